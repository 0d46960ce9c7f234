"""Transcribe a recording with Whisper or a like model, in float and in int8.

    python examples/speech.py openai/whisper-tiny recording.wav

The recording is a WAV file with 16-bit samples, at the sampling rate of the model (16 kHz for Whisper).
"""

import argparse
import wave

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer

from mono_quant_hf import MonoQuantConfig


def read_wav(file: str, rate: int) -> np.ndarray:
    """The first channel, float32 from -1 to 1."""
    with wave.open(file) as sound:
        if sound.getsampwidth() != 2 or sound.getframerate() != rate:
            raise SystemExit(f"{file} must hold 16-bit samples at {rate} Hz; convert it first.")
        samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype=np.int16)
        return samples[:: sound.getnchannels()].astype(np.float32) / 32768


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name of a float speech model")
    parser.add_argument("recording", help="a WAV file")
    arguments = parser.parse_args()

    extractor = AutoFeatureExtractor.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sound = read_wav(arguments.recording, extractor.sampling_rate)
    inputs = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    for name, config in (("float32", None), ("int8", MonoQuantConfig())):
        model = AutoModelForSpeechSeq2Seq.from_pretrained(
            arguments.model, dtype=torch.float32, quantization_config=config
        )
        tokens = model.generate(**inputs, max_new_tokens=16)
        text = tokenizer.decode(tokens[0], skip_special_tokens=True)
        print(f"{name} ({model.get_memory_footprint() / 1e6:.2f} MB): {text}")


if __name__ == "__main__":
    main()

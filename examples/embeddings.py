"""Sentence embeddings in int8: how close they are to those of the float model.

python examples/embeddings.py sentence-transformers/all-MiniLM-L6-v2 "A cat sat." "A dog ran."
"""

import argparse

import torch
from transformers import AutoModel, AutoTokenizer

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.evaluation import compare_encoders, text_embeddings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name of a float text encoder")
    parser.add_argument("sentences", nargs="+")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32)
    expected, before = text_embeddings(model, tokenizer, arguments.sentences), model.get_memory_footprint()
    model = AutoModel.from_pretrained(
        arguments.model, dtype=torch.float32, quantization_config=MonoQuantConfig()
    )
    result = compare_encoders(expected, model, tokenizer, arguments.sentences)
    print(f"in memory: {before / 1e6:.2f} MB -> {model.get_memory_footprint() / 1e6:.2f} MB")
    print(f"cosine with the float embeddings: mean {result.cosine_mean:.6f}, lowest {result.cosine_min:.6f}")


if __name__ == "__main__":
    main()

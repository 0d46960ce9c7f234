"""Quantize a language model and write it as compressed-tensors, the format that vLLM reads.

    python examples/export_vllm.py ./model ./model-int8 ./model-vllm
    vllm serve ./model-vllm

vLLM reads symmetric codes, so that is how the model is quantized; it is not needed to run this.
"""

import argparse

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.hub import export, quantize_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name of a float model")
    parser.add_argument("quantized", help="new folder for the quantized model")
    parser.add_argument("exported", help="new folder for the export")
    arguments = parser.parse_args()

    quantize_checkpoint(arguments.model, arguments.quantized, MonoQuantConfig(symmetric=True))
    export(arguments.quantized, arguments.exported, "compressed-tensors")
    print(f"{arguments.exported}: ready for `vllm serve {arguments.exported}`")


if __name__ == "__main__":
    main()

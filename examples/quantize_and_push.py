"""Quantize a model while it loads, save it, check it, and push it to the Hub where a name is given.

python examples/quantize_and_push.py org/model ./model-int8
python examples/quantize_and_push.py ./model ./model-int8 --push me/model-int8
"""

import argparse

from mono_quant_hf import MonoQuantConfig, push_to_hub
from mono_quant_hf.hub import quantize_checkpoint, verify_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name of a float model")
    parser.add_argument("output", help="new folder for the quantized one")
    parser.add_argument("--push", metavar="REPO", help="push it under this name on the Hub")
    arguments = parser.parse_args()

    # Weights, tokenizer or processor, and a model card.
    quantize_checkpoint(arguments.model, arguments.output, MonoQuantConfig())
    found = verify_checkpoint(arguments.output, arguments.model)
    verdict = "nothing is wrong" if found.ok else "; ".join(flaw.message for flaw in found.flaws)
    print(f"{len(found.weights)} weights, the lowest SQNR {found.weights[0].sqnr:.1f} dB: {verdict}")
    if arguments.push:
        print(push_to_hub(arguments.output, arguments.push).commit_url)


if __name__ == "__main__":
    main()

"""`python -m mono_quant_hf` is the command `mono-quant-hf`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""Starts `mono-quant-hf`: Ctrl-C while torch is imported ends it quietly, a version that is refused is one line.

Installed as the module `mono_quant_hf_launch` of its own, for importing a module of the package imports all that.
"""

import os
import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command; what the process exits with."""
    try:
        from mono_quant_hf.cli.main import main as command
    except KeyboardInterrupt:
        print("mono-quant-hf: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ImportError as problem:  # such as a version that the package was not made for
        if os.environ.get("MONO_QUANT_HF_TRACEBACK"):
            raise
        print(f"mono-quant-hf: error: {problem}", file=sys.stderr)
        return 2
    return command()

"""Starts `mono-quant-hf`, and ends it quietly where Ctrl-C comes while torch and transformers are still being imported.

Installed as the module `mono_quant_hf_launch` of its own, for importing a module of the package imports all that.
"""

import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command; what the process exits with."""
    try:
        from mono_quant_hf.cli.main import main as command
    except KeyboardInterrupt:
        print("mono-quant-hf: interrupted", file=sys.stderr)
        return INTERRUPTED
    return command()

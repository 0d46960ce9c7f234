"""The command `mono-quant-hf`; its entry is `main.main`."""

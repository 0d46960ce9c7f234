"""Plugins of engines that serve checkpoints of this package as they are; each is imported by its engine alone."""


def register() -> None:
    """Tell vLLM of `"quant_method": "mono_quant"`: the entry point in the group `vllm.general_plugins`."""
    from . import vllm_config  # noqa: F401  registers itself as it is imported, once in a process

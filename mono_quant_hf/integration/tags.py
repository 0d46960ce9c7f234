"""The tags that a quantized model carries to the Hub, also with a plain `model.push_to_hub`."""

from transformers import PreTrainedModel

from mono_quant_hf.config import MonoQuantConfig

_TAGS = {"int8": ["mono-quant", "int8", "8-bit"], "float16": ["mono-quant", "fp16"]}


def tags_of(config: MonoQuantConfig) -> list[str]:
    """The tags of a model quantized with `config`.

    Example:
        >>> tags_of(MonoQuantConfig()), tags_of(MonoQuantConfig(weights="float16"))
        (['mono-quant', 'int8', '8-bit'], ['mono-quant', 'fp16'])
    """
    return list(_TAGS[config.weights])


def add_tags(model: PreTrainedModel, config: MonoQuantConfig) -> None:
    """Give the model the tags of its config."""
    model.add_model_tags(tags_of(config))


def remove_tags(model: PreTrainedModel, config: MonoQuantConfig) -> None:
    """Take them away again, from a model that is float now."""
    if model.model_tags:
        model.model_tags = [tag for tag in model.model_tags if tag not in tags_of(config)]

"""Names that settings may have, for who must not wait for transformers to be imported."""

QUANT_METHOD = "mono_quant"
WEIGHT_TYPES = ("int8", "float16")
ACTIVATION_TYPES = ("int8",)
OVERRIDE_WEIGHT_TYPES = (*WEIGHT_TYPES, "float")
OF_ONE_SAVE = ("checksums", "format_version")
"""Fields of a config that are no settings."""
DTYPES = ("float32", "bfloat16", "float16")
"""Of what is not quantized, as torch calls them."""
EXPORT_FORMATS = ("compressed-tensors", "bitsandbytes", "gguf", "onnx")

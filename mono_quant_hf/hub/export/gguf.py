"""GGUF, the format of llama.cpp, with Q8_0 weights: blocks of 32 codes in a row with a float16 scale each.

Of symmetric int8 weights the codes are kept, and every block of a row gets the row's scale, rounded to float16. What
that costs is at most 2^-11 of a weight, a small part of the half step that rounding to codes costs.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mono_quant_hf.core.quantizers import dequantize_codes
from mono_quant_hf.files import file_written_aside
from mono_quant_hf.hub.checkpoint import making
from mono_quant_hf.hub.errors import HubError
from mono_quant_hf.hub.folders import check_not_read
from mono_quant_hf.json_files import read_json
from mono_quant_hf.modules import QuantizedModule
from mono_quant_hf.versions import require

from .exporter import Exporter

logger = logging.getLogger("mono_quant_hf")

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
}
"""`model_type` of transformers to the architecture's name in `gguf.MODEL_ARCH`."""
_ROTATED_IN_PAIRS = ("LLAMA",)
"""Architectures for which llama.cpp rotates neighbours, so that the rows of queries and keys are reordered."""
QUANTIZED_BY = "mono_quant_hf"
BLOCK = 32
LARGEST_SCALE_ERROR = 2.0**-10
"""Relative; float16 is worse only for scales below 2^-14, in its subnormal range."""

Stored = tuple[Tensor, Tensor | None, Tensor | None]
"""Codes, scale and zero-point; or a float tensor alone."""


class GgufExporter(Exporter):
    """Writes one file; the tokenizer too, if it is a byte-level BPE, as of Llama 3, Qwen and SmolLM."""

    def check_destination(self) -> None:
        gguf = require("gguf", "Writing GGUF")
        target = Path(self.destination)
        if target.suffix != ".gguf":
            raise HubError(f"{target} is no name for a GGUF file; give one that ends in .gguf.")
        check_not_read(target, self.model)
        if os.path.lexists(target) and not self.overwrite:
            raise HubError(
                f"{target} is there already; name a new file, or allow it to be replaced (--overwrite)."
            )
        if os.path.lexists(target) and not _is_ours(target, gguf):
            raise HubError(
                f"{target} is no GGUF file that mono_quant_hf wrote, and is not replaced; name another, or remove it "
                "yourself."
            )

    def write(self) -> None:
        gguf, config = require("gguf", "Writing GGUF"), self.model.config
        name = ARCHITECTURES.get(config.model_type)
        if name is None or not type(self.model).__name__.endswith("ForCausalLM"):
            raise HubError(
                f"{type(self.model).__name__} cannot be written as GGUF; causal models of type "
                f"{', '.join(ARCHITECTURES)} can."
            )
        rope: Any = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") != "default":
            raise HubError(
                f"The model has rotary embeddings of type {rope['rope_type']!r}, which this export cannot write; "
                "export to compressed-tensors instead."
            )
        if not getattr(config, "norm_topk_prob", True):
            raise HubError(
                "The shares of the experts are not normalized (norm_topk_prob=False), which llama.cpp always does; "
                "serve the model with transformers and mono_quant_hf."
            )
        what = "its files hold what cannot be written as GGUF"
        strange = making(self.source, what) if self.source else nullcontext()
        with strange, file_written_aside(self.destination) as file:
            writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[name]])
            self._add_config(writer, config, rope)
            tokenizer = self.source
            if self.tokenizer is not None:
                tokenizer = file.parent / "tokenizer"
                self.tokenizer.save_pretrained(tokenizer)
            if tokenizer is None or not _add_tokenizer(writer, tokenizer, config):
                writer.add_tokenizer_model("none")
            self._add_tensors(writer, name)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            try:
                writer.write_tensors_to_file()
            except OSError as problem:
                if problem.errno is not None:
                    raise
                # NumPy's, which does not say why a write was cut short
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {problem}", str(file)) from problem
            writer.close()

    def _add_config(self, writer: Any, config: Any, rope: dict[str, Any]) -> None:
        import gguf

        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_name(Path(self.destination).stem)
        writer.add_quantized_by(QUANTIZED_BY)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if experts := getattr(config, "num_experts", None):
            writer.add_expert_count(experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)

    def _add_tensors(self, writer: Any, architecture: str) -> None:
        import gguf

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], self.model.config.num_hidden_layers)
        rounded_again = []
        for key, stored in self._tensors():
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise HubError(f"{key} has no name in GGUF, so the model cannot be written.")
            heads = _heads_to_reorder(key, self.model.config) if architecture in _ROTATED_IN_PAIRS else None
            codes, scale, zero_point = (None if t is None else _reordered(t.detach(), heads) for t in stored)
            assert codes is not None
            if scale is None or codes.shape[-1] % BLOCK:
                array, kind = _float(codes if scale is None else dequantize_codes(codes, scale, zero_point))
            elif zero_point is not None:
                floats = dequantize_codes(codes, scale, zero_point).cpu().numpy()
                array, kind = gguf.quants.quantize(floats, gguf.GGMLQuantizationType.Q8_0), "Q8_0"
                rounded_again.append(key.removesuffix(".weight"))
            elif _fits_float16(codes, scale):
                array, kind = q8_0(codes, scale.half()), "Q8_0"
            else:
                array, kind = _float(dequantize_codes(codes, scale))
            raw = None if kind is None else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, array, raw_dtype=raw)
        if rounded_again:
            logger.warning(
                "%d modules, such as %s, have zero-points, for which Q8_0 has no place: their weights were rounded "
                "once more, in blocks of %d. Quantize with MonoQuantConfig(symmetric=True) to keep the codes.",
                len(rounded_again),
                rounded_again[0],
                BLOCK,
            )

    def _tensors(self) -> Iterator[tuple[str, Stored]]:
        """What is to be written, by the names that the float model would have, of experts those of stacked weights."""
        modules = dict(self.model.named_modules())
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        for key, tensor in self.model.state_dict().items():
            owner, _, parameter = key.rpartition(".")
            of_float = not isinstance(modules[owner], QuantizedModule) or parameter == "bias"
            if not of_float or key in tied or key.endswith("rotary_emb.inv_freq"):
                continue
            yield from _taken_apart(key, (tensor, None, None))
        for name, module in modules.items():
            if isinstance(module, QuantizedModule):
                for weight in module.weight_axes:
                    if f"{name}.{weight}_{module.quantization.weights}" not in tied:
                        yield from _taken_apart(f"{name}.{weight}", module.stored(weight))


def _taken_apart(key: str, stored: Stored) -> Iterator[tuple[str, Stored]]:
    """Gate and up of experts, which are one tensor [experts, gate and up, in] in the model, as two."""
    if key.endswith(".gate_up_proj"):
        for place, part in enumerate(("gate_proj", "up_proj")):
            halves: Any = tuple(None if t is None else t.chunk(2, dim=1)[place] for t in stored)
            yield f"{key.removesuffix('gate_up_proj')}{part}.weight", halves
    else:
        yield key if key.endswith((".weight", ".bias")) else f"{key}.weight", stored


def _is_ours(file: Path, gguf: Any) -> bool:
    """Whether this package wrote a GGUF file."""
    if file.is_symlink() or not file.is_file():
        return False
    try:
        written_by = gguf.GGUFReader(file).get_field("general.quantized_by")
    except (ValueError, IndexError, KeyError):  # it is no GGUF, or damaged
        return False
    return written_by is not None and written_by.contents() == QUANTIZED_BY


def _fits_float16(codes: Tensor, scale: Tensor) -> bool:
    """Whether float16 holds the scales well enough; rows of zeros need none."""
    error = ((scale.half().float() - scale).abs() / scale)[codes.bool().any(dim=-1)]
    return not bool((error > LARGEST_SCALE_ERROR).any())


def q8_0(codes: Tensor, scale: Tensor) -> np.ndarray:
    """Q8_0 of int8 codes [..., out, in] with float16 scales [..., out, 1]: uint8 [..., out, in / 32 * 34].

    Example:
        >>> q8_0(torch.ones(1, 32, dtype=torch.int8), torch.tensor([[0.5]]).half())[0, :4].tolist()
        [0, 56, 1, 1]
    """
    *rows, columns = codes.shape
    blocks = codes.cpu().reshape(*rows, columns // BLOCK, BLOCK).contiguous().numpy().view(np.uint8)
    scales = scale.cpu()[..., None].expand(*rows, columns // BLOCK, 1).contiguous().numpy().view(np.uint8)
    return np.concatenate([scales, blocks], axis=-1).reshape(*rows, -1)


def _float(tensor: Tensor) -> tuple[np.ndarray, str | None]:
    """Norms and biases in float32, as llama.cpp wants them; all else in its own dtype."""
    tensor = tensor.cpu().contiguous()
    if tensor.dim() > 1 and tensor.dtype is torch.float16:
        return tensor.numpy(), None
    if tensor.dim() > 1 and tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint8).numpy(), "BF16"
    return tensor.float().numpy(), None


def _heads_to_reorder(key: str, config: Any) -> int | None:
    if ".q_proj." in key:
        return int(config.num_attention_heads)
    if ".k_proj." in key:
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return None


def _reordered(tensor: Tensor, heads: int | None) -> Tensor:
    """Rows of each head from halves (first all even, then all odd) to neighbours, which llama.cpp rotates."""
    if heads is None:
        return tensor
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: Any, folder: Path, config: Any) -> bool:
    """Whether there is a tokenizer that could be added."""
    import gguf

    file = folder / "tokenizer.json"
    data = read_json(file) if file.is_file() else {}
    model = data.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE" or "ByteLevel" not in json.dumps(data.get("pre_tokenizer")):
        logger.warning(
            "The tokenizer in %s is no byte-level BPE, so it is not in the GGUF file; keep its files beside it.",
            folder,
        )
        return False
    tokens = [f"[PAD{n}]" for n in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, number in data["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in data.get("added_tokens", []):
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(data, config.model_type))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size).add_to_gguf(writer, quiet=True)
    return True


def _pre_tokenizer(data: dict[str, Any], model_type: str) -> str:
    """llama.cpp's name of the way in which a text is split before the merges."""
    steps = json.dumps(data.get("pre_tokenizer"))
    if model_type.startswith("qwen"):
        return "qwen2"
    if '"Digits"' in steps and '"individual_digits": true' in steps:
        return "smollm"
    if "{1,3}" in steps:
        return "llama-bpe"
    if '"Split"' not in steps and '"use_regex": true' in steps:
        return "gpt-2"
    logger.warning("llama.cpp's name of this tokenizer's pre-tokenizer is not known; 'default' is written.")
    return "default"

"""The table that compares with other libraries, in the README of the integration: its plain words are what this finds.

A cell with a link has its source behind the link, and a `?` is what nobody has tried.
"""

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.hub import export
from mono_quant_hf.kernels import use_kernel
from tests.integration.families import FAMILIES
from tests.peers import PEERS, bytes_per_value, stored_bytes
from tests.tiny_models import TOKENS, logits, relative_error

FOLDER = Path(__file__).parents[1] / "mono_quant_hf" / "integration"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
}
pytestmark = pytest.mark.filterwarnings("ignore")  # what the others warn of is theirs
REFUSALS = (ValueError, NotImplementedError)
"""What the libraries and transformers raise for what they do not do; any other error fails the test."""


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def moe():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).eval()


WHISPER = next(family for family in FAMILIES if family.name == "Whisper")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    llama(tied=False).save_pretrained(folder / "llama")
    llama(tied=True).save_pretrained(folder / "tied")
    moe().save_pretrained(folder / "moe")
    WHISPER.make().save_pretrained(folder / "whisper")
    # compressed-tensors loads what others made
    quantize_model(llama(tied=False), MonoQuantConfig(symmetric=True)).save_pretrained(folder / "symmetric")
    return folder


def load(name, folder, config=None, **more):
    """A model quantized by the library; for compressed-tensors one of its finished checkpoints."""
    if name != "compressed-tensors":
        config = config or PEERS[name].int8()
        return LlamaForCausalLM.from_pretrained(folder / "llama", quantization_config=config, **more).eval()
    return LlamaForCausalLM.from_pretrained(exported(folder), **more).eval()


def exported(folder, activations=None):
    to = folder / f"compressed-tensors-{activations}"
    if not to.exists():
        more = {"activations": activations} if activations else {}
        export(folder / "symmetric", to, "compressed-tensors", **more)
    return to


def projections(model):
    return [m for n, m in model.named_modules() if n.endswith("_proj") and hasattr(m, "in_features")]


def is_int8(model):
    """Whether the 14 projections of a Llama of two layers take a byte a value, and a scale for each row."""
    modules = projections(model)
    assert len(modules) == 14
    return all(hasattr(m, "weight") and bytes_per_value(m) < 1.3 for m in modules)


def yes(condition):
    return "yes" if condition else "no"


def on_the_fly(name, folder, tmp_path):
    if name == "HQQ":  # hqq itself warns of what torch takes away as it is imported, which is an error here
        return yes(HqqHfQuantizer.get_quantize_ops is not HfQuantizer.get_quantize_ops)
    config = PEERS[name].int8()
    try:
        model = LlamaForCausalLM.from_pretrained(folder / "llama", quantization_config=config)
    except REFUSALS:
        return "no"
    return yes(is_int8(model))


def stays_int8(name, folder, tmp_path):
    model = load(name, folder)
    logits(model)
    return yes(is_int8(model))


def reload(name, folder, tmp_path):
    model = load(name, folder)
    expected = logits(model)
    try:
        model.save_pretrained(tmp_path)
    except REFUSALS:
        return "no"
    return yes(torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), expected))


def reload_from_disk(name, folder, tmp_path):
    model = load(name, folder)
    expected = logits(model)
    try:
        model.save_pretrained(tmp_path / "saved")
        split = LlamaForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=SPLIT, offload_folder=str(tmp_path)
        )
    except REFUSALS:
        return "no"
    return yes(torch.equal(logits(split.eval()), expected))


def quantize_to_disk(name, folder, tmp_path):
    try:
        split = LlamaForCausalLM.from_pretrained(
            folder / "llama",
            quantization_config=PEERS[name].int8(),
            device_map=SPLIT,
            offload_folder=str(tmp_path),
        )
    except REFUSALS:
        return "no"
    return yes(torch.equal(logits(split.eval()), logits(load(name, folder))))


def convolutions(name, folder, tmp_path):
    config = PEERS[name].int8()
    model = WHISPER.model_class.from_pretrained(folder / "whisper", quantization_config=config)
    first = model.model.encoder.conv1
    assert isinstance(first, nn.Conv1d)
    return yes(stored_bytes(first.weight) == first.weight.numel())


def embeddings(name, folder, tmp_path):
    config = (PEERS[name].embeddings or PEERS[name].int8)()
    model = LlamaForCausalLM.from_pretrained(folder / "tied", quantization_config=config).eval()
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert table is head or table.data_ptr() == head.data_ptr()  # tied before and after
    if stored_bytes(table) > 1.5 * table.numel():
        return "no"
    expected = logits(model)
    model.save_pretrained(tmp_path)
    try:
        again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    except REFUSALS:
        return "partly"  # it computes, and cannot be loaded again
    return yes(torch.equal(logits(again), expected))


def experts(name, folder, tmp_path):
    config = (PEERS[name].experts or PEERS[name].int8)()
    model = Qwen3MoeForCausalLM.from_pretrained(folder / "moe", quantization_config=config).eval()
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    if stored_bytes(weight) > 1.3 * weight.numel():
        return "no"
    try:
        logits(model)
    except REFUSALS:
        model.set_experts_implementation("eager")
        logits(model)
        return "partly"  # not with the implementation that transformers chooses
    return "yes"


def one_graph(name, folder, tmp_path):
    model = load(name, folder)
    torch.compiler.reset()
    try:
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="eager")(TOKENS).logits
    except torch._dynamo.exc.Unsupported:
        return "no"
    return yes(relative_error(compiled, logits(model)) < 1e-4)


def lora(name, folder, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = load(name, folder)
    before = all(hasattr(module, "weight") for module in projections(base))
    without = logits(base)
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    if not all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_" in n):
        return "no"
    expected = logits(model.eval())
    assert relative_error(without, expected) > 0.3
    merged = relative_error(logits(model.merge_and_unload()), expected) < 0.1
    return "yes" if merged and before else "partly"  # `before`: PEFT finds no weight until the model has run


def fewer_bits(name, folder, tmp_path):
    if PEERS[name].fewer_bits is None:
        return yes(False) if name == "mono_quant_hf" else pytest.fail("needs a source in place of a test")
    model = load(name, folder, PEERS[name].fewer_bits())
    logits(model)
    return yes(all(bytes_per_value(module) < 0.8 for module in projections(model)))


def int8_activations(name, folder, tmp_path):
    """Whether the output differs from that of the same codes without rounded activations."""
    if name == "compressed-tensors":
        rounded = LlamaForCausalLM.from_pretrained(exported(folder, "int8")).eval()
        exact = load(name, folder)
    elif name == "bitsandbytes":
        rounded, exact = load(name, folder), load(name, folder).dequantize()
    else:
        try:
            rounded = load(name, folder, PEERS[name].int8_activations())
        except REFUSALS:
            return "no"
        exact = load(name, folder)
    with use_kernel("int8") if name == "mono_quant_hf" else torch.no_grad():
        found = logits(rounded)
    return yes(0 < relative_error(found, logits(exact)) < 0.2)


def dequantize(name, folder, tmp_path):
    model = load(name, folder)
    quantized = logits(model)
    try:
        floats = model.dequantize()
    except REFUSALS:
        return "no"
    assert all(type(module) is nn.Linear for module in projections(floats))
    return yes(relative_error(logits(floats), quantized) < 0.2)


def in_diffusers(name, folder, tmp_path):
    auto = pytest.importorskip("diffusers.quantizers.auto")
    method = {"mono_quant_hf": "mono_quant", "optimum-quanto": "quanto"}.get(name, name.lower())
    return yes(any(known.startswith(method) for known in auto.AUTO_QUANTIZATION_CONFIG_MAPPING))


ROWS = {
    "Quantizes as it loads, without data": on_the_fly,
    "int8 in memory after the first call, too": stays_int8,
    "Saved and reloaded: the same logits": reload,
    "Layers on disk, reloading": reload_from_disk,
    "Layers on disk, quantizing": quantize_to_disk,
    "Convolutions": convolutions,
    "Embedding and the head tied to it": embeddings,
    "Fused experts": experts,
    "One graph for `torch.compile`": one_graph,
    "LoRA with PEFT: trains and merges": lora,
    "Fewer than 8 bits": fewer_bits,
    "int8 activations": int8_activations,
    "`dequantize()`": dequantize,
    "`from_pretrained` of diffusers": in_diffusers,
}
TABLE = re.search(r"^\| +\| mono_quant_hf \|.*\n\| ---.*\n((?:\|.*\n)+)", README, flags=re.M)
CELLS = {
    (row, name): cell
    for line in (TABLE[1] if TABLE else "").splitlines()
    for row, *cells in [[part.strip() for part in line.strip("| ").split(" | ")]]
    for name, cell in zip(PEERS, cells, strict=True)
}
PLAIN = [key for key, cell in CELLS.items() if cell in ("yes", "no", "partly")]


def test_every_other_cell_has_a_source_or_is_open():
    assert set(ROWS) <= {row for row, _ in CELLS} and {row for row, _ in PLAIN} == set(ROWS)
    sources = dict(re.findall(r"^\[([\w-]+)\]: (https://\S+)$", README, flags=re.M))
    for key, cell in CELLS.items():
        link = re.fullmatch(r"\[[\w -]+\](?:\[([\w-]+)\]|\([\w./]+\))", cell)
        assert key in PLAIN or cell == "?" or link, (key, cell)
        assert not (link and link[1]) or link[1] in sources, (key, cell)


@pytest.mark.parametrize(("row", "name"), PLAIN, ids=[" - ".join(key) for key in PLAIN])
def test_a_plain_word_is_what_is_found(row, name, folder, tmp_path):
    PEERS[name].skip_if_missing()
    assert ROWS[row](name, folder, tmp_path) == CELLS[row, name]
    gc.collect()

"""Wherever accelerate puts the modules, the logits are the same, bit for bit."""

import accelerate
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from mono_quant_hf import MonoQuantConfig
from mono_quant_hf.modules import QuantizedModule
from tests import tiny_models
from tests.tiny_models import logits

from .families import FAMILIES
from .measure import outputs

CONFIGS = {
    "int8": MonoQuantConfig(),
    "int8 symmetric": MonoQuantConfig(symmetric=True),
    "float16": MonoQuantConfig(weights="float16"),
}
AUTO_CLASSES = {
    "llama": AutoModelForCausalLM,
    "tied": AutoModelForCausalLM,
    "resnet": AutoModelForImageClassification,
}
MODELS = {
    "llama": tiny_models.llama,
    "tied": lambda: tiny_models.llama(tied=True),
    "resnet": tiny_models.resnet,
}
LLAMA_PARTS = [
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
]


LAYER_PARTS = ["self_attn", "mlp.gate_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]


def llama_map(*on_disk: str) -> dict[str, str]:
    return {part: "disk" if on_disk and part.startswith(on_disk) else "cpu" for part in LLAMA_PARTS}


def one_linear_on_disk() -> dict[str, str]:
    device_map = llama_map() | {f"model.layers.0.{part}": "cpu" for part in LAYER_PARTS}
    del device_map["model.layers.0"]
    return device_map | {"model.layers.0.mlp.up_proj": "disk"}


LLAMA_PLACEMENTS = {
    "cpu": "cpu",
    "auto": "auto",
    "balanced": "balanced",
    "sequential": "sequential",
    "by hand": {"": "cpu"},
    "one layer on disk": llama_map("model.layers.0"),
    "a linear on disk": one_linear_on_disk(),
    "all layers on disk": llama_map("model.layers"),
    "embedding on disk": llama_map("model.embed_tokens"),
    "head on disk": llama_map("lm_head"),
    "all on disk": {"": "disk"},
}
PLACEMENTS = {
    "llama": LLAMA_PLACEMENTS,
    "tied": {key: LLAMA_PLACEMENTS[key] for key in ("embedding on disk", "head on disk", "all on disk")},
    "resnet": {
        "auto": "auto",
        "stem on disk": {
            "resnet.embedder": "disk",
            "resnet.encoder": "cpu",
            "resnet.pooler": "cpu",
            "classifier": "cpu",
        },
        "stages on disk": {
            "resnet.embedder": "cpu",
            "resnet.encoder": "disk",
            "resnet.pooler": "cpu",
            "classifier": "cpu",
        },
        "all on disk": {"": "disk"},
    },
}
CASES = [(model, placement) for model, placements in PLACEMENTS.items() for placement in placements]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`{(model, config, kind): folder}` of float and quantized checkpoints, in one file and sharded."""
    made = {}
    for name, make in MODELS.items():
        for shards in ("one file", "sharded"):
            size = {"max_shard_size": "20KB"} if shards == "sharded" else {}
            source = tmp_path_factory.mktemp("float")
            make().save_pretrained(source, **size)
            for config_name, config in CONFIGS.items():
                made[name, config_name, f"float, {shards}"] = source
                quantized = tmp_path_factory.mktemp("quantized")
                model = AUTO_CLASSES[name].from_pretrained(source, quantization_config=config)
                model.save_pretrained(quantized, **size)
                made[name, config_name, f"quantized, {shards}"] = quantized
    return made


@pytest.fixture(scope="module")
def expected(folders):
    return {
        (name, config): logits(
            AUTO_CLASSES[name].from_pretrained(folders[name, config, "quantized, one file"])
        )
        for name in MODELS
        for config in CONFIGS
    }


whole_on_disk = pytest.mark.xfail(
    Version(accelerate.__version__) < Version("1.15"),
    raises=ValueError,
    strict=False,
    reason="accelerate before 1.15 refuses to put a whole model on disk",
)


def load(folders, name, config, kind, **kwargs):
    extra = {"quantization_config": CONFIGS[config]} if kind.startswith("float") else {}
    return AUTO_CLASSES[name].from_pretrained(folders[name, config, kind], **extra, **kwargs)


@pytest.mark.parametrize(
    "kind", ["float, one file", "float, sharded", "quantized, one file", "quantized, sharded"]
)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("name", "placement"), CASES)
@whole_on_disk
def test_every_placement_gives_the_same_logits(name, placement, config, kind, folders, expected, tmp_path):
    device_map = PLACEMENTS[name][placement]
    model = load(folders, name, config, kind, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), expected[name, config])
    assert torch.equal(logits(model), expected[name, config])  # and again: offloading puts back what it took
    if "disk" in placement and name != "tied":
        assert any(parameter.is_meta for parameter in model.parameters())

    # Saving from there writes the complete checkpoint, bit for bit.
    model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    reloaded = AUTO_CLASSES[name].from_pretrained(tmp_path / "again")
    assert torch.equal(logits(reloaded), expected[name, config])
    original = AUTO_CLASSES[name].from_pretrained(folders[name, config, "quantized, one file"]).state_dict()
    assert reloaded.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[key]) for key, tensor in reloaded.state_dict().items())


# In float too: their code reads a parameter without calling its module, and finds it without a value.
NOT_FROM_DISK = ("Llama 4", "DeBERTa-v2", "SigLIP", "DETR")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in NOT_FROM_DISK], ids=lambda f: f.name)
@whole_on_disk
def test_every_family_runs_from_disk(family, tmp_path):
    family.make().save_pretrained(tmp_path / "float")
    in_memory = family.model_class.from_pretrained(tmp_path / "float", quantization_config=MonoQuantConfig())
    in_memory.save_pretrained(tmp_path / "quantized")
    wanted = outputs(in_memory, family.inputs)
    place = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    for source, config in (("float", {"quantization_config": MonoQuantConfig()}), ("quantized", {})):
        model = family.model_class.from_pretrained(tmp_path / source, **config, **place)
        assert all(parameter.is_meta for parameter in model.parameters())
        model.save_pretrained(tmp_path / "again")
        for found in (model, family.model_class.from_pretrained(tmp_path / "again")):
            pairs = zip(outputs(found, family.inputs), wanted, strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


@whole_on_disk
def test_a_map_that_splits_tied_weights_is_said_and_left_alone(folders, caplog, tmp_path):
    device_map = llama_map("model.embed_tokens")
    before = dict(device_map)
    load(folders, "tied", "int8", "float, one file", device_map=device_map, offload_folder=tmp_path)
    assert "model.embed_tokens shares its weight with lm_head and is put beside it, on cpu" in caplog.text
    assert device_map == before
    nested = {"model": "disk", "lm_head": "cpu"}
    load(folders, "tied", "int8", "float, one file", device_map=nested, offload_folder=tmp_path)
    assert "lm_head shares its weight with model.embed_tokens and is put beside it, on disk" in caplog.text


@pytest.mark.parametrize("kind", ["float, one file", "quantized, sharded"])
@pytest.mark.parametrize("config", CONFIGS)
def test_max_memory_is_planned_with_the_true_sizes(config, kind, folders, expected, tmp_path):
    whole = load(folders, "llama", config, kind)
    size = whole.get_memory_footprint()
    float_size = tiny_models.llama().get_memory_footprint()
    assert size < 0.75 * float_size
    fits = load(folders, "llama", config, kind, device_map="auto", max_memory={"cpu": int(size * 1.02)})
    assert "disk" not in getattr(fits, "hf_device_map", {"": "cpu"}).values()
    model = load(
        folders,
        "llama",
        config,
        kind,
        device_map="auto",
        max_memory={"cpu": int(size * 0.8)},
        offload_folder=tmp_path / "offload",
    )
    in_memory = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    assert "disk" in model.hf_device_map.values() and in_memory <= int(size * 0.8)
    assert torch.equal(logits(model), expected["llama", config])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_accelerates_own_functions(how, name, config, folders, expected, tmp_path):
    model = load(folders, name, config, "quantized, one file")
    if how == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk_offload":
        disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    else:
        first = "model.layers" if name != "resnet" else "resnet.encoder"
        rest = {child: "cpu" for child, _ in model.named_children()}
        inner = {f"{p}.{child}": "cpu" for p, m in model.named_children() for child, _ in m.named_children()}
        device_map = {
            **{k: v for k, v in rest.items() if not any(i.startswith(f"{k}.") for i in inner)},
            **inner,
        }
        dispatch_model(
            model, {**device_map, first: "disk"}, main_device="cpu", offload_dir=tmp_path / "offload"
        )
    quantized = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    assert quantized and any(m.weight.is_meta for m in quantized)
    assert torch.equal(logits(model), expected[name, config])
    assert any(m.weight.is_meta for m in quantized)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_meta_device_has_the_sizes_of_the_format(config, folders):
    model = load(folders, "llama", config, "quantized, one file")
    empty = load(folders, "llama", config, "quantized, one file").to("meta")
    assert empty.get_memory_footprint() == model.get_memory_footprint()
    assert {p.dtype for p in empty.parameters()} == {p.dtype for p in model.parameters()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", CONFIGS)
def test_layers_between_a_gpu_and_the_cpu(config, folders, tmp_path):
    on_gpu = load(folders, "llama", config, "quantized, one file", device_map={"": 0})
    split = {part: 0 for part in LLAMA_PARTS} | {"model.layers.1": "cpu"}
    model = load(folders, "llama", config, "float, one file", device_map=split)
    with torch.no_grad():
        tokens = tiny_models.TOKENS.to("cuda:0")
        assert torch.equal(model(tokens).logits, on_gpu(tokens).logits)

"""ONNX files, run by ONNX Runtime."""

import sys

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.cli.main import main
from mono_quant_hf.hub import HubError, export
from tests import tiny_models

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator

MODELS = {
    "llama": tiny_models.llama,
    "bert": tiny_models.bert,
    "resnet": tiny_models.resnet,
    "vit": tiny_models.vit,
}
SETTINGS = {
    "asymmetric": {"quantize_embeddings": True},
    "symmetric": {"symmetric": True, "quantize_embeddings": True},
    "float16": {"weights": "float16"},
}
# What torch and ONNX Runtime write while they are at work.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def inputs_of(model, batch=3, length=5):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 32, 32)}
    tokens = torch.randint(3, 60, (batch, length))
    mask = torch.ones_like(tokens)
    mask[0, 3:] = 0
    more = {"token_type_ids": torch.zeros_like(tokens)} if model.config.model_type == "bert" else {}
    return {"input_ids": tokens, "attention_mask": mask, **more}


def run(folder, inputs):
    """The first output, computed in float32: ONNX Runtime rounds activations to int8 where it sees int8 weights."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def relative_error(got, exact):
    return float((got - exact).norm() / exact.norm())


def expected(model, inputs):
    with torch.no_grad():
        return model(**inputs, **({"use_cache": False} if "llama" in model.config.model_type else {})).logits


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", "asymmetric"), ("llama", "float16"), ("bert", "asymmetric"), ("bert", "symmetric"),
        ("resnet", "asymmetric"), ("resnet", "symmetric"), ("vit", "symmetric"),
    ],
)  # fmt: skip
def test_onnx_runtime_computes_what_the_model_does(tmp_path, name, settings):
    model = quantize_model(MODELS[name](), MonoQuantConfig(**SETTINGS[settings]))
    export(model, tmp_path / "onnx", "onnx")
    inputs = inputs_of(model)
    (first, *_) = onnx.load(tmp_path / "onnx" / "model.onnx").graph.input
    assert first.type.tensor_type.shape.dim[0].dim_param == "batch"
    got = run(tmp_path / "onnx", inputs)
    exact = expected(model.dequantize(), inputs)
    seen = inputs.get("attention_mask", torch.ones(1)).bool() if name == "llama" else ...
    assert relative_error(got[seen], exact[seen]) < 1e-4


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_weights_are_int8_with_a_scale_for_each_channel(tmp_path, name):
    model = quantize_model(MODELS[name]())
    export(model, tmp_path / "onnx", "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    dtypes = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    quantized = [module for module in model.modules() if hasattr(module, "quantization")]
    assert len(nodes) == len(quantized)
    for node in nodes:
        codes, scale, zero_point = (dtypes[name] for name in node.input)
        assert codes[0] == zero_point[0] == onnx.TensorProto.INT8 and scale[0] == onnx.TensorProto.FLOAT
        assert scale[1] == zero_point[1] == codes[1][:1]


def test_int8_activations_are_integer_products(tmp_path, caplog):
    model = quantize_model(tiny_models.bert())
    export(model, tmp_path / "onnx", "onnx", activations="int8")
    assert "without VNNI" in caplog.text
    nodes = {node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node}
    assert nodes >= {"MatMulInteger", "DynamicQuantizeLinear"} and "DequantizeLinear" not in nodes
    inputs = inputs_of(model)
    exactly = ReferenceEvaluator(str(tmp_path / "onnx" / "model.onnx"))  # ONNX Runtime may saturate
    (result,) = exactly.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert relative_error(torch.from_numpy(result), expected(model, inputs)) < 0.05


def test_from_a_folder_by_the_command(tmp_path):
    model = quantize_model(tiny_models.bert().bfloat16())
    model.save_pretrained(tmp_path / "int8")
    (tmp_path / "int8" / "vocab.txt").write_text("a\n")
    assert main(["export", str(tmp_path / "int8"), str(tmp_path / "onnx"), "--format", "onnx"]) == 0
    assert {"model.onnx", "config.json", "vocab.txt"} <= {file.name for file in (tmp_path / "onnx").iterdir()}
    assert "quantization_config" not in (tmp_path / "onnx" / "config.json").read_text()
    inputs = inputs_of(model)
    assert relative_error(run(tmp_path / "onnx", inputs), expected(model, inputs).float()) < 0.02


def test_the_model_stays_as_it_is(tmp_path):
    model = quantize_model(tiny_models.llama()).train()
    export(model, tmp_path / "onnx", "onnx")
    assert model.training and model.config.use_cache


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return quantize_model(T5ForConditionalGeneration(config).eval())


def test_other_models_are_exported_by_example_inputs(tmp_path):
    model = t5()
    inputs = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "decoder_input_ids": torch.ones(2, 3, dtype=torch.long),
    }
    export(model, tmp_path / "onnx", "onnx", inputs=inputs)
    other = {name: torch.randint(1, 60, (3, tensor.shape[1] + 2)) for name, tensor in inputs.items()}
    with torch.no_grad():
        exact = model(**other, use_cache=False).logits
    assert relative_error(run(tmp_path / "onnx", other), exact) < 1e-3


def test_what_cannot_be_exported_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(HubError, match=r"T5ForConditionalGeneration.*inputs="):
        export(t5(), tmp_path / "onnx", "onnx")
    with pytest.raises(HubError, match="not quantized by mono_quant_hf"):
        export(tiny_models.llama(), tmp_path / "onnx", "onnx")
    with pytest.raises(HubError, match="Expected activations"):
        export(quantize_model(tiny_models.llama()), tmp_path / "onnx", "onnx", activations="int4")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        export(quantize_model(tiny_models.llama()), tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()

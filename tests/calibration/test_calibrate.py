"""Calibrated rounding of whole models: smaller error on other samples, same format, resumable, reproducible."""

import copy

import pytest
import torch
from torch import nn
from transformers import Conv1D, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.calibration import Compensation, Sampling, calibration_batches, write_text
from mono_quant_hf.calibration.blocks import Blocks
from mono_quant_hf.modules import QuantizedModule
from tests import tiny_models
from tests.evaluation.conftest import TEXT, make_llama, make_tokenizer
from tests.tiny_models import relative_error


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def correlated(rows, inputs, seed):
    mixing = torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(7)) ** 3
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) @ mixing + 1


def codes_of(model):
    return {
        f"{name}.{key}": getattr(module, key)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for key in module.storage_names()
    }


def same_codes(a, b):
    a, b = codes_of(a), codes_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def output_error(model, quantized, x):
    return relative_error(quantized(x), model(x))


def test_linears_in_sequence():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), Conv1D(40, 48), nn.ReLU(), nn.Linear(40, 8)).eval()
    train, test = correlated(600, 32, 0), correlated(200, 32, 1)
    plain = quantize_model(copy.deepcopy(model))
    calibrated = quantize_model(copy.deepcopy(model), calibration=train.split(100))
    assert output_error(model, calibrated, test) < 0.5 * output_error(model, plain, test)
    # the format is the same: as many tensors of the same kind, and the same scales
    a, b = codes_of(plain), codes_of(calibrated)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    assert all(torch.equal(a[key], b[key]) for key in a if key.endswith(("scale", "zero_point")))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_convolutions_grouped_depthwise_and_of_one_dimension(padding_mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode=padding_mode),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 5, padding="same", groups=16, padding_mode=padding_mode),
        nn.ReLU6(),
        nn.Conv2d(16, 8, 3, dilation=2, groups=2),
        nn.Flatten(2),
        nn.Conv1d(8, 6, 3, padding=2, stride=2, padding_mode=padding_mode),
    ).eval()
    train, test = (
        nn.functional.avg_pool2d(torch.randn(24, 3, 40, 40, generator=torch.Generator().manual_seed(n)), 4, 1)
        for n in (0, 1)
    )
    plain = quantize_model(copy.deepcopy(model))
    calibrated = quantize_model(copy.deepcopy(model), calibration=train.split(8))
    assert output_error(model, calibrated, test) < 0.6 * output_error(model, plain, test)


def test_data_free_rounding_helps_inputs_with_a_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.rand(100, 64) + 0.5
    plain, balanced = (quantize_model(copy.deepcopy(model), calibration=how) for how in (None, "data-free"))
    assert output_error(model, balanced, x) < 0.8 * output_error(model, plain, x)


def batches(seed, count=12):
    tokens = torch.randint(3, 64, (4 * count, 24), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in tokens.split(4)]


def logits_error(model, quantized, seed=99):
    with torch.no_grad():
        got, expected = (torch.cat([m(**b).logits for b in batches(seed, 4)]) for m in (quantized, model))
    return relative_error(got, expected)


def test_a_language_model_and_its_way_to_disk_and_back(tmp_path):
    model = tiny_models.llama(layers=3)
    plain = quantize_model(copy.deepcopy(model))
    calibrated = quantize_model(copy.deepcopy(model), calibration=batches(0))
    assert logits_error(model, calibrated) < 0.75 * logits_error(model, plain)
    calibrated.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_codes(loaded, calibrated) and torch.equal(
        tiny_models.logits(loaded), tiny_models.logits(calibrated)
    )


def test_blocks_are_run_once_a_pass_and_give_what_the_whole_model_gives(monkeypatch):
    model = tiny_models.llama(layers=3)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    blocks = Blocks(model, names, batches(0)[0])
    assert [stage.block for stage in blocks.stages] == [f"model.layers.{n}" for n in range(3)]
    assert blocks.stages[0].groups == [
        [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"],
        ["model.layers.0.self_attn.o_proj"],
        ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
        ["model.layers.0.mlp.down_proj"],
    ]
    in_blocks = quantize_model(copy.deepcopy(model), calibration=batches(0))
    monkeypatch.setattr("mono_quant_hf.calibration.blocks._rows_of", lambda model, names: {})
    whole = quantize_model(copy.deepcopy(model), calibration=batches(0))
    a, b = codes_of(in_blocks), codes_of(whole)
    assert all(float((a[key] != b[key]).float().mean()) < 0.01 for key in a)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert", "vit", "resnet"])
def test_other_architectures(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    elif kind == "t5":
        config = T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        model = T5ForConditionalGeneration(config)
    else:
        model = getattr(tiny_models, kind)()
    model.eval()

    def inputs(seed):
        if model.main_input_name == "pixel_values":
            pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            return [{"pixel_values": part} for part in pixels.split(4)]
        rows = batches(seed, 6)
        return [row | {"decoder_input_ids": row["input_ids"]} for row in rows] if kind == "t5" else rows

    # Noise for pictures says nothing of what the patch embedding of a ViT is fed.
    config = MonoQuantConfig(
        modules_to_not_convert=["patch_embeddings.projection"] if kind == "vit" else None
    )
    plain = quantize_model(copy.deepcopy(model), config)
    calibrated = quantize_model(copy.deepcopy(model), config, calibration=inputs(0))
    with torch.no_grad():
        expected, rounded, better = (
            torch.cat([m(**batch).logits for batch in inputs(1)]) for m in (model, plain, calibrated)
        )
    assert relative_error(better, expected) < 0.9 * relative_error(rounded, expected)
    assert not same_codes(plain, calibrated)


def test_float_modules_and_half_weights_stay_as_the_config_says():
    config = MonoQuantConfig(
        module_overrides={"*.o_proj": {"weights": "float16"}, "*.q_proj": {"weights": "float"}}
    )
    model = quantize_model(tiny_models.llama(), config, calibration=batches(0, 2))
    layer = model.model.layers[0]
    assert (
        layer.self_attn.o_proj.quantization.weights == "float16"
        and layer.mlp.up_proj.quantization.weights == "int8"
    )
    assert type(layer.self_attn.q_proj) is nn.Linear


def test_a_module_that_no_sample_comes_by_is_said_and_rounded_without_data(caplog):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = Two()
    plain = quantize_model(copy.deepcopy(model), calibration="data-free")
    quantized = quantize_model(model, calibration=[torch.randn(50, 8)])
    assert "unused" in caplog.text and torch.equal(quantized.unused.weight_int8, plain.unused.weight_int8)


def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path):
    model = tiny_models.llama(layers=3)
    whole = quantize_model(copy.deepcopy(model), calibration=batches(0))
    quantize_model(copy.deepcopy(model), calibration=batches(0), resume_folder=tmp_path)
    stages = sorted(tmp_path.glob("stage-*"))
    assert len(stages) == 3
    stages[-1].unlink()  # as if it had stopped there
    kept = stages[0].stat().st_mtime_ns
    resumed = quantize_model(copy.deepcopy(model), calibration=batches(0), resume_folder=tmp_path)
    assert same_codes(whole, resumed) and stages[0].stat().st_mtime_ns == kept and stages[-1].exists()
    with pytest.raises(ValueError, match="another model, samples or settings"):
        quantize_model(copy.deepcopy(model), calibration=batches(1), resume_folder=tmp_path)


@pytest.mark.parametrize("calls", [0, 10, 30])
def test_a_calibration_that_is_interrupted_leaves_the_float_model(calls):
    model = tiny_models.llama(layers=3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    left = [calls]

    def interrupt(*_):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, calibration=batches(0))
    handle.remove()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and all(module.training for module in model.modules())
    quantize_model(model, calibration=batches(0, 2))  # and can be calibrated again


def test_training_mode_and_dtype_are_kept():
    model = tiny_models.llama(dtype=torch.bfloat16).train()
    quantized = quantize_model(copy.deepcopy(model), calibration=batches(0, 2))
    assert quantized.training and all(module.training for module in quantized.modules())
    assert logits_error(model.eval(), quantized.eval()) < 0.1


def test_self_calibration_is_reproducible_for_a_seed():
    model = tiny_models.llama()
    sampling = Sampling(samples=48, length=24, batch_size=24)
    first, again, other = (
        quantize_model(copy.deepcopy(model), calibration="self", sampling=s)
        for s in (sampling, sampling, Sampling(samples=48, length=24, batch_size=24, seed=1))
    )
    assert same_codes(first, again) and not same_codes(first, other)
    plain = quantize_model(copy.deepcopy(model))
    assert logits_error(model, first) < logits_error(model, plain)


def test_text_is_drawn_from_the_distribution_of_the_model():
    model = tiny_models.llama()
    rows = write_text(model, Sampling(samples=4000, length=2))
    with torch.no_grad():
        expected = model(input_ids=rows[:1, :1]).logits[0, -1].softmax(-1)
    found = rows[:, 1].bincount(minlength=len(expected)) / len(rows)
    # the error of a share p of n draws has the variance p (1 - p) / n
    assert bool(((found - expected).abs() < 5 * (expected / len(rows)).sqrt() + 1e-3).all())


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ("selff", ValueError, "not known"),
        (["a text"], TypeError, "tokenizer"),
        ([], ValueError, "empty"),
    ],
)
def test_what_cannot_be_calibrated_on(calibration, error, message):
    with pytest.raises(error, match=message):
        quantize_model(tiny_models.llama(), calibration=calibration)


def test_an_encoder_cannot_write_its_own_text():
    with pytest.raises(TypeError, match="causal"):
        quantize_model(tiny_models.bert(), calibration="self")


@pytest.mark.parametrize("settings", [{"damping": -1}, {"sweeps": 1.5}, {"drift": 2}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Compensation(**settings)
    with pytest.raises(ValueError, match="samples"):
        Sampling(samples=0)


def test_texts_become_rows_as_the_model_reads_them():
    words, tokenizer = TEXT.split(), make_tokenizer()
    paragraphs = [" ".join(words[n : n + size]) for n, size in ((0, 5), (5, 9), (14, 5), (19, 40))]
    rows = [
        batch["input_ids"]
        for batch in calibration_batches(
            tiny_models.bert(), ["\n\n".join(paragraphs)], tokenizer, Sampling(length=16, batch_size=2)
        )
    ]
    # an encoder: a row for each paragraph between the special tokens, cut at the length, nothing padded
    assert [tuple(part.shape) for part in rows] == [(1, 16), (1, 11), (2, 7)]
    assert all(bool((part[:, 0] == 2).all() and (part[:, -1] == 3).all()) for part in rows)
    causal = make_tokenizer()
    causal.mask_token = None
    batches = calibration_batches(make_llama(), [TEXT], causal, Sampling(samples=3, length=20, batch_size=2))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 20), (1, 20)]

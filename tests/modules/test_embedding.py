import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding

from mono_quant_hf.modules import QuantizedEmbedding, quantized_class_for

from .settings import COMPUTE, SETTINGS, SURVIVALS, TOLERANCES, check_storage_survives, float_twin


def plain():
    return nn.Embedding(20, 12, padding_idx=0)


def scaled():
    return Gemma3TextScaledWordEmbedding(20, 12, 0, embed_scale=3.4641)


EACH = pytest.mark.parametrize("kind", [plain, scaled])
IDS = torch.tensor([[0, 3, 19], [7, 7, 1]])


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return kind().to(dtype)


def quantize(module, weights="int8", symmetric=False):
    return quantized_class_for(module).from_float(module, weights, symmetric, "embed_tokens")


@EACH
@SETTINGS
@COMPUTE
def test_vectors_are_the_rows_that_the_codes_stand_for_in_the_dtype_of_the_module(
    kind, weights, symmetric, compute
):
    module = make(kind, compute)
    quantized = quantize(module, weights, symmetric)
    assert isinstance(quantized, type(module))
    expected = float_twin(module, {"weight": 0}, weights, symmetric)(IDS)
    vectors = quantized(IDS)
    assert vectors.dtype == compute
    tolerance = TOLERANCES[compute]
    torch.testing.assert_close(vectors.double(), expected, rtol=tolerance, atol=tolerance)
    if kind is plain:
        assert not vectors[0, 0].any()  # the padding row, exactly


@EACH
def test_storage_and_way_back(kind):
    module = make(kind, torch.bfloat16)
    quantized = quantize(module)
    stored = {name: (t.dtype, tuple(t.shape)) for name, t in quantized.state_dict().items()}
    assert stored == {
        "weight_int8": (torch.int8, (20, 12)),
        "weight_scale": (torch.float32, (20, 1)),
        "weight_zero_point": (torch.int8, (20, 1)),
    }
    restored = quantized.to_float(torch.bfloat16)
    assert type(restored) is type(module) and set(restored.state_dict()) == {"weight"}
    torch.testing.assert_close(restored(IDS), quantized(IDS))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_vectors_follow_a_cast_of_the_module(kind, dtype):
    assert quantize(make(kind)).to(dtype)(IDS).dtype == dtype


@EACH
@SETTINGS
@SURVIVALS
def test_nothing_is_lost(kind, weights, symmetric, survive):
    quantized = quantize(make(kind), weights, symmetric)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    check_storage_survives(quantized, survive(quantized), before)


@EACH
@SETTINGS
def test_copy_and_state_dict_round_trip_are_bit_identical(kind, weights, symmetric):
    source = quantize(make(kind), weights, symmetric)
    target = quantize(kind(), weights, symmetric)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(IDS), source(IDS))
    assert torch.equal(copy.deepcopy(source)(IDS), source(IDS))


def test_offset_positions_are_looked_up_too():
    module = OPTLearnedPositionalEmbedding(16, 8)
    quantized = quantize(module)
    mask = torch.ones(2, 6, dtype=torch.long)
    assert isinstance(quantized, QuantizedEmbedding)
    torch.testing.assert_close(quantized(mask), module(mask), rtol=0, atol=0.02)


def test_a_forward_of_another_kind_meets_the_float_weight():
    module = WhisperPositionalEmbedding(8, 4)
    rows = quantize(module)(torch.zeros(1, 3), position_ids=torch.tensor([2, 3, 4]))
    torch.testing.assert_close(rows, module.weight[2:5], rtol=0, atol=0.02)


def test_what_changes_the_rows_is_refused():
    assert (
        QuantizedEmbedding.refuses(nn.Embedding(4, 2, max_norm=1.0))
        == "its max_norm renormalizes the rows in place"
    )


def test_an_index_out_of_range_is_an_error():
    with pytest.raises(IndexError):
        quantize(make(plain))(torch.tensor([20]))


def test_repr_says_what_it_is():
    assert (
        repr(quantize(make(plain))) == "QuantizedEmbedding(20, 12, padding_idx=0, weights=int8, asymmetric)"
    )

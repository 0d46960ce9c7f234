import pytest

from mono_quant_hf import quantize_model
from tests.evaluation.conftest import make_llama, make_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny language model: `float`, with its tokenizer, and `int8`, without."""
    folder = tmp_path_factory.mktemp("models")
    make_llama().save_pretrained(folder / "float")
    make_tokenizer().save_pretrained(folder / "float")
    quantize_model(make_llama()).save_pretrained(folder / "int8")
    return folder

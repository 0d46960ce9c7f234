import json

from mono_quant_hf import quantize_model
from mono_quant_hf.cli.main import main
from tests import tiny_models
from tests.hub.conftest import hub  # noqa: F401


def test_a_folder_goes_to_the_hub(hub, tmp_path, capsys):  # noqa: F811
    quantize_model(tiny_models.llama()).save_pretrained(tmp_path / "model")
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"dataset": "a text", "results": [{"perplexity": 12.5, "tokens": 10}]}))
    arguments = ["--evaluation", str(results), "--license", "mit", "--message", "First", "--private"]
    assert main(["push", str(tmp_path / "model"), "me/tiny", *arguments]) == 0
    assert (
        capsys.readouterr().out.strip() == f"{hub.url}/me/tiny/commit/{hub.repos['me/tiny'].branches['main']}"
    )
    assert hub.messages("me/tiny") == ["initial commit", "First"]
    assert hub.repos["me/tiny"].private
    card = hub.files("me/tiny")["README.md"].decode()
    assert "license: mit" in card and "## Measured on a text" in card


def test_a_mistake_is_one_line(hub, tmp_path, capsys):  # noqa: F811
    tiny_models.llama().save_pretrained(tmp_path / "float")
    quantize_model(tiny_models.llama()).save_pretrained(tmp_path / "int8")
    capsys.readouterr()
    for arguments, said in [
        ([str(tmp_path / "none"), "me/tiny"], "is no folder"),
        ([str(tmp_path / "float"), "me/tiny"], f"{tmp_path / 'float'} is float, not quantized"),
        ([str(tmp_path / "int8"), "me/a/b"], "me/a/b"),
    ]:
        assert main(["push", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0]

"""`estimate`: a table of forms and devices."""

import json

import pytest

from mono_quant_hf.cli.main import main


def test_a_table_for_people_and_numbers_for_programs(models, tmp_path, capsys):
    call = ["estimate", str(models / "float"), "--symmetric", "--json", str(tmp_path / "sizes.json")]
    assert main([*call, "--max-memory", "0=40kB", "--max-memory", "cpu=1GB"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "sizes.json").read_text())
    assert "LlamaForCausalLM" in said and "GPU 0" in said
    for form in found["forms"]:
        assert f"\n{form['name']} " in said and f"{form['bytes'] / 1e6:.1f}" in said
        assert sum(form["bytes_by_device"].values()) == form["bytes"]
    assert found["forms"][-1]["bytes"] < found["forms"][-3]["bytes"]  # symmetric, and not


@pytest.mark.parametrize("limit", ["8GB", "gpu=8GB", "0=8", "0="])
def test_a_limit_that_is_none(limit, capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "model", "--max-memory", limit])
    assert "--max-memory: " in capsys.readouterr().err

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mono_quant_hf.versions import REQUIRED, TESTED, check_versions

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_ranges_are_open_above_and_what_is_installed_is_tested():
    declared = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
    for name in REQUIRED:
        assert {specifier.operator for specifier in declared[name]} == {">="}
        assert declared[name].contains(importlib.metadata.version(name), prereleases=True)


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("bound", [">=99", "<0.1"])
def test_an_unsupported_version_is_one_clear_error(name, bound):
    found = importlib.metadata.version(name)
    with pytest.raises(ImportError) as raised:
        check_versions([f"{name}{bound}"])
    assert str(raised.value) == (
        f"mono_quant_hf works with {name}{bound}, but {name} {found} is installed; run: pip install '{name}{bound}'"
    )


def test_it_is_the_import_that_raises(tmp_path):
    info = tmp_path / "mono_quant_hf-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mono-quant-hf\nVersion: 9\nRequires-Dist: transformers<1\n"
    )
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from mono_quant_hf import MonoQuantConfig"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: mono_quant_hf works with transformers<1, but" in done.stderr


def test_other_requirements_are_left_to_pip():
    check_versions(["torch-other>=99", "numpy>=99", "torch>=99; extra == 'never'"])


def test_a_newer_version_than_tested_is_one_warning(monkeypatch, caplog):
    check_versions([])
    assert not caplog.records, "what is installed here is tested"
    found = importlib.metadata.version("transformers")
    monkeypatch.setitem(TESTED, "transformers", "5.1")
    check_versions([])
    (record,) = caplog.records
    assert record.getMessage() == (
        f"mono_quant_hf was tested with transformers up to 5.1, and {found} is installed; should something fail, try "
        "pip install 'transformers==5.1.*'."
    )

"""Loading without the import, each case in a new process with an installation made for it."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from mono_quant_hf import MonoQuantConfig, quantize_model
from mono_quant_hf.hub import push_to_hub
from tests import tiny_models
from tests.hub.conftest import environment, hub  # noqa: F401

ROOT = Path(__file__).parent.parent
LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER)
with torch.no_grad():
    logits = model(input_ids=torch.arange(12)[None]).logits
print(json.dumps({"class": type(model.model.layers[0].mlp.down_proj).__name__, "sum": logits.double().sum().item()}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = quantize_model(tiny_models.llama(), MonoQuantConfig())
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(input_ids=torch.arange(12)[None]).logits.double().sum().item()


@pytest.fixture
def site(tmp_path):
    """A folder for PYTHONPATH, in which the package is installed as the wheel installs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    info = tmp_path / "mono_quant_hf-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mono-quant-hf\nVersion: 0.1.0\n")
    entries = project["project"]["entry-points"]["torch.backends"]
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[torch.backends]", *lines, ""]))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        shutil.copyfile(ROOT / source, tmp_path / target)
    (tmp_path / "mono_quant_hf").symlink_to(ROOT / "mono_quant_hf", target_is_directory=True)
    return tmp_path


def python(site, code, folder=None, **variables):
    source = f"FOLDER = {str(folder)!r}\nimport json, sys\n{code}"
    settings = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", source], env=os.environ | settings, cwd=site, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, transformers",
        "import transformers.quantizers.auto, torch",
        "import torch, transformers.modeling_utils, mono_quant_hf",
    ],
)
def test_a_checkpoint_loads_whatever_is_imported_first(site, checkpoint, imports):
    folder, expected = checkpoint
    done = python(site, f"{imports}\n{LOAD}", folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"class": "QuantizedLinear", "sum": expected}


def test_from_the_hub_in_a_new_process(site, checkpoint, hub, environment):  # noqa: F811
    folder, expected = checkpoint
    push_to_hub(folder, "me/tiny-int8", private=True)
    done = python(site, f"import torch\n{LOAD}", "me/tiny-int8", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"class": "QuantizedLinear", "sum": expected}


def test_armed_and_no_more_than_that(site):
    code = """
import torch
assert "mono_quant_hf_autoload" in sys.modules
assert not {"transformers", "mono_quant_hf", "numba"} & set(sys.modules)
import mono_quant_hf_autoload as autoload
hooks = [f for f in sys.meta_path if isinstance(f, autoload._Hook)]
assert len(hooks) == 2
autoload.arm()
assert [f for f in sys.meta_path if isinstance(f, autoload._Hook)] == hooks
from transformers.quantizers import auto
assert [f.module for f in sys.meta_path if isinstance(f, autoload._Hook)] == ["diffusers.quantizers.auto"]
assert type(auto.__loader__).__name__ == type(auto.__spec__.loader).__name__ == "SourceFileLoader"
assert isinstance(auto.AUTO_QUANTIZER_MAPPING["mono_quant"], autoload.StandIn)
assert "mono_quant_hf" not in sys.modules
assert auto.AutoQuantizationConfig.from_dict({"quant_method": "mono_quant"}).weights == "int8"
assert auto.AUTO_QUANTIZER_MAPPING["mono_quant"].__name__ == "MonoQuantHfQuantizer"
"""
    done = python(site, code)
    assert done.returncode == 0, done.stderr


def test_a_component_of_diffusers_loads_without_the_import(site, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = quantize_model(diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8))
    model.save_pretrained(tmp_path / "model")
    code = """
from diffusers import AutoencoderKL, PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantoConfig
PipelineQuantizationConfig(quant_mapping={"unet": QuantoConfig()})
assert "mono_quant_hf" not in sys.modules
print(type(AutoencoderKL.from_pretrained(FOLDER).encoder.conv_in).__name__)
"""
    done = python(site, code, tmp_path / "model")
    assert (done.returncode, done.stdout) == (0, "QuantizedConv2d\n"), done.stderr


@pytest.mark.parametrize("variable", ["MONO_QUANT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_switched_off(site, variable):
    code = """
import torch
from transformers.quantizers import auto
assert "mono_quant" not in auto.AUTO_QUANTIZER_MAPPING
assert not [f for f in sys.meta_path if type(f).__module__ == "mono_quant_hf_autoload"]
import mono_quant_hf
assert "mono_quant" in auto.AUTO_QUANTIZER_MAPPING, "who imports the package asks for it"
quantizer = mono_quant_hf.MonoQuantHfQuantizer
assert auto.AUTO_QUANTIZER_MAPPING["mono_quant"] is quantizer
"""
    done = python(site, code, **{variable: "0"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("broken", ["gone", "raises"])
def test_a_broken_installation_breaks_neither_torch_nor_other_models(site, checkpoint, tmp_path, broken):
    package = site / "mono_quant_hf"
    package.unlink()
    if broken == "raises":
        package.mkdir()
        (package / "__init__.py").write_text("def broken(:\n")
    plain = tmp_path / "plain"
    tiny_models.llama().save_pretrained(plain)
    # The repository itself must not be found in place of the broken package.
    code = f"""
import torch
sys.path[:] = [folder for folder in sys.path if folder != {str(ROOT)!r}]
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(plain)!r}).model.layers[0].mlp.down_proj).__name__)
try:
    AutoModelForCausalLM.from_pretrained(FOLDER)
except ImportError as problem:
    print(problem)
"""
    done = python(site, code, checkpoint[0])
    assert done.returncode == 0, done.stderr
    kind, *said = done.stdout.splitlines()
    assert kind == "Linear"
    if not said and broken == "gone":
        pytest.skip("another installation of mono_quant_hf is in this environment")
    assert said[0].startswith(
        "This checkpoint was quantized by mono_quant_hf, which is installed but cannot be imported"
    )


def test_arming_never_raises(monkeypatch):
    from mono_quant_hf import autoload

    monkeypatch.setattr(sys, "meta_path", None)
    monkeypatch.delitem(sys.modules, autoload.PACKAGE, raising=False)
    autoload.arm()

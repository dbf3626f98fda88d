"""Builds a TensorRT engine from an ONNX file, and writes it with its log and a description. Needs a GPU.

The builder's log is kept at VERBOSE, the only level that names the layers with sparse kernels. Profiling is DETAILED,
the only level at which layers name their kernels. Only what TensorRT 10 and 11 both have is used: a test checks this
file and engine.py against the bindings of both.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import Exported
from mpcompile.runtimes.nvidia import Gpu
from mpcompile.runtimes.protocol import Build
from mpcompile.runtimes.tensorrt.engine import TensorRTEngine
from mpcompile.runtimes.tensorrt.logs import kept_logger
from mpcompile.system.hashing import file_sha256

TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class SerializedEngine:
    """A serialised engine and the log of its build."""

    data: bytes = field(repr=False)
    log: str = field(repr=False)


def build_serialized(
    file: Path, shapes: Sequence[tuple[int, ...]], sparse: bool, cache: Path | None = None
) -> SerializedEngine:
    """Builds the engine of an ONNX file. Raises BuildError.

    `shapes` are the image shapes that will be run, if the file's batch is free. Each gets an optimization profile of
    its own, so that kernels are chosen for that shape. `sparse` allows sparse kernels. `cache` is a timing cache: it is
    read if it exists, then written again together with a file of its hash.
    """
    import tensorrt as trt

    logger = kept_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the bindings raise it if the library's factory returns null
        raise BuildError(f"TensorRT {trt.__version__} has no builder here: {logger.errors() or error}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = "; ".join(" ".join(error.desc().split()) for error in errors)
        raise BuildError(f"TensorRT {trt.__version__} cannot parse {file.name}: {reasons}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and the file asks for float32
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    for shape in shapes:
        profile = builder.create_optimization_profile()
        exact = trt.Dims(shape)
        profile.set_shape(network.get_input(0).name, exact, exact, exact)
        config.add_optimization_profile(profile)
    if cache is not None:
        timings = config.create_timing_cache(cache.read_bytes() if cache.exists() else b"")
        config.set_timing_cache(timings, False)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"TensorRT {trt.__version__} cannot build {file.name}: {logger.errors() or 'no reason given'}")
    if cache is not None:
        cache.write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))
        cache.with_name(f"{cache.name}.sha256").write_text(f"{file_sha256(cache)}  {cache.name}\n", encoding="utf-8")
    return SerializedEngine(bytes(memoryview(data)), logger.text())


def build_engine(exported: Exported, build: Build, gpu: Gpu) -> TensorRTEngine:
    """Builds an engine and loads it. Raises BuildError, also if the engine does not run in the file's precision.

    With `build.folder`, the engine, its log and a JSON description are written there.
    """
    import tensorrt as trt

    folder = build.folder
    batches = tuple(sorted(set(build.batches))) if exported.batch is None else ()
    shapes = [(batch, *exported.image_shape) for batch in batches]
    cache = folder / TIMING_CACHE if folder is not None else None
    serialized = build_serialized(exported.onnx, shapes, build.sparse, cache)
    engine = TensorRTEngine.loaded(serialized.data, serialized.log, exported, batches, gpu)
    if folder is not None:
        stem = engine_name(exported, build, trt.__version__, gpu)
        path = folder / f"{stem}.engine"
        path.write_bytes(serialized.data)
        (folder / f"{stem}.log").write_text(serialized.log, encoding="utf-8")
        description = {
            "onnx": exported.onnx.name,
            "onnx_sha256": file_sha256(exported.onnx),
            "sha256": file_sha256(path),
            "tensorrt": trt.__version__,
            "gpu": gpu.name,
            "compute_capability": list(gpu.capability),
            "precision": exported.precision,
            "tuned_for_batches": batches or [exported.batch],
            "sparse_weights": build.sparse,
            "sparsity": asdict(engine.sparsity),
            "layers": [asdict(layer) for layer in engine.engine_layers],
        }
        (folder / f"{stem}.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return engine


def engine_name(exported: Exported, build: Build, version: str, gpu: Gpu) -> str:
    """Returns the engine's file stem, such as vit_base-2x4-fp16-bs8-trt10.16.1-sm80."""
    return f"{build.file_stem(exported)}-trt{version}-{gpu.sm}"

"""Quantises the dense model to int8 with ONNX Runtime's own tools: the baseline that a user would try before pruning.

Dynamic quantisation runs MatMul and Gemm in int8 with activation scales computed in each call, as is usual for
transformers. Static quantisation uses scales from calibration images for every operator that it supports, including
convolutions, as is usual for CNNs. Both use one weight scale per output channel.

A baseline must be the best that ONNX Runtime can do on this CPU. On x86 without VNNI its u8 × s8 kernels add two
products in 16 bits (`vpmaddubsw`), which saturates silently. 7-bit weights (`reduce_range`) cannot saturate, since
2 · 255 · 64 < 2^15, but lose one bit of resolution. If products saturate on this CPU, both files are made, and the one
whose logits on the calibration images are closer to the dense model's is used.

Source: "Quantize ONNX models" in ONNX Runtime's documentation. OpenVINO's documentation describes the same under
"Saturation (overflow) issue workaround".
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import cause_of
from mpcompile.export.onnx_export import Exported
from mpcompile.runtimes.ort.session import OrtEngine, cpu_engine, session_on
from mpcompile.runtimes.protocol import Engine, QuantizedBaseline

if TYPE_CHECKING:
    import onnx

BATCH = 8  # calibration images per call, if the file's batch is free
PROBE_CHANNELS = 64  # a multiple of the vector length of every instruction set
LARGEST_U8, LARGEST_S8 = 255, 127
EXACT = "8-bit weights, since ONNX Runtime's u8 × s8 products are exact on this processor"
SATURATING = "ONNX Runtime's u8 × s8 products saturate at 16 bits on this processor, as on x86 without VNNI"


@dataclass(frozen=True)
class _Candidate:
    """A quantised file, and the mean over calibration images of the largest change of a logit."""

    engine: OrtEngine
    weight_bits: int
    shift: float


def quantised(
    exported: Exported, threads: int | None, images: NDArray[np.float32], folder: Path, *, saturating: bool
) -> Mapping[str, QuantizedBaseline | str]:
    """Returns the best int8 engine per kind of quantisation, or why there is none. Files are written into `folder`.

    `images` (n, c, h, w) are the calibration set. With `saturating`, they also decide between 8-bit and 7-bit weights.
    """
    if exported.precision != "fp32":
        return {"int8": f"ONNX Runtime's tools quantise float32 files, and this one is {exported.precision}"}
    expected = logits_of(cpu_engine(exported, threads), images) if saturating else None

    def best(name: str, make: Callable[[Path, bool], None]) -> QuantizedBaseline | str:
        """Returns the better of the files that `make(path, reduced)` writes; `reduced` means 7-bit weights."""
        candidates: list[_Candidate] = []
        failed = ""
        for bits in (7, 8) if saturating else (8,):
            path = folder / f"{name.replace(', ', '_')}_{bits}_bits.onnx"
            try:
                with _without_advice():
                    make(path, bits == 7)
                engine = session_on(path, threads)
                shift = 0.0 if expected is None else _shift(logits_of(engine, images), expected)
            except Exception as error:  # the tools raise many types; a missing baseline is reported, not fatal
                failed = cause_of(error)
            else:
                candidates.append(_Candidate(engine, bits, shift))
        if not candidates:
            return failed
        closest = min(candidates, key=lambda candidate: candidate.shift)
        return QuantizedBaseline(closest.engine, _method(closest, candidates) if saturating else EXACT)

    return {
        "int8, dynamic": best("int8, dynamic", lambda path, reduced: quantise_dynamic(exported.onnx, path, reduced)),
        "int8, static": best("int8, static", lambda path, reduced: quantise_static(exported, path, images, reduced)),
    }


def _method(used: _Candidate, candidates: list[_Candidate]) -> str:
    """Returns how the used candidate was quantised and why, as part of a sentence."""
    method = (
        f"{used.weight_bits}-bit weights: {SATURATING}; outputs of the calibration images shift by {used.shift:.3f}"
    )
    others = (f"{other.shift:.3f} with {other.weight_bits}-bit weights" for other in candidates if other is not used)
    return ", ".join((method, *others))


def logits_of(engine: Engine, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the logits (n, outputs) of all images, run in batches of BATCH."""
    return np.concatenate([engine(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def _shift(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Returns the largest change of a logit, averaged over images; infinite if a logit is not finite."""
    shift = float(np.abs(logits - expected).reshape(len(logits), -1).max(1).mean())
    return shift if np.isfinite(shift) else np.inf


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's u8 × s8 products saturate on this CPU, tested with the largest factors."""
    from onnx import TensorProto, helper, numpy_helper

    shape = (PROBE_CHANNELS, PROBE_CHANNELS)
    weight = numpy_helper.from_array(np.full(shape, LARGEST_S8, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "saturation",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, shape)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    sums = _run_once(model, np.full(shape, LARGEST_U8, np.uint8))
    return bool((sums != LARGEST_U8 * LARGEST_S8 * PROBE_CHANNELS).any())


def _run_once(model: "onnx.ModelProto", x: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Returns the output of a model x -> y."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y: NDArray[np.int32] = session.run(None, {"x": x})[0]
    return y


@contextmanager
def _without_advice() -> Iterator[None]:
    """Drops records of the root logger itself, on which the tools log advice that users did not ask for."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def drop(record: logging.LogRecord) -> bool:
        return False

    root.addHandler(handler)  # without a handler, the first record would configure the root logger
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)
        root.removeHandler(handler)


def quantise_dynamic(file: Path, path: Path, reduced: bool) -> None:
    """Writes the file to `path` with MatMul and Gemm in int8; `reduced` means 7-bit weights."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(file, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, reduce_range=reduced)


def quantise_static(
    exported: Exported, path: Path, images: NDArray[np.float32], reduced: bool, method: str = "MinMax"
) -> None:
    """Writes the file to `path` quantised statically; `reduced` means 7-bit weights.

    `method` is a name of ONNX Runtime's CalibrationMethod: MinMax, Percentile or Entropy.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Yields the calibration images in batches, as the tools read them."""

        def __init__(self) -> None:
            self._batches = _batches(images, exported.batch)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            """Returns the next batch, or None after the last."""
            batch = next(self._batches, None)
            return None if batch is None else {exported.input_names[0]: batch}

    quantize_static(
        exported.onnx,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduced,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )


def _batches(images: NDArray[np.float32], fixed: int | None) -> Iterator[NDArray[np.float32]]:
    """Yields the images in batches; if the file's batch is `fixed`, the last is padded by repeating its own images."""
    size = fixed or BATCH
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        yield np.ascontiguousarray(np.resize(batch, (size, *batch.shape[1:])) if fixed else batch)

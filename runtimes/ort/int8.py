"""The dense model quantised to int8 by ONNX Runtime's own tools: what a user would try instead of pruning.

Dynamic quantisation turns MatMul and Gemm into int8 with activation scales found call by call, as is usual for
transformers. Static quantisation puts scales from calibration images around every operator that it knows, convolutions
among them, as is usual for CNNs. Both have one weight scale per output channel.

These files are baselines, so each is the best that ONNX Runtime can do on the processor at hand. On x86 without VNNI
its u8 × s8 kernels add two products in 16 bits (`vpmaddubsw`) and saturate silently. 7-bit weights (`reduce_range`)
cannot saturate there, since 2 · 255 · 64 < 2^15, and cost one bit of resolution. So where products saturate, both are
made, and the file whose logits lie nearer to those of the dense model on the calibration images is taken.

Source: "Quantize ONNX models" in ONNX Runtime's documentation; OpenVINO's describes the same as "Saturation (overflow)
issue workaround".
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
from mpcompile.export.onnx_export import INPUT, Exported
from mpcompile.runtimes.ort.session import OrtEngine, cpu_engine, session_on
from mpcompile.runtimes.protocol import QuantizedBaseline

if TYPE_CHECKING:
    import onnx

BATCH = 8  # calibration images at once, where the file leaves the batch free
PROBE_CHANNELS = 64  # whole vectors of every instruction set
LARGEST_U8, LARGEST_S8 = 255, 127
EXACT = "8-bit weights, since ONNX Runtime's u8 × s8 products are exact on this processor"
SATURATING = "ONNX Runtime's u8 × s8 products saturate at 16 bits on this processor, as on x86 without VNNI"


@dataclass(frozen=True)
class _Candidate:
    """One quantised file, and how far it moves the logits of the calibration images (mean largest change)."""

    engine: OrtEngine
    weight_bits: int
    shift: float


def quantised(
    exported: Exported, threads: int | None, images: NDArray[np.float32], folder: Path, *, saturating: bool
) -> Mapping[str, QuantizedBaseline | str]:
    """The best int8 engine of each kind of quantisation, or why there is none; files go into `folder`.

    `images` (n, c, h, w) calibrate scales, and decide between 8-bit and 7-bit weights where products are `saturating`.
    """
    if exported.precision != "fp32":
        return {"int8": f"ONNX Runtime's tools quantise float32 files, and this one is {exported.precision}"}
    expected = _logits(cpu_engine(exported, threads), images) if saturating else None

    def best(name: str, make: Callable[[Path, bool], None]) -> QuantizedBaseline | str:
        """`make` writes a file to a path, with 7-bit weights where its second argument says so."""
        made: list[_Candidate] = []
        failed = ""
        for bits in (7, 8) if saturating else (8,):
            path = folder / f"{name.replace(', ', '_')}_{bits}_bits.onnx"
            try:
                with _without_advice():
                    make(path, bits == 7)
                engine = session_on(path, threads)
                shift = 0.0 if expected is None else _shift(_logits(engine, images), expected)
            except Exception as error:  # whatever the tools raise: a baseline that cannot be had is told, not fatal
                failed = cause_of(error)
            else:
                made.append(_Candidate(engine, bits, shift))
        if not made:
            return failed
        taken = min(made, key=lambda candidate: candidate.shift)
        return QuantizedBaseline(taken.engine, _method(taken, made) if saturating else EXACT)

    return {
        "int8, dynamic": best("int8, dynamic", lambda path, reduced: quantise_dynamic(exported.onnx, path, reduced)),
        "int8, static": best("int8, static", lambda path, reduced: _quantise_static(exported, path, images, reduced)),
    }


def _method(taken: _Candidate, made: list[_Candidate]) -> str:
    """How the candidate that was taken was quantised, and why."""
    told = f"{taken.weight_bits}-bit weights: {SATURATING}; logits of the calibration images shift by {taken.shift:.3f}"
    others = (f"{other.shift:.3f} with {other.weight_bits}-bit weights" for other in made if other is not taken)
    return ", ".join((told, *others))


def _logits(engine: OrtEngine, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (n, outputs), of a few images at once."""
    return np.concatenate([engine(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def _shift(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest change of a logit, mean over images; infinite where a logit is not finite."""
    found = float(np.abs(logits - expected).max(1).mean())
    return found if np.isfinite(found) else np.inf


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's u8 × s8 products saturate on this processor: tried on the largest factors there are."""
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
    found = _run_once(model, np.full(shape, LARGEST_U8, np.uint8))
    return bool((found != LARGEST_U8 * LARGEST_S8 * PROBE_CHANNELS).any())


def _run_once(model: "onnx.ModelProto", x: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The output of a model of x -> y."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y: NDArray[np.int32] = session.run(None, {"x": x})[0]
    return y


@contextmanager
def _without_advice() -> Iterator[None]:
    """Inside, what is logged on the root logger itself is dropped: the tools give advice there, to no one who asked."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def drop(record: logging.LogRecord) -> bool:
        return False

    root.addHandler(handler)  # where there is none, the first word on the root logger would configure it
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)
        root.removeHandler(handler)


def quantise_dynamic(file: Path, path: Path, reduced: bool) -> None:
    """Writes the file to `path` with MatMul and Gemm in int8; `reduced` leaves one bit of the weights out."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(file, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, reduce_range=reduced)


def _quantise_static(exported: Exported, path: Path, images: NDArray[np.float32], reduced: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The calibration images, batch by batch."""

        def __init__(self) -> None:
            self._batches = _batches(images, exported.batch)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            """The next batch, or None after the last."""
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    quantize_static(
        exported.onnx,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduced,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _batches(images: NDArray[np.float32], fixed: int | None) -> Iterator[NDArray[np.float32]]:
    """The images in batches that the file takes; of a fixed size the last is filled up from the first."""
    size = fixed or BATCH
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        yield np.ascontiguousarray(np.resize(batch, (size, *batch.shape[1:])) if fixed else batch)

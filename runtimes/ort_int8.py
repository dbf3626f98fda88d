"""The dense model quantised to int8 by ONNX Runtime's own tools: what a user would try instead of pruning.

Dynamic quantisation turns MatMul and Gemm into int8 with scales found call by call, as is usual for transformers;
static quantisation puts scales from calibration images around every operator that it knows, convolutions among them, as
is usual for CNNs. Both change results, and neither is a product of this project: they are references beside it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcompile.lower import INPUT, Exported
from mpcompile.runtimes.ort import OrtEngine, session_on

BATCH = 8  # calibration images at once, where the file leaves the batch free


def quantised(
    exported: Exported, threads: int | None, images: NDArray[np.float32], folder: Path
) -> Mapping[str, OrtEngine | str]:
    """An engine by kind of quantisation, or why there is none; files go into `folder`."""
    if exported.precision != "fp32":
        return {"int8": f"ONNX Runtime's tools quantise float32 files, and this one is {exported.precision}"}
    makers: dict[str, Callable[[Path], None]] = {
        "int8, dynamic": lambda path: _dynamic(exported.onnx, path),
        "int8, static": lambda path: _static(exported, path, images),
    }
    found: dict[str, OrtEngine | str] = {}
    for name, make in makers.items():
        path = folder / f"{name.replace(', ', '_')}.onnx"
        try:
            with _unheard():
                make(path)
            found[name] = session_on(path, threads)
        except Exception as error:  # whatever the tools raise: a reference that cannot be had is told, not fatal
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return found


@contextmanager
def _unheard() -> Iterator[None]:
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


def _dynamic(file: Path, path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(file, path, op_types_to_quantize=["MatMul", "Gemm"])


def _static(exported: Exported, path: Path, images: NDArray[np.float32]) -> None:
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
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _batches(images: NDArray[np.float32], fixed: int | None) -> Iterator[NDArray[np.float32]]:
    """The images in batches that the file takes; of a fixed size the last is filled up from the first."""
    size = fixed or BATCH
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        yield np.ascontiguousarray(np.resize(batch, (size, *batch.shape[1:])) if fixed else batch)

"""One number a layer, for bars and colours: what it adds to the change of the outputs, and the time that it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from mpcompile.report.schema import Report


@dataclass(frozen=True, slots=True)
class LayerValues:
    """A title, a format string for one value, and the values by name of the layer; there is at least one."""

    title: str
    form: str
    values: Mapping[str, float]


def losses(report: Report) -> LayerValues | None:
    """What each layer adds to the change of the outputs: its share in the certificate, else its refit error."""
    shares = {row.name: row.share for row in report.certificate.layers} if report.certificate else {}
    candidates: tuple[tuple[str, Mapping[str, float | None]], ...] = (
        ("estimated share of the change of the outputs; a negative share makes up for others", shares),
        ("refit error on calibration images", {row.name: row.missed for row in report.layers}),
        ("error of the rounded weights on calibration images", {row.name: row.rounding_error for row in report.layers}),
    )
    for title, found in candidates:
        values = {name: value for name, value in found.items() if value is not None}
        if values:
            return LayerValues(title, "{:.1%}", values)
    return None


def times(report: Report) -> LayerValues | None:
    """Milliseconds of a call of each layer on the kernel that runs it; else the multiply-accumulates that are left."""
    in_8_bits = {row.layer: row.ms for row in report.quantized.kernels if row.ms} if report.quantized else {}
    if in_8_bits:
        return LayerValues("milliseconds a call", "{:.3f} ms", in_8_bits)
    measured = {row.layer: row.sparse_ms if row.chosen else row.dense_ms for row in report.verdicts}
    values = {name: value for name, value in measured.items() if value}
    if values:
        return LayerValues("milliseconds a call", "{:.3f} ms", values)
    left = {row.name: float(row.macs_left) for row in report.layers if row.macs_left is not None}
    return LayerValues("multiply-accumulates left", "{:.3g}", left) if left else None

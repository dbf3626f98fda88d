"""QuantizedLayer: whether a layer with 8-bit weights and inputs really runs on an 8-bit kernel, and if not, why."""

from collections.abc import Sequence
from dataclasses import dataclass

NATIVE = ("NMGemmInt8", "NMConvInt8")  # the first part of the names of mpcompile's own 8-bit operators


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What a runtime did with one quantised layer, as its own profile reports it.

    Attributes:
        layer: qualified module name.
        initializer: its weight in the ONNX file. Layers with equal weights may share it.
        op: the operator in the file: Conv, Gemm or MatMul.
        in_8_bits: whether every product with the weight ran on an 8-bit kernel.
        kernel: the operator that the runtime ran instead, such as QLinearConv; None if it is unknown.
        reason: why the layer did not run in 8 bits, as a sentence; None if it did.
        ms: time per call of its products, in milliseconds, in one profiled run; None if it is unknown.
    """

    layer: str
    initializer: str
    op: str
    in_8_bits: bool
    kernel: str | None = None
    reason: str | None = None
    ms: float | None = None

    @property
    def native(self) -> bool:
        """Whether it ran on a kernel of mpcompile."""
        return self.in_8_bits and self.kernel is not None and self.kernel.startswith(NATIVE)


def tally_8_bit(rows: Sequence[QuantizedLayer]) -> str:
    """A sentence with the number of quantised layers that ran in 8 bits, and the reasons of the others."""
    ran = sum(row.in_8_bits for row in rows)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault(row.reason, []).append(row.layer)
    others = (f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return "; ".join((f"{ran} of {len(rows)} quantised layers ran on 8-bit kernels", *others))

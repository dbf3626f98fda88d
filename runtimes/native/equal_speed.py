"""Which M the native kernels run at the same speed, from measurements: what `--pattern 50%` stands for on a CPU.

fp32: the kernel's speed depends on the density and hardly on M. SPEED_FP32 has, for the widest M of each density, the
relative speed of the patterns of half, a quarter and an eighth of that M: medians over eight shapes
(benchmarks/results/cpu_groups.md; a test compares the two). All are within SAME of the widest.

int8: the kernel skips the zeros of a weight that keeps at most 8, or at most 4, of each 16 input channels, whichever
positions they are (int8_selection.py). So all M that divide 16 run the same instructions.
"""

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import nested
from mpcompile.ir.precision import QUANTIZED, Precision

SAME = 0.03  # relative; the intervals of single shapes are as wide
SPEED_FP32: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "8:32": (1.00, 1.00, 1.01),
        "12:32": (1.00, 1.00),
        "16:32": (0.99, 1.00, 1.01),
        "20:32": (0.99, 1.01),
        "24:32": (1.00, 1.00, 1.00),
    }
)
WIDEST_FP32, WIDEST_INT8 = 32, 16


def equally_fast(density: Fraction, precision: Precision, rows: int) -> tuple[NM, ...]:
    """The patterns of a density that the kernel of this precision runs at the same speed, freest first.

    If the int8 kernel does not skip the zeros of this density, all its patterns run as dense, at one speed too.
    """
    skips = density <= Fraction(1, 2) and WIDEST_INT8 % density.denominator == 0
    widest = WIDEST_INT8 if precision in QUANTIZED and skips else WIDEST_FP32
    return nested(density, rows, widest)

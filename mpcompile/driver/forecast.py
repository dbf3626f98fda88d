"""The forecast of a plan for one target: the speed that it would reach, from counting and from measured products."""

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from mpcompile.analysis.macs import Cost
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import QUANTIZED, Precision
from mpcompile.measure.timing import Speedup
from mpcompile.report.schema import Value
from mpcompile.runtimes import (
    RUNTIMES,
    GemmShape,
    MeasuresQuantized,
    PredictsSpeed,
    QuantizedGemm,
    QuantizedSpeed,
    has_sparse_kernel,
)


class OverFp32(Value):
    """A plan in 8 bits beside the dense model in fp32.

    Attributes:
        dense: the measured speedup over dense fp32 of each quantised Linear layer, dense in 8 bits.
        layers: the expected speedup over dense fp32 of the same layers with the planned masks: that of `dense` times
            that of `Forecast.layers`.
        speedup: speedup of the whole model over dense fp32 by `layers`, if time in fp32 is proportional to MACs.
        dense_speedup: the same of the dense model in 8 bits, by `dense`.
    """

    dense: dict[str, Speedup]
    layers: dict[str, float]
    speedup: float
    dense_speedup: float


class Forecast(Value):
    """The plan as one target would execute it. "Dense" is the dense model in the same precision.

    Attributes:
        accelerated: the planned patterns that the target has kernels for. Layers with other patterns run as dense.
        macs: multiply-accumulates per image that the target executes.
        weight_bytes: size of the weights as the target stores them.
        speedup_bound: dense MACs over executed MACs; from counting, not measured.
        layers: expected speedup over dense of each planned layer whose matrix product can be timed on this machine.
            It is 1 if the interval of `measured` is not wholly above 1, because such a layer runs as dense.
        measured: the measured speedup of each of those products. In int8 it is over the fastest dense int8 kernel.
        speedup: speedup of the whole model by `layers`, if time in fp32 is proportional to MACs; None if no layer was
            timed. Layers that are not in `layers` count as dense.
        untimed: the convolutions among the layers with a kernel. They are timed only when the file is built.
        refused: why the target does not run this precision; None if it does.
        over_fp32: in 8 bits, the plan beside the dense model in fp32; None if no layer was timed.
    """

    target: str
    accelerated: tuple[NM, ...]
    macs: float
    weight_bytes: float
    speedup_bound: float
    layers: dict[str, float]
    measured: dict[str, Speedup]
    speedup: float | None
    refused: str | None = None
    over_fp32: OverFp32 | None = None
    untimed: int = 0


def forecast(
    target: str,
    model: Model,
    counted: Cost,
    patterns: Mapping[str, NM],
    precision: Precision = "fp32",
    quantized: Iterable[str] = (),
) -> Forecast:
    """The forecast for one target. Layers whose pattern has no kernel count as dense.

    Args:
        target: the name of the runtime.
        model: the planned model.
        counted: its cost.
        patterns: the planned pattern of each masked layer.
        precision: of the compiled file.
        quantized: the layers that are in 8 bits if the precision is.
    """
    runtime = RUNTIMES[target]
    refused = runtime.refuses(precision, None)
    in_8_bits = tuple(quantized) if precision in QUANTIZED else ()
    with_kernel = {
        name: pattern
        for name, pattern in patterns.items()
        if refused is None
        and (precision not in QUANTIZED or name in in_8_bits)
        and has_sparse_kernel(runtime, pattern, precision)
    }
    speeds: Mapping[str, QuantizedSpeed] = {}
    measured: Mapping[str, Speedup] = {}
    if refused is None and precision in QUANTIZED and isinstance(runtime, MeasuresQuantized):
        shapes = _shapes(model, counted, in_8_bits)
        products = {name: QuantizedGemm(*shape, with_kernel.get(name)) for name, shape in shapes.items()}
        speeds = runtime.predicted_quantized(products, precision)
        measured = {name: speed.masked for name, speed in speeds.items() if speed.masked}
    elif refused is None and precision not in QUANTIZED and isinstance(runtime, PredictsSpeed):
        shapes = _shapes(model, counted, with_kernel)
        measured = runtime.predicted({name: GemmShape(*shape, with_kernel[name]) for name, shape in shapes.items()})
    layers = {name: speedup.ratio if speedup.faster else 1.0 for name, speedup in measured.items()}
    over_fp32 = _over_fp32(counted, {name: speed.dense for name, speed in speeds.items()}, layers) if speeds else None
    macs = counted.executed_macs(with_kernel)
    return Forecast(
        target=target,
        accelerated=tuple(sorted(set(with_kernel.values()), key=str)),
        macs=macs,
        weight_bytes=_bytes_in_8_bits(counted, in_8_bits) if in_8_bits else counted.weight_bytes(with_kernel),
        speedup_bound=counted.macs / macs,
        layers=layers,
        measured=dict(measured),
        speedup=_speedup(counted, layers, over_fp32) if layers else None,
        refused=refused,
        over_fp32=over_fp32,
        untimed=sum(isinstance(model.layer(name), nn.Conv1d | nn.Conv2d) for name in with_kernel),
    )


def _over_fp32(counted: Cost, dense: Mapping[str, Speedup], masked: Mapping[str, float]) -> OverFp32:
    """The comparison with dense fp32: from the layers' speedups dense over fp32, and masked over dense 8 bits."""
    in_dense = {name: speedup.ratio for name, speedup in dense.items()}
    layers = {name: ratio * masked.get(name, 1.0) for name, ratio in in_dense.items()}
    return OverFp32(
        dense=dict(dense),
        layers=layers,
        speedup=_whole_model(counted, layers),
        dense_speedup=_whole_model(counted, in_dense),
    )


def _speedup(counted: Cost, layers: Mapping[str, float], over_fp32: OverFp32 | None) -> float:
    """The speedup of the whole model over dense in the same precision."""
    return over_fp32.speedup / over_fp32.dense_speedup if over_fp32 else _whole_model(counted, layers)


def _whole_model(counted: Cost, layers: Mapping[str, float]) -> float:
    """The speedup of the whole model over dense fp32 by those of layers, if time in fp32 is proportional to MACs."""
    return counted.macs / (counted.macs - sum(counted.layers[name] * (1 - 1 / ratio) for name, ratio in layers.items()))


def _bytes_in_8_bits(counted: Cost, quantized: Collection[str]) -> float:
    """Bytes of all parameters if the weights of these layers take one byte, and zeros are stored too."""
    return counted.weight_bytes({}) - 3 * sum(counted.weights[name] for name in quantized)


def _shapes(model: Model, counted: Cost, names: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Output channels, input channels and tokens of each Linear layer among these.

    Convolutions are left out: their cost depends on the layers around them, with which ONNX Runtime shares a blocked
    layout. They are timed when a file is built, alone and in the whole file.
    """
    shapes = {}
    for name in names:
        layer = model.layer(name)
        if isinstance(layer, nn.Linear):
            out, in_ = layer.weight.shape
            shapes[name] = (out, in_, max(1, round(counted.layers[name] / (out * in_))))
    return shapes

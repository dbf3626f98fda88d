"""Target `rtx`: TensorRT for RTX, NVIDIA's parser and compiler, which compile plans without a GPU.

Its plans are not TensorRT engines: an application that ships the runtime of TensorRT for RTX loads them, on the compute
capabilities they were compiled for. Here the compiler proves, on any machine, that NVIDIA's software accepts the graph,
which layers it fuses, and that the masked weights are in the plan. No sparse speedup is claimed: plans with and without
the sparsity flag have the same bytes.

The layers are read from the compiler's log, because a plan cannot be deserialised without a driver.
"""

import importlib.util
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.errors import BuildError, RuntimeMissing
from mpcompile.export.mask_check import file_weights
from mpcompile.export.onnx_export import Exported
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import Precision
from mpcompile.runtimes.protocol import Build, Engine, Prepared, WithoutKernels
from mpcompile.runtimes.tensorrt.logs import EngineLayer, dumped, kept_logger
from mpcompile.runtimes.tensorrt.quantization_rules import FP8_CAPABILITY
from mpcompile.runtimes.tensorrt.rules import refusals
from mpcompile.system.hashing import file_sha256

log = logging.getLogger(__name__)

CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")  # A100, A40 and RTX 30, RTX 40, RTX 50; there is no SM90
FP8_SINCE = 89  # the compute capability of FP8_CAPABILITY
NO_RUN = (
    "A plan of TensorRT for RTX was compiled and cannot run here: an application that ships its runtime loads it. "
    "It is not a TensorRT engine, and no speed is claimed for it"
)


@dataclass(frozen=True)
class SerializedPlan:
    """A compiled plan, its fused layers, and the initializers whose bytes were found in it."""

    data: bytes = field(repr=False)
    capabilities: tuple[str, ...]
    layers: tuple[EngineLayer, ...]
    initializers: frozenset[str]

    @property
    def attentions(self) -> int:
        """The number of attention layers that run as one fused kernel."""
        return sum(layer.attention for layer in self.layers)


@dataclass(frozen=True)
class TensorRTForRTX(WithoutKernels):
    """The target `rtx`. `capabilities` are the compute capabilities that plans are compiled for."""

    name: ClassVar[str] = "rtx"
    offline: ClassVar[bool] = False

    capabilities: tuple[str, ...] = CAPABILITIES

    def missing(self) -> str | None:
        """Returns what to install, or None. No GPU is needed."""
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return "tensorrt-rtx is not installed: pip install 'mpcompile[rtx]' (NVIDIA's licence, 340 MB)"
        return None

    def idle(self) -> str | None:
        """Returns why plans do not run: they are only compiled here."""
        return NO_RUN

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """Returns why `--threads` cannot be used; any precision can."""
        return None if threads is None else "--threads is for targets on a CPU; leave it out"

    def quantization(self, precision: Precision) -> Mapping[str, Any]:
        """Returns symmetric activations, and 8-bit outputs of all layers, as for TensorRT."""
        return {"activations": "fp8" if precision == "fp8" else "s8", "outputs": "all"}

    def has_quantized_kernel(self, pattern: NM) -> bool:
        """False: no sparse speed is claimed."""
        return False

    def versions(self) -> Mapping[str, str]:
        """Returns the compiler's version."""
        return {"tensorrt-rtx": _bindings().__version__}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Compiles the plan and writes it and a JSON description into `folder`. Raises RuntimeMissing or BuildError."""
        file = onnx.load(exported.onnx)
        capabilities = _supporting(exported, self.capabilities)
        try:
            plan = compiled(exported.onnx, capabilities, build.profile(exported))
        except BuildError as error:
            reasons = [str(refusal) for refusal in refusals(file)]
            raise BuildError("; ".join([str(error), *reasons])) from error
        version = self.versions()["tensorrt-rtx"]
        targets = "+".join(name.removeprefix("SM") for name in plan.capabilities)
        stem = f"{build.file_stem(exported)}-rtx{version}-sm{targets}"
        path = folder / f"{stem}.engine"
        path.write_bytes(plan.data)
        masked = {mask.initializer for mask in exported.masks}
        description = {
            "onnx": exported.onnx.name,
            "onnx_sha256": file_sha256(exported.onnx),
            "sha256": file_sha256(path),
            "tensorrt-rtx": version,
            "compute_capabilities": plan.capabilities,
            "attentions_in_one_kernel": plan.attentions,
            "masked_weights_found": sorted(masked & plan.initializers),
            "masked_weights_not_found": sorted(masked - plan.initializers),
            "layers": [asdict(layer) for layer in plan.layers],
        }
        (folder / f"{stem}.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        notes = [
            f"{exported.onnx.name} compiles for {', '.join(plan.capabilities)}: {len(plan.layers)} layers, "
            f"{plan.attentions} attentions in one kernel each"
        ]
        if left_out := [name for name in self.capabilities if name not in capabilities]:
            notes.append(f"{exported.onnx.name} is not compiled for {', '.join(left_out)}: {FP8_CAPABILITY.says}")
        if masked:
            notes.append(
                f"{len(masked & plan.initializers)} of its {len(masked)} masked weights are in the plan, every number, "
                "as stored or with their axes reordered"
                + ("; the others were not found" if masked - plan.initializers else "")
            )
        return Prepared(notes=tuple(notes))

    def build(self, exported: Exported, build: Build) -> Engine:
        """Raises BuildError: a plan cannot run here."""
        raise BuildError(NO_RUN)


def _supporting(exported: Exported, capabilities: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities that have the types of a file. Raises BuildError if none has."""
    if exported.precision != "fp8":
        return capabilities
    found = tuple(name for name in capabilities if int(name.removeprefix("SM")) >= FP8_SINCE)
    if not found:
        raise BuildError(
            f"FP8 needs compute capability 8.9 or newer, and plans are compiled for {', '.join(capabilities)}; use int8"
        )
    return found


def compiled(
    file: Path, capabilities: Sequence[str], profile: tuple[tuple[int, ...], ...] | None = None
) -> SerializedPlan:
    """Compiles an ONNX file for these compute capabilities. Raises RuntimeMissing or BuildError.

    `profile` holds the smallest, usual and largest image shape, for a file with a free batch.
    """
    trt = _bindings()
    logger = kept_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{e.node_operator()} {e.node_name()}: {' '.join(e.desc().split())}" for e in errors)
        raise BuildError(f"TensorRT for RTX {trt.__version__} cannot parse {file.name}: {reasons}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        capability = getattr(trt.ComputeCapability, name, None)
        if capability is None:
            raise BuildError(f"TensorRT for RTX {trt.__version__} does not compile for {name}")
        config.set_compute_capability(capability, index)
    if profile is not None:
        shapes = builder.create_optimization_profile()
        shapes.set_shape(network.get_input(0).name, *profile)
        config.add_optimization_profile(shapes)
    # No timing cache: creating one looks for a GPU.
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(
            f"TensorRT for RTX {trt.__version__} cannot compile {file.name} for {', '.join(capabilities)}: "
            f"{logger.errors() or 'no reason given'}"
        )
    data = bytes(plan)
    return SerializedPlan(
        data, tuple(capabilities), tuple(dumped(logger.text())), initializers_in(data, onnx.load(file))
    )


def initializers_in(plan: bytes, file: onnx.ModelProto) -> frozenset[str]:
    """Returns the initializers of a file's weights whose bytes are in a plan, in one of the layouts of `_layouts`."""
    stored = {tensor.name: tensor for tensor in file.graph.initializer}
    names = {weight.initializer for weight in file_weights(file)}
    return frozenset(
        name
        for name in names
        if any(layout.tobytes() in plan for layout in _layouts(numpy_helper.to_array(stored[name])))
    )


def _layouts(values: NDArray[Any]) -> Iterable[NDArray[Any]]:
    """Yields a weight as stored, transposed, and with the input channels last, as tensor cores read it."""
    yield values
    if values.ndim == 2:
        yield np.ascontiguousarray(values.T)
    if values.ndim == 4:
        yield np.ascontiguousarray(values.transpose(0, 2, 3, 1))
        yield np.ascontiguousarray(values.transpose(2, 3, 1, 0))


def _bindings() -> Any:
    """Imports tensorrt_rtx. Raises RuntimeMissing."""
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise RuntimeMissing(
            TensorRTForRTX().missing() or f"tensorrt_rtx is installed and does not import: {error}"
        ) from error
    return tensorrt_rtx

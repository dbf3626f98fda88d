"""Parses TensorRT's reports on its engines, of all versions: `(Sparsity)` log lines and the inspector's JSON.

Up to early 10.x the log only names layers. Later versions count them, and name them at VERBOSE. The lines appear once
per round of tactics, so the last of each kind is valid. The inspector of 11.x separates format and type; 10.x has one
key `Format/Datatype`. Without DETAILED profiling its layers are plain names. What cannot be parsed is left out, never
guessed: a truncated log gives "unknown", which differs from "no sparse kernel was chosen".
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A line without a line end was truncated, and is not parsed.
REST = r"(?::[ \t]*(?P<names>[^\n]*))?[^\n]*\n"
ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics"
    r"|Layers eligible for sparse math)" + REST
)
CHOSEN = re.compile(
    r"\(Sparsity\) (?:Chose (?P<count>\d+) layer\(s\) using sparse tactics"
    r"|TRT inference plan picked sparse implementation for layers)" + REST
)
SPARSE_KERNEL = re.compile(r"spars|spmma|sptensor|sp_?gemm", re.IGNORECASE)
HALF = re.compile(r"half|fp16|float16|bf16|fp8|int8", re.IGNORECASE)
MHA = re.compile(r"_mha|mha_", re.IGNORECASE)
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
NAME_SEPARATOR = re.compile(r"\s*(?:,| \+ | \|\| )\s*")
DUMPED = re.compile(r"^Name: ([^,]+), LayerType: ([^,]+),(.*)$", re.MULTILINE)
TACTIC = re.compile(r"TacticName: ([^,]*),")


@dataclass(frozen=True, slots=True)
class SparsityLog:
    """Numbers of layers (None if the log has no such line), and their names if the log has them."""

    eligible: int | None
    eligible_names: tuple[str, ...]
    chosen: int | None
    chosen_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """A layer of an engine: the ONNX nodes fused into it, its kernel, and the types of its inputs and outputs."""

    name: str
    kind: str
    kernel: str
    onnx: tuple[str, ...]  # names of the fused nodes, if known
    types: tuple[str, ...]

    @property
    def sparse(self) -> bool:
        """Whether the kernel's name is that of a sparse kernel."""
        return bool(SPARSE_KERNEL.search(self.kernel))

    @property
    def in_half_precision(self) -> bool:
        """Whether an input, output or weight has 16 bits or fewer."""
        return any(HALF.search(kind) for kind in self.types)

    @property
    def attention(self) -> bool:
        """Whether it is a whole attention fused into one kernel."""
        return bool(MHA.search(self.name) or MHA.search(self.kernel))


def sparsity_in(log: str) -> SparsityLog:
    """Returns the eligible and the chosen layers that a builder's log reports."""
    eligible, chosen = _last(ELIGIBLE, log), _last(CHOSEN, log)
    return SparsityLog(*(eligible or (None, ())), *(chosen or (None, ())))


def _last(pattern: re.Pattern[str], log: str) -> tuple[int | None, tuple[str, ...]] | None:
    """Returns the count and the names in the last line that matches, or None."""
    lines = list(pattern.finditer(log))
    if not lines:
        return None
    names = tuple(name for name in re.split(r"\s*,\s*", (lines[-1]["names"] or "").strip()) if name)
    if lines[-1]["count"] is not None:
        return int(lines[-1]["count"]), names
    return len(names), names


def nodes_in(layer: str) -> tuple[str, ...]:
    """Returns the ONNX nodes in a layer's name, in which TensorRT writes `a + b` and `a || b` for fused nodes."""
    return tuple(part for part in NAME_SEPARATOR.split(layer) if part)


def inspected(text: str) -> list[EngineLayer]:
    """Returns the layers in the inspector's JSON; none if the text is truncated or not JSON."""
    try:
        content = json.loads(text)
    except ValueError:
        return []
    layers = content.get("Layers") if isinstance(content, Mapping) else None
    rows = layers if isinstance(layers, list) else []
    return [_layer(row) for row in rows if isinstance(row, str | Mapping)]


def _layer(row: str | Mapping[str, Any]) -> EngineLayer:
    """Returns one layer, from its plain name or from its JSON object."""
    if isinstance(row, str):
        return EngineLayer(row, "", "", nodes_in(row), ())
    name = str(row.get("Name", ""))
    nodes = tuple(ONNX_LAYER.findall(str(row.get("Metadata", ""))))
    tensors = [
        tensor
        for side in (row.get("Inputs"), row.get("Outputs"))
        for tensor in (side if isinstance(side, list) else ())
        if isinstance(tensor, Mapping)
    ]
    reported = [tensor.get("Datatype") or tensor.get("Format/Datatype") for tensor in tensors]
    weights = row.get("Weights")
    reported += [weights.get("Type")] if isinstance(weights, Mapping) else []
    # With a free batch, a type may be "N/A due to dynamic shapes".
    types = tuple(str(kind) for kind in reported if kind and not str(kind).startswith("N/A"))
    kernel = str(row.get("TacticName", ""))
    return EngineLayer(name, str(row.get("LayerType", "")), kernel, nodes or nodes_in(name), types)


def dumped(log: str) -> list[EngineLayer]:
    """Returns the layers that TensorRT for RTX writes into its log at DETAILED profiling verbosity."""
    layers = []
    for name, kind, rest in DUMPED.findall(log):
        tactic = TACTIC.search(rest)
        types = tuple(re.findall(r"Datatype: (\w+)", rest))
        layers.append(EngineLayer(name, kind, tactic[1] if tactic else "", (), types))
    return layers


def kept_logger(trt: Any) -> Any:
    """Returns a logger for `trt`, the module tensorrt or tensorrt_rtx, that keeps every message."""

    class KeptLogger(trt.ILogger):  # type: ignore[misc] # its base class is known only when the bindings are imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            self.messages.append((severity, msg))

        def text(self) -> str:
            return "\n".join(message for _, message in self.messages) + "\n"

        def errors(self) -> str:
            worst = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            return "; ".join(" ".join(message.split()) for severity, message in self.messages if severity in worst)

    return KeptLogger()

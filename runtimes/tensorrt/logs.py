"""What TensorRT says of its engines: the `(Sparsity)` lines of its log and the inspector's JSON, of every era.

Up to early 10.x the log names layers only; later it counts them, and names them at VERBOSE. The lines come once for
each round of tactics, so the last of each kind counts. The inspector of 11.x keeps format and type apart where 10.x
had `Format/Datatype`; without DETAILED profiling its layers are plain names. What cannot be read is left out and never
guessed: a log that was cut off says nothing, which is not the same as that no kernel was chosen.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A line that does not end was cut off, and is not read.
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
APART = re.compile(r"\s*(?:,| \+ | \|\| )\s*")
DUMPED = re.compile(r"^Name: ([^,]+), LayerType: ([^,]+),(.*)$", re.MULTILINE)
TACTIC = re.compile(r"TacticName: ([^,]*),")


@dataclass(frozen=True, slots=True)
class SparsityLog:
    """How many layers, and which ones where the log names them; None where it has no such line."""

    eligible: int | None
    eligible_names: tuple[str, ...]
    chosen: int | None
    chosen_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """A layer of an engine: what was fused into it, its kernel, and the types of its inputs and results."""

    name: str
    kind: str
    kernel: str
    onnx: tuple[str, ...]  # the nodes it came from, where that is told
    types: tuple[str, ...]

    @property
    def sparse(self) -> bool:
        """Whether its kernel's name is that of a sparse one."""
        return bool(SPARSE_KERNEL.search(self.kernel))

    @property
    def in_half_precision(self) -> bool:
        """Whether anything that goes in or comes out has 16 bits or fewer."""
        return any(HALF.search(kind) for kind in self.types)

    @property
    def attention(self) -> bool:
        """Whether a whole attention runs in it."""
        return bool(MHA.search(self.name) or MHA.search(self.kernel))


def sparsity_in(log: str) -> SparsityLog:
    """What a builder's log says of sparse tactics."""
    eligible, chosen = _last(ELIGIBLE, log), _last(CHOSEN, log)
    return SparsityLog(*(eligible or (None, ())), *(chosen or (None, ())))


def _last(pattern: re.Pattern[str], log: str) -> tuple[int | None, tuple[str, ...]] | None:
    """The count and the names of the last line of a kind."""
    found = list(pattern.finditer(log))
    if not found:
        return None
    names = tuple(name for name in re.split(r"\s*,\s*", (found[-1]["names"] or "").strip()) if name)
    if found[-1]["count"] is not None:
        return int(found[-1]["count"]), names
    return len(names), names


def nodes_in(layer: str) -> tuple[str, ...]:
    """The ONNX nodes that a layer's name is made of, as `a + b` for fused ones and `a || b` for joined ones."""
    return tuple(part for part in APART.split(layer) if part)


def inspected(text: str) -> list[EngineLayer]:
    """The layers in the inspector's JSON; none where the text is cut off or no JSON."""
    try:
        content = json.loads(text)
    except ValueError:
        return []
    layers = content.get("Layers") if isinstance(content, Mapping) else None
    rows = layers if isinstance(layers, list) else []
    return [_layer(row) for row in rows if isinstance(row, str | Mapping)]


def _layer(row: str | Mapping[str, Any]) -> EngineLayer:
    """One layer: a plain name, or all there is to say."""
    if isinstance(row, str):
        return EngineLayer(row, "", "", nodes_in(row), ())
    name = str(row.get("Name", ""))
    named = tuple(ONNX_LAYER.findall(str(row.get("Metadata", ""))))
    tensors = [
        tensor
        for side in (row.get("Inputs"), row.get("Outputs"))
        for tensor in (side if isinstance(side, list) else ())
        if isinstance(tensor, Mapping)
    ]
    said = [tensor.get("Datatype") or tensor.get("Format/Datatype") for tensor in tensors]
    weights = row.get("Weights")
    said += [weights.get("Type")] if isinstance(weights, Mapping) else []
    # Where the batch is free, types may be "N/A due to dynamic shapes", which says nothing.
    types = tuple(str(kind) for kind in said if kind and not str(kind).startswith("N/A"))
    kernel = str(row.get("TacticName", ""))
    return EngineLayer(name, str(row.get("LayerType", "")), kernel, named or nodes_in(name), types)


def dumped(log: str) -> list[EngineLayer]:
    """The layers that TensorRT for RTX writes into its log when it compiles at DETAILED."""
    layers = []
    for name, kind, rest in DUMPED.findall(log):
        tactic = TACTIC.search(rest)
        types = tuple(re.findall(r"Datatype: (\w+)", rest))
        layers.append(EngineLayer(name, kind, tactic[1] if tactic else "", (), types))
    return layers


def kept_logger(trt: Any) -> Any:
    """A logger for one of NVIDIA's modules that keeps every message."""

    class Kept(trt.ILogger):  # type: ignore[misc] # a class of the bindings, known only once they are there
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

    return Kept()

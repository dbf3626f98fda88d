"""What a TensorRT engine made of each masked layer: the rules' verdicts, completed by its log, layers and times."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mpcompile.export.mask_check import ProvenMask
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.runtimes.tensorrt.logs import EngineLayer, SparsityLog, nodes_in

PRODUCT = re.compile(r"gemm|conv|matmul|matrix|correlation|_fc|xmma", re.IGNORECASE)


def completed(
    verdicts: Sequence[LayerVerdict],
    masks: Sequence[ProvenMask],
    log: SparsityLog,
    layers: Sequence[EngineLayer],
    sparse_ms: Mapping[str, float],
    dense_ms: Mapping[str, float],
    dense_layers: Sequence[EngineLayer] = (),
) -> tuple[LayerVerdict, ...]:
    """The verdicts with what the engine chose, its kernels and their times.

    Times are those of the layers of the engine (`sparse_ms`) and of one of the same file without sparse kernels
    (`dense_ms`), by layer name; a layer that was fused with others has the time of all.
    """
    nodes = {mask.initializer: set(mask.nodes) for mask in masks}
    eligible = {node for name in log.eligible_names for node in nodes_in(name)}
    chosen = {node for name in log.chosen_names for node in nodes_in(name)}
    rows = []
    for verdict in verdicts:
        own = nodes[verdict.initializer]
        holder = _holder(own, layers)
        taken, reason = _told(verdict, own, log, eligible, chosen, holder)
        before = _holder(own, dense_layers)
        rows.append(
            replace(
                verdict,
                chosen=taken,
                reason=reason,
                kernel=holder.kernel or None if holder else None,
                sparse_ms=sparse_ms.get(holder.name) if holder else None,
                dense_ms=dense_ms.get(before.name) if before else None,
            )
        )
    return tuple(rows)


def _holder(nodes: set[str], layers: Sequence[EngineLayer]) -> EngineLayer | None:
    """The engine's layer that these nodes became a part of: of several, one that multiplies, not a copy or a cast."""
    found = [layer for layer in layers if nodes.intersection(layer.onnx)]

    def rank(layer: EngineLayer) -> tuple[bool, bool]:
        return layer.sparse, bool(PRODUCT.search(f"{layer.kind} {layer.kernel}"))

    return max(found, key=rank, default=None)


def _told(
    verdict: LayerVerdict,
    own: set[str],
    log: SparsityLog,
    eligible: set[str],
    chosen: set[str],
    holder: EngineLayer | None,
) -> tuple[bool | None, str]:
    """Whether a sparse kernel was chosen, and how that is known or why not."""
    if own & chosen:
        return True, "the builder's log says that it chose a sparse kernel"
    if holder and holder.sparse:
        return True, f"its kernel is a sparse one, {holder.kernel}"
    if log.chosen is None:
        return None, "the builder's log has no line on sparsity: it is cut off, or the sparsity flag was off"
    if own & eligible:
        return False, "the builder found it eligible and did not choose a sparse kernel"
    if verdict.eligible is False:
        return False, verdict.reason
    if log.chosen == 0:
        return False, f"the builder chose sparse kernels for none of {log.eligible or 0} eligible layers"
    if len(chosen) < log.chosen and not log.chosen_names:
        return None, f"the builder chose sparse kernels for {log.chosen} layers and its log does not name them"
    return False, "the builder's log does not have it among the layers with sparse kernels"

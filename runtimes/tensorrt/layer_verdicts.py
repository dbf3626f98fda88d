"""Completes the rules' verdict on each masked layer with the builder's log, the engine's layers and their times."""

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
    """Returns the verdicts with the kernel that the engine chose for each masked layer, and its time.

    `log` and `layers` are those of the engine. `sparse_ms` are its times by layer name. `dense_ms` and `dense_layers`
    are those of an engine of the same file without sparse kernels. A fused layer has the time of all its nodes.
    """
    nodes = {mask.initializer: set(mask.nodes) for mask in masks}
    eligible = {node for name in log.eligible_names for node in nodes_in(name)}
    chosen = {node for name in log.chosen_names for node in nodes_in(name)}
    rows = []
    for verdict in verdicts:
        own = nodes[verdict.initializer]
        layer, dense_layer = _layer_of(own, layers), _layer_of(own, dense_layers)
        sparse, reason = _sparse_kernel(verdict, own, log, eligible, chosen, layer)
        rows.append(
            replace(
                verdict,
                chosen=sparse,
                reason=reason,
                kernel=layer.kernel or None if layer else None,
                sparse_ms=sparse_ms.get(layer.name) if layer else None,
                dense_ms=dense_ms.get(dense_layer.name) if dense_layer else None,
            )
        )
    return tuple(rows)


def _layer_of(nodes: set[str], layers: Sequence[EngineLayer]) -> EngineLayer | None:
    """Returns the engine's layer that contains these nodes; of several, one that multiplies, not a copy or a cast."""
    candidates = [layer for layer in layers if nodes.intersection(layer.onnx)]

    def rank(layer: EngineLayer) -> tuple[bool, bool]:
        return layer.sparse, bool(PRODUCT.search(f"{layer.kind} {layer.kernel}"))

    return max(candidates, key=rank, default=None)


def _sparse_kernel(
    verdict: LayerVerdict,
    own: set[str],
    log: SparsityLog,
    eligible: set[str],
    chosen: set[str],
    layer: EngineLayer | None,
) -> tuple[bool | None, str]:
    """Returns whether the nodes `own` have a sparse kernel (None: unknown), and the evidence or the reason."""
    if own & chosen:
        return True, "the builder's log lists it among the layers with sparse kernels"
    if layer and layer.sparse:
        return True, f"its kernel is sparse: {layer.kernel}"
    if log.chosen is None:
        return None, "the builder's log has no line on sparsity: it is truncated, or the sparsity flag was off"
    if own & eligible:
        return False, "the builder found it eligible and did not choose a sparse kernel"
    if verdict.eligible is False:
        return False, verdict.reason
    if log.chosen == 0:
        return False, f"the builder chose sparse kernels for none of {log.eligible or 0} eligible layers"
    if len(chosen) < log.chosen and not log.chosen_names:
        return None, f"the builder chose sparse kernels for {log.chosen} layers and its log does not name them"
    return False, "the builder's log does not list it among the layers with sparse kernels"

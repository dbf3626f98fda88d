"""What `--dry-run` says of memory: the peak of the process during nm-mask, and what goes to files.

nm-mask holds most: two more copies of the weights, the values of all calibration images in two graphs at one point
(passes/reconstruct/layerwise.py), and the second moments and solution of the widest layer.
"""

from dataclasses import dataclass

from mpcompile.data.images import Data
from mpcompile.driver.run_plan import RunPlan
from mpcompile.ir.model import Model
from mpcompile.ir.placement import tensors_of
from mpcompile.passes import NMMask
from mpcompile.passes.reconstruct.calibration_batches import BATCH, open_bytes, peak_bytes
from mpcompile.passes.reconstruct.second_moments import solving_bytes
from mpcompile.system.device import CPU
from mpcompile.system.memory import unused_bytes
from mpcompile.system.resource_errors import resident_bytes

GRAPHS = 2  # that run side by side


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Bytes of memory at the peak, and bytes of activations in files; None if the system does not report its memory."""

    peak_bytes: int | None
    file_bytes: int | None


def memory_forecast(plan: RunPlan, model: Model, data: Data) -> MemoryForecast:
    """The forecast for a captured model; call it within the run's memory limit, before any pass has run."""
    resident, unused = resident_bytes(), unused_bytes(CPU)
    if resident is None or unused is None:
        return MemoryForecast(None, None)
    weights = GRAPHS * sum(tensor.numel() * tensor.element_size() for tensor in set(tensors_of(model.graph)))
    masks = any(isinstance(step, NMMask) for step in plan.passes)
    if not masks or not len(data.calibration):
        return MemoryForecast(resident + weights, 0)
    solving = max((solving_bytes(layer) for _, layer in model.layers()), default=0)
    each = GRAPHS * peak_bytes(model)
    activations = int(each * len(data.calibration))
    limit = max(0, unused - weights - solving - open_bytes(model))
    open_batch = int(each * min(BATCH, len(data.calibration)))
    kept = min(activations, max(limit, open_batch))
    return MemoryForecast(resident + weights + solving + kept, max(0, activations - kept))

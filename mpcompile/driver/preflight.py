"""Checks of a run that need no work: settings that contradict each other, images that are too few, space on the disk.

`compile` makes them before its first stage that takes long, and `preview` (--dry-run) makes all of them.
"""

import shutil
from pathlib import Path

from mpcompile.analysis.output_head import named_output, with_head
from mpcompile.data.images import Data
from mpcompile.driver.plugins import GIVEN
from mpcompile.driver.quantization import require_consistent_precision
from mpcompile.driver.run_plan import RunPlan
from mpcompile.errors import ResourceError, UsageError
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.ir.precision import QUANTIZED
from mpcompile.passes.mp_budget.mp_budget import MPBudget
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes.inputs import TakesInputs
from mpcompile.system.distributed import process_rank
from mpcompile.system.resource_errors import format_bytes


def require_consistent(plan: RunPlan, with_images: bool) -> None:
    """Raises UsageError if the recipe asks for a search, a precision or a gate that is not possible.

    Nothing is loaded for it.
    """
    recipe = plan.recipe
    if recipe.tune is not None:
        if recipe.gates.max_drop is None:
            raise UsageError("tune needs a limit on the loss of accuracy; give --max-drop (gates.max_drop)")
        if process_rank().size > 1:
            raise UsageError("tune runs in one process; start it without torchrun, then train the recipe that it finds")
        if own := [what for what, origin in plan.origins.items() if origin.endswith(GIVEN)]:
            raise UsageError(f"tune cannot name {own[0]} in a recipe, as it is {GIVEN}; install it with an entry point")
    require_consistent_precision(recipe, plan.passes, plan.runtime, with_images)
    if recipe.submodule is not None and recipe.gates.on_outputs:
        raise UsageError(
            "--max-drop limits a drop of accuracy, and the outputs of a part (--submodule) are no answers; leave it "
            "out. The report compares the whole model with the dense one"
        )
    if recipe.metric is not None and not with_images:
        raise UsageError("--metric is measured on images; give --data PKG.MOD:FN, which returns (inputs, target) pairs")
    if (recipe.gates.max_drop is not None or recipe.gates.max_ece is not None) and not with_images:
        raise UsageError("a gate on accuracy (--max-drop) needs labelled images (--data)")
    if recipe.gates.max_kl is not None and not with_images:
        raise UsageError("a gate on the divergence (--max-drop kl=…) needs held-out images; give --data")


def require_inputs(plan: RunPlan, dense: Model, images: Data) -> None:
    """Raises a MpcompileError if the gate or a pass cannot work with this model and these images."""
    _require_accuracy(plan, dense, images)
    _require_probabilities(plan, dense, images)
    if plan.recipe.gates.max_drop is not None and not images.held_out.judged:
        raise UsageError(f"a gate on accuracy (--max-drop) needs labelled images; {'; '.join(images.notes)}")
    require_inputs_of_target(plan, dense, images)
    PassManager(plan.passes).require_inputs(dense, images)
    if plan.passes and isinstance(plan.passes[0], MPBudget):  # passes before it could change what it can reach
        plan.passes[0].require_reachable(dense, images)


def require_inputs_of_target(plan: RunPlan, dense: Model, images: Data) -> None:
    """Raises UsageError if the model has several inputs and the target, the precision or the images give one alone."""
    if not dense.others:
        return
    names = ", ".join(dense.input_names)
    runtime = plan.runtime
    if not (isinstance(runtime, TakesInputs) and runtime.several_inputs):
        raise UsageError(f"the model takes {names}, and target {runtime.name} runs models with one input; use ort")
    if plan.recipe.precision in QUANTIZED:
        raise UsageError(
            f"the model takes {names}, and {plan.recipe.precision} is for models with one input; use fp32 or fp16"
        )
    if trains := next((step.name for step in plan.passes if step.name in ("distill", "polish")), None):
        raise UsageError(f"the model takes {names}, and {trains} trains models with one input; leave it out")
    for split in (images.calibration, images.validation, images.training, images.held_out):
        if len(split) and len(split.first_inputs(1)) != len(dense.input_names):
            raise UsageError(
                f"the model takes {names}, and the data give {len(split.first_inputs(1))} of them; give --data "
                "PKG.MOD:FN, a function that returns (inputs, target) pairs with all inputs"
            )


def _require_accuracy(plan: RunPlan, dense: Model, images: Data) -> None:
    """Raises UsageError if the drop of accuracy is limited and the outputs have no decision that could be right."""
    limited = [step.name for step in plan.passes if getattr(step, "max_drop", None) is not None]
    if images.held_out.metric is not None or (plan.recipe.gates.max_drop is None and not limited):
        return
    if _deciding_head(plan, dense) is None:
        raise UsageError(
            f"--max-drop (max_drop) limits the loss of accuracy, and {named_output(dense)} is taken as "
            "values, which have none; give --metric PKG.MOD:FN, limit max_shift of restore, or give --head softmax"
        )


def _deciding_head(plan: RunPlan, dense: Model) -> Head | None:
    """The recipe's head on these outputs; None if the outputs are values, which have no decision."""
    headed, _ = with_head(dense, plan.recipe.head, None)
    return headed.head if headed.head is not None and headed.head.decides else None


def _require_probabilities(plan: RunPlan, dense: Model, images: Data) -> None:
    """Raises UsageError if a limit on calibration or divergence cannot be measured on these outputs and images."""
    gates = plan.recipe.gates
    if gates.max_ece is None and gates.max_kl is None:
        return
    head = _deciding_head(plan, dense)
    if head is None:
        raise UsageError(
            f"--max-drop ece and kl limit changes of probabilities, and {named_output(dense)} is taken as values, "
            "which have none; leave them out, or give --head softmax"
        )
    if not len(images.held_out):
        raise UsageError(f"a gate on the divergence (--max-drop kl=…) needs held-out images; {'; '.join(images.notes)}")
    if gates.max_ece is None:
        return
    if head.kind == "ordinal" or dense(dense.example_inputs).ndim > 2:
        raise UsageError(
            f"a gate on the calibration error (--max-drop ece=…) needs one label for each output that decides, and "
            f"{named_output(dense)} gives ranks or maps; leave ece out"
        )
    if not images.held_out.labelled:
        raise UsageError(
            f"a gate on the calibration error (--max-drop ece=…) needs labelled images; {'; '.join(images.notes)}"
        )


def require_space(output: Path, least_bytes: int) -> None:
    """Raises ResourceError if the disk of the output folder has less free space than the output needs at least."""
    existing = next(parent for parent in output.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < least_bytes:
        raise ResourceError(
            f"the disk is too full: {format_bytes(free)} are left under {existing}, and the whole output takes at "
            f"least {format_bytes(least_bytes)}; free some space, or name a folder on another disk with --output"
        )

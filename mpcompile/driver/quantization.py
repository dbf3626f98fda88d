"""The settings of a recipe in 8 bits: what the target decides, and settings that contradict each other."""

import dataclasses
from collections.abc import Sequence

from mpcompile.errors import UsageError
from mpcompile.export.onnx_export import QUANTIZED_OPSET
from mpcompile.ir.precision import QUANTIZED
from mpcompile.passes import DropUnreadTokens, Quantize, ScaleMigration
from mpcompile.pipeline.pass_manager import Pass
from mpcompile.pipeline.pass_record import Effect
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes import RunsQuantized, Runtime

# The passes of the dense model in 8 bits. The first two are exact and serve a model without masks as well.
DENSE_QUANTIZED = (DropUnreadTokens, ScaleMigration, Quantize)


def with_target_defaults(recipe: Recipe, runtime: Runtime) -> Recipe:
    """The recipe with the parameters of its 8-bit passes that the target decides, where it does not give them."""
    if recipe.precision not in QUANTIZED or not isinstance(runtime, RunsQuantized):
        return recipe
    decided = runtime.quantization(recipe.precision)
    for kind in (ScaleMigration, Quantize):
        step = recipe.step(kind.name)
        if step is not None:
            fields = {row.name for row in dataclasses.fields(kind)}
            params = {key: value for key, value in decided.items() if key in fields}
            if step.params.get("activations") == "fp8":
                params.pop("lanes", None)  # of integers: an int8 target's would hide that fp8 is the mistake
            recipe = recipe.with_params(kind.name, {**params, **step.params})
    return recipe


def require_consistent_precision(recipe: Recipe, passes: Sequence[Pass], runtime: Runtime, with_images: bool) -> None:
    """Raises UsageError if the precision, the pass `quantize`, the target and the images do not fit each other."""
    step = next((step for step in passes if isinstance(step, Quantize)), None)
    precision = recipe.precision
    if precision not in QUANTIZED:
        if step is not None:
            raise UsageError(
                f"the recipe has the pass quantize, and precision {precision} cannot hold its 8-bit weights; give "
                "--precision int8, or remove the pass"
            )
        return
    if step is None:
        raise UsageError(
            f"the recipe has precision {precision} and no pass quantize; add quantize before certify, or give "
            "--precision fp32"
        )
    if (step.activations == "fp8") != (precision == "fp8"):
        raise UsageError(
            f"quantize: activations is {step.activations}, and the recipe has precision {precision}; leave activations "
            "out"
        )
    if isinstance(runtime, RunsQuantized):
        needed = runtime.quantization(precision).get("activations", step.activations)
        if step.activations != needed:
            raise UsageError(
                f"quantize: activations is {step.activations}, and the {precision} kernels of target {runtime.name} "
                f"take {needed}; set activations to {needed}"
            )
    if recipe.opset is not None and recipe.opset < QUANTIZED_OPSET:
        raise UsageError(
            f"opset {recipe.opset} is too early for {precision}, which needs opset {QUANTIZED_OPSET} or later"
        )
    if not with_images:
        raise UsageError(
            f"precision {precision} needs images, on which the ranges of activations are measured; give --data"
        )


def quantizes_alone(passes: Sequence[Pass]) -> bool:
    """Whether only passes of DENSE_QUANTIZED change the model, so that their result is the dense model in 8 bits."""
    names = [step.name for step in passes if step.effect is not Effect.ANALYSIS]
    return Quantize.name in names and set(names) <= {kind.name for kind in DENSE_QUANTIZED}

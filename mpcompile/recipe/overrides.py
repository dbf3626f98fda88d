"""Options of the command line that override a recipe."""

from typing import Any

from mpcompile.errors import UsageError
from mpcompile.ir.precision import QUANTIZED
from mpcompile.recipe.schema import Recipe, Step

# Passes after which `tome`, `restore`, `distill` and `polish` are inserted.
MASKING = ("mp-budget", "permute", "nm-mask")
# Passes after which `quantize` is inserted.
FLOATING = (*MASKING, "tome", "batch-norm", "restore", "distill", "polish", "confidence")
CORRECTIONS = ("batch-norm", "confidence")  # of what masks and token merging lose
OPTION_OF = {"signal": "budget"}  # parameter of mp-budget -> its option, if the two names differ


def overridden(
    recipe: Recipe,
    *,
    budget: dict[str, Any],
    permute: dict[str, Any] | None,
    mask: dict[str, Any],
    tome: dict[str, Any] | None = None,
    restore: dict[str, Any] | None = None,
    distill: dict[str, Any] | None = None,
    polish: dict[str, Any] | None = None,
    quantize: dict[str, Any] | None = None,
    exact: dict[str, dict[str, Any]] | None = None,
    evidence: dict[str, dict[str, Any]] | None = None,
    confidence: bool = True,
    top: dict[str, Any],
    nested: dict[str, dict[str, Any]],
) -> Recipe:
    """The recipe, with its values replaced by those of the command-line options. None and empty options change nothing.

    If the recipe has neither mp-budget nor nm-mask and patterns are given, mp-budget, permute and nm-mask are appended.
    If it has nm-mask but no mp-budget, nm-mask gets the pattern and the choice of layers. `tome`, `distill` and
    `polish` are inserted if they are given and missing. `exact`, `restore` and `evidence` are inserted only if the
    recipe has no passes.
    `quantize` is inserted if the precision is int8 or fp8 and it is missing, with `scale-migration` before all passes
    that lose accuracy. It gets the limit of `restore`. If the recipe then masks no layer, the
    choice of layers belongs to `quantize` alone, and `batch-norm` and `confidence`, which correct for masks, are not
    inserted.

    Args:
        recipe: the recipe to start from; it is not changed.
        budget: parameters of mp-budget.
        permute: parameters of permute; None removes the pass.
        mask: parameters of nm-mask.
        tome: parameters of tome.
        restore: parameters of restore.
        distill: parameters of distill.
        polish: parameters of polish.
        quantize: parameters of scale-migration and quantize: the choice of layers; used only in int8 and fp8.
        exact: parameters of the exact passes that serve every model (drop-unread-tokens), by name; they come after
            mp-budget and before all others.
        evidence: pass name -> parameters, for the passes that correct and certify the result (batch-norm, confidence,
            certify).
        confidence: False removes the pass confidence.
        top: keys of the recipe itself.
        nested: section of the recipe -> its keys.

    Raises UsageError if an option needs a pass that the recipe does not have.
    """
    budget = {key: value for key, value in budget.items() if value}
    mask = {key: value for key, value in mask.items() if value}
    order = {key: value for key, value in (permute or {}).items() if value}
    tome = {key: value for key, value in (tome or {}).items() if value is not None}
    steps = list(recipe.passes)
    names = {step.name for step in steps}
    in_8_bits = (top.get("precision") or recipe.precision) in QUANTIZED
    quantize = {key: value for key, value in (quantize or {}).items() if value} if in_8_bits else {}
    if in_8_bits and "patterns" not in budget and not names & {"mp-budget", "nm-mask"}:
        budget = {key: value for key, value in budget.items() if key not in quantize}
    if (budget or mask) and not names & {"mp-budget", "nm-mask"}:
        if "patterns" not in budget:
            flags = ", ".join(f"--{OPTION_OF.get(key, key)}" for key in (budget | mask))
            raise UsageError(f"{flags} needs a pattern; give --pattern too")
        steps += [Step(name=name) for name in MASKING if name != "permute" or permute is not None]
    elif budget and "mp-budget" not in names:
        budget_only = [key for key in ("macs", "signal") if key in budget]
        if budget_only or len(budget.get("patterns", ())) > 1:
            option = f"--{OPTION_OF.get(budget_only[0], budget_only[0])}" if budget_only else "more than one --pattern"
            raise UsageError(f"{option} needs the budget pass; add mp-budget to the recipe's passes")
        mask |= {"pattern" if key == "patterns" else key: value for key, value in budget.items()}
        if "pattern" in mask:
            [mask["pattern"]] = mask["pattern"]
    if tome:
        steps = _with(steps, "tome", after=MASKING)
        if tome["r"] != "auto":  # `macs` of the recipe belongs to r: auto
            steps = [_without(step, "macs") if step.name == "tome" else step for step in steps]
    if not recipe.passes and (steps or in_8_bits):
        kept = {name: params for name, params in (evidence or {}).items() if steps or name not in CORRECTIONS}
        steps += [Step(name=name, params=params) for name, params in kept.items()]
    changes_floats = any(step.name in FLOATING for step in steps)
    if (
        restore and not recipe.passes and (changes_floats or not in_8_bits)
    ):  # a recipe with passes gets no restore: the limit is only a gate there
        steps = _with(steps, "restore", after=(*MASKING, "tome", "batch-norm"))
    if distill:
        steps = _with(steps, "distill", after=(*MASKING, "tome", "batch-norm", "restore"))
    if polish:
        steps = _with(steps, "polish", after=(*MASKING, "tome", "batch-norm", "restore", "distill"))
    if in_8_bits and all(step.name != "quantize" for step in steps):
        steps = _with(steps, "quantize", after=FLOATING)
        place = next(index for index, step in enumerate(steps) if step.name in (*FLOATING[1:], "quantize"))
        if all(step.name != "scale-migration" for step in steps):  # exact, so it comes before every pass that loses
            steps = [*steps[:place], Step(name="scale-migration"), *steps[place:]]
    if not recipe.passes and steps:
        planning = sum(step.name == "mp-budget" for step in steps)  # first, if it is there
        inserted = [Step(name=name, params=params) for name, params in (exact or {}).items()]
        steps = [*steps[:planning], *inserted, *steps[planning:]]
    if permute is None:
        steps = [step for step in steps if step.name != "permute"]
    elif order and all(step.name != "permute" for step in steps):
        raise UsageError(f"--{next(iter(order))} needs the permutation; add permute to the recipe's passes")
    if not confidence:
        steps = [step for step in steps if step.name != "confidence"]
    changes = {"mp-budget": budget, "permute": order, "nm-mask": mask, "tome": tome}
    changes |= {"restore": restore or {}, "distill": distill or {}, "polish": polish or {}, "scale-migration": quantize}
    changes["quantize"] = {**quantize, **(restore or {} if not recipe.passes else {})}  # the same limit
    content = recipe.model_dump(mode="json")
    # Steps, not their text: patterns stay NM values, and are not parsed again.
    content["passes"] = [
        step.model_copy(update={"params": {**step.params, **changes.get(step.name, {})}}) for step in steps
    ]
    content |= {key: value for key, value in top.items() if value is not None}
    for section, values in nested.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            content[section] = {**(content[section] or {}), **given}
    return Recipe.checked(content, "options")


def _with(steps: list[Step], name: str, after: tuple[str, ...]) -> list[Step]:
    """The steps, with a step `name` inserted behind the last step in `after` if there is none yet."""
    if any(step.name == name for step in steps):
        return steps
    position = max((index + 1 for index, step in enumerate(steps) if step.name in after), default=0)
    return [*steps[:position], Step(name=name), *steps[position:]]


def _without(step: Step, key: str) -> Step:
    """The step without the parameter `key`."""
    return step.model_copy(update={"params": {k: value for k, value in step.params.items() if k != key}})

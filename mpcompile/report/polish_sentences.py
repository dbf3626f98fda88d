"""The sentence on a training of limited minutes (pass polish)."""

from mpcompile.ir.results import Closeness, Polished


def on_polish(polished: Polished | None) -> tuple[str, ...]:
    """How long the model was trained and what that changed on validation images, or why it was left as it was."""
    if polished is None:
        return ()
    where = f"on {polished.validation:,} validation images"
    before, after = polished.before, polished.after
    if polished.kept_start is not None:
        found = f"Its {measure_name(before)} is {_number(before)} {where}."
        return (f"The polish left the model as it was: {polished.kept_start}. {found}",)
    tried = sum(trial.steps for trial in polished.trials)
    probe = f", after {tried:,} steps that tried learning rates" if tried else ""
    agreement = ""
    if before.agreement is not None and after.agreement is not None:
        agreement = f" and the agreement from {before.agreement:.2%} to {after.agreement:.2%}"
    return (
        f"A polish of at most {polished.minutes:g} minutes trained {polished.taken:,} steps of {polished.batch} images "
        f"at a learning rate of {polished.rate:g} of a weight's size{probe}: {where}, the {measure_name(before)} goes "
        f"from {_number(before)} to {_number(after)}{agreement}. Masks are the same as before.",
    )


def measure_name(closeness: Closeness) -> str:
    """The name of the divergence in a Closeness."""
    if closeness.agreement is None:
        return "relative squared error"
    return "divergence from the dense model, with the best factor on the logits,"


def _number(closeness: Closeness) -> str:
    return f"{closeness.divergence:.3g}" + ("" if closeness.agreement is None else " nats")

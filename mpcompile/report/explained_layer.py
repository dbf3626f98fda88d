"""Why a layer is as it is: plain sentences from a report alone. `mpcompile explain` prints them."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mpcompile.errors import UsageError
from mpcompile.report.explained_kernel import kernel, number_format
from mpcompile.report.explained_values import amount, rank
from mpcompile.report.schema import LayerRow, Report

NEAREST = 5  # names that an error proposes
KEPT_DENSE = "the budget keeps it dense"  # the reason that mp-budget gives


@dataclass(frozen=True, slots=True)
class Explanation:
    """One layer: pairs of a topic and a sentence, in the order of the run."""

    layer: str
    sentences: tuple[tuple[str, str], ...]


def explain(report: Report, row: LayerRow) -> Explanation:
    """Why a layer of a report is as it is. What the run did not measure is left out or said to be unknown."""
    found = [
        *_layer(report, row),
        *_pattern(report, row),
        *_spectrum(report, row),
        *_channels(row),
        *_refit(report, row),
        *number_format(report, row),
        *kernel(report, row),
        *_loss(report, row),
    ]
    return Explanation(row.name, tuple(found))


def layers_named(report: Report, name: str) -> tuple[LayerRow, ...]:
    """The layers of this name, or that match it as a shell pattern. Raises UsageError with the nearest names."""
    rows = [row for row in report.layers if row.name == name]
    rows = rows or [row for row in report.layers if fnmatchcase(row.name, name)]
    if rows:
        return tuple(rows)
    near = sorted((row.name for row in report.layers), key=lambda other: -_likeness(name, other))[:NEAREST]
    raise UsageError(
        f"no layer is called {name!r}; the nearest are {', '.join(near)}; without a name, explain lists all layers"
    )


def _likeness(name: str, layer: str) -> float:
    """How much a text resembles a layer's name, or as many neighbouring parts of it as the text has; at most 1."""
    parts, count = layer.lower().split("."), name.count(".") + 1
    spans = [".".join(parts[n : n + count]) for n in range(max(1, len(parts) - count + 1))]
    return max(difflib.SequenceMatcher(None, name.lower(), span).ratio() for span in (*spans, layer.lower()))


def one_line_each(report: Report) -> tuple[tuple[str, str], ...]:
    """For each layer its name and the shortest answer: its pattern and loss, or why it is dense."""
    return tuple((row.name, _short(report, row)) for row in report.layers)


def _short(report: Report, row: LayerRow) -> str:
    """One line on a layer."""
    parts = [row.pattern or "dense"]
    if report.quantized:
        parts.append(row.precision or "floating point")
    if row.reason:
        return f"{', '.join(parts)}: {row.reason}"
    if row.missed is not None:
        parts.append(f"refit error {amount(row.missed)}")
    shares = {each.name: each.share for each in report.certificate.layers} if report.certificate else {}
    if row.name in shares:
        parts.append(f"{amount(shares[row.name])} of the logit shift")
    verdict = next((v for v in report.verdicts if v.layer == (row.shares_weight_with or row.name)), None)
    if verdict and verdict.chosen is not None:
        parts.append("sparse kernel" if verdict.chosen else "dense kernel")
    return ", ".join(parts)


def _layer(report: Report, row: LayerRow) -> Iterator[tuple[str, str]]:
    """What the layer is, and what it costs."""
    shape = "×".join(map(str, row.shape))
    text = f"{row.name} is a {row.kind} with a weight of {shape}"
    if row.macs is not None and report.cost.dense:
        place = rank(row.macs, [other.macs for other in report.layers])
        text += f" and {amount(row.macs / report.cost.dense)} of the dense model's multiply-accumulates ({place})"
    yield "layer", f"{text}."
    if row.macs and row.macs_left is not None:
        share = row.macs_left / row.macs
        yield "cost", f"{amount(share)} of its multiply-accumulates are left, with zeros skipped and tokens merged."
    if row.shares_weight_with:
        yield "layer", f"It has the same weight as {row.shares_weight_with}, so both have the same mask."


def _pattern(report: Report, row: LayerRow) -> Iterator[tuple[str, str]]:
    """Its pattern, and who chose it; or why it is dense."""
    if row.pattern is None:
        yield "pattern", f"It is dense. The reason: {row.reason or 'none was recorded'}."
    else:
        yield "pattern", f"It is masked to {row.pattern}: {amount(row.density)} of its weights are kept."
    if row.pattern is not None or row.reason == KEPT_DENSE:  # else the reason says who decided it
        yield from (("pattern", text) for text in _planned(report, row))
    changed = [record.name for record in report.passes if row.name in record.layers_changed]
    if changed:
        yield "pattern", f"Passes that changed the layer or its plan, in order: {', '.join(changed)}."
    if report.tuning:
        tried = len(report.tuning.points)
        yield "pattern", f"The recipe is {report.tuning.chosen}, which the search chose from {tried} recipes."


def _planned(report: Report, row: LayerRow) -> Iterator[str]:
    """Which pass of the recipe decided, and by what."""
    budget, mask = report.recipe.step("mp-budget"), report.recipe.step("nm-mask")
    if budget is None:
        if mask is not None and row.pattern is not None:
            yield "No budget chose layers: nm-mask masks every eligible layer to the pattern of the recipe."
        return
    macs, signal = budget.params.get("macs"), budget.params.get("signal", "mp")
    offered = budget.params.get("patterns")
    names = [str(each) for each in offered] if offered and not isinstance(offered, str) else []
    listed = f" out of {', '.join(names)}" if len(names) > 1 else ""
    if macs is None:
        given = f"the pattern {names[0]}" if len(names) == 1 else f"a pattern{listed}"
        yield f"The pass mp-budget planned it: without a limit on cost, every eligible layer gets {given}."
        return
    yield (
        f"The pass mp-budget decided it: it chose patterns{listed}, so that {amount(float(macs))} of the model's "
        f"multiply-accumulates are left, by the signal {signal}."
    )


def _spectrum(report: Report, row: LayerRow) -> Iterator[tuple[str, str]]:
    """The fit of the Marchenko–Pastur law, and whether it decided anything."""
    if row.unfitted:
        if row.unfitted != row.reason:
            yield "spectrum", f"The Marchenko–Pastur law was not fitted: {row.unfitted}."
        return
    s = row.spectrum
    if s is None:
        return
    count = min(row.shape[0], _inputs(row))
    yield (
        "spectrum",
        f"{s.spikes} of its {count} singular values lie above the noise edge of {s.edge:.3g}, and "
        f"{amount(s.bulk_share)} lie in the fitted bulk. σ is {s.sigma:.3g}.",
    )
    if s.null_error is not None:
        text = f"The distance from the law is {s.fit_error:.3f}, and {s.null_error:.3f} with its entries shuffled"
        closer = "the order of its entries has structure that the law does not describe"
        yield "spectrum", f"{text}: {closer}." if s.fit_error > 2 * s.null_error else f"{text}."
    budget = report.recipe.step("mp-budget")
    signal = "mp" if budget is None else budget.params.get("signal", "mp")
    if signal != "mp":
        yield "spectrum", f"The spectrum decided nothing here: the budget's signal was {signal}."


def _inputs(row: LayerRow) -> int:
    """The columns of the weight as a matrix."""
    count = 1
    for side in row.shape[1:]:
        count *= side
    return count


def _channels(row: LayerRow) -> Iterator[tuple[str, str]]:
    """Whether its input channels were reordered."""
    if row.permuted:
        yield "channels", "Its input channels were reordered, so that the pattern keeps more of the important weights."
    elif row.unpermuted and row.unpermuted != row.reason:
        yield "channels", f"Its channels were not reordered: {row.unpermuted}."


def _refit(report: Report, row: LayerRow) -> Iterator[tuple[str, str]]:
    """The error of its refit beside those of the other layers."""
    if row.missed is None:
        return
    errors = [other.missed for other in report.layers]
    images = report.data.calibration
    where = f" on {images:,} calibration images" if images else ""
    yield (
        "refit",
        f"After the refit its outputs miss the dense model's by a relative squared error of {amount(row.missed)}"
        f"{where} ({rank(row.missed, errors)}).",
    )


def _loss(report: Report, row: LayerRow) -> Iterator[tuple[str, str]]:
    """Its part of the change of the logits."""
    rows = report.certificate.layers if report.certificate else ()
    found = next((each for each in rows if each.name == row.name), None)
    if found is None:
        if row.pattern and not rows:
            yield "loss", "What it costs is unknown: the run attributed no loss to layers (pass certify, with --data)."
        return
    shares: Sequence[float | None] = [each.share for each in rows]
    if any(shares):
        yield (
            "loss",
            f"It causes {amount(found.share)} of the squared logit shift, to first order "
            f"({rank(found.share, shares)}). Its outputs change by at most {found.reach:.3g}, mean over images.",
        )
    else:
        yield "loss", f"Its outputs change by at most {found.reach:.3g}, mean over images. No loss was attributed."

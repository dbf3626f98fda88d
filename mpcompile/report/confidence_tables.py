"""Tables on the confidence of both models, and on the agreement by quartile of the dense margin."""

from mpcompile.ir.results import MarginQuartile
from mpcompile.report.head_words import confidence_name
from mpcompile.report.schema import Report
from mpcompile.report.table import Cell, Column, Table, columns, number

KEY = ".comparison.confidence"
QUARTERS = ("lowest", "second", "third", "highest")


def confidence_rows(report: Report) -> list[tuple[Cell, ...]]:
    """Rows of a table of dense, compressed and their difference: probability of the decisions, calibration error."""
    c = report.comparison
    if c is None or c.confidence is None:
        return []
    before, after = c.confidence.dense, c.confidence.compressed
    rows: list[tuple[Cell, ...]] = [
        (
            Cell(f"{confidence_name(c.head)}, {c.count:,} images"),
            number(before.top_probability, "{:.3f}", f"{KEY}.dense.top_probability"),
            number(after.top_probability, "{:.3f}", f"{KEY}.compressed.top_probability"),
            _difference(after.top_probability - before.top_probability, "top_probability"),
        )
    ]
    if before.calibration and after.calibration:
        gained = after.calibration.error - before.calibration.error
        rows.append(
            (
                Cell(f"calibration error (expected, 15 bins), {c.count:,} images"),
                number(before.calibration.error, "{:.3f}", f"{KEY}.dense.calibration.error"),
                number(after.calibration.error, "{:.3f}", f"{KEY}.compressed.calibration.error"),
                _difference(gained, "calibration.error"),
            )
        )
    return rows


def _difference(value: float, name: str) -> Cell:
    return number(value, "{:+.3f}", f"{KEY}.compressed.{name} - {KEY}.dense.{name}")


def confidence(report: Report) -> Table:
    """Confidence of both models, and the divergence with and without the best common factor on the logits."""
    rows = confidence_rows(report)
    found = report.comparison.confidence if report.comparison else None
    if found:
        rows += [
            (
                Cell("divergence from dense, nats"),
                Cell(),
                number(found.divergence, "{:.3g}", f"{KEY}.divergence"),
                Cell(),
            ),
            (
                Cell("divergence after the best common factor on the logits"),
                Cell(),
                number(found.least_divergence, "{:.3g}", f"{KEY}.least_divergence"),
                number(found.best_factor, "factor {:.3f}", f"{KEY}.best_factor"),
            ),
        ]
    if report.logit_factor is not None:
        factor = number(report.logit_factor, "{:.3f}", ".logit_factor")
        rows.append((Cell("factor on the logits that is in the last layers"), Cell(), factor, Cell()))
    names = ("", "dense", "compressed", "difference")
    return Table(columns(*names, numbers=names[1:]), tuple(rows), KEY)


def quartiles(report: Report) -> Table:
    """One row for each quarter of the dense margins: how many decisions are the same."""
    found = report.comparison.confidence if report.comparison else None
    rows = [_quartile(n, row) for n, row in enumerate(found.quartiles)] if found else []
    about = "the dense model's largest output minus the second, or the distance to the threshold"
    heads = columns("dense margins", "from", "to", "decisions", "same as dense", "95 % interval")
    numeric = [Column(head.name, n > 0, about if n in (1, 2) else "") for n, head in enumerate(heads)]
    return Table(tuple(numeric), tuple(rows), f"{KEY}.quartiles")


def _quartile(n: int, row: MarginQuartile) -> tuple[Cell, ...]:
    key = f"{KEY}.quartiles[{n}]"
    low, high = row.interval or (None, None)
    interval = Cell() if low is None else Cell(f"{low:.2%} to {high:.2%}", low, f"{key}.interval[0]")
    return (
        Cell(f"{QUARTERS[n]} quarter"),
        number(row.lowest, "{:.3f}", f"{key}.lowest"),
        number(row.highest, "{:.3f}", f"{key}.highest"),
        number(row.count, "{:.0f}", f"{key}.count"),
        number(row.agreement, "{:.2%}", f"{key}.agreeing / {key}.count"),
        interval,
    )

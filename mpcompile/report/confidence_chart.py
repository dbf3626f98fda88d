"""Chart: the reliability diagram of both models. None without labels."""

from mpcompile.measure.model_confidence import Calibration
from mpcompile.report.chart import Chart, Dot, Label, Line, Mark, Scale, x_axis, y_axis
from mpcompile.report.schema import Report

WIDTH, HEIGHT = 380.0, 340.0
STEPS = (0, 0.2, 0.4, 0.6, 0.8, 1)


def reliability(report: Report) -> Chart | None:
    """The share of right predictions over the predicted probability, one dot a bin; on the diagonal they are equal."""
    found = report.comparison.confidence if report.comparison else None
    if found is None or found.dense.calibration is None or found.compressed.calibration is None:
        return None
    across, up = Scale(0, 1, 52, WIDTH - 16), Scale(0, 1, HEIGHT - 48, 12)
    marks = y_axis(up, STEPS, 52, WIDTH - 16, "{:.0%}") + x_axis(across, STEPS, 12, HEIGHT - 48, "{:.1f}")
    marks.append(Line(((across(0), up(0)), (across(1), up(1))), "axis", "predictions are right as often as they say"))
    for name, one in (("dense", found.dense.calibration), ("compressed", found.compressed.calibration)):
        marks += _curve(across, up, name, one)
    marks.append(Label((36 + WIDTH) / 2, HEIGHT - 14, "predicted probability", "middle"))
    description = (
        f"The expected calibration error is {found.compressed.calibration.error:.3f} compressed and "
        f"{found.dense.calibration.error:.3f} dense. On the diagonal, predictions are right as often as they say."
    )
    return Chart(WIDTH, HEIGHT, "Share of right predictions by predicted probability", description, tuple(marks))


def _curve(across: Scale, up: Scale, name: str, found: Calibration) -> list[Mark]:
    """The bins of one model as dots with a line through them."""
    points = [(across(row.confidence), up(row.right)) for row in found.bins]
    line: list[Mark] = [Line(tuple(points), f"{name}-curve")] if len(points) > 1 else []
    texts = [
        f"{name}: {row.count:,} predictions of {row.low:.2f} to {row.high:.2f}, {row.confidence:.3f} on average; "
        f"{row.right:.1%} are right"
        for row in found.bins
    ]
    return [*line, *(Dot(x, y, name, text) for (x, y), text in zip(points, texts, strict=True))]

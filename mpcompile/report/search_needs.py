"""Which of the recipes that a search tried to take for which need."""

from dataclasses import dataclass

from mpcompile.report.search_schema import Point, Tuning


@dataclass(frozen=True, slots=True)
class Need:
    """A need, the model that meets it best, and where its recipe is: a file of the output folder, or None."""

    need: str
    point: Point
    file: str | None


def needs(tuning: Tuning) -> tuple[Need, ...]:
    """The models to take: the chosen recipe first, then those that are better in some way.

    A recipe is listed only if it is faster or loses less than those listed before it, and an int8 version of the dense
    model only if it holds and its speed interval lies above that of the chosen recipe.
    """
    measured = [point for point in tuning.points if point.drop is not None]
    chosen = next(point for point in measured if point.name == tuning.chosen)
    found = [_need(tuning, "the fastest within the limit" if chosen.holds else "the smallest loss", chosen)]
    if chosen.holds:
        half = [point for point in measured if _loss(point) + (point.error or 0.0) <= tuning.limit / 2]
        if half:
            _add(found, tuning, "the fastest within half of the limit", max(half, key=lambda point: point.speed))
        _add(found, tuning, "the smallest loss", min(measured, key=_loss))
    faster = max(measured, key=lambda point: point.speed)
    if faster.speed > chosen.speed:
        _add(found, tuning, f"the fastest, if the limit may be {_loss(faster) + (faster.error or 0.0):.2g}", faster)
    quantized = [
        point
        for point in tuning.references
        if point.failed is None and point.holds and point.speed_interval[0] > chosen.speed_interval[1]
    ]
    if quantized:
        best = max(quantized, key=lambda point: point.speed)
        found.append(Need("faster, dense in 8 bits without a mask", best, None))
    return tuple(found)


def recipe_file(number: int) -> str:
    """The path, in the output folder, of the recipe of row `number`, which counts from 1."""
    return f"tried/{number}.yaml"


def _need(tuning: Tuning, need: str, point: Point) -> Need:
    file = "recipe.yaml" if point.name == tuning.chosen else recipe_file(tuning.points.index(point) + 1)
    return Need(need, point, file)


def _add(found: list[Need], tuning: Tuning, need: str, point: Point) -> None:
    """Adds a recipe that is not listed yet."""
    if all(point is not other.point for other in found):
        found.append(_need(tuning, need, point))


def _loss(point: Point) -> float:
    assert point.drop is not None  # of measured points only
    return point.drop

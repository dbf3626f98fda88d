"""Numbers in the sentences about a layer: shares, and the rank of a value among all layers."""

from collections.abc import Sequence


def amount(share: float) -> str:
    """A share in per cent, with three significant digits: `1.23 %`."""
    percent = 100 * share
    return f"{percent:.1f} %" if percent >= 10 or not percent else f"{percent:.3g} %"


def rank(value: float, values: Sequence[float | None]) -> str:
    """The place of a value among those that are known, the largest first: `the 2nd largest of 24 layers`."""
    known = [other for other in values if other is not None]
    place = 1 + sum(other > value for other in known)
    layers = f"of {len(known)} layers" if len(known) > 1 else "of 1 layer"
    place_name = "the largest" if place == 1 else f"the {ordinal(place)} largest"
    equal = sum(other == value for other in known) - 1
    return f"{place_name} {layers}{f', as {equal} others' if equal > 1 else ', as 1 other' if equal else ''}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"

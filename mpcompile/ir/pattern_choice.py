"""What an option may give for the pattern of several layers: one N:M, or a density such as 50%.

A density stands for patterns of several M, all of which a target runs at the same speed. They are nested: if M divides
M′, every N:M mask is also an N′:M′ mask of the same density (2:4 ⊂ 4:8 ⊂ 8:16 ⊂ 16:32). So the freest pattern whose M
divides a layer's width loses least, whatever is lost by removing a weight, and no search is needed. A layer whose width
no M divides stays dense.

(This holds for the best mask of each pattern, in a given order of channels. A criterion that selects masks by a
heuristic, and a permutation that is searched for one pattern, may find a better mask of a narrower M in rare cases.)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

from mpcompile.errors import UsageError
from mpcompile.ir.pattern import NM, SHAPE

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

WIDEST, NARROWEST = 32, 4  # the M that a density stands for, unless the target runs others
PERCENT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*(?:x\s*(\d{1,9}))?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Nested patterns of one density, freest first; a layer takes the first whose M divides its width.

    Written `16:32|8:16|4:8|2:4`. In the recipe of an output folder it stands where `50%` was given.
    """

    patterns: tuple[NM, ...]

    def __post_init__(self) -> None:
        """Raises UsageError unless the patterns are nested and of one density."""
        first = self.patterns[0]
        for wider, narrower in zip(self.patterns, self.patterns[1:], strict=False):
            nested = wider.of > narrower.of and wider.of % narrower.of == 0
            same = (wider.keep * narrower.of, wider.rows) == (narrower.keep * wider.of, narrower.rows)
            if first.vocabulary or narrower.vocabulary or not (nested and same):
                raise UsageError(
                    f"pattern {self}: the alternatives of a layer have one density, and each M divides the one before; "
                    f"give for example 8:16|4:8|2:4, or a comma for patterns that a budget chooses from: {first},"
                    f"{narrower}"
                )

    @classmethod
    def parse(cls, text: str) -> "Alternatives":
        """Parses `16:32|8:16|4:8|2:4`. Raises UsageError."""
        return cls(tuple(NM.parse(part) for part in text.split("|")))

    @property
    def density(self) -> float:
        """The share of weights that are kept, in (0, 1)."""
        return self.patterns[0].density

    def __str__(self) -> str:
        return "|".join(map(str, self.patterns))


@dataclass(frozen=True, slots=True)
class PatternText:
    """Reads and writes a pattern choice as text, in recipes and in their JSON Schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        from pydantic_core import core_schema

        def validate(value: object, _: object) -> NM | Alternatives:
            if isinstance(value, NM | Alternatives):
                return value
            try:
                return parse_choice(str(value))
            except UsageError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_wrap_validator_function(
            validate,
            core_schema.str_schema(pattern=rf"^({SHAPE}(\|{SHAPE})*|\d+(\.\d+)?%(x\d+)?)$"),
            serialization=core_schema.to_string_ser_schema(),
        )


PatternChoice = Annotated[NM | Alternatives, PatternText()]


def parse_choice(text: str) -> NM | Alternatives:
    """Parses `2:4`, `16:32|8:16|4:8|2:4`, or `50%`, which stands for the patterns of `nested`. Raises UsageError."""
    if (density := parse_density(text)) is not None:
        return choice_of(nested(*density))
    if "|" in text:
        return Alternatives.parse(text)
    if "%" in text:
        raise UsageError(
            f"pattern {text!r} is no density: give a share of the weights to keep, such as 50%, or 50%x4 for four "
            "neighbouring output channels that share a pattern; a vocabulary needs an N:M, such as 4:8v8"
        )
    if near := _density_meant(text):
        raise UsageError(
            f"pattern {text!r} is neither N:M, such as 2:4, nor a density in percent; did you mean {near}?"
        )
    return NM.parse(text)


def parse_density(text: str) -> tuple[Fraction, int] | None:
    """The density in `50%`, and the rows that share a pattern in `50%x4`, else 1; None for any other text.

    Raises UsageError if no N:M has this density.
    """
    match = PERCENT.fullmatch(text)
    if match is None:
        return None
    density, rows = Fraction(match[1]) / 100, int(match[2] or 1)
    if rows < 1:
        raise UsageError(f"pattern {text!r}: the number of rows that share a pattern is at least 1")
    if not 0 < density < 1 or density.denominator > WIDEST:
        nearest = min((Fraction(n, WIDEST) for n in range(1, WIDEST)), key=lambda other: abs(other - density))
        proposal = f"{_percent(nearest)} ({NM(nearest.numerator, nearest.denominator)})"
        raise UsageError(
            f"pattern {text!r}: no N:M with M ≤ {WIDEST} keeps exactly this share of the weights; did you mean "
            f"{proposal}?"
        )
    return density, rows


def nested(density: Fraction, rows: int = 1, widest: int = WIDEST, narrowest: int = NARROWEST) -> tuple[NM, ...]:
    """The nested patterns of a density, widest M first.

    Each M is twice the next. All lie between `narrowest` and `widest`, unless the density needs a wider M.
    """
    of = density.denominator
    found: list[NM] = []
    while of <= widest or not found:
        if of >= narrowest:
            found.append(NM(int(density * of), of, rows))
        of *= 2
    return tuple(reversed(found))


def choice_of(patterns: Sequence[NM]) -> NM | Alternatives:
    """One pattern as it is, several as Alternatives."""
    return patterns[0] if len(patterns) == 1 else Alternatives(tuple(patterns))


def patterns_in(choice: NM | Alternatives) -> tuple[NM, ...]:
    """The patterns of a choice, freest first."""
    return choice.patterns if isinstance(choice, Alternatives) else (choice,)


def pattern_for(choice: NM | Alternatives, inputs: int) -> NM:
    """The pattern of a layer with this many input channels per group: the first whose M divides it, else the last."""
    patterns = patterns_in(choice)
    return next((pattern for pattern in patterns if inputs % pattern.of == 0), patterns[-1])


def reason_unfit(choice: NM | Alternatives, outputs: int, inputs: int, per: str = "") -> str | None:
    """Why a layer with so many output channels, and input channels (`per` group), can have no pattern of the choice."""
    pattern = pattern_for(choice, inputs)
    if inputs % pattern.of:
        widths = " or ".join(str(other.of) for other in patterns_in(choice))
        return f"{inputs} input channels{per} are not a multiple of {widths}"
    if outputs % pattern.rows:
        return f"{outputs} output channels are not a multiple of the {pattern.rows} that share a pattern"
    return None


def with_rows(choice: NM | Alternatives, rows: int) -> NM | Alternatives:
    """The choice with this many neighbouring output channels that share each pattern."""
    return choice_of([replace(pattern, rows=rows) for pattern in patterns_in(choice)])


def _percent(density: Fraction) -> str:
    return f"{float(100 * density):.10g}%"


def _density_meant(text: str) -> str:
    """A proposal for a density without its percent sign, such as 50 or 0.5; empty if there is none."""
    match = re.fullmatch(r"\s*(\d{1,2}(?:\.\d{1,9})?|\.\d{1,9})\s*", text)
    if match is None:
        return ""
    number = Fraction(match[1])
    density = number if number < 1 else number / 100
    return _percent(density) if 0 < density < 1 and density.denominator <= WIDEST else ""

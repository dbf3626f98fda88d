"""N:M patterns: N of every M consecutive weights are kept; several rows may share one choice."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpcompile.errors import UsageError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


WIDEST_GROUP = 64  # the largest M


@dataclass(frozen=True, slots=True)
class NM:
    """N kept of every M consecutive input channels (NVIDIA's sense; some other tools count the zeros).

    `rows` > 1: that many neighbouring output channels keep the same positions. Such a mask is still legal N:M; a CPU
    kernel reuses each loaded input for all of them, and accuracy is lower. Dense is `None`, never an NM.
    """

    keep: int
    of: int
    rows: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of <= WIDEST_GROUP:
            raise UsageError(
                f"pattern {self.keep}:{self.of}: needs 1 ≤ N < M ≤ {WIDEST_GROUP} (N weights kept of every M); "
                "for a dense layer leave it out with --exclude"
            )
        if self.rows < 1:
            raise UsageError(f"pattern {self}: the number of rows that share a pattern is at least 1")

    @classmethod
    def parse(cls, text: str) -> "NM":
        """Parses `2:4`, or `2:4x4` for four rows that share their positions. Raises UsageError."""
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*(?:x\s*(\d{1,9}))?\s*", text)
        if match is None:
            raise UsageError(
                f"pattern {text!r} is not N:M (N weights kept of every M), such as 2:4; in 2:4x4, four "
                f"neighbouring output channels share one pattern{_near(text)}"
            )
        keep, of, rows = match.groups(default="1")
        return cls(int(keep), int(of), int(rows))

    @property
    def density(self) -> float:
        """The share of weights that are kept, N/M, in (0, 1)."""
        return self.keep / self.of

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" + (f"x{self.rows}" if self.rows > 1 else "")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        """In a recipe an NM is text. An NM is taken as it is; text is parsed once."""
        from pydantic_core import core_schema

        def validate(value: object, _: object) -> NM:
            if isinstance(value, NM):
                return value
            try:
                return NM.parse(str(value))
            except UsageError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_wrap_validator_function(
            validate,
            core_schema.str_schema(pattern=r"^\d+:\d+(x\d+)?$"),  # for the JSON Schema
            serialization=core_schema.to_string_ser_schema(),
        )


TWO_OF_FOUR = NM(keep=2, of=4)


def _near(text: str) -> str:
    """A proposal for a pattern in another spelling, such as 2/4, 2-4 or `2 of 4`; empty if there is none."""
    numbers = [int(number) for number in re.findall(r"\d{1,3}", text)]
    if len(numbers) not in (2, 3) or not 1 <= numbers[0] < numbers[1] <= WIDEST_GROUP or min(numbers) < 1:
        return ""
    return f"; did you mean {NM(*numbers)}?"

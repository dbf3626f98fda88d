"""N:M patterns: N of every M consecutive weights are kept.

NM is the one value for all kinds of patterns. A kind limits which masks follow the pattern:

own         every output channel (row) has its own positions in every group of M: `2:4`
rows        neighbouring output channels keep the same positions: `2:4x4`, four of them
vocabulary  in every block of M input channels, each output channel takes one of a few patterns: `4:8v8`, eight of them

A mask of any kind is a legal N:M mask, so every kernel for N:M runs it. What differs by kind stands in two places: the
check of a mask (mpcompile/ir/weight_groups.py) and its selection from scores (passes/nm_mask/selection.py).
"""

import re
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

from mpcompile.errors import UsageError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


WIDEST_GROUP = 64  # the largest M
WIDEST_VOCABULARY = 8  # the largest M with a vocabulary: all C(8, 4) = 70 patterns of a block are compared
SHAPE = r"\d+:\d+(x\d+|v\d+)?"  # the text of a pattern, for the JSON Schema


@dataclass(frozen=True, slots=True)
class NM:
    """N kept of every M consecutive input channels (NVIDIA's sense; some other tools count the zeros).

    `rows` > 1: that many neighbouring output channels keep the same positions. Such a mask is still legal N:M; a CPU
    kernel reuses each loaded input for all of them, and accuracy is lower.

    `vocabulary` > 0: in every block of M input channels (of each kernel tap) at most that many different patterns
    occur, and each output channel takes one of them. Accuracy lies between own patterns and shared rows. It is for
    kernels that cannot give each output channel its own pattern; today's kernels run such a mask as plain N:M.

    Dense is `None`, never an NM.
    """

    keep: int
    of: int
    rows: int = 1
    vocabulary: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of <= WIDEST_GROUP:
            raise UsageError(
                f"pattern {self.keep}:{self.of}: needs 1 ≤ N < M ≤ {WIDEST_GROUP} (N weights kept of every M); "
                "for a dense layer leave it out with --exclude"
            )
        if self.rows < 1:
            raise UsageError(f"pattern {self}: the number of rows that share a pattern is at least 1")
        if self.vocabulary and self.rows > 1:
            raise UsageError(
                f"pattern {self}: output channels either share a pattern with their neighbours (x) or take one from a "
                f"vocabulary (v); give {self.keep}:{self.of}x{self.rows} or {self.keep}:{self.of}v{self.vocabulary}"
            )
        if self.vocabulary and self.of > WIDEST_VOCABULARY:
            raise UsageError(
                f"pattern {self}: a vocabulary needs M ≤ {WIDEST_VOCABULARY}; give for example 4:8v8: {EXAMPLE}"
            )
        if self.vocabulary > (existing := comb(self.of, self.keep)):
            raise UsageError(
                f"pattern {self}: only {existing} patterns of {self.plain} exist, so this vocabulary restricts "
                f"nothing; give {self.plain}"
            )

    @classmethod
    def parse(cls, text: str) -> "NM":
        """Parses `2:4`, `2:4x4` (four rows that share their positions) or `4:8v8` (a vocabulary). Raises UsageError."""
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*(?:x\s*(\d{1,9}))?\s*(?:v\s*(\d{1,9}))?\s*", text)
        if match is None:
            raise UsageError(
                f"pattern {text!r} is not N:M (N weights kept of every M), such as 2:4; in 2:4x4, four "
                f"neighbouring output channels share one pattern; 4:8v8: {EXAMPLE}{_near(text)}"
            )
        keep, of, rows, vocabulary = match.groups()
        if vocabulary is not None and int(vocabulary) < 1:
            raise UsageError(f"pattern {text!r}: a vocabulary has at least 1 pattern; give for example 4:8v8")
        return cls(int(keep), int(of), int(rows or 1), int(vocabulary or 0))

    @property
    def density(self) -> float:
        """The share of weights that are kept, N/M, in (0, 1)."""
        return self.keep / self.of

    @property
    def plain(self) -> "NM":
        """The N:M pattern in which every output channel has its own positions; every mask of this one follows it."""
        return NM(self.keep, self.of)

    def __repr__(self) -> str:
        # Without a vocabulary as before there was one: the keys of checkpoints contain it.
        vocabulary = f", vocabulary={self.vocabulary}" if self.vocabulary else ""
        return f"NM(keep={self.keep}, of={self.of}, rows={self.rows}{vocabulary})"

    def __str__(self) -> str:
        rows = f"x{self.rows}" if self.rows > 1 else ""
        return f"{self.keep}:{self.of}{rows}" + (f"v{self.vocabulary}" if self.vocabulary else "")

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
            core_schema.str_schema(pattern=f"^{SHAPE}$"),  # for the JSON Schema
            serialization=core_schema.to_string_ser_schema(),
        )


TWO_OF_FOUR = NM(keep=2, of=4)
EXAMPLE = "in every block of 8 input channels, each output channel takes one of 8 patterns"  # what 4:8v8 means


def _near(text: str) -> str:
    """A proposal for a pattern in another spelling, such as 2/4, 2-4 or `2 of 4`; empty if there is none."""
    numbers = [int(number) for number in re.findall(r"\d{1,3}", text)]
    vocabulary = re.search(r"(v[a-z]*|p)\W*\d+\s*$", text, re.IGNORECASE) is not None and len(numbers) == 3
    keep, of, *third = numbers if len(numbers) in (2, 3) else (0, 0)
    if not 1 <= keep < of <= WIDEST_GROUP or min(third, default=1) < 1:
        return ""
    if vocabulary:
        return f"; did you mean {NM(keep, of, 1, *third)}?" if of <= WIDEST_VOCABULARY else ""
    return f"; did you mean {NM(keep, of, *third)}?"

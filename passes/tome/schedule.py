"""The schedule of token merging: how many tokens merge after each attention, parsed from text and bounded."""

from collections.abc import Sequence

from mpcompile.analysis.attention import Attention
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.token_merging import most_merged

WIDEST_TOPK = 3840  # largest K of TensorRT's TopK
MOST_TOKENS = 10**9  # bounds numbers in texts; no image has this many tokens


def parse_schedule(text: int | str | tuple[int, ...], attentions: int) -> tuple[int, ...]:
    """Parses `8`, `8:decreasing` or `0,0,4,8` into one number for each of `attentions`. Raises UsageError."""
    if isinstance(text, tuple):
        return _require_count(text, attentions)
    number, colon, shape = str(text).partition(":")
    try:
        listed = tuple(int(part) for part in number.split(","))
    except ValueError:
        listed = ()
    if (
        not listed
        or min(listed) < 0
        or max(listed) > MOST_TOKENS
        or (colon and (len(listed) > 1 or shape not in ("uniform", "decreasing")))
    ):
        raise UsageError(
            f"tome: r is {text!r}; needed is a number of tokens such as 8, 8:decreasing, a number for each attention "
            "such as 0,0,4,8, or auto"
        )
    if "," in number:
        return _require_count(listed, attentions)
    return decreasing(listed[0], attentions) if shape == "decreasing" else listed * attentions


def _require_count(listed: tuple[int, ...], attentions: int) -> tuple[int, ...]:
    """The listed numbers. Raises UsageError unless there is one, 0 or more, for each attention."""
    if len(listed) != attentions:
        raise UsageError(
            f"tome: r has {len(listed)} numbers, but the model has {attentions} attentions with tokens to merge"
        )
    if min(listed) < 0:
        raise UsageError(f"tome: r has a negative number, {min(listed)}")
    return listed


def decreasing(r: int, attentions: int) -> tuple[int, ...]:
    """The schedule that decreases linearly from 2r to 0, rounded down (Bolya et al., arXiv 2210.09461, section 4.1)."""
    return (
        (r,)
        if attentions == 1
        else tuple(int(2 * r - 2 * r * attention / (attentions - 1)) for attention in range(attentions))
    )


def require_mergeable(r: int | str | tuple[int, ...], tokens: int, protected: int) -> None:
    """Raises UsageError if one number for every attention is more than the first attention can merge."""
    number, most = int(str(r).partition(":")[0]), most_merged(tokens, protected)
    if number > most:
        raise UsageError(
            f"tome: r is {number}, but of {tokens} tokens ({protected} protected) at most {most} can merge after one "
            "attention; give a smaller r"
        )


def require_tokens_left(schedule: Sequence[int], tokens: int, least: float) -> None:
    """Raises UsageError if a schedule leaves less than the share `least` of the tokens."""
    left = tokens - sum(schedule)
    if left < least * tokens:
        raise UsageError(
            f"tome: the schedule {', '.join(map(str, schedule))} leaves {left} of {tokens} tokens "
            f"({100 * left / tokens:.1f} %), and at least {100 * least:g} % have to be left; merge fewer tokens, or "
            "lower least_left in the recipe"
        )


def within_limits(
    asked: Sequence[int], attentions: Sequence[Attention], protected: int, exact: bool = False
) -> tuple[int, ...]:
    """The schedule with each r reduced to the most that its tokens allow: 0 after an attention that selects tokens.

    Raises UsageError instead if `exact`, and PassError if there are more tokens than TensorRT can rank.
    """
    tokens = attentions[0].tokens
    if (tokens - protected + 1) // 2 > WIDEST_TOPK:
        raise PassError(f"{tokens} tokens are too many to merge: TensorRT ranks at most {WIDEST_TOPK}")
    schedule = []
    for attention, r in zip(attentions, asked, strict=True):
        most = 0 if attention.selects else most_merged(tokens, protected)
        if r > most and exact and not attention.selects:
            raise UsageError(
                f"tome: at {attention.name} there are {tokens} tokens, {protected} of them protected, so that at most "
                f"{most} can merge; r asks for {r}"
            )
        schedule.append(min(r, most))
        tokens -= schedule[-1]
    return tuple(schedule)

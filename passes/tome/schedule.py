"""How many tokens merge after each attention, as a user spells it, and what the tokens allow."""

from collections.abc import Sequence

from mpcompile.analysis.attention import Attention
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.token_merging import most_merged

WIDEST_TOPK = 3840  # TensorRT's limit
MOST_TOKENS = 10**9  # no image has as many


def spelt(text: int | str | tuple[int, ...], sites: int) -> tuple[int, ...]:
    """The schedule that `8`, `8:decreasing` or `0,0,4,8` spells for so many attentions. Raises UsageError."""
    if isinstance(text, tuple):
        return _counted(text, sites)
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
        return _counted(listed, sites)
    return decreasing(listed[0], sites) if shape == "decreasing" else listed * sites


def _counted(listed: tuple[int, ...], sites: int) -> tuple[int, ...]:
    """A number for each attention."""
    if len(listed) != sites:
        raise UsageError(f"tome: r has {len(listed)} numbers, and the model {sites} attentions with tokens to merge")
    if min(listed) < 0:
        raise UsageError(f"tome: r has a negative number, {min(listed)}")
    return listed


def decreasing(r: int, sites: int) -> tuple[int, ...]:
    """From 2r down to none, linearly, rounded down (Bolya et al., section 4.1)."""
    return (r,) if sites == 1 else tuple(int(2 * r - 2 * r * site / (sites - 1)) for site in range(sites))


def within_limits(
    asked: Sequence[int], sites: Sequence[Attention], protected: int, exact: bool = False
) -> tuple[int, ...]:
    """The schedule with each r cut to what its tokens allow; where it has to be `exact`, one too large is an error."""
    tokens = sites[0].tokens
    if (tokens - protected + 1) // 2 > WIDEST_TOPK:
        raise PassError(f"{tokens} tokens are too many to merge: TensorRT ranks {WIDEST_TOPK} at most")
    found = []
    for site, r in zip(sites, asked, strict=True):
        most = most_merged(tokens, protected)
        if r > most and exact:
            raise UsageError(
                f"tome: at {site.name} there are {tokens} tokens, {protected} of them protected, so that at most "
                f"{most} can merge; r asks for {r}"
            )
        found.append(min(r, most))
        tokens -= found[-1]
    return tuple(found)

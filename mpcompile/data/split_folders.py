"""Which folders of a data set are its splits (train, val, test), in any case and spelling."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpcompile.data.image_tree import ImageTree, shown
from mpcompile.errors import LoadError

SPLITS = (  # names of split folders in lower case, without spaces and punctuation, in the order of preference
    ("train", ("train", "training")),
    ("val", ("val", "valid", "validation", "validate", "dev", "eval", "evaluation", "heldout", "holdout")),
    ("test", ("test", "testing")),
)
AFTER_SPLIT = re.compile(r"(set|data|images?|split)?(\d{4})?")  # as in train2017, train_images, Test set
HELD_OUT_FOLDERS = ("val", "validation", "test")  # names that error texts propose


def split_of(name: str) -> str | None:
    """`train`, `val` or `test` for the name of a split folder, in any case and spelling; None for another name."""
    plain = re.sub(r"[\W_]+", "", name.casefold())
    for split, names in SPLITS:
        if any(plain.startswith(n) and AFTER_SPLIT.fullmatch(plain.removeprefix(n)) for n in names):
            return split
    return None


@dataclass(frozen=True, slots=True)
class SplitFolders:
    """The folders of a data set with splits: calibration images are drawn from `train`, `held_out` is evaluated on.

    `held_out` is None if the data set has one split only. `unused` are further folders beside the splits.
    """

    train: str
    held_out: str | None
    unused: tuple[str, ...]

    @property
    def calibrates_on_held_out(self) -> bool:
        """Whether the folder to calibrate on is not called `train`, as in a data set of val/ and test/."""
        return split_of(self.train) != "train"


def splits_in(tree: ImageTree) -> SplitFolders | None:
    """The split folders at the top of a tree; None if it has no splits. Raises LoadError if one of two is missing.

    A single folder called `train` or `test` that holds images directly, beside other such folders, is a class.
    """
    named: dict[str, list[str]] = {}
    tops = [path.parts[0] for path in tree.folders if len(path.parts) == 1]
    for name in tops:
        if (kind := split_of(name)) is not None:
            named.setdefault(kind, []).append(name)
    if not named:
        return None
    others = [name for name in tree.top_folders() if split_of(name) is None]
    if len(named) == 1:
        [(kind, names)] = named.items()
        nested = any(len(path.parts) > 2 and path.parts[0] in names for path in tree.images)
        if others and not nested:
            return None
        if kind == "train":
            raise LoadError(
                f"{tree.root} has {names[0]}/ but no held-out folder; add one of "
                f"{', '.join(f'{name}/' for name in HELD_OUT_FOLDERS)}"
            )
        if others:
            raise LoadError(
                f"{tree.root} has {names[0]}/ and also {shown(others)} beside it; needed are train/ and {names[0]}/, "
                "or class folders only"
            )
    chosen = [kind for kind, _ in SPLITS if kind in named][:2]
    for kind in chosen:
        if len(named[kind]) > 1:
            raise LoadError(
                f"{tree.root} has {' and '.join(f'{n}/' for n in named[kind])}, which mean one split; keep one"
            )
    train, *held_out = (named[kind][0] for kind in chosen)
    unused = tuple(name for name in tree.top_folders() if name not in (train, *held_out))
    return SplitFolders(train, held_out[0] if held_out else None, unused)


def without_wrappers(tree: ImageTree, is_class: Callable[[Path, str], bool]) -> ImageTree:
    """The tree without folders that only wrap a data set, such as `archive/` in `archive/cat` and `archive/dog`.

    A folder that leads to one folder of images only is a class, and stays. `is_class` tells for a folder, by its parent
    and its name, whether it is known as a class: then it stays, and so do its subfolders.
    """
    inner = tree
    while not any(len(path.parts) == 1 for path in inner.images) and len(tops := inner.top_folders()) == 1:
        if split_of(tops[0]) is not None or is_class(inner.root, tops[0]):
            return inner
        inner = inner.below(tops[0])
        if len(inner.top_folders()) > 1:
            return inner
    return tree


def require_no_inner_splits(tree: ImageTree) -> None:
    """Raises LoadError if class folders hold train/ and test/: their images would be pooled."""
    inner = {path.parts[1]: path.parts[0] for path in tree.images if len(path.parts) > 2}
    kinds = {kind: f"{top}/{name}" for name, top in inner.items() if (kind := split_of(name)) is not None}
    if len(kinds) > 1:
        raise LoadError(
            f"{tree.root} has splits inside its class folders ({', '.join(kinds.values())}); needed are train/ and "
            "val/ at the top, each with the class folders"
        )

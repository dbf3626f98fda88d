"""Which splits of a dataset calibrate and are held out: chosen by their names as for folders, or named by the user."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpcompile.data.dataset_name import DatasetName
from mpcompile.data.image_tree import shown
from mpcompile.data.split_folders import SPLITS, split_of
from mpcompile.errors import LoadError

GIVE = "give ,train=SPLIT,held_out=SPLIT behind the name"
SHOWN = 12  # names of splits and columns in an error


@dataclass(frozen=True, slots=True)
class ChosenSplits:
    """The names of two splits; `held_out` is None if the images of `train` are divided. `notes` are for the report."""

    train: str
    held_out: str | None
    notes: tuple[str, ...] = ()


def chosen_splits(dataset: DatasetName, names: Sequence[str]) -> ChosenSplits:
    """The splits to use of those that a dataset has. Raises LoadError, which lists them.

    Calibration images come from `train`; held-out images from `val` or else `test`, in any usual spelling. Without a
    `train`, a dataset of `val` and `test` calibrates on `val`. Only one split is divided.
    """
    listed = shown(names, SHOWN) or "none"
    for given in (dataset.train, dataset.held_out):
        if given is not None and given not in names:
            raise LoadError(f"{dataset} has no split {given!r}; it has {listed}")
    if dataset.train is not None and dataset.train == dataset.held_out:
        raise LoadError(
            f"{dataset}: train and held_out are both {dataset.train!r}; give held_out another of {listed}, or leave it "
            "out"
        )
    train, held_out = dataset.train, dataset.held_out
    if train is None:
        others = [name for name in names if name != held_out]
        train = next(iter(others if len(others) == 1 else _usual(dataset, others, listed)), None)
    if train is None:
        raise LoadError(f"{dataset} has the splits {listed}, and no usual name tells which to calibrate on; {GIVE}")
    if held_out is None:
        others = [name for name in names if name != train and split_of(name) != "train"]
        held_out = next(iter(_usual(dataset, others, listed)), None)
    if held_out is None:
        note = f"calibration, validation and held-out images are all from the split {train} of {dataset}"
        return ChosenSplits(train, None, (note,))
    if dataset.train is None and split_of(train) != "train":
        return ChosenSplits(train, held_out, (f"there is no split train: calibration images are from {train}",))
    return ChosenSplits(train, held_out)


def _usual(dataset: DatasetName, names: Sequence[str], listed: str) -> list[str]:
    """The splits with usual names, in the order train, val, test. Raises LoadError if two names mean one split."""
    by_kind = {kind: [name for name in names if split_of(name) == kind] for kind, _ in SPLITS}
    for found in by_kind.values():
        if len(found) > 1:
            raise LoadError(f"{dataset} has the splits {listed}; {' and '.join(found)} mean one split; {GIVE}")
    return [found[0] for found in by_kind.values() if found]

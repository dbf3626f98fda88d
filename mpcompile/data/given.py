"""The data of a run from what a function of the user returns: one iterable of samples, a dict of splits, or `Data`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpcompile.data.dataset_pool import first_of_stream, held_out_of_stream
from mpcompile.data.divide import Numbers
from mpcompile.data.images import Data, Split
from mpcompile.data.samples import SampleImages, called, class_of, indexed, is_stream, parts_of
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source

TRAINING = ("train", "training")
CALIBRATION = ("calibration",)
VALIDATION = ("validation", "val", "valid")
HELD_OUT = ("held_out", "test", "heldout")


def given_data(
    given: Any,
    source: Source,
    names: Sequence[str],
    calibration: int = 256,
    validation: int = 256,
    held_out: int | None = None,
    seed: int = 0,
    name: str = "the data",
) -> Data:
    """The splits of a run from samples `(inputs, target)`.

    One iterable is divided at random. In a dict, `train` is divided into calibration, validation and training images;
    `calibration` replaces the first of these, and `validation` (or `val`) the second if there is `test` (or
    `held_out`), else it is held out. A torch IterableDataset is read until it has given the samples of a run.

    Args:
        given: an iterable, a dict of iterables by split, or `Data`.
        source: the model's source.
        names: the names of the model's inputs, the images first.
        calibration: number of calibration images.
        validation: number of validation images.
        held_out: number of held-out images; None for all.
        seed: selects the images.
        name: what to call the data in errors.

    Raises LoadError.
    """
    if isinstance(given, Data):
        return given
    rng = np.random.default_rng(seed)
    parts = _parts(given, name) if isinstance(given, Mapping) else {"all": given}
    numbers = Numbers(calibration, validation, held_out, seed)
    most = {part: _most(part, numbers) for part in parts}
    parts = {part: called(one) for part, one in parts.items()}
    sets = {
        part: SampleImages(indexed(one, len(source.size), name, most[part]), source, names)
        for part, one in parts.items()
    }
    for part, images in sets.items():
        if not len(images):
            raise LoadError(f"{name} has no samples{'' if part == 'all' else f' in {part}'}; give at least one")
    train = sets.get("all", sets.get("train", sets.get("calibration")))
    assert train is not None
    order = rng.permutation(len(train)).tolist()
    test = train
    if "all" in sets:
        fitted = order[: min(calibration, len(order) // 2)]
        left = order[len(fitted) :]
        validating = left[: min(validation, len(left) // 5)]
        evaluating = left[len(validating) :]
    else:
        fitted = order[:calibration]
        validating = order[len(fitted) :][:validation]
        test = sets["held_out"]
        evaluating = rng.permutation(len(test)).tolist()
    evaluating = sorted(evaluating[:held_out])
    if not evaluating:
        raise LoadError(f"{name} has {len(train)} samples, and none are left to hold out; give more")
    validators = sets.get("validation")
    others = set(validating) if validators is None else set()
    calibrators = sets.get("calibration", train)
    if calibrators is not train:
        fitted = rng.permutation(len(calibrators)).tolist()[:calibration]
    training = [index for index in range(len(train)) if index not in others] if "all" not in sets else fitted
    labelled = all(class_of(parts_of(images.samples[0], 0)[1]) is not None for images in sets.values())

    def split(images: SampleImages, chosen: Sequence[int]) -> Split:
        return Split(images, tuple(chosen), labelled)

    if validators is not None:
        validating = rng.permutation(len(validators)).tolist()[:validation]
    note = (
        f"the images are those of {name}: {len(fitted):,} for calibration and {len(validating):,} for validation, "
        f"drawn by seed {seed} from {len(calibrators):,} samples, and {len(evaluating):,} held out of {len(test):,}"
    )
    streams = [part for part, one in parts.items() if is_stream(one) and len(sets[part]) == most[part]]
    ends = [f"only the first {most[part]:,} samples of {name} were read{_of(part)}, in their order" for part in streams]
    return Data(
        split(calibrators, fitted),
        split(test, evaluating),
        (note, *ends),
        split(validators or train, validating),
        split(train, sorted(training)),
    )


def _most(part: str, numbers: Numbers) -> int:
    """The number of samples that a run reads from a stream: for calibration, validation and holding out."""
    if part in ("calibration", "validation"):
        return {"calibration": numbers.calibration, "validation": numbers.validation}[part]
    return held_out_of_stream(numbers) if part == "held_out" else first_of_stream(numbers, part == "all")


def _of(part: str) -> str:
    return "" if part == "all" else f" for {part}"


def _parts(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The iterables by part: held_out, and train or calibration, perhaps validation. Raises LoadError."""
    known = {"train": TRAINING, "calibration": CALIBRATION, "validation": VALIDATION, "held_out": HELD_OUT}
    found = {part: given[key] for part, keys in known.items() for key in keys if key in given}
    unknown = [str(key) for key in given if not any(key in keys for keys in known.values())]
    if "held_out" not in found and "validation" in found:
        found["held_out"] = found.pop("validation")
    if unknown or "held_out" not in found or not {"train", "calibration"} & set(found):
        raise LoadError(
            f"{name} has the splits {', '.join(map(str, given)) or 'none'}; give train (or calibration), and test (or "
            "validation), and no others"
        )
    return found

"""Which columns of a dataset hold the image and its class, by the types and the usual names of the columns."""

from collections.abc import Mapping
from typing import Any

from mpcompile.data.dataset_name import DatasetName
from mpcompile.data.dataset_splits import SHOWN
from mpcompile.data.image_tree import shown
from mpcompile.data.samples import IMAGE_KEYS, TARGET_KEYS
from mpcompile.errors import LoadError


def image_column(dataset: DatasetName, features: Mapping[str, Any]) -> str:
    """The column of the images. `features` are the types of all columns by name. Raises LoadError, which lists them."""
    if dataset.image is not None:
        return _given(dataset, dataset.image, features)
    found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    return _only(dataset, found, [name for name in IMAGE_KEYS if name in found], features, "image") or _none(
        dataset, features
    )


def label_column(dataset: DatasetName, features: Mapping[str, Any]) -> str | None:
    """The column of the classes, or None if there is none. Raises LoadError if it may be one of several."""
    if dataset.label is not None:
        return _given(dataset, dataset.label, features)
    found = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    usual = [name for name in TARGET_KEYS if name in (found or features)]
    return _only(dataset, found or usual[:1], usual, features, "label")


def holds_classes(feature: Any) -> bool:
    """Whether a column can hold the class of each image: numbers or names, not masks or lists."""
    return type(feature).__name__ in ("ClassLabel", "Value", "Scalar", "Tensor", "Text")


def class_names(feature: Any) -> tuple[str, ...] | None:
    """The class names of a column, by index, or None."""
    names = getattr(feature, "names", None)
    return None if names is None else tuple(map(str, names))


def _given(dataset: DatasetName, name: str, features: Mapping[str, Any]) -> str:
    if name not in features:
        raise LoadError(f"{dataset} has no column {name!r}; it has {shown(features, SHOWN)}")
    return name


def _only(
    dataset: DatasetName, found: list[str], usual: list[str], features: Mapping[str, Any], what: str
) -> str | None:
    """The one column of a kind, or the usual one of several. Raises LoadError."""
    if len(found) < 2:
        return found[0] if found else None
    if usual:
        return usual[0]
    raise LoadError(
        f"{dataset} has the columns {shown(features, SHOWN)}, of which {shown(found, SHOWN)} may be the {what}; give "
        f",{what}=COLUMN behind the name"
    )


def _none(dataset: DatasetName, features: Mapping[str, Any]) -> str:
    raise LoadError(
        f"{dataset} has the columns {shown(features, SHOWN)}, and none is of images; give ,image=COLUMN behind the name"
    )

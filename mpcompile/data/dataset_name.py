"""The names of datasets that --data takes: `wds/PATH`, `hfds/NAME`, `hfids/NAME` and `tfds/NAME`, as in timm."""

import re
from dataclasses import dataclass

from mpcompile.errors import UsageError, did_you_mean

KINDS = ("wds", "hfds", "hfids", "tfds")
OPTIONS = ("train", "held_out", "image", "label", "config")
WRITTEN = "wds/FOLDER, hfds/NAME, hfids/NAME or tfds/NAME, then options such as ,train=SPLIT,held_out=SPLIT"


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A dataset as timm names it.

    - `kind` is the reader: tar shards on disk (`wds`), Hugging Face by index (`hfds`) or as a stream (`hfids`), or
      TensorFlow Datasets (`tfds`).
    - `name` is a path, or a name on the hub.
    - `train` and `held_out` name splits; None chooses them by their usual names.
    - `image` and `label` name columns; None finds them. `config` is the configuration of a dataset that has several.
    """

    kind: str
    name: str
    train: str | None = None
    held_out: str | None = None
    image: str | None = None
    label: str | None = None
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


def dataset_named(text: str) -> DatasetName | None:
    """The dataset that a text such as `hfds/food101,held_out=validation` names, or None. Raises UsageError.

    The prefix may be in any case, as in timm. Options follow the name, each behind a comma.
    """
    prefix, slash, rest = text.partition("/")
    if not slash or prefix.lower() not in KINDS:
        return None
    name, *options = re.split(r",(?=[A-Za-z_]+=)", rest)
    given: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in OPTIONS:
            raise UsageError(f"{text} has the option {key!r}; give {', '.join(OPTIONS)}{did_you_mean(key, OPTIONS)}")
        if not value or key in given:
            raise UsageError(f"{text} gives {key} {'twice' if key in given else 'no value'}; give {key}=VALUE once")
        given[key] = value
    if not name:
        raise UsageError(f"{text} names no dataset; give {WRITTEN}")
    return DatasetName(prefix.lower(), name, **given)

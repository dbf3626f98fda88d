"""The pixels of a Hugging Face model are those of its own image processor, or the run stops."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hugging_face_models import hugging_face, needs_transformers, saved

from mpcompile.driver import inputs
from mpcompile.driver.processor_check import require_same_pixels
from mpcompile.errors import LoadError
from mpcompile.frontend.load_model import Request, load
from mpcompile.frontend.preprocessing import Preprocessing, with_preprocessing
from mpcompile.frontend.preset_file import read_preset
from mpcompile.ir.source import Source

pytestmark = needs_transformers
BASE = Source("x", "", "x", (3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center", ())
SMALL = {"height": 48, "width": 48}


def read(tmp_path: Path, name: str, **values: Any) -> tuple[Path, Source]:
    """The file that a class of transformers writes, and a source with the preprocessing that is read in it."""
    import transformers

    getattr(transformers, name)(**values).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    return file, with_preprocessing(BASE, Preprocessing(), read_preset(file), "recorded")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ViTImageProcessor", {"size": SMALL}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 48}, "crop_size": SMALL}),
        ("BitImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": SMALL}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.875}),
        ("LevitImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
        ("EfficientNetImageProcessor", {"size": SMALL, "include_top": True}),
        ("SegformerImageProcessor", {"size": SMALL, "do_reduce_labels": True}),
        ("SiglipImageProcessor", {"size": SMALL, "resample": 3}),
        ("DeiTImageProcessor", {"size": {"height": 64, "width": 64}, "crop_size": SMALL}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": SMALL}),
        ("RTDetrImageProcessor", {"size": SMALL}),
    ],
)
def test_pixels_of_transformers(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    require_same_pixels(*read(tmp_path, name, **values))


def test_other_pixels_stop_the_run(tmp_path: Path) -> None:
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    file, source = read(tmp_path, "LevitImageProcessor", **size)
    for change in ({"resize": (56,)}, {"std": (0.1,) * 3}, {"channel_order": "bgr"}):
        with pytest.raises(LoadError, match=r"was read otherwise than transformers' Levit.*they differ by \d+%"):
            require_same_pixels(file, dataclasses.replace(source, **change))
    with pytest.raises(LoadError, match=r"on one picture, \(3, 48, 48\) against \(3, 56, 56\)"):
        require_same_pixels(file, dataclasses.replace(source, size=(3, 48, 48)))


def test_options_of_the_user_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, hugging_face("ViTForImageClassification"))
    assert load(Request(str(folder))).processor == folder / "preprocessor_config.json"
    assert load(Request(str(folder), mean=(0.1,) * 3)).processor is None
    assert load(Request(str(folder), preprocess="imagenet")).processor is None
    called: list[Path] = []
    monkeypatch.setattr(inputs, "require_same_pixels", lambda file, source: called.append(file))
    inputs.loaded_from(folder)
    assert called == [folder / "preprocessor_config.json"]

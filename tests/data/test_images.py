"""Images of folders and .npz files: disjoint splits, labels, preprocessing, and errors for unreadable ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpcompile.data.images import Data
from mpcompile.data.loading import load_data
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source

SOURCE = Source(name="m", sha256="", arch="m", size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)
GREY = Source(name="m", sha256="", arch="m", size=(1, 8, 8), mean=(0.5,), std=(0.5,))


def save_image(path: Path, value: int, size: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)


def save_classes(root: Path, names: tuple[str, ...] = ("cat", "dog"), each: int = 6) -> Path:
    for label, name in enumerate(names):
        for i in range(each):
            save_image(root / name / f"{i}.png", 100 * label + i)
    return root


def save_arrays(path: Path, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    content = {
        "calibration_images": rng.integers(0, 256, (6, 8, 8), np.uint8),
        "calibration_labels": np.arange(6) % 3,
        "heldout_images": rng.integers(0, 256, (5, 8, 8), np.uint8),
        "heldout_labels": np.arange(5) % 3,
    } | changes
    np.savez(path, allow_pickle=True, **{name: value for name, value in content.items() if value is not None})
    return path


def test_one_folder_gives_disjoint_splits(tmp_path: Path) -> None:
    data = load_data(save_classes(tmp_path), SOURCE, outputs=2, calibration=4)
    # Validation gets a fifth of the eight that calibration leaves.
    splits = (data.calibration, data.validation, data.held_out)
    assert [len(split) for split in splits] == [4, 1, 7]
    assert len({index for split in splits for index in split.order}) == 12
    assert data.held_out.labelled


def test_the_seed_decides_which_images_calibrate(tmp_path: Path) -> None:
    save_classes(tmp_path)
    orders = [load_data(tmp_path, SOURCE, outputs=2, calibration=4, seed=seed).calibration.order for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_train_and_val_folders_are_kept_apart(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", each=3)
    save_classes(tmp_path / "val", each=2)
    data = load_data(tmp_path, SOURCE, outputs=2, calibration=256, held_out=3)
    assert (len(data.calibration), len(data.held_out)) == (6, 3)
    assert data.notes[1:] == ("256 calibration images were requested, but there are only 6",)


def test_images_are_preprocessed_as_the_source_says(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", each=1)
    save_classes(tmp_path / "test", each=1)
    [(pixels, labels)] = list(load_data(tmp_path, SOURCE, outputs=2).held_out.batches())
    assert pixels.shape == (2, 3, 16, 16)
    assert labels.tolist() == [0, 1]
    # A constant image stays constant under resizing: (value / 255 − mean) / std, to float32 rounding.
    expected = torch.tensor([(0 / 255 - 0.5) / 0.25, (100 / 255 - 0.5) / 0.25])
    torch.testing.assert_close(pixels[:, 0, 0, 0], expected, rtol=0, atol=1e-6)


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    for i in range(6):
        save_image(tmp_path / f"{i}.png", i)
    data = load_data(tmp_path, SOURCE, outputs=10, calibration=2)
    assert not data.held_out.labelled
    assert "no labels: the outputs are compared with the dense model's" in data.notes[0]


def test_labels_of_another_number_of_classes_are_dropped_with_a_note(tmp_path: Path) -> None:
    data = load_data(save_classes(tmp_path), SOURCE, outputs=1000, calibration=2)
    assert not data.held_out.labelled
    assert "the images have 2 classes, the model 1000 outputs" in data.notes[0]


def test_train_and_held_out_folders_need_the_same_class_names(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", names=("cat", "dog"))
    save_classes(tmp_path / "val", names=("dog", "fox"))
    with pytest.raises(LoadError, match="have different classes: only one of them has cat, fox; give both the same"):
        load_data(tmp_path, SOURCE, outputs=2)


def test_notes_name_files_left_out_and_the_order_of_classes(tmp_path: Path) -> None:
    save_classes(tmp_path, names=("2", "10"), each=6)
    (tmp_path / "2" / "scan.dng").write_bytes(b"raw")
    Image.new("RGB", (20, 20)).save(tmp_path / "2" / "more.webp")
    data = load_data(tmp_path, SOURCE, outputs=2, calibration=2)
    assert len(data.calibration) + len(data.validation) + len(data.held_out) == 13
    assert data.notes[0].startswith("1 files in ")
    assert "torchvision's ImageFolder sorts them as text, folder 10 before folder 2" in data.notes[1]


def test_image_files_do_not_give_four_channels(tmp_path: Path) -> None:
    source = Source(name="m", sha256="", arch="m", size=(4, 16, 16), mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(LoadError, match="takes images of 4 channels, and image files have 1 or 3; give an .npz"):
        load_data(save_classes(tmp_path), source, outputs=2)


def test_labels_of_an_npz_need_not_use_every_output(tmp_path: Path) -> None:
    assert load_data(save_arrays(tmp_path / "a.npz"), GREY, outputs=10).held_out.labelled
    assert not load_data(save_arrays(tmp_path / "a.npz"), GREY, outputs=2).held_out.labelled
    assert not load_data(save_arrays(tmp_path / "a.npz"), GREY, outputs=0).held_out.labelled


def test_npz_images_are_normalised_and_keep_their_order(tmp_path: Path) -> None:
    data = load_data(save_arrays(tmp_path / "a.npz"), GREY, outputs=3, calibration=4)
    assert (len(data.calibration), len(data.held_out)) == (4, 5)
    [(pixels, labels)] = list(data.held_out.batches())
    raw = np.load(tmp_path / "a.npz")["heldout_images"]
    torch.testing.assert_close(pixels[:, 0], (torch.from_numpy(raw).float() / 255 - 0.5) / 0.5)
    assert labels.tolist() == [0, 1, 2, 0, 1]


def test_data_for_passes_have_no_held_out_images(tmp_path: Path) -> None:
    data = load_data(save_arrays(tmp_path / "a.npz"), GREY, outputs=3)
    assert len(data.for_passes().held_out) == 0
    assert data.for_passes().calibration is data.calibration


def test_empty_data() -> None:
    assert list(Data().held_out.batches()) == []
    with pytest.raises(IndexError):
        Data().held_out.images[0]


def test_the_error_names_the_image_that_cannot_be_read(tmp_path: Path) -> None:
    save_classes(tmp_path, each=4)
    (tmp_path / "dog" / "9.png").write_bytes((tmp_path / "dog" / "0.png").read_bytes()[:40])
    with pytest.raises(LoadError, match=r"dog/9.png is not an image that can be read .*; repair or remove it") as error:
        load_data(tmp_path, SOURCE, outputs=2, calibration=1)
    assert error.value.exit_code == 3


def test_folders_without_usable_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="nowhere does not exist; --data takes a folder of images or an .npz file"):
        load_data(tmp_path / "nowhere", SOURCE, outputs=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match="has no images; give a folder of images"):
        load_data(tmp_path / "empty", SOURCE, outputs=2)
    save_classes(tmp_path / "half" / "train")
    with pytest.raises(LoadError, match="has train/ but no held-out folder; add one of val/, validation/, test/"):
        load_data(tmp_path / "half", SOURCE, outputs=2)
    save_classes(tmp_path / "half" / "val", names=("cat", "dog", "eel"))
    with pytest.raises(LoadError, match="have different classes: only one of them has eel"):
        load_data(tmp_path / "half", SOURCE, outputs=2)
    save_classes(tmp_path / "one", names=("cat",), each=1)
    with pytest.raises(LoadError, match="all 1 images are used for calibration"):
        load_data(tmp_path / "one", SOURCE, outputs=2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"heldout_labels": None}, "it needs heldout_images and heldout_labels"),
        ({"heldout_images": np.zeros((5, 9, 9), np.uint8)}, r"the model needs uint8 \(n, 8, 8, 1\)"),
        ({"heldout_images": np.zeros((5, 8, 8), np.float32)}, r"heldout_images is float32"),
        (
            {"heldout_images": np.zeros((0, 8, 8), np.uint8), "heldout_labels": np.zeros(0, np.int64)},
            "heldout_images is empty",
        ),
        ({"heldout_labels": np.arange(4)}, "it needs one class index"),
        ({"heldout_labels": np.full(5, -1)}, "it needs one class index"),
        ({"heldout_labels": np.array([None] * 5)}, "cannot be read as an .npz file"),
    ],
)
def test_npz_arrays_of_wrong_shape_or_type_are_refused(
    tmp_path: Path, changes: dict[str, np.ndarray], text: str
) -> None:
    with pytest.raises(LoadError, match=text):
        load_data(save_arrays(tmp_path / "a.npz", **changes), GREY, outputs=3)


def test_a_file_that_is_not_an_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(LoadError, match="cannot be read as an .npz file"):
        load_data(tmp_path / "a.npz", GREY, outputs=3)


def test_labels_of_several_outputs_in_an_npz_file(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    flags = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])

    def read(labels: np.ndarray, multilabel: bool) -> Data:
        both = {"images": images, "labels": labels}
        named: dict[str, Any] = {
            f"{split}_{name}": values for split in ("calibration", "heldout") for name, values in both.items()
        }
        np.savez(tmp_path / "a.npz", **named)
        return load_data(tmp_path / "a.npz", GREY, 3, multilabel=multilabel)

    for kind in (np.int64, np.uint8, bool):
        found = read(flags.astype(kind), True).held_out
        assert found.labelled
        assert torch.equal(torch.cat([labels for _, labels in found.batches(3)]), torch.from_numpy(flags))
    assert read(np.arange(4) % 3, True).held_out.labelled  # one class each: `headed` says that they are not used
    with pytest.raises(LoadError, match=r"labels is int64 \(4, 3\), several labels per image; give --head multilabel"):
        read(flags, False)
    for wrong in (flags[:, :2], 2 * flags, flags.astype(np.float32), flags - 1):
        with pytest.raises(LoadError, match="with --head multilabel it needs 0 or 1 for each of the model's 3 outputs"):
            read(wrong, True)

"""Image files of every kind give the same pictures as 8-bit grey files, or an error or a note that names the kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_kinds import EXACT, LOSSY, NOTED, Write, frames, on_transparent_ground, tiff, turned
from numpy.typing import NDArray
from PIL import Image

from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data
from mpcompile.data.loading import load_data
from mpcompile.errors import LoadError
from mpcompile.frontend.load_model import Request, load
from mpcompile.ir.source import Source
from mpcompile.pipeline.fingerprint import images_key

SIZE = (12, 10)
GREY = Source(name="m", sha256="", arch="m", size=(1, *SIZE), mean=(0.5,), std=(0.5,), crop_pct=1.0)
RGB = Source(name="m", sha256="", arch="m", size=(3, *SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
NOTES = {
    "exif6": "8 of 8 images have an EXIF orientation, which was applied (--exif ignore",
    "exif_late": "8 of 8 images have an EXIF orientation",
    "exif_jpeg": "8 of 8 images have an EXIF orientation",
    "png16": "8 of 8 images hold integers of more than 8 bits (largest value 65535); values from 0 to 65535 were",
    "float_unit": "8 of 8 images hold floats of more than 8 bits (largest value 1); values from 0 to 1 were scaled",
    "animated_gif": "8 of 8 images have more than one frame; the first is used",
    "multi_page_tiff": "8 of 8 images have more than one frame; the first is used",
    "cmyk": "8 of 8 images are CMYK, converted without a colour profile",
    "rgba": "8 of 8 images have transparent pixels, which were read with their stored colour",
}


def pictures(count: int = 8) -> NDArray[np.uint8]:
    """Random pictures, each with black and with white."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *SIZE), np.uint8)
    pixels[:, 0, :3], pixels[:, 1, :3] = 0, 255
    return pixels


def saved(root: Path, write: Write, pixels: NDArray[np.uint8] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures() if pixels is None else pixels):
        write(picture, root / str(index))
    return root


def read(root: Path, source: Source = GREY, **options: str) -> tuple[torch.Tensor, Data]:
    """All pictures in order as float32 (n, c, h, w), and the data."""
    data = load_data(root, source, 10, calibration=4, validation=0, **options)  # type: ignore[arg-type]
    images = data.held_out.images
    return torch.stack([images[index][0] for index in range(len(images))]), data


@pytest.mark.parametrize("source", [GREY, RGB], ids=["grey", "rgb"])
@pytest.mark.parametrize("kind", [*EXACT, *LOSSY])
def test_the_same_picture_in_every_kind(tmp_path: Path, kind: str, source: Source) -> None:
    expected, _ = read(saved(tmp_path / "plain", EXACT["grey"]), source)
    found, data = read(saved(tmp_path / "kind", ({**EXACT, **LOSSY})[kind]), source)
    # JPEG moves noise by some grey levels; one is 2/255 of the normalised range.
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if kind in EXACT else 0.5)
    if kind in NOTES:
        assert any(note.startswith(NOTES[kind]) for note in data.notes), data.notes


@pytest.mark.parametrize("kind", NOTED)
def test_transparency_is_dropped_with_a_note_or_put_on_a_ground(tmp_path: Path, kind: str) -> None:
    expected, _ = read(saved(tmp_path / "plain", EXACT["grey"]))
    root = saved(tmp_path / "kind", NOTED[kind])
    dropped, data = read(root)
    assert (dropped != expected).any()
    assert any(note.startswith(NOTES["rgba"]) for note in data.notes)
    black, data = read(root, alpha="black")
    assert torch.equal(black, expected)
    assert any("8 of 8 images have transparent pixels, which were put on black" in note for note in data.notes)
    white, _ = read(root, alpha="white")
    assert torch.equal(white, dropped)  # these files hold white where they are transparent


def test_exif_may_be_ignored(tmp_path: Path) -> None:
    root = saved(tmp_path, lambda x, path: turned(x, path, 2))
    applied, _ = read(root)
    stored, data = read(root, exif="ignore")
    assert torch.equal(stored, applied.flip(3))
    assert any("EXIF orientation, which was ignored, as torchvision and timm do" in note for note in data.notes)


def test_options_and_ranges_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    root = saved(tmp_path, lambda x, path: on_transparent_ground(x, path, 9))
    choices: list[dict[str, str]] = [{}, {"alpha": "white"}, {"alpha": "black"}, {"exif": "ignore"}]
    assert len({images_key(read(root, GREY, **options)[1].held_out) for options in choices}) == 4


def test_files_of_more_bits_share_one_range(tmp_path: Path) -> None:
    """A dark picture stays dark: its own largest value is not taken for white."""
    pixels = pictures()
    pixels[3] = 0
    pixels[3, 0, 0] = 1
    root = saved(tmp_path, EXACT["float_255"], pixels)
    found, _ = read(root)
    assert float(found[3].max()) == pytest.approx(2 / 255 - 1)
    held_out = read(root)[1].held_out.images
    assert isinstance(held_out, FolderImages)
    assert held_out.reading.white["float"] == 255


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda x, p: tiff(x.astype(np.float32) * 4, p), "largest value .* is 1020 .*needed are floats from 0 to 1 or"),
        (lambda x, p: tiff(x.astype(np.float32) - 9, p), r"holds negative values \(down to -9\)"),
        (lambda x, p: tiff(x.astype(np.float32) / 0, p), "holds NaN or infinite values"),
        (lambda x, p: tiff(x.astype(np.uint16) * 16, p), "largest value .* is 4080 .*cannot be known which value is"),
        (lambda x, p: tiff(x.astype(np.int32) * 2**20, p), "largest value .* is 2.67387e[+]08"),
        (lambda x, p: tiff(x.astype(np.int32) - 1024, p), "holds negative values"),
        (lambda x, p: Image.fromarray(x).convert("RGB").convert("LAB").save(f"{p}.tif"), "is not an image that can be"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_what_cannot_be_known_is_refused(tmp_path: Path, write: Write, text: str) -> None:
    with pytest.raises(LoadError, match=text):
        read(saved(tmp_path, write))


def test_a_training_image_beyond_the_range_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """The range comes from the images of the run; another file is refused, and not clipped."""
    root = saved(tmp_path / "a", EXACT["float_unit"])
    _, data = read(root)
    tiff(pictures()[0].astype(np.float32), root / "0")
    with pytest.raises(LoadError, match="holds values from 0 to 255, and the other images from 0 to 1; save it with 8"):
        data.held_out.images[0]


def test_broken_files_are_skipped_and_counted_on_request(tmp_path: Path) -> None:
    root = saved(tmp_path / "images", EXACT["grey"])
    whole = (root / "3.png").read_bytes()
    (root / "3.png").write_bytes(whole[:-30])
    (root / "5.png").write_bytes(b"")
    with pytest.raises(LoadError, match="is not an image that can be read"):
        load_data(root, GREY, 10, calibration=4).held_out.first(4)
    data = load_data(root, GREY, 10, calibration=3, skip_broken=True)
    assert len(data.calibration) + len(data.validation) + len(data.held_out) == 6
    assert "2 images that cannot be read were skipped (--skip-broken): images/3.png, images/5.png" in data.notes
    for path in root.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(LoadError, match="none of the 8 images can be read"):
        load_data(root, GREY, 10, skip_broken=True)


def test_no_kind_changes_the_accuracy_of_the_example(example: Path, tmp_path: Path) -> None:
    """The dense model is as accurate, within 0.3 points. For kinds that give equal pictures that follows from above."""
    loaded = load(Request(str(example / "model.safetensors")))
    arrays = np.load(example / "images.npz")
    pixels, labels = arrays["heldout_images"][:60], arrays["heldout_labels"][:60]
    pixels = pixels.reshape(-1, *loaded.source.size[1:])
    top1 = {}
    for kind, write in {"grey": EXACT["grey"], "png16": EXACT["png16"], **LOSSY}.items():
        for index, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = tmp_path / kind / loaded.source.labels[label]
            folder.mkdir(parents=True, exist_ok=True)
            write(picture, folder / str(index))
        data = load_data(tmp_path / kind, loaded.source, 10, calibration=1, validation=0)
        assert data.held_out.labelled
        [(batch, truth)] = data.held_out.batches(100)
        with torch.no_grad():
            top1[kind] = 100 * float((loaded.module(batch).argmax(1) == truth).double().mean())
    assert top1["grey"] > 80
    assert all(abs(found - top1["grey"]) < 0.3 for found in top1.values()), top1


def test_animations_are_not_counted_twice(tmp_path: Path) -> None:
    _, data = read(saved(tmp_path, lambda x, path: frames(x, path, ".gif")))
    assert len(data.calibration) + len(data.held_out) == 8

"""Images for calibration, training and evaluation, from a folder or an .npz file.

What `--data` may be:

- a folder with `train/` and one of `val/`, `validation/` or `test/`, each with a folder per class;
- a folder with a folder per class: shuffled by the seed, calibration images first, held-out images after them;
- a folder of images without classes: the same, without labels, so agreement is measured and not accuracy;
- an .npz file with `calibration_images`, `calibration_labels`, `heldout_images`, `heldout_labels`: bytes of shape
  (n, h, w) or (n, h, w, c), and integers.

Folders are read by timm's reader and transforms with the preprocessing of the model. Unlike timm's own dataset,
an image that cannot be read is an error here and not a skipped sample.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.errors import LoadError
from mpcompile.model import Source
from mpcompile.progress import tracked

HELD_OUT_FOLDERS = ("val", "validation", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB"}
BATCH = 64


@runtime_checkable
class Images(Protocol):
    """Preprocessed images by index, each with its label or -1; `classes` is how many labels there are, or 0."""

    @property
    def classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Split:
    """A choice of images, in order; reads them batch by batch, so memory holds one batch."""

    images: Images
    order: tuple[int, ...]
    labelled: bool

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, c, h, w) and labels (b,), -1 where unknown."""
        for start in range(0, len(self.order), size):
            pairs = [self.images[index] for index in self.order[start : start + size]]
            yield torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    def announced(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`batches`, each told to whoever listens to progress before it is handed out."""
        starts = range(0, len(self), size)
        for _, batch in zip(tracked(starts, "image {}".format), self.batches(size), strict=True):
            yield batch

    def first(self, count: int) -> Tensor:
        """The first images as one batch."""
        return torch.stack([self.images[index][0] for index in self.order[:count]])


@dataclass(frozen=True)
class NoImages:
    """The empty set of images."""

    classes: int = 0

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise IndexError(index)


NONE = Split(NoImages(), (), labelled=False)


@dataclass(frozen=True)
class Data:
    """Images to calibrate and train on, others to decide on, and others again to evaluate on.

    What a pass fits, it fits on `calibration`; where it chooses by what it measures, it measures on `validation`, which
    are training images too. `training` are all that there are to train on, those for calibration among them and those
    for validation not. `held_out` are shown to no pass that changes the model.
    """

    calibration: Split = NONE
    held_out: Split = NONE
    notes: tuple[str, ...] = ()
    validation: Split = NONE
    training: Split = NONE

    def for_passes(self) -> "Data":
        """The same without the held-out images: what a pass that changes the model is given."""
        return replace(self, held_out=NONE)


@dataclass(frozen=True)
class FolderImages:
    """Image files through timm's evaluation transform."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    transform: Callable[[Any], Tensor]
    mode: str

    @property
    def classes(self) -> int:
        return len(self.names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.picture(index)
        return self.transform(picture), label

    def picture(self, index: int) -> tuple[Any, int]:
        """The image as it is in its file."""
        from PIL import Image

        path = self.paths[index]
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device never ends
            raise LoadError(f"{path} is a pipe or a device, and no image; remove it")
        try:
            with Image.open(path) as image:
                return image.convert(self.mode), self.labels[index]
        except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, DecompressionBombError …
            raise LoadError(f"{path} is not an image that can be read ({error}); mend or remove it") from error


@dataclass(frozen=True)
class ArrayImages:
    """Images of an .npz file: bytes (n, h, w, c), already of the model's size, and their labels (n,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.integer]
    classes: int
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.pixels[index]).permute(2, 0, 1).float() / 255
        return (image - self.mean[:, None, None]) / self.std[:, None, None], int(self.labels[index])

    def picture(self, index: int) -> tuple[Any, int]:
        """The image of one or three channels as PIL has it."""
        from PIL import Image

        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), int(self.labels[index])


def load_data(
    path: Path,
    source: Source,
    outputs: int,
    calibration: int = 256,
    held_out: int | None = None,
    seed: int = 0,
    validation: int = 256,
) -> Data:
    """The images at `path`, preprocessed for a model with that many outputs.

    At most that many images are taken, chosen by `seed`; of one pool, validation gets at most a fifth of what
    calibration leaves. Raises LoadError.
    """
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long, no permission, or a byte that names cannot have
        raise LoadError(f"{path} cannot be looked up: {error}") from error
    if not exists:
        raise LoadError(f"{path} does not exist; --data takes a folder of images or an .npz file")
    if not path.is_file() and not path.is_dir():
        raise LoadError(f"{path} is a pipe or a device; --data takes a folder of images or an .npz file")
    notes: list[str] = []
    train, test = _read_npz(path, source, outputs) if path.is_file() else _read_folders(path, source, notes)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    chosen, left = order[:calibration], order[calibration:]
    if test is None:  # one pool: disjoint shares of it
        deciding = left[: min(validation, len(left) // 5)]
        test, rest = train, left[len(deciding) :]
    else:
        deciding = left[:validation]
        rest = rng.permutation(len(test))
    if not len(rest):
        raise LoadError(
            f"{path}: all {len(train)} images are taken for calibration and none are left to evaluate on; "
            "give more images, or fewer with --calibration"
        )
    rest = np.sort(rest[:held_out])  # in the order of the folder: neighbours on disk are read together
    if len(chosen) < calibration:
        notes.append(f"{calibration} calibration images were asked for, {len(chosen)} are there")
    labelled, note = _labels_fit(test, outputs)
    return Data(
        Split(train, tuple(chosen.tolist()), labelled),
        Split(test, tuple(rest.tolist()), labelled),
        tuple(notes + note),
        Split(train, tuple(deciding.tolist()), labelled),
        Split(train, tuple(np.setdiff1d(order if test is not train else chosen, deciding).tolist()), labelled),
    )


def _labels_fit(images: Images, outputs: int) -> tuple[bool, list[str]]:
    """Whether the labels are the model's outputs, and a note where they are not or there are none."""
    if images.classes == outputs > 0:
        return True, []
    instead = "agreement with the dense model is measured instead of accuracy"
    if images.classes == 0:
        return False, [f"the images have no labels: {instead}"]
    return False, [f"the images have {images.classes} classes, the model {outputs} outputs: {instead}"]


def _read_folders(root: Path, source: Source, notes: list[str]) -> tuple[FolderImages, FolderImages | None]:
    """The images of `train/` and a held-out folder beside it, or of one folder; adds what is to be known of them."""
    train = root / "train"
    if not train.is_dir():
        return _read_folder(root, source, notes), None
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if held_out is None:
        raise LoadError(f"{root} has train/ and none of {', '.join(f'{n}/' for n in HELD_OUT_FOLDERS)} to evaluate on")
    splits = _read_folder(train, source, notes), _read_folder(held_out, source, [])
    if splits[0].names != splits[1].names:
        differ = sorted(set(splits[0].names) ^ set(splits[1].names))
        raise LoadError(f"{train} and {held_out} have different classes: {', '.join(differ[:4])} in only one of them")
    return splits


def _read_folder(root: Path, source: Source, notes: list[str]) -> FolderImages:
    """The images of a folder per class, or of one folder without classes."""
    from timm.data import create_transform
    from timm.data.readers.reader_image_folder import find_images_and_targets

    if source.size[0] not in MODES:
        raise LoadError(
            f"the model takes images of {source.size[0]} channels; files give 1 or 3, an .npz file any number"
        )
    _require_tree(root)
    found, classes = find_images_and_targets(str(root), types=SUFFIXES)
    others = sum(path.is_file() and path.suffix.lower() not in SUFFIXES for path in root.rglob("*"))
    if others:
        notes.append(f"{others} files in {root.name}/ are not images by their suffix, and were left out")
    if list(classes) != sorted(classes):
        notes.append("classes are numbered as timm sorts their folders, 2 before 10; torchvision sorts them otherwise")
    if not found:
        raise LoadError(f"{root} holds no images; needed is a folder per class, or a folder of images")
    labelled = list(classes) != [""]
    transform = create_transform(
        source.size,
        is_training=False,
        interpolation=source.interpolation,
        mean=source.mean,
        std=source.std,
        crop_pct=source.crop_pct,
        crop_mode=source.crop_mode,
    )
    return FolderImages(
        paths=tuple(Path(path) for path, _ in found),
        labels=tuple(label if labelled else -1 for _, label in found),
        names=tuple(classes) if labelled else (),
        transform=transform,
        mode=MODES[source.size[0]],
    )


def _require_tree(root: Path) -> None:
    """Raises where links make a folder part of itself: timm follows them, some forty deep."""
    home = root.resolve()
    for folder, inner, _ in os.walk(root):
        for name in inner:
            link = Path(folder, name)
            if link.is_symlink() and (home.is_relative_to(link.resolve()) or link.resolve() in link.absolute().parents):
                raise LoadError(f"{root} holds itself: a link in it leads back, {link}; remove it")


def _read_npz(path: Path, source: Source, outputs: int) -> tuple[ArrayImages, ArrayImages]:
    """The two splits of an .npz file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            _require_memory(arrays.zip, path)
            splits = [_read_arrays(arrays, path, split, source) for split in ("calibration", "heldout")]
    except LoadError:
        raise
    except Exception as error:  # numpy raises ValueError, OSError, EOFError, BadZipFile, pickle errors …
        raise LoadError(f"{path} is not an .npz file that can be read: {error}") from error
    # Labels here are indices of the model's outputs; not every output has to occur.
    classes = max(outputs, *(split.classes for split in splits))
    return replace(splits[0], classes=classes), replace(splits[1], classes=classes)


def _require_memory(archive: ZipFile, path: Path) -> None:
    """Raises where the arrays would not fit into memory, by what their headers say."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 0
    for name in (name for name in archive.namelist() if name.endswith(".npy")):
        with archive.open(name) as array:
            read = np.lib.format.read_array_header_1_0
            if np.lib.format.read_magic(array) != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, kind = read(array)
            needed += math.prod(shape) * kind.itemsize
    if needed > free:
        raise LoadError(
            f"{path} unpacks to {needed:,} bytes of memory, and this machine has {free:,}; give fewer images"
        )


def _read_arrays(arrays: Mapping[str, NDArray[Any]], path: Path, split: str, source: Source) -> ArrayImages:
    """One split of an .npz file, its shapes checked against the model."""
    wanted = f"{split}_images", f"{split}_labels"
    if any(name not in arrays for name in wanted):
        raise LoadError(f"{path} has the arrays {', '.join(arrays) or 'none'}; needed are {wanted[0]} and {wanted[1]}")
    pixels, labels = (arrays[name] for name in wanted)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    channels, height, width = source.size
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, channels):
        raise LoadError(
            f"{path}: {wanted[0]} is {pixels.dtype} {pixels.shape}; "
            f"the model needs uint8 (n, {height}, {width}, {channels})"
        )
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise LoadError(f"{path}: {wanted[1]} is {labels.dtype} {labels.shape}; needed is a class index ≥ 0 an image")
    if not len(pixels):
        raise LoadError(f"{path}: {wanted[0]} is empty")
    return ArrayImages(pixels, labels, int(labels.max()) + 1, torch.tensor(source.mean), torch.tensor(source.std))

"""Surveys the image files of a run before it starts: what kinds they are, as notes for the report."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mpcompile.data.image_file import Readable
from mpcompile.data.image_tree import shown
from mpcompile.data.picture import Opened, Reading, deep_kind, deep_values, is_transparent, orientation, printed
from mpcompile.errors import LoadError

THREADS = 8  # PIL decodes without the interpreter's lock
COLOUR_SPACES = ("CMYK", "YCbCr", "LAB", "HSV")
FULL_16_BITS = 65535
# Largest value of a set of 16-bit images: up to 14 bits, it may as well be another white (10, 12 or 14 bits).
UNKNOWN_WHITE = 2**14


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is unusual about an image file. `low` and `high` are its values, if it has more than 8 bits per channel."""

    turned: bool = False
    transparent: bool = False
    frames: int = 1
    colour_space: str | None = None
    deep: str | None = None
    low: float = 0
    high: float = 0


def facts_of_image(path: Readable) -> ImageFacts:
    """What is unusual about a file. Pixels are decoded only if it has transparency or more than 8 bits."""
    with Opened(path) as image:
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # MPO adds a preview or a gain map
        deep = deep_kind(image.mode)
        low, high = 0.0, 0.0
        turned = _orientation_of_header(image, path) != 1
        colour_space = image.mode if image.mode in COLOUR_SPACES else None
        if deep is not None:
            values = deep_values(_loaded(image))
            low, high = float(values.min(initial=0)), float(values.max(initial=0))
            if not np.isfinite(values).all():
                low = high = float("nan")
        return ImageFacts(turned, is_transparent(image), frames, colour_space, deep, low, high)


def _loaded(image: Any) -> Any:
    image.load()
    return image


def _orientation_of_header(image: Any, path: Readable) -> int:
    """The EXIF orientation. Of a PNG file without an eXIf chunk nothing is decoded, which PIL would do."""
    if image.format == "PNG" and "exif" not in image.info and "xmp" not in image.info and not _has_late_exif(path):
        return 1
    return orientation(image)


def _has_late_exif(path: Readable) -> bool:
    """Whether a PNG file has an eXIf chunk, also behind its pixels."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            if head[4:] == b"eXIf":
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def surveyed(paths: Sequence[Readable], reading: Reading) -> tuple[Reading, tuple[str, ...]]:
    """The reading with the white of images of more than 8 bits, and notes that count what is unusual. Raises LoadError.

    Images of more than 8 bits share one white. For integers it is 255 if no value is larger, else 65,535; for floats it
    is 1 or 255. Other ranges, and largest values below 2^14 of 16-bit images, raise LoadError.
    """
    facts = [facts_of_image(path) for path in paths]
    notes = list(_count_notes(facts, reading))
    white = dict(reading.white)
    for kind, choose in (("integer", _integer_white), ("float", _float_white)):
        some = [(fact, path) for fact, path in zip(facts, paths, strict=True) if fact.deep == kind]
        if some:
            _require_range(some)
            highest, path = max(((fact.high, path) for fact, path in some), key=lambda one: one[0])
            white[kind] = choose(highest, path)
            notes.append(
                f"{len(some):,} of {len(facts):,} images hold {_NAMES[kind]} of more than 8 bits (largest value "
                f"{highest:g}); values from 0 to {white[kind]:g} were scaled to 8 bits"
            )
    return Reading(reading.exif, reading.alpha, MappingProxyType(white)), tuple(notes)


_NAMES = {"integer": "integers", "float": "floats"}


def _require_range(some: Sequence[tuple[ImageFacts, Readable]]) -> None:
    for fact, path in some:
        if not fact.low >= 0:
            what = "NaN or infinite values" if fact.low != fact.low else f"negative values (down to {fact.low:g})"
            raise LoadError(f"{path} holds {what}; save the images with 8 bits, so that black and white are known")


def _integer_white(highest: float, path: Readable) -> float:
    if highest <= 255:
        return 255.0
    if UNKNOWN_WHITE <= highest <= FULL_16_BITS:
        return float(FULL_16_BITS)
    raise _unknown_white(highest, path, "integers up to 255 or up to 65,535")


def _float_white(highest: float, path: Readable) -> float:
    if highest <= 1:
        return 1.0
    if highest <= 255:
        return 255.0
    raise _unknown_white(highest, path, "floats from 0 to 1 or from 0 to 255")


def _unknown_white(highest: float, path: Readable, needed: str) -> LoadError:
    return LoadError(
        f"the largest value of the images of more than 8 bits is {highest:g} ({printed(path)}), so it cannot be known "
        f"which value is white; needed are {needed}; save the images with 8 bits"
    )


def _count_notes(facts: Sequence[ImageFacts], reading: Reading) -> list[str]:
    """A sentence for each unusual kind of image, with the number of images."""
    applied = {
        "apply": "which was applied (--exif ignore reads images as stored)",
        "ignore": "which was ignored, as torchvision and timm do (--exif apply turns them)",
    }
    dropped = {
        "drop": "which were read with their stored colour, as torchvision and timm do (--alpha white or --alpha black "
        "shows that colour through them)",
        "white": "which were put on white",
        "black": "which were put on black",
    }
    kinds: tuple[tuple[Callable[[ImageFacts], bool], str], ...] = (
        (lambda fact: fact.turned, f"have an EXIF orientation, {applied[reading.exif]}"),
        (lambda fact: fact.transparent, f"have transparent pixels, {dropped[reading.alpha]}"),
        (lambda fact: fact.frames > 1, "have more than one frame; the first is used"),
        *(
            (lambda fact, space=space: fact.colour_space == space, f"are {space}, converted without a colour profile")
            for space in COLOUR_SPACES
        ),
    )
    counts = [(sum(map(belongs, facts)), text) for belongs, text in kinds]
    return [f"{count:,} of {len(facts):,} images {text}" for count, text in counts if count]


def readable(paths: Sequence[Readable]) -> tuple[tuple[bool, ...], str | None]:
    """Whether each file can be decoded, and a note about those that cannot. Decodes every file, in several threads."""
    with ThreadPoolExecutor(THREADS) as threads:
        fine = tuple(threads.map(_can_be_decoded, paths))
    broken = [printed(path) for path, good in zip(paths, fine, strict=True) if not good]
    verb = "image that cannot be read was" if len(broken) == 1 else "images that cannot be read were"
    return fine, f"{len(broken):,} {verb} skipped (--skip-broken): {shown(broken)}" if broken else None


def _can_be_decoded(path: Readable) -> bool:
    try:
        with Opened(path) as image:
            image.load()
    except LoadError:
        return False
    return True

"""Writes the same grey pictures as image files of many kinds: bits, colour modes, transparency, orientation, frames."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
Write = Callable[[Picture, Path], None]
WHITE_IS_ZERO = {262: 0}  # the TIFF tag of a photometric interpretation


def png(pixels: NDArray[Any], path: Path, **options: Any) -> None:
    Image.fromarray(pixels).save(path.with_suffix(".png"), **options)


def tiff(pixels: NDArray[Any], path: Path, **options: Any) -> None:
    Image.fromarray(pixels).save(path.with_suffix(".tif"), **options)


def turned(pixels: Picture, path: Path, orientation: int, suffix: str = ".png") -> None:
    """Stored in an orientation of EXIF, with the tag that tells how to turn it back."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == ".webp" else {"quality": 100}
    Image.fromarray(pixels).transpose(undo[orientation]).save(path.with_suffix(suffix), exif=exif, **options)


def with_late_exif(pixels: Picture, path: Path) -> None:
    """A PNG file whose eXIf chunk is behind its pixels."""
    turned(pixels, path, 6)
    file = path.with_suffix(".png")
    content = file.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    tail = content.index(b"IEND") - 4
    file.write_bytes(content[:start] + content[end:tail] + content[start:end] + content[tail:])


def on_transparent_ground(pixels: Picture, path: Path, ground: int, mode: str = "RGBA") -> None:
    """Black is transparent, and the transparent pixels hold another grey, `ground`."""
    grey = Image.fromarray(np.where(pixels > 0, pixels, ground).astype(np.uint8))
    alpha = Image.fromarray(((pixels > 0) * 255).astype(np.uint8))
    bands = [grey] * (3 if mode == "RGBA" else 1)
    Image.merge(mode, [*bands, alpha]).save(path.with_suffix(".png"))


def frames(pixels: Picture, path: Path, suffix: str) -> None:
    """An animation whose second frame is another picture."""
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    first, second = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    first.save(path.with_suffix(suffix), save_all=True, append_images=[second], duration=100, **options)


def grey_palette(pixels: Picture, path: Path) -> None:
    """Palette indices that are not the grey values."""
    image = Image.fromarray(255 - pixels).convert("P")
    image.putpalette([value for index in range(256) for value in [255 - index] * 3])
    image.save(path.with_suffix(".png"))


# Every picture is the same, exactly.
EXACT: Mapping[str, Write] = {
    "grey": png,
    "rgb": lambda x, path: Image.fromarray(x).convert("RGB").save(path.with_suffix(".png")),
    "bmp": lambda x, path: Image.fromarray(x).save(path.with_suffix(".bmp")),
    "webp": lambda x, path: Image.fromarray(x).save(path.with_suffix(".webp"), lossless=True),
    "upper_case_suffix": lambda x, path: Image.fromarray(x).save(path.with_suffix(".PNG")),
    "palette": grey_palette,
    "cmyk": lambda x, path: Image.fromarray(x).convert("RGB").convert("CMYK").save(path.with_suffix(".tif")),
    "opaque_alpha": lambda x, path: Image.fromarray(x).convert("RGBA").save(path.with_suffix(".png")),
    "grey_alpha": lambda x, path: Image.fromarray(x).convert("LA").save(path.with_suffix(".png")),
    "png16": lambda x, path: png(x.astype(np.uint16) * 257, path),
    "tiff16": lambda x, path: tiff(x.astype(np.uint16) * 257, path),
    "tiff16_white_is_zero": lambda x, path: tiff(65535 - x.astype(np.uint16) * 257, path, tiffinfo=WHITE_IS_ZERO),
    "pgm16": lambda x, path: Image.fromarray(x.astype(np.uint16) * 257).save(path.with_suffix(".pgm")),
    "tiff32_8_bit_values": lambda x, path: tiff(x.astype(np.int32), path),
    "tiff32_16_bit_values": lambda x, path: tiff(x.astype(np.int32) * 257, path),
    "float_unit": lambda x, path: tiff((x / 255).astype(np.float32), path),
    "float_255": lambda x, path: tiff(x.astype(np.float32), path),
    **{f"exif{n}": lambda x, path, n=n: turned(x, path, n) for n in range(2, 9)},  # type: ignore[misc]
    "exif_webp": lambda x, path: turned(x, path, 6, ".webp"),
    "exif_tiff": lambda x, path: turned(x, path, 6, ".tif"),
    "exif_late": with_late_exif,
    "gif": lambda x, path: Image.fromarray(x).save(path.with_suffix(".gif")),
    "animated_gif": lambda x, path: frames(x, path, ".gif"),
    "animated_webp": lambda x, path: frames(x, path, ".webp"),
    "animated_png": lambda x, path: frames(x, path, ".png"),
    "multi_page_tiff": lambda x, path: frames(x, path, ".tif"),
}
# Almost the same, since JPEG loses some.
LOSSY: Mapping[str, Write] = {
    "jpeg": lambda x, path: Image.fromarray(x).save(path.with_suffix(".jpg"), quality=100),
    "exif_jpeg": lambda x, path: turned(x, path, 6, ".jpg"),
    "cmyk_jpeg": lambda x, path: (
        Image.fromarray(x).convert("RGB").convert("CMYK").save(path.with_suffix(".jpeg"), quality=100)
    ),
}
# Not the same unless an option says so; a note names the kind.
NOTED: Mapping[str, Write] = {
    "rgba": lambda x, path: on_transparent_ground(x, path, 255),
    "la": lambda x, path: on_transparent_ground(x, path, 255, "LA"),
}

"""Reads an image file as a PIL image of 8 bits per channel: orientation, transparency, and values of more bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcompile.data.image_file import Readable
from mpcompile.data.image_tree import printable
from mpcompile.errors import LoadError

ORIENTATION = 0x0112  # tag of EXIF and TIFF: 1 is upright, 2 to 8 are turned or mirrored
BITS, PHOTOMETRIC = 0x0102, 0x0106  # tags of TIFF
WHITE_IS_ZERO = 0
INTEGER_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # PIL's modes of 16 and 32 bits
GROUNDS: Mapping[str, tuple[int, int, int, int]] = {"white": (255, 255, 255, 255), "black": (0, 0, 0, 255)}


@dataclass(frozen=True, slots=True)
class Reading:
    """How image files are read.

    - `exif`: `apply` turns an image as its EXIF orientation says, `ignore` reads it as stored. Libraries that train
      models ignore it (torchvision, timm) or apply it (OpenCV, TensorFlow's Keras).
    - `alpha`: `drop` keeps the colour of transparent pixels, as torchvision and timm do; `white` and `black` put the
      image on a ground of that colour.
    - `white`: by kind (`integer`, `float`), the value that becomes 255 in images of more than 8 bits per channel.
    """

    exif: str = "apply"
    alpha: str = "drop"
    white: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"integer": 65535.0, "float": 1.0}))

    def __hash__(self) -> int:
        return hash(repr(self))


def read_picture(path: Readable, mode: str, reading: Reading) -> Any:
    """The image in PIL's mode `L` or `RGB`; of an animation the first frame. Raises LoadError.

    Values beyond the white of `reading`, negative values and NaN raise LoadError: they are never clipped.
    """
    with Opened(path) as image:
        image.load()
        deep = deep_kind(image.mode)
        upright = _upright(image) if reading.exif == "apply" else image
        if deep is not None:
            return _scaled(deep_values(upright), reading.white[deep], path).convert(mode)
        return _opaque(upright, reading.alpha).convert(mode)


class Opened:
    """A context that opens an image file with PIL.

    All that PIL raises inside becomes a LoadError that names the file.
    """

    def __init__(self, path: Readable) -> None:
        self._path = path

    def __enter__(self) -> Any:
        from PIL import Image, UnidentifiedImageError

        # Reading a pipe may block, a device may never end.
        if isinstance(self._path, Path) and self._path.exists() and not self._path.is_file():
            raise LoadError(f"{self._path} is a pipe or a device, not an image; remove it")
        try:
            # Not by name: PIL maps an uncompressed TIFF into memory then, and reads a turned one by a wrong width.
            self._file = self._path.open("rb")
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        try:
            return Image.open(self._file)
        except UnidentifiedImageError as error:
            self._file.close()
            raise self._unreadable("its format is not known") from error
        except Exception as error:
            self._file.close()
            raise self._unreadable(error) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        # PIL raises many kinds: OSError, SyntaxError, DecompressionBombError …
        if isinstance(error, Exception) and not isinstance(error, LoadError):
            raise self._unreadable(error) from error

    def _unreadable(self, error: object) -> LoadError:
        return LoadError(f"{self._path} is not an image that can be read ({error}); repair or remove it")


def deep_kind(mode: str) -> str | None:
    """`integer` or `float` for a PIL mode of more than 8 bits per channel, else None."""
    return "integer" if mode in INTEGER_MODES else "float" if mode == "F" else None


def deep_values(image: Any) -> NDArray[np.float64]:
    """The values (h, w) of an image of 16 or 32 bits. Of a TIFF with 9 to 15 bits they are scaled to 16 bits."""
    values = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", None)
    if tags is None or not image.mode.startswith("I;16"):
        return values
    bits = tags.get(BITS, (16,))[0]
    if 8 < bits < 16:
        values = values * (65535 / (2**bits - 1))
    return 65535 - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values


def _scaled(values: NDArray[np.float64], white: float, path: Readable) -> Any:
    """Values from 0 to `white` as a grey image of 8 bits, rounded. Raises LoadError for values outside."""
    from PIL import Image

    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > white:
        raise LoadError(
            f"{path} holds values from {values.min():g} to {values.max():g}, and the other images from 0 to {white:g}; "
            "save it with 8 bits"
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or none that can be read. PIL itself turns TIFF files."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data, of an image that can be read
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 and image.format != "TIFF" else 1


def _upright(image: Any) -> Any:
    from PIL import Image

    turns = {
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_270,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_90,),
    }
    for turn in turns.get(orientation(image), ()):
        image = image.transpose(turn)
    return image


def _opaque(image: Any, alpha: str) -> Any:
    """The image without transparency; an image that has none unchanged."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    colours = image.convert("RGBA")
    if alpha == "drop":
        return colours.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", colours.size, GROUNDS[alpha]), colours).convert("RGB")


def is_transparent(image: Any) -> bool:
    """Whether any pixel of an image is not fully opaque; decodes the image if it may be."""
    if not image.has_transparency_data or deep_kind(image.mode) is not None:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest < 255)


def printed(path: Readable) -> str:
    """The file and its folder, or the name of an image of a dataset, as printable text."""
    return printable(f"{path.parent.name}/{path.name}" if isinstance(path, Path) else str(path))

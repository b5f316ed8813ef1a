"""Opens image files: the size from the header at start-up, the pixels during training.

A photograph is turned upright as its EXIF orientation says, both here and there: annotation tools and browsers show it
upright, so that is what boxes were drawn on.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from distill.errors import UserError

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_TAIL_BYTES = 1024  # a few trailing bytes after the end marker are common and harmless
# What PIL raises on files that are no image, are cut short or lie about themselves.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)


class UnreadableImageError(UserError):
    """An image file is missing, cut short or no image; the message is one line.

    A loader's worker process re-raises an exception with its whole traceback as the message; only the sentence is kept.
    """

    def __init__(self, message: str):
        marker = f"{type(self).__name__}: "
        super().__init__(message.rpartition(marker)[2].strip() if marker in message else message)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright image, without decoding it where the file ends as its format demands.

    Raises:
        UnreadableImageError: the file is missing, no image, or cut short.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            if _orientation(image) >= 5:
                width, height = height, width
            marker = _END_MARKERS.get(image.format)
            if marker is not None and marker not in _read_tail(file):
                image.load()  # some cameras append data: only decoding tells that from a file cut short
    except _DECODE_ERRORS as error:
        raise UnreadableImageError(_explain(path, error)) from error
    return height, width


def read_image(path: Path) -> np.ndarray:
    """The upright image as RGB, (H, W, 3) uint8, whatever its mode; transparency is dropped, 16 bits are cut to 8.

    Raises:
        UnreadableImageError: the file is missing, no image, or cut short.
    """
    try:
        with Image.open(path) as image:
            orientation = _orientation(image)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no fixed range")
            image.load()
            if image.mode.startswith("I"):  # 16-bit grey; a plain conversion would clip it to white
                pixels = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels)
            if orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[orientation])
            return np.array(image.convert("RGB"))  # a copy: the view that asarray gives is read-only
    except _DECODE_ERRORS as error:
        raise UnreadableImageError(_explain(path, error)) from error


def _orientation(image: Image.Image) -> int:
    if image.format not in ("JPEG", "MPO", "PNG", "WEBP"):
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # asking would decode the whole file
    return image.getexif().get(0x0112, 1)


def _read_tail(file) -> bytes:
    position = file.tell()
    file.seek(0, 2)
    file.seek(max(0, file.tell() - _TAIL_BYTES))
    tail = file.read()
    file.seek(position)
    return tail


def _explain(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: the image does not exist"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{path}: cannot be read as an image ({reason})"

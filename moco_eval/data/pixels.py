"""Images opened by their format, decoded to 8-bit RGB by one rule for every task; what lies there in their place."""

import functools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
from PIL import EpsImagePlugin, Image

from moco_eval import limits
from moco_eval.errors import InputError

# what the accepted suffixes stand for; Pillow has forty more, some of which start programs or have no limits
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it says of damaged files is in our refusals
PART = 2**20  # pixels that are scaled at once
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 16-bit greys some versions of Pillow hold in 32 bits
# what is found under an image's name, by its first bytes
OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the image (git lfs pull fetches it)"),
    (b"/annex/objects/", "a git-annex pointer in place of the image (git annex get fetches it)"),
    (b"\0\5\x16\7", "an AppleDouble file, which macOS leaves beside an image"),
    (b"<!doctype html", "a web page in place of the image"),
    (b"<html", "a web page in place of the image"),
    (b"%!ps", "PostScript, which is a program and not an image"),
)


def open_image(file: BinaryIO, name: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image of one of these formats, its pixels not yet decoded; no other decoder is tried, no program started.

    Args:
        file: at its start.
        name: what to call it in a message.
        formats: as Pillow calls them.
    Raises:
        InputError: more pixels than the limit.
        UnidentifiedImageError: it is of none of these formats.
        Exception: whatever else Pillow raises about damaged files; see `reason_of`.
    """
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError:
        if not _raise_limit_of_pillow():
            raise InputError(
                f"{name} has more than the {limits.most('pixels'):,} pixels that one image may have; {limits.WAY_OUT}"
            ) from None
        image = Image.open(file, formats=formats)
    width, height = image.size
    limits.require(name, "pixels", width * height)
    return image


def _raise_limit_of_pillow() -> bool:
    """Raise Pillow's own limit, twice MAX_IMAGE_PIXELS, to ours; False where MOCO_EVAL_LIMITS asks for no more."""
    wanted = limits.most("pixels") // 2 + 1
    if Image.MAX_IMAGE_PIXELS is None or wanted <= Image.MAX_IMAGE_PIXELS + 1:
        return False
    Image.MAX_IMAGE_PIXELS = wanted
    return True


def pixels_in_scans(data: bytes, pixels: int) -> int:
    """How many pixels the decoder of a JPEG image goes over at most: all of them again for each scan.

    A progressive file has about ten. Looked at closely only where the limit may be passed; 0 for other formats.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return 0
    at_most = len(data) // SHORTEST_SCAN
    if not limits.allows("scans", pixels * at_most):
        at_most = data.count(b"\xff\xda")  # also by chance, and in what follows the image, such as a phone's film
    return pixels * (at_most if limits.allows("scans", pixels * at_most) else _scans(data))


SHORTEST_SCAN = 10  # bytes: the marker, a length, one component, three numbers


LARGEST = 2**26  # pixels; PIL, which decides about larger ones, refuses from 2.7 times as many


def plain_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels of a plain JPEG image, (H, W, 3) uint8, as PIL gives them, by libjpeg-turbo in two thirds of the time.

    None for what it does not take (CMYK, PNG, damaged and very large files): PIL, which also says what is wrong.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        few_scans = limits.allows("scans", pixels_in_scans(data, height * width))
        if colours in ("YCbCr", "RGB", "Gray") and height * width < LARGEST and few_scans:
            return simplejpeg.decode_jpeg(data)
    except (ValueError, MemoryError):
        pass  # truncated or damaged: PIL says how
    return None


MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


def _scans(data: bytes) -> int:
    """The scans of a JPEG image up to its end, marker by marker."""
    count, at = 0, 2
    while (marker := MARKER.search(data, at)) and marker[0] != b"\xff\xd9":
        count += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return count


def reason_of(error: Exception) -> str:
    """Why an image cannot be decoded, on one line: whatever `open_image`, or what it opened, has raised."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


_without_programs = ContextVar("_without_programs", default=False)


@contextmanager
def without_programs() -> Iterator[None]:
    """Images that another library opens inside start no program either: of Pillow's formats PostScript alone does."""
    _refuse_programs()
    token = _without_programs.set(True)
    try:
        yield
    finally:
        _without_programs.reset(token)


@functools.cache
def _refuse_programs() -> None:
    """Pillow's Ghostscript as before, but inside `without_programs`."""
    ghostscript = EpsImagePlugin.Ghostscript

    def guarded(*arguments: Any, **options: Any) -> Any:
        if _without_programs.get():
            raise OSError("PostScript is a program, which is not run; give an image")
        return ghostscript(*arguments, **options)

    EpsImagePlugin.Ghostscript = guarded


def as_rgb(image: Image.Image, name: str, form: str | None = None) -> Image.Image:
    """8-bit RGB: grey, palette, CMYK as PIL converts them, and 32-bit integers of 0 to 255; 16 bits scaled to 8.

    Args:
        image: decoded.
        name: what to call it in a message.
        form: its file's format, where the image itself does not know it any more.
    Raises:
        InputError: floating-point pixels, or 32-bit integers beyond 0 to 255: their scale is written nowhere.
    """
    if image.mode == "F":
        raise InputError(
            f"{name} holds floating-point pixels{_span(image)}, whose scale is unknown; save it in 8 or 16 bits"
        )
    if image.mode == "I" and (form or image.format) not in SIXTEEN_BITS:
        low, high = (int(end(np.asarray(image))) for end in (np.min, np.max))
        if not 0 <= low <= high <= 255:
            raise InputError(
                f"{name} holds 32-bit integers, {low} to {high}, which are not within 0 to 255; save it in 8 or 16 bits"
            )
        return image.convert("L").convert("RGB")
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """16 bits, held in as many or more, to 8; a part at a time, without a second copy of them all."""
    sixteen, eight = pixels.ravel(), np.empty(pixels.size, np.uint8)
    for start in range(0, pixels.size, PART):
        part = slice(start, start + PART)
        eight[part] = sixteen[part].astype(np.int64).clip(0, 65535) >> 8
    return eight.reshape(pixels.shape)


def _span(image: Image.Image) -> str:
    values = np.asarray(image)
    finite = np.isfinite(values)
    if not finite.any():
        return ""
    low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
    return f", {low:g} to {high:g}"


def other_than_image(start: bytes) -> str:
    """What a file is that no reader of images takes, by its first bytes; empty where they do not say."""
    if not start.strip(b"\0"):
        return "nothing but zeros (an unfinished download?)" if start else "empty"
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((words for mark, words in OTHERS if head.startswith(mark.lower())), "")

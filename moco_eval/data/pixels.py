"""Decoded images to 8-bit RGB, by one rule for every task; and what lies there in place of an image."""

import numpy as np
from PIL import Image

from moco_eval.errors import InputError

SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 16-bit greys some versions of Pillow hold in 32 bits
# what is found under an image's name, by its first bytes
OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the image (git lfs pull fetches it)"),
    (b"/annex/objects/", "a git-annex pointer in place of the image (git annex get fetches it)"),
    (b"\0\5\x16\7", "an AppleDouble file, which macOS leaves beside an image"),
    (b"<!doctype html", "a web page in place of the image"),
    (b"<html", "a web page in place of the image"),
)


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
            f"{name} holds floating-point pixels{_span(image)}, of no known scale; save it in 8 or 16 bits"
        )
    if image.mode == "I" and (form or image.format) not in SIXTEEN_BITS:
        low, high = (int(end(np.asarray(image))) for end in (np.min, np.max))
        if not 0 <= low <= high <= 255:
            raise InputError(
                f"{name} holds 32-bit integers, {low} to {high}, which are no 0 to 255; save it in 8 or 16 bits"
            )
        return image.convert("L").convert("RGB")
    if image.mode.startswith("I"):
        sixteen = np.asarray(image).astype(np.int64)
        return Image.fromarray((sixteen.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _span(image: Image.Image) -> str:
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    return f", {finite.min():g} to {finite.max():g}" if finite.size else ""


def other_than_image(start: bytes) -> str:
    """What a file is that no reader of images takes, by its first bytes; empty where they do not say."""
    if not start.strip(b"\0"):
        return "nothing but zeros (an unfinished download?)" if start else "empty"
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((words for mark, words in OTHERS if head.startswith(mark.lower())), "")

"""TIFF and .npy images of any number of channels that a stranger may have written: sizes are looked at first."""

import io
import logging
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moco_eval import limits
from moco_eval.errors import InputError

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_START = b"\x93NUMPY"
MOST_PAGES = 64  # pages that are the bands of one image
DEFLATE = (8, 32946)  # TIFF's two numbers for it
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it says of damaged files is in our refusals
READ = "uncompressed and Deflate are read; gdal_translate -co COMPRESS=DEFLATE rewrites it"


def read_npy(data: bytes, name: str) -> np.ndarray:
    """The array of an .npy file, no pickle read.

    Raises:
        InputError: it is no array of numbers, is larger than the limits, or has not the bytes that its header says.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, columns_first, dtype = header(file)
    except Exception as error:  # whatever a damaged header makes numpy raise
        raise InputError(f"{name} is not a .npy array ({_line(error)}); remove or replace it") from None
    require_numbers(name, dtype)
    require_sides(name, shape)
    count = math.prod(shape)
    if len(data) - file.tell() != count * dtype.itemsize:
        raise InputError(
            f"{name} of shape {shape} has {len(data) - file.tell():,} bytes instead of {count * dtype.itemsize:,}; "
            "remove or replace it"
        )
    values = np.frombuffer(data, dtype, count, file.tell())
    return values.reshape(shape, order="F" if columns_first else "C")


def read_tiff(data: bytes, name: str) -> np.ndarray:
    """The bands of a TIFF file, (C, H, W): samples of a page, interleaved or planar, or pages of one band each.

    Raises:
        InputError: damaged, larger than the limits, of other pixels than whole or floating-point numbers, compressed
            otherwise than by Deflate, or of several pages that are no bands.
    """
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return np.concatenate([_page(page, name, data) for page in _band_pages(file, name)])
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise InputError(f"{name} cannot be decoded ({_line(error)}); remove or replace it") from None


def _band_pages(file: Any, name: str) -> list[Any]:
    """The page with the bands, or the pages of one band each; smaller copies (overviews) and masks are left out."""
    first, pages = file.pages[0], [file.pages[0]]
    for number in range(1, MOST_PAGES + 1):
        try:
            page = file.pages[number]
        except IndexError:
            break
        if not page.subfiletype & 5:
            pages.append(page)
    if len(pages) > 1 and (len(pages) > MOST_PAGES or any(_facts(page) != _facts(first) for page in pages)):
        raise InputError(f"{name} has several pages that are not bands of one image; save the bands in one page")
    if len(pages) > 1 and first.samplesperpixel > 1:
        raise InputError(f"{name} has {len(pages)} pages of {first.samplesperpixel} channels; save one image per file")
    require_sides(name, (len(pages) * first.samplesperpixel, first.imagelength, first.imagewidth))
    return pages


def _facts(page: Any) -> tuple:
    return page.imagelength, page.imagewidth, page.samplesperpixel, page.dtype


def _page(page: Any, name: str, data: bytes) -> np.ndarray:
    """(C, H, W) of one page."""
    if page.dtype is None or page.bitspersample != page.dtype.itemsize * 8:
        raise InputError(f"{name} has {page.bitspersample} bits per sample; save it in 8 or 16 bits, or as float32")
    require_numbers(name, page.dtype)
    if page.imagedepth != 1:
        raise InputError(f"{name} is a volume of {page.imagedepth} layers; save one image per file")
    if page.photometric == 3:
        raise InputError(f"{name} has a palette, so its values are not bands; save it without one")
    require_sides(name, page.chunks)
    if sum(page.databytecounts) > len(data):
        raise InputError(f"{name} has parts that are longer than the file, {len(data):,} bytes; remove or replace it")
    if page.compression in DEFLATE:
        _require_bounded(page, name, data)
    elif page.compression != 1:
        kind = getattr(page.compression, "name", page.compression)
        raise InputError(f"{name} is compressed by {kind}; {READ}")
    interleaved = page.samplesperpixel > 1 and page.planarconfig == 1
    values = page.asarray(maxworkers=1).reshape(_stored_shape(page, interleaved))
    return values.transpose(2, 0, 1) if interleaved else values


def _stored_shape(page: Any, interleaved: bool) -> tuple[int, int, int]:
    sides, bands = (page.imagelength, page.imagewidth), page.samplesperpixel
    return (*sides, bands) if interleaved else (bands, *sides)


def _require_bounded(page: Any, name: str, data: bytes) -> None:
    """Raises InputError where a packed part holds more than it stands for; zlib is asked for no more than that."""
    most = math.prod(page.chunks) * page.dtype.itemsize
    for offset, count in zip(page.dataoffsets, page.databytecounts):
        packed = memoryview(data)[offset : offset + count]
        if len(zlib.decompressobj().decompress(packed, most + 1)) > most:
            raise InputError(f"{name} has a packed part of more than the {most:,} bytes it stands for; replace it")


def require_numbers(name: str, dtype: np.dtype) -> None:
    """Raises InputError where values are no whole or floating-point numbers."""
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise InputError(f"{name} holds values of type {dtype}; save it in 8 or 16 bits, or as float32")


def require_sides(name: str, shape: Sequence[int]) -> None:
    """Raises InputError where an array is no image, or larger than the limits."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise InputError(f"{name} has the shape {tuple(shape)}; an image is (H, W), (H, W, C) or (C, H, W)")
    limits.require(name, "values_of_bands", math.prod(shape))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

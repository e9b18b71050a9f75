"""The masks of a COCO file: polygons, and run-length encodings as lists of numbers or as text."""

from typing import Any

import numpy as np

from moco_eval import limits
from moco_eval.errors import InputError

REACH = 4  # times the longer side of its image; no coordinate of a polygon lies further off
LONGEST = 7  # characters of five bits that a run below 2^31 has in a compressed encoding


def read_mask(value: Any, size: tuple[int, int], where: str) -> tuple[Any, int]:
    """The `segmentation` of an object, checked.

    Args:
        value: polygons, each x0, y0, x1, y1, ...; or size (height, width) and counts, numbers or text; or nothing.
        size: width and height of the image.
        where: the object, for messages.
    Returns:
        Polygons as (2n,) float64 arrays, or the encoding as it is, or None; and how many polygons were dropped
        because they have fewer than three points or a number too many, which detectron2 drops too.
    Raises:
        InputError: anything else.
    """
    if value is None or value == []:
        return None, 0
    if isinstance(value, dict):
        _check_runs(value, size, where)
        return {"size": [size[1], size[0]], "counts": value["counts"]}, 0
    try:
        polygons = [np.array(polygon, dtype=np.float64) for polygon in value]
    except (TypeError, ValueError, OverflowError):
        polygons = []
    if not isinstance(value, list) or not polygons or any(polygon.ndim != 1 for polygon in polygons):
        raise InputError(f"{where}: its segmentation is neither polygons nor size and counts; correct or remove it")
    for polygon in polygons:
        _check_polygon(polygon, size, where)
    valid = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    return valid or None, len(polygons) - len(valid)


def _check_polygon(polygon: np.ndarray, size: tuple[int, int], where: str) -> None:
    """The C code that fills polygons walks along their outlines, and keeps every step."""
    reach = REACH * max(size)
    if not np.abs(polygon).max(initial=0) <= reach:  # also what is not a number
        far = polygon[~(np.abs(polygon) <= reach)][0]
        what = f"the number {far:g}, far outside its image" if np.isfinite(far) else "a number that is not finite"
        raise InputError(f"{where}: its segmentation has {what}; correct or remove it")
    if not limits.allows("outline", len(polygon) * reach):  # no outline is longer
        points = polygon[: len(polygon) // 2 * 2].reshape(-1, 2)
        steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
        limits.require(f"{where}: a polygon", "outline", int(steps.sum()) + len(points))


def _check_runs(value: dict[str, Any], size: tuple[int, int], where: str) -> None:
    """Runs must fill their image: the C code that decodes them writes as many pixels as they say."""
    width, height = size
    if value.get("size") != [height, width]:
        raise InputError(
            f"{where}: its mask has size {value.get('size')!r} and its image is {[height, width]} (height, width); "
            "correct or remove it"
        )
    counts = value.get("counts")
    try:
        runs = uncompressed(counts) if isinstance(counts, str) else np.array(counts)
    except ValueError:
        runs = np.array([])
    whole = runs.ndim == 1 and runs.dtype.kind == "i" and len(runs) > 0
    if not whole or runs.min() < 0 or runs.max() > width * height or runs.sum() != width * height:
        raise InputError(
            f"{where}: the counts of its mask are not runs that fill {width}x{height} pixels; correct or remove it"
        )


def uncompressed(text: str) -> np.ndarray:
    """The runs of a compressed encoding; raises ValueError where it is none.

    Five bits a character from the lowest on, bit 6 where more follow, the last one's fifth bit the sign; from the
    fourth run on the difference to the run before the last.

    Source: pycocotools, maskApi.c, rleFrString.
    """
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    lengths = np.diff(ends, prepend=-1)
    if not len(ends) or ends[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63 or lengths.max() > LONGEST:
        raise ValueError("no runs")
    starts = ends - lengths + 1
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs[(codes[ends] & 16) != 0] -= 1 << (5 * lengths[(codes[ends] & 16) != 0])
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def area_of(mask: Any, size: tuple[int, int]) -> float:
    """How many pixels a checked mask covers, as pycocotools counts them; `size`: width and height of the image."""
    from pycocotools import mask as coco_mask

    width, height = size
    if isinstance(mask, dict) and isinstance(mask["counts"], str):
        return float(coco_mask.area(mask))
    runs = coco_mask.frPyObjects(mask, height, width)
    return float(coco_mask.area(runs if isinstance(mask, dict) else coco_mask.merge(runs)))


def runs_of(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1 of a mask, (H, W) bool, column by column, as COCO counts them from a 0."""
    pixels = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(pixels[1:] != pixels[:-1])
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()

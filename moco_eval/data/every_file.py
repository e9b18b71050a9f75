"""Every file of a set looked into: which images are whole, and which are truncated, empty or no images at all."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

from PIL import Image

from moco_eval.config.base import usual_workers
from moco_eval.data.image_set import ImageSet
from moco_eval.data.index import EXTENSIONS, ImageFiles, scan
from moco_eval.data.pixels import FORMATS
from moco_eval.data.tables import TableImages
from moco_eval.errors import InputError
from moco_eval.runtime.console import progress

NAMED = 3  # files of a kind
AHEAD = 64  # images given to the threads before the first is waited for
ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND"}  # how a JPEG and a PNG begin, and what ends them
SETTINGS = ("bands.yaml",)  # what belongs beside images


def look(images: ImageSet, quick: bool = False) -> list[str]:
    """What cannot be read, in words: a line for each kind of trouble, with how many and the first few by name.

    Args:
        images: of a set in memory there is nothing to say.
        quick: only the headers are read, which tells no truncated image.
    """
    if not isinstance(images.files, ImageFiles | TableImages):
        return []
    troubles: dict[str, list[str]] = {}
    title = f"{images.name} {images.split}: {'headers' if quick else 'every image'}"
    with progress(title, len(images)) as advance:
        for index, trouble in enumerate(_troubles(images, quick)):
            if trouble:
                troubles.setdefault(trouble, []).append(images.name_of(index))
            advance()
    return [
        f"{images.name} {images.split}: {len(names):,} of {len(images):,} images: {trouble} ({_some(names)})"
        for trouble, names in troubles.items()
    ]


def other_suffixes(splits: Sequence[ImageSet]) -> list[str]:
    """Files beside the images whose suffix is none of an image's that is read, in words; none where there are none."""
    folders = {_folder(images) for images in splits}
    found: dict[str, list[str]] = {}
    for root, start in sorted(folder for folder in folders if folder):
        for name, _ in scan(Path(root), start.encode(), ("",))[0]:
            path = PurePath(name.decode("utf-8", "backslashreplace"))
            if path.suffix.lower() not in EXTENSIONS and path.name not in SETTINGS:
                found.setdefault(path.suffix.lower() or "without a suffix", []).append(str(Path(root) / path))
    counts = Counter({suffix: len(names) for suffix, names in found.items()})
    return [
        f"{count:,} file{'s' * (count > 1)} {suffix} ({_some(found[suffix])}); images are {', '.join(EXTENSIONS)}"
        for suffix, count in counts.most_common()
    ]


def _folder(images: ImageSet) -> tuple[str, str] | None:
    """The folder that a set was listed from, and the split's folder in it; None where it is no folder of files."""
    if not isinstance(images.files, ImageFiles) or not len(images):
        return None
    root = images.files.root
    return root, PurePath(images.files[0]).relative_to(root).parts[0] if images.labels is not None else ""


def _troubles(images: ImageSet, quick: bool) -> Iterator[str]:
    """Of each image in order, what is wrong with it; empty where nothing is."""
    with ThreadPoolExecutor(max(1, usual_workers())) as pool:
        for start in range(0, len(images), AHEAD):
            rows = range(start, min(start + AHEAD, len(images)))
            yield from pool.map(lambda index: trouble(images, index, quick), rows)


def trouble(images: ImageSet, index: int, quick: bool) -> str:
    """What is wrong with one image, in words; empty where nothing is."""
    try:
        data = images.read(index)
        if quick:
            Image.open(io.BytesIO(data), formats=FORMATS)
        elif images.bands:
            images.values(index)
        else:
            images.array(index)
    except (InputError, OSError, SyntaxError, ValueError) as error:
        return _kind(images, index, str(error))
    return ""


def _kind(images: ImageSet, index: int, message: str) -> str:
    try:
        data = images.read(index)
    except InputError:
        return "not to be opened"
    if not data:
        return "empty, 0 bytes"
    if _is_text(data[:512]):
        return "text under an image's name"
    end = next((end for start, end in ENDS.items() if data.startswith(start)), b"")
    return "truncated" if "truncated" in message or end not in data[-1024:] else "not to be decoded"


def _is_text(start: bytes) -> bool:
    try:
        return "".join(start.decode("utf-8").split()).isprintable()
    except UnicodeDecodeError:
        return False


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NAMED else ""
    return f"first: {', '.join(names[:NAMED])}{more}"

"""What --labels asks for."""

import re
from dataclasses import dataclass
from pathlib import Path

from moco_eval.data.image_set import ImageSet
from moco_eval.data.index import ImageFiles
from moco_eval.errors import InputError

PUBLISHED_AT = "https://github.com/google-research/simclr/tree/master/imagenet_subsets"
SHARES = {"1%": "1percent.txt", "10%": "10percent.txt"}


@dataclass(frozen=True)
class Labels:
    """What --labels asks for: one of the three is given.

    Attributes:
        per_class: so many images of each class, drawn anew from each seed.
        list_file: the images that a file names.
        share: '1%' or '10%', the file of that name in the data set's folder.
    """

    per_class: int | None = None
    list_file: Path | None = None
    share: str | None = None

    @property
    def name(self) -> str:
        """For the name of a run directory."""
        if self.per_class is not None:
            return f"{self.per_class}-per-class"
        return Path(SHARES[self.share]).stem if self.share else Path(str(self.list_file)).stem

    def of(self, images: ImageSet, seed: int) -> ImageSet:
        """The subset of a whole training split; `seed` matters where it is drawn.

        Raises:
            InputError: a class has too few images, or the list does not fit; see `ImageSet.listed`.
        """
        if self.per_class is not None:
            return images.few_labels(self.per_class, seed)
        return images.listed(self.list_file or self._published(images))

    def _published(self, images: ImageSet) -> Path:
        assert self.share is not None
        name = SHARES[self.share]
        if not isinstance(images.files, ImageFiles):
            raise InputError(
                f"--labels {self.share} is a list of ImageNet's file names, which {images.name} does not have"
            )
        path = Path(images.files.root) / name
        if not path.is_file():
            raise InputError(
                f"--labels {self.share} needs the list {path}, which does not exist; {name} is published at "
                f"{PUBLISHED_AT}: put it there, or give its path as --labels PATH/{name}"
            )
        return path


def parse_labels(text: str | None) -> Labels | None:
    """What --labels says: N-per-class, 1%, 10%, or the path of a list file; None for all labels.

    Raises:
        InputError: none of these.
    """
    if text is None:
        return None
    if match := re.fullmatch(r"0*([1-9][0-9]*)-per-class", text):
        return Labels(per_class=int(match[1]))
    if text in SHARES:
        return Labels(share=text)
    if Path(text).is_file():
        return Labels(list_file=Path(text))
    raise InputError(
        f"--labels {text!r} is not N-per-class, 1%, 10% or a list file that exists; for example --labels 10-per-class"
    )

"""Class names as people read them: ImageNet's classes, which are folders named by WordNet ids, by their words."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

WORDNET = re.compile(r"n\d{8}")


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """n01440764 becomes tench; of two classes of one word (crane, the bird and the machine) each keeps its id beside.

    The words are those that timm ships; other names, and ids that it does not know, stay as they are.
    """
    words = [_word(name) if WORDNET.fullmatch(name) else name for name in names]
    often = Counter(words)
    return tuple(word if often[word] == 1 or word == name else f"{word} {name}" for word, name in zip(words, names))


@cache
def _word(synset: str) -> str:
    """The first of a synset's words."""
    try:
        return _words().label_name_to_description(synset).split(",")[0]
    except KeyError:
        return synset


@cache
def _words():
    from timm.data import ImageNetInfo  # with torch behind it

    return ImageNetInfo()  # its words cover all of WordNet's classes that ImageNet ever had

"""moco-eval: how well does a self-supervised encoder transfer, under the papers' own protocols?

The names below are what a program uses; importing the package is light, and torch comes with the first of them.
"""

import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from moco_eval.api import (
        Comparison,
        Encoder,
        ImageSet,
        Monitor,
        Preprocessing,
        Result,
        compare,
        detect,
        features,
        images,
        judge,
        load,
        segment,
        set_verbosity,
        wrap,
    )

__all__ = [
    "Comparison",
    "Encoder",
    "ImageSet",
    "Monitor",
    "Preprocessing",
    "Result",
    "compare",
    "detect",
    "features",
    "images",
    "judge",
    "load",
    "segment",
    "set_verbosity",
    "wrap",
]


class _Package(types.ModuleType):
    """`moco_eval.features` is the function, also once the room of that name has been imported."""

    @property
    def features(self) -> Any:
        """See `api.features`."""
        from moco_eval import api

        return api.features

    @features.setter
    def features(self, room: types.ModuleType) -> None:
        """What the import system notes of every package; `from moco_eval.features.cache import ...` needs it not."""


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moco_eval' has no attribute {name!r}")
    from moco_eval import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

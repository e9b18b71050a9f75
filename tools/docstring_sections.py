"""An extension of griffe, which reads docstrings for the site: our sections follow each other without an empty line."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"\n( *)(Args|Attributes|Returns|Raises|Source):")


class Sections(griffe.Extension):
    """An empty line before each section, where griffe expects one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each function, class and attribute."""
        if obj.docstring:
            obj.docstring.value = SECTION.sub(r"\n\n\1\2:", obj.docstring.value)

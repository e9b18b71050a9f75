"""YAML that a stranger may have written: its size, depth, aliases and numbers are looked at before a value is built."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from moco_eval import limits
from moco_eval.errors import InputError

BASE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML has it: ten times as fast


class _Loader(BASE):  # type: ignore[misc, valid-type]
    """A safe loader that refuses endless integers before it computes them."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = len(str(node.value))
        if digits > limits.most("digits"):
            raise yaml.constructor.ConstructorError(None, None, f"an integer of {digits:,} digits", node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read(path: Path) -> tuple[yaml.Node | None, Any]:
    """A YAML file as its nodes, which know their lines, and as plain values.

    Raises:
        InputError: not a regular file, too large, not YAML, or more than `parse` builds.
    """
    try:
        data = limits.read_bytes(path, "yaml")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return parse(data, str(path))


def parse(text: str | bytes, name: str) -> tuple[yaml.Node | None, Any]:
    """The same of YAML in memory.

    Args:
        name: what it is called in a message.
    Raises:
        InputError: not YAML; aliases that contain themselves, or more levels, values or digits than the limits allow.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        _require_bounded(yaml.parse(text, Loader=_Loader), name)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None


class _Collection:
    """A mapping or list that is being read: its anchor, and its values and levels so far, aliases written out."""

    def __init__(self, anchor: str | None):
        self.anchor, self.values, self.levels = anchor, 1, 1

    def add(self, values: int, levels: int) -> None:
        self.values += values
        self.levels = max(self.levels, 1 + levels)


def _require_bounded(events: Iterable[yaml.Event], name: str) -> None:
    """Raises InputError where the document, with all aliases written out, is deeper or larger than the limits allow."""
    most_levels, most_values = limits.most("depth"), limits.most("values")
    opened = [_Collection(None)]
    anchors: dict[str, tuple[int, int] | None] = {}  # values and levels; None while it is being read
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Collection(event.anchor))
            if event.anchor:
                anchors[event.anchor] = None
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = opened.pop()
            _close(closed.anchor, (closed.values, closed.levels), opened[-1], anchors)
        elif isinstance(event, yaml.ScalarEvent):
            _close(event.anchor, (1, 0), opened[-1], anchors)
        elif isinstance(event, yaml.AliasEvent):
            size = anchors.get(str(event.anchor), (1, 0))  # of an unknown anchor the composer says so
            if size is None:
                raise InputError(f"{name}: the alias *{event.anchor} contains itself; write it out")
            opened[-1].add(*size)
        if len(opened) > most_levels or opened[-1].levels > most_levels:
            limits.require(name, "depth", max(len(opened), opened[-1].levels))
        if opened[-1].values > most_values:
            limits.require(name, "values", opened[-1].values)


def _close(
    anchor: str | None, size: tuple[int, int], around: _Collection, anchors: dict[str, tuple[int, int] | None]
) -> None:
    """Count a value that was read to its end in what it lies in, and remember it under its anchor."""
    around.add(*size)
    if anchor:
        anchors[anchor] = size

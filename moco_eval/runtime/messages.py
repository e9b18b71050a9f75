"""Plain values and arrays as bytes and back, for what processes tell each other: JSON and raw numbers, no pickle.

torch's own collectives for objects unpickle what arrives, and so execute it.
"""

import base64
import json
from typing import Any

import numpy as np
import torch

LENGTH = 8  # bytes of the number before the JSON: its length


def packed(value: Any) -> bytes:
    """The bytes of a value.

    Args:
        value: None, bool, int, float, str, bytes, numpy arrays, CPU tensors, and lists, tuples, sets and dicts of them.
    Raises:
        TypeError: it holds something else.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_tree(value, arrays)).encode()
    return b"".join((len(text).to_bytes(LENGTH, "little"), text, *(array.tobytes() for array in arrays)))


def unpacked(data: bytes) -> Any:
    """The value of `packed`; arrays are its own copies. Raises ValueError or KeyError where the bytes are others."""
    start = LENGTH + int.from_bytes(data[:LENGTH], "little")
    return _value(json.loads(data[LENGTH:start]), data, [start])


def _tree(value: Any, arrays: list[np.ndarray]) -> Any:
    """A value as JSON has it: [kind, contents] for what JSON does not know; the arrays, in their order, aside."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, dict):
        return ["dict", [[_tree(key, arrays), _tree(item, arrays)] for key, item in value.items()]]
    if isinstance(value, list | tuple | set):
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        return [kind.__name__, [_tree(item, arrays) for item in value]]
    if isinstance(value, torch.Tensor):
        return ["tensor", _tree(value.numpy(), arrays)]
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        arrays.append(np.asarray(value))
        return ["array", [value.dtype.str, value.shape]]
    raise TypeError(f"processes do not tell each other a {type(value).__name__}")


def _value(tree: Any, data: bytes, start: list[int]) -> Any:
    """The value of a tree; arrays are taken from the bytes at `start`, which moves on."""
    if not isinstance(tree, list):
        return tree
    kind, contents = tree
    if kind == "array":
        dtype, shape = np.dtype(contents[0]), tuple(contents[1])
        array = np.frombuffer(data, dtype, int(np.prod(shape)), start[0]).reshape(shape).copy()
        start[0] += array.nbytes
        return array
    if kind == "bytes":
        return base64.b64decode(contents)
    if kind == "tensor":
        return torch.from_numpy(_value(contents, data, start))
    if kind == "dict":
        return {_value(key, data, start): _value(item, data, start) for key, item in contents}
    return {"list": list, "tuple": tuple, "set": set}[kind](_value(item, data, start) for item in contents)

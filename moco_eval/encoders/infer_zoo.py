"""Which network of timm's zoo do these tensors belong to, at which image size and with how many channels?"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from moco_eval.encoders import timm_index
from moco_eval.encoders.architectures import TimmNetwork, architecture
from moco_eval.errors import InputError

_TABLES = re.compile(r"layers\.(\d+)\.blocks\.0\.attn\.relative_position_bias_table")


def zoo_architectures(tensors: Mapping[str, Tensor], prefer: str | None = None) -> list[str]:
    """Every `timm:NAME`, with the arguments that the tensors tell, of those that compute differently.

    Args:
        prefer: of several with the same tensors, a regular expression on the name of the one to take.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names, channels = timm_index.candidates(_in_colour(shapes), prefer), _channels(shapes)
    further = f",in_chans={channels}" if channels != 3 else ""
    sized = [_sized(name, shapes) + further for name in names]
    return [name for name in sized if _fits(name, shapes)]


def require_one(source: str, names: list[str]) -> str:
    """The only one. Raises InputError where several have these tensors but compute differently."""
    if len(names) > 1:
        raise InputError(
            f"{source}: {_listed(names)} have these tensors but compute differently (padding, epsilon, activation, "
            f"blur or windows), which the tensors do not show; choose one: --arch {names[0]}"
        )
    return names[0]


def nearest_in_zoo(tensors: Mapping[str, Tensor], prefer: str | None = None) -> str | None:
    """The network of timm's that these are but for a tensor or two; None where there is none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = [f"timm:{name}" for name in timm_index.nearest(_in_colour(shapes), prefer)]
    shares = {name: _share(name, shapes) for name in names}
    return max(shares, key=shares.__getitem__) if shares and max(shares.values()) > 0.9 else None


def _share(arch: str, shapes: timm_index.Shapes) -> float:
    """Of names and shapes that a network has in common with these tensors; 1 is all."""
    ours, theirs = set(shapes.items()), set(_built(arch).items())
    return len(ours & theirs) / len(ours | theirs)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _channels(shapes: timm_index.Shapes) -> int:
    """Of the images, by the first convolution."""
    stem = timm_index.stem(shapes)
    return shapes[stem][1] if stem else 3


def _in_colour(shapes: timm_index.Shapes) -> timm_index.Shapes:
    """The same of a network for images of three channels."""
    stem = timm_index.stem(shapes)
    return {name: (shape[0], 3, *shape[2:]) if name == stem else shape for name, shape in shapes.items()}


def _sized(name: str, shapes: timm_index.Shapes) -> str:
    """A network's name with the windows of a Swin, where they are not its own, and the image size at which they fit.

    The first stage has the windows as they were asked for. The last has them cut down to its map, a 32nd of the image:
    7 of 224 pixels, 12 of 384 or 6 of 192 are both; 14 of 224 (EsViT) and 12 of 192 (SimMIM) are cut to 7 and 6.
    """
    tables = {int(match[1]): shape for key, shape in shapes.items() if (match := _TABLES.fullmatch(key))}
    if not tables or not name.startswith("swin_") or _fits(f"timm:{name}", shapes):
        return f"timm:{name}"
    first, last = (_window(tables[stage]) for stage in (min(tables), max(tables)))
    return f"timm:{name},window_size={first},img_size={32 * last}"


def _window(table: tuple[int, ...]) -> int:
    """Places along one side of the window whose relative positions a table has."""
    return (math.isqrt(table[0]) + 1) // 2


def _fits(arch: str, shapes: timm_index.Shapes) -> bool:
    """Whether the network that is built under this name has these tensors."""
    built = _built(arch)
    return all(built.get(name) == shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked"))


def _built(arch: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network of timm's; none where the installed one lacks it, or it takes no such arguments."""
    try:
        network = architecture(arch)
    except InputError:
        return {}
    assert isinstance(network, TimmNetwork)
    return {name: tuple(tensor.shape) for name, tensor in network.layers.state_dict().items()}

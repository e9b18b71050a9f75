"""The projection head of pretraining, built from its tensors."""

import re

from torch import Tensor, nn

from moco_eval.encoders.prove import require_finite, size_words, with_counts
from moco_eval.errors import InputError


def build_head(
    source: str, tensors: dict[str, Tensor], feature_dim: int, warnings: list[str] | None = None
) -> nn.Module | None:
    """A linear layer (MoCo v1), or a sequence of linear layers, batch norms and ReLUs (v2, v3 and most others).

    Args:
        tensors: `weight` and `bias`, or by place in the sequence (`0.weight`, `2.bias`); a place without tensors
            before the last layer is a ReLU.
        feature_dim: what the head takes.
        warnings: doubts are appended here.
    Returns:
        (N, feature_dim) to (N, dim), in eval mode; None without tensors.
    Raises:
        InputError: tensors of another kind of head, of shapes that do not fit, or not finite.
    """
    if not tensors:
        return None
    if tensors.keys() <= {"weight", "bias"}:
        head: nn.Module = _layer(source, tensors)
    else:
        head = nn.Sequential(*_layers(source, tensors))
    tensors = with_counts(tensors, head.state_dict(), [] if warnings is None else warnings)
    _require_fit(source, head, tensors, feature_dim)
    require_finite(source, {f"the head's {name}": tensor for name, tensor in tensors.items()})
    head.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return head.eval()


def _layers(source: str, tensors: dict[str, Tensor]) -> list[nn.Module]:
    places: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, parameter = name.partition(".")
        if not re.fullmatch(r"1?[0-9]", place) or "." in parameter:
            held = ", ".join(list(tensors)[:6])
            raise InputError(f"{source}: the projection head is neither linear nor a sequence of layers: {held}")
        places.setdefault(int(place), {})[parameter] = tensor
    return [_layer(source, places[i]) if i in places else nn.ReLU() for i in range(max(places) + 1)]


def _layer(source: str, tensors: dict[str, Tensor]) -> nn.Module:
    """Linear, or a batch norm with or without scale and shift."""
    if "running_mean" in tensors:
        return nn.BatchNorm1d(len(tensors["running_mean"]), affine="weight" in tensors, device="meta")
    weight = tensors.get("weight")
    if weight is None or weight.ndim != 2:
        held = ", ".join(f"{name} {size_words(tensor)}" for name, tensor in tensors.items())
        raise InputError(f"{source}: the projection head has a layer that is neither linear nor a batch norm: {held}")
    return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, device="meta")


def _require_fit(source: str, head: nn.Module, tensors: dict[str, Tensor], feature_dim: int) -> None:
    wanted = head.state_dict()
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise InputError(f"{source}: the projection head has one of weight and its companions only: {', '.join(odd)}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            there = f"{size_words(tensors[name])} {tensors[name].dtype}"
            raise InputError(f"{source}: the projection head's {name} is {there}, expected {size_words(tensor)}")
    width = feature_dim
    for place, layer in enumerate(head if isinstance(head, nn.Sequential) else [head]):
        takes = getattr(layer, "in_features", getattr(layer, "num_features", width))
        if takes != width:
            raise InputError(f"{source}: layer {place} of the projection head takes {takes} values and gets {width}")
        width = getattr(layer, "out_features", width)


def head_shape(head: nn.Module | None) -> str | None:
    """Such as '2048-2048-128'."""
    if head is None:
        return None
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    return "-".join(str(size) for size in (layers[0].in_features, *(layer.out_features for layer in layers)))

"""Any network in memory as an encoder: looked at before it is taken, and given back as it came."""

import contextlib
import copy
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.naming import safe_name, sha256_of_tensors
from moco_eval.errors import InputError, RunFailed, message_of
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime.device import autocast, forked_generator

ORIGIN = "a network in memory"
_turns: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_turning = threading.Lock()


def wrap(net: nn.Module, preprocessing: Preprocessing, *, name: str = "network") -> Encoder:
    """An encoder of any network; it stays the caller's, on its own device, every tensor and mode as it was.

    What it is judged as is looked at when it is judged: a network that has trained on since then is another encoder.

    Args:
        net: (N, 3, H, W) to (N, D) floating-point features, in evaluation mode.
        preprocessing: the pixels that it expects.
        name: what tables call it.
    Raises:
        InputError: it takes no such images, or gives no such features: a tuple, a map without pooling, numbers that are
            not finite, other widths in training and in evaluation mode.
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"net is a {type(net).__name__}; give a torch.nn.Module")
    require_sound(preprocessing)
    _require_tensors(net)
    encoder = Encoder(
        source=name,
        run_name=safe_name(name),
        arch=type(net).__name__,
        backbone=net,
        feature_dim=0,
        head=None,
        origin=ORIGIN,
        sha256="",
        tensors_loaded=len(tensors_of(net)),
        preprocessing=preprocessing,
        wrapped=True,
    )
    with borrowed(encoder), torch.inference_mode(False):
        images = _images(preprocessing.size, device_of(net))
        width = _width(_features(net, images, preprocessing.size))
    _require_the_same_in_training(net, images, width)
    return as_it_is_now(replace(encoder, feature_dim=width))


def as_it_is_now(encoder: Encoder) -> Encoder:
    """A wrapped encoder under the sha256 of its tensors at this moment; others as they are."""
    if not encoder.wrapped:
        return encoder
    return replace(encoder, sha256=digest_of(encoder.backbone))


def _turn(net: nn.Module) -> threading.RLock:
    """A network's own lock."""
    with _turning:
        return _turns.setdefault(net, threading.RLock())


@contextlib.contextmanager
def borrowed(encoder: Encoder) -> Iterator[None]:
    """The network in evaluation mode; afterwards every mode, every requires_grad and every tensor is as it was.

    Threads that want the same network wait for each other.

    Raises:
        RunFailed: a tensor changed; the network is then not what it was.
    """
    with _turn(encoder.backbone):
        yield from _given_back(encoder)


def _given_back(encoder: Encoder) -> Iterator[None]:
    net = encoder.backbone
    modes = {module: module.training for module in net.modules()}
    gradients = {tensor: tensor.requires_grad for tensor in net.parameters()}
    before = digest_of(net) if encoder.wrapped else ""
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.inference_mode():  # where alone tensors made in it take gradients again
            for tensor, wanted in gradients.items():
                tensor.requires_grad_(wanted)
    if encoder.wrapped and digest_of(net) != before:
        raise RunFailed(
            f"{encoder.source}: a tensor of the network changed while it was judged; does its forward change it?"
        )


def require_sound(preprocessing: Preprocessing) -> None:
    """Raises InputError for what is no preprocessing, or a value of another kind or out of its range."""
    if not isinstance(preprocessing, Preprocessing):
        raise InputError(f"preprocessing is a {type(preprocessing).__name__}; give a moco_eval.Preprocessing")
    try:
        Preprocessing.from_dict(asdict(preprocessing))
    except InputError as error:
        raise InputError(str(error).removeprefix("its ")) from None


def _require_tensors(net: nn.Module) -> None:
    """Raises InputError where a tensor has no values yet."""
    for name, tensor in tensors_of(net).items():
        if is_lazy(tensor):
            raise InputError(f"net has a lazy module ({name} has no shape yet); run one batch through it first")
        if tensor.is_meta:
            raise InputError(
                f"net is on the meta device, where tensors have no values ({name}); load its weights first"
            )


def device_of(net: nn.Module) -> torch.device:
    """Where a network lies, by its first tensor; the CPU for one without tensors."""
    return next((tensor.device for tensor in tensors_of(net).values()), torch.device("cpu"))


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those that no state dict keeps included."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def digest_of(net: nn.Module) -> str:
    """sha256 of a network: its class, and the bytes of its tensors."""
    named = f"{type(net).__module__}.{type(net).__qualname__}"
    return hashlib.sha256(f"{named} {sha256_of_tensors(tensors_of(net))}".encode()).hexdigest()


def _images(size: int, device: torch.device) -> Tensor:
    """Two images as networks expect them, (2, 3, size, size), the same each time."""
    shape, generator = (2, 3, size, size), torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)


def _features(net: nn.Module, images: Tensor, size: int) -> object:
    try:
        with torch.no_grad(), autocast(images.device, "fp32"):
            return net(images)
    except Exception as error:  # whatever somebody's forward raises
        reason = (message_of(error).splitlines() or [""])[0]
        raise InputError(
            f"net does not take images of 3 x {size} x {size} pixels ({type(error).__name__}: {reason}); give a "
            "preprocessing with the size that it takes"
        ) from None


def _width(features: object) -> int:
    """D of features (2, D). Raises InputError where they are none."""
    if not isinstance(features, Tensor):
        raise InputError(
            f"net gives a {type(features).__name__}, not a tensor of features; wrap a module that returns the feature "
            "alone"
        )
    shape = " x ".join(map(str, features.shape))
    if features.dim() == 4:
        raise InputError(f"net gives maps, {shape}: pooling is missing; wrap a module that averages over positions")
    if features.dim() != 2 or len(features) != 2:
        raise InputError(f"net gives {shape} for 2 images; it must give one row of features for each, (N, D)")
    if not features.is_floating_point():
        raise InputError(f"net gives {features.dtype}; features are floating-point numbers")
    if not features.isfinite().all():
        raise InputError("net gives features that are not finite (NaN or infinite) for ordinary images")
    return features.shape[1]


def _require_the_same_in_training(net: nn.Module, images: Tensor, width: int) -> None:
    """Raises InputError where training mode gives another width; looked at in a copy, which may not be had."""
    try:
        twin = copy.deepcopy(net).train()
        with forked_generator(images.device), torch.no_grad():
            features = twin(images)
    except (
        Exception
    ):  # no copy, or batch norm over a single value: nothing is known, and evaluation mode is what counts
        return
    if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[1] != width:
        shape = " x ".join(map(str, features.shape)) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            f"net gives {width} numbers an image in evaluation mode and {shape} in training mode; wrap a module that "
            "gives the same in both, the backbone alone for example"
        )

"""What torch.cuda, loaders and process groups are where there is a twin of a device; twin.py installs it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import dataloader
from twin import Twin, note, pin, refuse, values_of

COLLECTIVES = "all_gather all_gather_into_tensor all_reduce all_to_all_single broadcast reduce"
joined: dict[str, Any] = {}  # how init_process_group was called


def install(gpus: int) -> None:
    """From here on torch.cuda speaks of so many devices, and NCCL is gloo on their values."""
    _install_cuda(gpus)
    _install_loaders()
    _install_processes()


def install_mps() -> None:
    """From here on torch.backends.mps has its device, and its generator draws nothing of its own."""
    torch.backends.mps.is_built = torch.backends.mps.is_available = lru_cache(lambda: True)  # torch unwraps it
    torch.mps.get_rng_state, torch.mps.set_rng_state = lambda *_: torch.get_rng_state(), lambda *_: None
    torch.mps.manual_seed, torch.mps.synchronize = lambda _seed: None, lambda: None
    _install_arithmetic()
    _install_loaders()


class Stream:
    """A stream or an event: all that it was given is done, and whether it was when asked for is a matter of time."""

    def __init__(self, *_: Any, **__: Any):
        self.query = lambda: True
        self.elapsed_time = lambda _end: 1.0  # ms

    def nothing(self, *_: Any) -> None:
        pass

    record = wait_stream = wait_event = synchronize = nothing


class Parallel(nn.Module):
    """What DistributedDataParallel does to gradients."""

    def __init__(self, module: nn.Module, **_: Any):
        super().__init__()
        self.module, self.synchronised = module, True
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach().contiguous(), src=0)
        for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
            parameter.register_post_accumulate_grad_hook(self._average)

    def _average(self, parameter: Tensor) -> None:
        if self.synchronised:
            gradient = parameter.grad.contiguous()  # a bucket's memory is in order
            dist.all_reduce(gradient)
            parameter.grad.copy_(gradient.div_(dist.get_world_size()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.synchronised = False
        yield
        self.synchronised = True


def collective(real: Callable) -> Callable:
    """One of torch.distributed, on the values."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for tensor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            if not isinstance(tensor, Twin) and joined.get("backend") == "nccl":
                refuse(f"No backend type associated with device type cpu (dist.{real.__name__})")
            if not values_of(tensor).is_contiguous():
                refuse(f"dist.{real.__name__} of {tuple(tensor.shape)} with strides {tensor.stride()}")
        note("collectives", real.__name__)
        return real(*tree_map(values_of, args), **tree_map(values_of, kwargs))

    return call


def _install_cuda(gpus: int) -> None:
    nothing = lambda *_, **__: None  # noqa: E731
    cuda = torch.cuda
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: gpus, lambda: 0
    cuda.get_device_name, cuda.get_device_capability = lambda *_: "the twin of a GPU", lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: SimpleNamespace(name="the twin of a GPU", total_memory=141 << 30)
    cuda.get_rng_state, cuda.set_rng_state = lambda *_: torch.get_rng_state(), nothing
    cuda.mem_get_info, cuda.max_memory_allocated = lambda *_: (140 << 30, 141 << 30), lambda *_: 0
    cuda.set_device = cuda.manual_seed = cuda.manual_seed_all = cuda.reset_peak_memory_stats = nothing
    cuda.synchronize = lambda *_: note("waits", "synchronize")
    cuda.current_stream, cuda.stream = Stream, contextlib.nullcontext
    cuda.Stream = cuda.Event = Stream
    _install_arithmetic()


def _install_arithmetic() -> None:
    autocast = torch.autocast

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any):
            super().__init__("cpu", *args, **kwargs)

    torch.autocast, torch.compile = Autocast, lambda *_, **__: refuse("a twin compiles nothing")


def _install_loaders() -> None:
    batches = dataloader._BaseDataLoaderIter
    following = batches.__next__

    def pinned(self: Any) -> Any:
        batch = following(self)
        if not self._loader_pins:
            return batch
        return tree_map(lambda leaf: pin(leaf) if isinstance(leaf, Tensor) else leaf, batch)

    start = batches.__init__

    def begin(self: Any, loader: Any) -> None:
        self._loader_pins, loader.pin_memory = loader.pin_memory, False  # torch would look for a real device
        start(self, loader)
        loader.pin_memory = self._loader_pins

    batches.__init__, batches.__next__ = begin, pinned


def _install_processes() -> None:
    join, get_backend = dist.init_process_group, dist.get_backend

    def init(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        joined.update(backend=backend, device_id=device_id)
        join("gloo" if backend == "nccl" else backend, *args, **kwargs)

    dist.init_process_group, nn.parallel.DistributedDataParallel = init, Parallel
    dist.get_backend = lambda *args: joined.get("backend") or get_backend(*args)
    for name in COLLECTIVES.split():
        setattr(dist, name, collective(getattr(dist, name)))

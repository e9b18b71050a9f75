"""A twin of a CUDA device for a machine without one: its tensors say cuda:0 and hold their values in a CPU's memory.

Or of Apple's MPS: its tensors say mps:0, and float64 is refused there.

`install()` in a process of its own, never pytest's: `ranks.run_ranks(..., device="cuda")` does it in each rank,
`environment()` in every Python process of a command, ranks included. Our code then runs as it is.

What CUDA refuses is refused: mixing with tensors or generators of the CPU, NumPy's view of a tensor, collectives of
CPU tensors under "nccl", which is gloo here. So are collectives of memory that is not in the order of its rows. What
costs is counted in `notes` by line: waits of the host, copies to the device beside it, operator calls, collectives.

It cannot see: kernels and what only they refuse, races between streams (every copy has arrived at once, every event has
come), rounding, TF32, what autocast does on a GPU alone, torch.compile and CUDA graphs (refused, as where there is no
compiler), memory, real NCCL and its networks, DistributedDataParallel's own buckets (a loop over gradients stands in),
nn.SyncBatchNorm, libraries with CUDA code of their own.
"""

import atexit
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
DEVICE = CUDA  # or mps:0
GPUS, REPORT = "MOCO_EVAL_TWIN_GPUS", "MOCO_EVAL_TWIN_REPORT"  # how many there seem to be; where processes report
OURS = ("moco_eval", "pretraining")
FACTORIES = "arange as_tensor empty eye full linspace ones rand randint randn randperm scalar_tensor tensor zeros"
FACTORIES += " empty_like full_like ones_like rand_like randn_like zeros_like"
# operators whose result, or its size, the host must know before it goes on; and those that launch nothing
WAITING = ("local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nms", "nonzero", "unique")
FREE = ("detach", "empty", "new_empty", "local_scalar_dense")
INDEXING = ("index", "index_put", "unsafe_index")

# {(what, line): times}: waits of the host; copies to the device that it does not wait for
notes: dict[str, Counter] = {kind: Counter() for kind in ("waits", "copies", "calls", "collectives")}


def note(kind: str, what: str) -> None:
    notes[kind][what, line()] += 1


def line() -> str:
    """The innermost line of our code on the stack, and the one that called it."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < 2:
        path = Path(frame.f_code.co_filename)
        if any(part in OURS for part in path.parts) and "site-packages" not in path.parts:
            lines.append(f"{path.parent.name}/{path.name}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    return " < ".join(lines) or "?"


def refuse(what: str) -> None:
    raise RuntimeError(f"{what}, at {line()}")


class Twin(Tensor):
    """A tensor on the device; `values` are its numbers."""

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False):
        if DEVICE.type == "mps" and values.dtype in (torch.float64, torch.complex128):
            refuse(f"Cannot convert a MPS Tensor to {values.dtype} as the MPS framework doesn't support it")
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        twin = Tensor._make_wrapper_subclass(cls, values.size(), **layout, requires_grad=requires_grad)
        twin.values = values
        return twin

    device = property(lambda self: DEVICE)
    is_cuda, is_cpu = property(lambda self: DEVICE == CUDA), property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"Twin({self.values!r})"

    def numpy(self, *_: Any, **__: Any):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; copy it to the host first")

    __array__ = numpy

    def tolist(self) -> Any:
        note("waits", "tolist")
        return self.values.tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        note("waits", "new_tensor copies to the device")
        return Twin(self.values.new_tensor(data, **kwargs))

    def __reduce_ex__(self, protocol: int):
        note("waits", "saved")
        return self.values.detach().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        name, kwargs = operator.name().partition("::")[2].partition(".")[0].strip("_"), kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        _refuse_mixed(name, leaves, tensors)
        _note_call(name, operator, args, kwargs)
        before = {id(values_of(tensor)): tensor for tensor in tensors}  # what is changed in place stays that tensor
        result = operator(*tree_map(values_of, args), **tree_map(values_of, kwargs))

        def wrapped(leaf: Any) -> Any:
            return before[id(leaf)] if id(leaf) in before else Twin(leaf) if isinstance(leaf, Tensor) else leaf

        return tree_map(wrapped, result)


def values_of(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, Twin) else leaf


def _refuse_mixed(name: str, leaves: list, tensors: list[Tensor]) -> None:
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        refuse(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")
    others = [tensor for tensor in tensors if not isinstance(tensor, Twin) and tensor.dim()]
    if others and name not in ("copy", *INDEXING):
        refuse(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name}, {others[0].shape})")


def _note_call(name: str, operator: Any, args: tuple, kwargs: dict) -> None:
    """A call, and the wait or copy that it is."""
    if name == "copy":
        to, source, beside = *args[:2], args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if not isinstance(to, Twin):
            (beside and is_pinned(to)) or note("waits", "copy to the host")
        elif not isinstance(source, Twin) and source.dim():
            note("copies" if beside and is_pinned(source) else "waits", "copy to the device")
    if name.startswith(WAITING) or operator.name() == "aten::repeat_interleave.Tensor":
        note("waits", name)
    if name in INDEXING:
        index = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        if any(leaf.dtype in (torch.bool, torch.uint8) for leaf in index):
            note("waits", "index by a mask")
        if any(not isinstance(leaf, Twin) for leaf in index):
            note("waits", "index from the CPU")
    if not operator.is_view and not name.startswith(FREE):
        notes["calls"][name, ""] += 1


# From one memory to the other


def is_pinned(tensor: Tensor, *_: Any) -> bool:
    """Whether it, or what it is a view of, was pinned."""
    return getattr(tensor if tensor._base is None else tensor._base, "pinned", False)


def pin(tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, Twin):
        refuse("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    copy.pinned = True
    return copy


class _Cross(torch.autograd.Function):
    """A copy in the other memory; its gradient comes back."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        copy = values_of(tensor).detach().clone(memory_format=torch.preserve_format)
        return copy if isinstance(tensor, Twin) else Twin(copy)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Cross.apply(gradient)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def moving(real: Callable) -> Callable:
    """Tensor.to, of which torch parses the arguments."""

    def to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, beside, form = torch._C._nn._parse_to(*args, **kwargs)
        converted = real(tensor, dtype or tensor.dtype, copy=copy, **({"memory_format": form} if form else {}))
        if device is None or _is_there(device) == isinstance(tensor, Twin):
            return converted
        if isinstance(tensor, Twin):
            note("waits", "to the host")
        else:
            note("copies" if beside and is_pinned(tensor) else "waits", "to the device")
        return _Cross.apply(converted)

    return to


def making(real: Callable) -> Callable:
    """A factory such as torch.zeros; without a device of its own it makes its result where its first argument is."""

    def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        there = _is_there(device) or (device is None and bool(args) and isinstance(args[0], Twin))
        if there and isinstance(kwargs.get("generator"), torch.Generator):
            refuse(f"Expected a 'cuda' device type for generator but found 'cpu' ({real.__name__})")
        if there and real.__name__ in ("as_tensor", "tensor") and not isinstance(args[0], Twin):
            note("waits", f"torch.{real.__name__} copies to the device")
        made = real(*map(values_of, args), **kwargs, **({} if device is None or there else {"device": device}))
        if there:
            notes["calls"][real.__name__, ""] += not real.__name__.startswith("empty")
            return Twin(made.detach(), kwargs.get("requires_grad", False))
        return pin(made) if pin_memory else made

    return make


def install(gpus: int | None = None) -> None:
    """From here on this process, and those that it forks, have a twin of so many devices."""
    import twin_cuda

    _install_tensors()
    twin_cuda.install(gpus or int(os.environ.get(GPUS, "1")))
    if REPORT in os.environ:
        atexit.register(report, Path(os.environ[REPORT]))


def _install_tensors() -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter on the device is another object
    to, load = moving(Tensor.to), torch.load
    Tensor.to, Tensor.pin_memory, Tensor.is_pinned = to, pin, is_pinned
    Tensor.cpu = lambda tensor, **_: to(tensor, "cpu")
    Tensor.cuda = lambda tensor, device=None, non_blocking=False: to(tensor, DEVICE, non_blocking=non_blocking)
    Tensor.record_stream = lambda tensor, stream: None
    for name in FACTORIES.split():
        setattr(torch, name, making(getattr(torch, name)))

    def load_there(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        if callable(map_location) or not _is_there(map_location):
            return load(file, map_location=map_location, **kwargs)
        loaded = load(file, map_location="cpu", **kwargs)
        return tree_map(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, loaded)

    torch.load = load_there


def install_mps() -> None:
    """The same for the one device that MPS is."""
    import twin_cuda

    global DEVICE
    DEVICE = torch.device("mps", 0)
    _install_tensors()
    twin_cuda.install_mps()


def environment(folder: Path, gpus: int = 1) -> dict[str, str]:
    """Variables with which every Python process has the twin, and reports to `folder` when it ends."""
    (folder / "sitecustomize.py").write_text("import twin\n\ntwin.install()\n")
    here = Path(__file__).parent
    paths = [str(folder), str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), GPUS: str(gpus), REPORT: str(folder)}


def lines(kind: str) -> dict[str, int]:
    """One kind of notes in plain words, the most frequent first."""
    return {f"{what} at {where}": count for (what, where), count in notes[kind].most_common()}


def report(folder: Path) -> None:
    (folder / f"twin_{os.getpid()}.json").write_text(json.dumps({kind: lines(kind) for kind in notes}, indent=1))

"""torch's two file formats, looked through before torch reads them with `weights_only=True`.

What torch itself admits is narrowed to what checkpoints need, and widened by stand-ins for the objects that training
frameworks store beside the weights: these are read, and nothing of them is executed.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moco_eval.untrusted import zip_archive
from moco_eval.untrusted.pickle_read import MADE, NETWORK, elsewhere, refusal, stand_in
from moco_eval.untrusted.pickle_scan import DAMAGED, DISTRUST, Name, Refused, Scan, scan, shown

# What a pickle may name


REBUILD = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
}
NOT_DENSE = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "empty (meta)",
}
CALLED = {  # by torch itself, with plain values alone
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.set",
    "builtins.bytearray",
    "builtins.complex",
    "torch.Size",
    "torch.device",
    "_codecs.encode",
}
CHANGED = {"dict", "list", "set", "collections.OrderedDict()", "collections.Counter()"}  # given items or a state
NAMED = re.compile(  # and never called
    r"torch\.Tensor|torch\.nn\.parameter\.Parameter|torch(\.storage|\.cuda)?\.\w*Storage"
    r"|torch\.(bool|(b?float|complex|q?u?int)\d+\w*)"
)
FRAMEWORKS = (
    "omegaconf",
    "hydra",
    "mmengine",
    "mmcv",
    "yacs",
    "fvcore.common.config",
    "detectron2.config",
    "easydict",
    "addict",
    "munch",
    "ml_collections",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "vissl",
    "classy_vision",
)
INERT = re.compile(
    "|".join(
        (
            rf"({'|'.join(map(re.escape, FRAMEWORKS))})(\.\w+)*\.[A-Z]\w*",  # their classes, none of their functions
            rf"(?:{NETWORK.pattern})(\w+\.)*[A-Z]\w*",  # whole networks beside the weights ...
            r"lightly_train(\.\w+)+|types\.MethodType",  # ... as lightly-train keeps them, with their methods
            r"(__main__|main_vicreg)\.exclude_bias_and_norm",  # VICReg's optimiser names it and never calls it here
            r"argparse\.Namespace|types\.SimpleNamespace|typing\.[A-Z]\w*",
            r"pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path",
            r"datetime\.(datetime|date|time|timedelta|timezone)",
            r"builtins\.(dict|list|tuple|str|int|float|bool|object|type|slice|range|getattr)|_?operator\.getitem",
            r"copyreg\._reconstructor",
            r"numpy\.(bool|int|uint|float|complex)(_|\d+)?|numpy\.dtypes\.\w+DType",
            r"numpy\.random\.(_pickle\.__\w+_ctor|\w+\.(__pyx_unpickle_)?[A-Z]\w*)",
            *(pattern for pattern, _ in MADE),
        )
    )
)


def _require_harmless(effects: Scan) -> None:
    """Raises Refused for the first global or call that no checkpoint needs."""
    if reason := next(filter(None, map(elsewhere, effects.names)), None):
        raise Refused(reason)
    for name in effects.names:
        if name in NOT_DENSE:
            raise Refused(f"holds a tensor that is {NOT_DENSE[name]}; only dense tensors are read: have it saved dense")
        if name not in REBUILD | CALLED and not NAMED.fullmatch(name) and not INERT.fullmatch(name):
            raise Refused(refusal(name))
    for name, arguments in sorted(effects.calls):
        if not _harmless_call(name, arguments):
            raise Refused(f"calls {name} in a way that no checkpoint does; {DISTRUST}")
    for kind in sorted(effects.built | effects.filled.keys()):
        if kind not in CHANGED and not INERT.fullmatch(kind.removesuffix("()")):
            raise Refused(f"changes a {shown(kind)} after it is made; {DISTRUST}")


def _harmless_call(name: str, kinds: tuple[str, ...]) -> bool:
    """Whether torch may make this call; a tensor or a number where items are due would fill the memory."""
    if name == "torch._tensor._rebuild_from_type_v2":
        return len(kinds) > 2 and kinds[0].removeprefix("global ") in REBUILD - {name} and kinds[2] == "tuple"
    if name in REBUILD or (name not in CALLED and INERT.fullmatch(name)):
        return True
    if name == "_codecs.encode":
        return kinds == ("str", "latin1")
    plain = {"list", "tuple", "dict", "str", "latin1", "_codecs.encode()"}
    numbers = {"int", "float"} if name in ("torch.device", "builtins.complex") else set()
    return name in CALLED and set(kinds) <= plain | numbers


# What it asks for


WIDTHS = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
WIDTHS |= {"Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1}


def _storages(effects: Scan, fields: int) -> dict[str, int]:
    """Bytes of tensor data by key, as the pickle declares them before any is read."""
    needs: dict[str, int] = {}
    for identity in effects.storages:
        if len(identity) != fields or identity[0] != "storage" or not _sensible(*identity[1:5]):
            raise Refused(f"asks for tensor data that is none ({shown(identity)}): {DAMAGED}")
        _, kind, key, _, count, *_ = identity
        width = WIDTHS.get(kind.rpartition(".")[2].removesuffix("Storage"))
        if width is None:
            raise Refused(f"holds tensors of {shown(kind)}, which are not read: have them saved as float32")
        needs[key] = max(needs.get(key, 0), count * width)
    return needs


def _sensible(kind: Any, key: Any, location: Any, count: Any) -> bool:
    named = isinstance(kind, Name) and isinstance(key, str) and isinstance(location, str)
    return named and isinstance(count, int) and count >= 0


def _load(effects: Scan, file: Any, **how: Any) -> Any:
    """torch.load with stand-ins for what the pickle names; nothing in it is executed."""
    names = [name for name in effects.names if name not in CALLED and INERT.fullmatch(name)]
    try:
        with _safe_globals([stand_in(str(name), effects.filled.get(f"{name}()", "")) for name in names]):
            return torch.load(file, map_location="cpu", weights_only=True, **how)
    except (MemoryError, Refused):
        raise
    except Exception as error:  # torch raises a dozen kinds for a file that is not one of its own
        if "allocate memory" in str(error):
            raise MemoryError from None
        if effects.protocol > 2:
            again = "torch.save it again without pickle_protocol"
            raise Refused(
                f"has pickle protocol {effects.protocol}, which torch does not read safely: {again}"
            ) from None
        reason = shown(str(error).rpartition("WeightsUnpickler error: ")[2])
        raise Refused(f"is damaged, or not as torch {torch.__version__} reads it ({reason}): {DAMAGED}") from None


@contextmanager
def _safe_globals(made: list[type]) -> Iterator[None]:
    """These and no others, whatever other packages have told torch to take for safe."""
    others = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(made)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


# The two formats


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled


def read_legacy(path: Path, size: int) -> Any:
    """What a checkpoint of before torch 1.6 holds: five pickles, then the tensors' data. All of it goes into memory.

    Raises:
        Refused: truncated, damaged, or made to harm.
    """
    with path.open("rb") as file:
        pickles = [scan(file, size) for _ in range(5)]
        for part in pickles:
            _require_harmless(part)
        need = sum(8 + count for count in _storages(pickles[3], 6).values())
        left = size - file.tell()
        if need > left:
            raise Refused(f"is truncated: its tensors take {need:,} bytes, {left:,} are there; {DAMAGED}")
        file.seek(0)
        return _load(pickles[3], file)


def read_archive(path: Path, size: int, mapped: bool) -> Any:
    """What a checkpoint in torch's zip format holds.

    Args:
        mapped: the tensors stay on disk until they are used; otherwise all of them go into memory.
    Raises:
        Refused: not torch's, truncated, damaged, or made to harm.
    """
    with path.open("rb") as file:
        records, pickled = zip_archive.check(file, size)
        effects = scan(io.BytesIO(pickled), len(pickled))
        _require_harmless(effects)
        for key, need in _storages(effects, 5).items():
            there = records.get(f"data/{key}")
            if there is None or there < need:
                have = "absent" if there is None else f"{there:,} bytes"
                raise Refused(f"says that its data/{shown(key)} has {need:,} bytes, but it is {have}: {DAMAGED}")
        file.seek(0)
        return _load(effects, str(path), mmap=True) if mapped else _load(effects, file)

"""Reading checkpoint files: made to harm, broken, something else altogether, or fine.

Every file of FILES is refused in one line, runs nothing and takes no memory to speak of. Those of PICKLES and HARMFUL
are shown to run their command where nobody checks.
"""

import argparse
import collections
import gzip
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import environment
from torch import nn

from moco_eval.errors import InputError
from moco_eval.untrusted import pickle_read, pickle_scan
from moco_eval.untrusted import read as reader
from moco_eval.untrusted.pickle_read import StandIn
from moco_eval.untrusted.read import read

CANARY = "canary"  # in the working directory
COMMAND = f"touch {CANARY}"

# A small assembler for pickles


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + row(*arguments) + b"R"


def entries(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def done(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


SYSTEM = named("posix", "system")
RUNS = call(SYSTEM, text(COMMAND))
EMPTY = call(named("collections", "OrderedDict"))


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage", *more: bytes) -> bytes:
    return row(text("storage"), named("torch", kind), text(key), text("cpu"), number(count), *more) + b"Q"


def tensor(data: bytes, *shape: int, stride: tuple[int, ...] = ()) -> bytes:
    sizes, strides = (row(*map(number, values)) for values in (shape, stride or (1,) * len(shape)))
    return call(named("torch._utils", "_rebuild_tensor_v2"), data, number(0), sizes, strides, b"\x89", EMPTY)


WEIGHT = tensor(storage(), 4)
FOUR = np.arange(4, dtype=np.float32).tobytes()


class Evil:
    def __reduce__(self):
        return os.system, (COMMAND,)


# Archives


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as file:
        for name, content in records.items():
            file.writestr(name, content)
    return made.getvalue()


def checkpoint(pickled: bytes, **more: bytes) -> dict[str, bytes]:
    """The records of torch's zip format."""
    return {"x/data.pkl": pickled, "x/byteorder": b"little", "x/data/0": FOUR, "x/version": b"3\n"} | more


def zipped(value: bytes) -> bytes:
    return archive(checkpoint(done(value)))


GOOD = zipped(entries(weight=WEIGHT))


def twice(name: str) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate"):
        made = io.BytesIO(GOOD)
        with zipfile.ZipFile(made, "a") as file:
            file.writestr(name, b"")
        return made.getvalue()


def directory(old: bytes, new: bytes, at: int, record: bytes = b"x/data/0") -> bytes:
    """GOOD with other bytes in the directory's entry of one record, `at` bytes from its start."""
    start = GOOD.rindex(record) - 46
    assert GOOD[start : start + 4] == b"PK\1\2" and GOOD[start + at :].startswith(old)
    return GOOD[: start + at] + new + GOOD[start + at + len(new) :]


def offset(record: bytes) -> bytes:
    return struct.pack("<I", GOOD.index(record) - 30)


def legacy(value: bytes, keys: bytes = b"]" + text("0") + b"a", data: bytes = struct.pack("<q", 4) + FOUR) -> bytes:
    about = entries(protocol_version=number(1001), little_endian=b"\x88")
    head = [number(0x1950A86A20F9469CFC6C), number(1001), about, value, keys]
    return b"".join(map(done, head)) + data


OLD_STORAGE = storage("0", 4, "FloatStorage", b"N")


def saved(value: object, **how: object) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, **how)
    return made.getvalue()


def tensors_file(header: dict | bytes, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def npz() -> bytes:
    made = io.BytesIO()
    np.savez(made, a=np.zeros(3))
    return made.getvalue()


def tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights.pth"))
    return made.getvalue()


def array_pickle(shape: bytes, data: bytes, start: bytes = b"K\0\x85") -> bytes:
    """A pickled float32 array, put together by hand."""
    kind = call(named("numpy", "dtype"), text("f4"), b"\x89", b"\x88")
    empty = call(named("numpy.core.multiarray", "_reconstruct"), named("numpy", "ndarray"), start, text("b"))
    return empty + row(number(1), shape, kind, b"\x89", data) + b"b"


def laughs(levels: int) -> bytes:
    """A list in a list, twice, in a list, twice, ..."""
    return row(b"]q\0", *(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(levels)))


# Files that run a command where nobody checks: by content, and what is said of them


NEW = b"\x81"
BUILD = b"b"
GETATTR, GETITEM = named("builtins", "getattr"), named("_operator", "getitem")
GLOBALS = call(GETATTR, call(GETATTR, named("argparse", "Namespace"), text("__init__")), text("__globals__"))

PICKLES: dict[str, tuple[bytes, str]] = {
    "protocol 0": (f"cposix\nsystem\n(S'{COMMAND}'\ntR.".encode(), "posix.system"),
    "protocol 1": (pickle.dumps(Evil(), 1), "posix.system"),
    "protocol 2": (pickle.dumps(Evil(), 2), "posix.system"),
    "protocol 4 with STACK_GLOBAL": (pickle.dumps(Evil(), 4), "posix.system"),
    "protocol 5": (pickle.dumps({"state_dict": Evil()}, 5), "posix.system"),
    "INST": (f"(S'{COMMAND}'\niposix\nsystem\n.".encode(), "posix.system"),
    "OBJ": (done(b"(" + SYSTEM + text(COMMAND) + b"o"), "posix.system"),
    "NEWOBJ": (
        done(
            named("builtins", "bytes")
            + row(named("builtins", "map") + row(SYSTEM, b"](" + text(COMMAND) + b"e") + NEW)
            + NEW
        ),
        "builtins.map",
    ),
    "BUILD of a __setstate__": (
        done(
            named("argparse", "Namespace") + b")" + NEW + entries(__setstate__=SYSTEM) + BUILD + text(COMMAND) + BUILD
        ),
        "argparse.Namespace",
    ),
    "eval": (done(call(named("builtins", "eval"), text(f"__import__('os').system({COMMAND!r})"))), "builtins.eval"),
    "Python 2's name of eval": (
        done(call(named("__builtin__", "eval"), text(f"__import__('os').system({COMMAND!r})"))),
        "builtins.eval",
    ),
    "a module's module": (
        done(text("argparse") + text("_os.system") + b"\x93" + row(text(COMMAND)) + b"R", 4),
        "argparse._os.system",
    ),
    "numpy's exec": (
        done(call(named("numpy.testing", "runstring"), text(f"__import__('os').system({COMMAND!r})"), b"}")),
        "numpy.testing.runstring",
    ),
    "torch's shell": (
        done(call(named("torch.utils.collect_env", "run"), text(COMMAND))),
        "torch.utils.collect_env.run",
    ),
}

HARMFUL: dict[str, tuple[bytes, str]] = {
    "beside the tensors": (zipped(entries(weight=WEIGHT, x=RUNS)), "wants to run code named posix.system"),
    "in an ordered dict": (
        zipped(EMPTY + b"(" + text("weight") + WEIGHT + text("x") + RUNS + b"u"),
        "wants to run code named posix.system",
    ),
    "in a stand-in's state": (
        zipped(entries(a=named("argparse", "Namespace") + b")" + NEW + entries(x=RUNS) + BUILD, weight=WEIGHT)),
        "wants to run code named posix.system",
    ),
    "in a stand-in's arguments": (
        zipped(entries(a=call(named("pathlib", "PurePosixPath"), text("x"), RUNS + b"0" + text("y")), weight=WEIGHT)),
        "wants to run code named posix.system",
    ),
    "as a stand-in's state": (
        zipped(
            entries(
                weight=WEIGHT,
                x=named("argparse", "Namespace")
                + b")"
                + NEW
                + entries(__setstate__=SYSTEM)
                + BUILD
                + text(COMMAND)
                + BUILD,
            )
        ),
        "wants to run code named posix.system",
    ),
    "allowed names alone": (
        zipped(
            entries(
                weight=WEIGHT,
                x=call(call(GETATTR, call(GETITEM, GLOBALS, text("_os")), text("system")), text(COMMAND)),
            )
        ),
        "calls what it has made itself",
    ),
    "torch's shell in an archive": (
        zipped(entries(x=call(named("torch.utils.collect_env", "run"), text(COMMAND)), weight=WEIGHT)),
        "wants to run code named torch.utils.collect_env.run",
    ),
    "in the legacy format": (
        legacy(entries(weight=tensor(OLD_STORAGE, 4), x=RUNS)),
        "wants to run code named posix.sys",
    ),
    "in the legacy format's key list": (
        legacy(entries(weight=tensor(OLD_STORAGE, 4)), keys=b"](" + text("0") + RUNS + b"0e"),
        "wants to run code named posix.system",
    ),
}

# Files that exhaust memory or stack, that are broken, or that are something else


def fifty(value: bytes) -> bytes:
    return zipped(entries(weight=WEIGHT, x=value))


GIANT = 12_500_000_000  # of float32: 50 GB
ARRAY_OK = array_pickle(number(4) + b"\x85", call(named("_codecs", "encode"), text("\0" * 16), text("latin1")))

GREEDY: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "50 GB from one number": (
        zipped(entries(weight=tensor(storage(), GIANT, stride=(0,)))),
        "claims tensors of 50.0 GB",
    ),
    "50 GB storage": (zipped(entries(weight=tensor(storage("0", GIANT), GIANT))), "50,000,000,000 bytes, but it is 16"),
    "50 GB storage, legacy": (
        legacy(entries(weight=tensor(storage("0", GIANT, "FloatStorage", b"N"), 4))),
        "is truncated",
    ),
    "50 GB of bytes": (
        fifty(call(named("builtins", "bytearray"), number(5 * 10**10))),
        "calls builtins.bytearray in a way",
    ),
    "50 GB tensor class": (fifty(call(named("torch", "FloatTensor"), number(GIANT))), "code named torch.FloatTensor"),
    "50 GB tensor": (fifty(call(named("torch", "Tensor"), number(GIANT))), "calls torch.Tensor in a way"),
    "50 GB counted": (
        fifty(call(named("collections", "Counter"), tensor(storage(), GIANT, stride=(0,)))),
        "calls collections.Counter in a way",
    ),
    "50 GB as arguments": (
        fifty(named("builtins", "set") + tensor(storage(), GIANT, stride=(0,)) + b"R"),
        "calls what it has made itself",
    ),
    "50 GB from a hidden rebuild": (
        fifty(
            call(
                named("torch._tensor", "_rebuild_from_type_v2"),
                named("builtins", "bytearray"),
                named("torch", "Tensor"),
                row(number(5 * 10**10)),
                b"}",
            )
        ),
        "calls torch._tensor._rebuild_from_type_v2 in a way",
    ),
    "50 GB array": (
        done(entries(model=entries(a=array_pickle(number(GIANT) + b"\x85", text("x"))))),
        "has an array of",
    ),
    "50 GB array in an archive": (fifty(array_pickle(number(GIANT) + b"\x85", text("x"))), "has an array of"),
    "50 GB of safetensors": (tensors_file({"a": entry([GIANT], 0, 4 * GIANT)}), "damaged safetensors"),
    "many tensors of one storage": (
        lambda: archive(
            checkpoint(
                done(b"}(" + b"".join(number(i) + tensor(storage("0", 1 << 20), 1 << 20) for i in range(300)) + b"u")
            )
            | {"x/data/0": bytes(1 << 22)}
        ),
        "claims tensors of",
    ),
    "a memo of 2 billion": (done(b"}r" + struct.pack("<I", 2**31 - 1)), "a memo of 2,147,483,647 entries"),
    "a string of 2 GB": (done(b"X" + struct.pack("<I", 2**31) + b"a"), "2147483648 bytes announced"),
    "bytes of 50 GB": (done(b"\x8e" + struct.pack("<Q", 5 * 10**10) + b"a", 4), "50000000000 bytes announced"),
    "a frame of 50 GB": (done(b"\x95" + struct.pack("<Q", 5 * 10**10) + b"N", 4), "a frame of 50000000000 bytes"),
    "copies of copies": (
        lambda: done(
            b"]q\0(" + b"K\1" * 100_000 + b"e0" + named("collections", "OrderedDict") + b"q\x01" + b"h\1h\0\x85R" * 200
        ),
        "copies the same values over and over",
    ),
    "a billion laughs": (done(laughs(60)), "nests the same entries"),
    "a billion laughs beside weights": (fifty(laughs(60)), "nests the same entries"),
    "a list that holds itself": (fifty(b"]q\0h\0a"), "nests its entries more than 100 deep"),
    "lists 100,000 deep": (fifty(b"]" * 100_000 + b"a" * 99_999), "nests its entries more than 100 deep"),
    "lists 100,000 deep, pickled": (done(b"]" * 100_000 + b"a" * 99_999), "nests its entries more than 100 deep"),
    "tuples 1,000,000 deep as a key": (done(b"}N" + b"\x85" * 1_000_000 + b"Ns"), "nests tuples more than 100 deep"),
    "tuples 1,000,000 deep in an archive": (fifty(b"}N" + b"\x85" * 1_000_000 + b"Ns"), "nests tuples more than 100"),
    "header of 99 MB": (lambda: tensors_file(b"{" + b" " * 99_000_000), "a header of 99,000,001 bytes"),
    "metadata 100,000 deep": (
        tensors_file({"__metadata__": {"moco-eval": "[" * 100_000}, "a": entry([4], 0, 16)}),
        "damaged safetensors",
    ),
    "a bomb among the tensors": (
        lambda: archive(
            checkpoint(done(entries(weight=WEIGHT))) | {"x/data/0": bytes(20_000_000)}, zipfile.ZIP_DEFLATED
        ),
        "is a compressed archive",
    ),
    "a bomb for a pickle": (
        lambda: archive(checkpoint(bytes(20_000_000)), zipfile.ZIP_DEFLATED),
        "is a compressed archive",
    ),
    "a note of 2 MB": (
        lambda: archive(checkpoint(done(entries(weight=WEIGHT))) | {"x/version": bytes(2 << 20)}),
        "x/version has",
    ),
}

EVIL_NAMES = {
    "a name that starts alike": fifty(named("argparse_evil", "Namespace")),
    "a package that starts alike": fifty(call(named("numpyx", "ndarray"))),
    "numpy's loader": fifty(call(named("numpy", "load"), text("x.npy"))),
    "numpy's fortran": fifty(call(named("numpy.f2py.crackfortran", "getlincoef"), text("1"), b"}")),
    "a function of a framework": fifty(call(named("omegaconf", "x"))),
    "a method of a framework": fifty(call(named("omegaconf", "OmegaConf.load"), text("x.yaml"))),
    "pathlib's os": fifty(call(named("pathlib", "os.system"), text(COMMAND))),
    "torch.hub": fifty(call(named("torch.hub", "load"), text("x/y"), text("z"))),
    "torch.load": fifty(call(named("torch", "load"), text("x.pth"))),
    "an unknown class": fifty(named("__main__", "Settings") + b")\x81"),
    "a name with an escape": done(text("os\x1b[2J\n") + text("system\n" * 1000) + b"\x93", 4),
}

BROKEN: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "extension registry": (done(b"\x82\x01"), "calls code by number"),
    "hidden name": (done(b"}}\x93", 4), "hides the name of the code"),
    "state for a class": (fifty(named("argparse", "Namespace") + b"}b"), "hands a state to what has none"),
    "items for a tensor": (fifty(WEIGHT + number(0) + number(1) + b"s"), "changes a torch._utils._rebuild_tensor_v2()"),
    "state for a tensor": (fifty(WEIGHT + b"}b"), "changes a torch._utils._rebuild_tensor_v2()"),
    "codec": (fifty(call(named("_codecs", "encode"), text("x"), text("idna"))), "calls _codecs.encode in a way"),
    "names without end": (
        fifty(b"(" + b"".join(named("omegaconf", f"C{i}") for i in range(1001)) + b"t"),
        "names more than 1000 classes",
    ),
    "array of 64 dimensions": (
        done(entries(a=array_pickle(row(*(64 * [number(1)])), text("x")))),
        "array of the shape",
    ),
    "no storage": (fifty(row(text("storage"), text("x")) + b"Q"), "asks for tensor data that is none"),
    "stored outside": (fifty(row(text("storage"), b"]") + b"Q"), "something stored outside of it"),
    "absent storage": (fifty(tensor(storage("7"), 4)), "data/7 has 16 bytes, but it is absent"),
    "short storage": (fifty(tensor(storage("0", 400), 4)), "data/0 has 1,600 bytes, but it is 16 bytes"),
    "view beyond its storage": (zipped(entries(weight=tensor(storage(), 400))), "is damaged, or not as torch"),
    "sparse": (lambda: saved({"a": torch.eye(3).to_sparse()}), "only dense tensors"),
    "quantised": (fifty(call(named("torch._utils", "_rebuild_qtensor"))), "only dense tensors"),
    "meta": (lambda: saved({"a": torch.ones(2, device="meta")}), "only dense tensors"),
    "network": (lambda: saved(nn.Linear(2, 2)), "holds a whole network (class torch.nn.modules.linear.Linear)"),
    "network, legacy": (lambda: saved(nn.Linear(2, 2), _use_new_zipfile_serialization=False), "holds a whole network"),
    "tensor": (lambda: saved(torch.ones(3)), "holds a Tensor, not a dict"),
    "list": (lambda: saved([torch.ones(3)]), "holds a list, not a dict"),
    "namespace": (lambda: saved(argparse.Namespace(a=1)), "holds an argparse.Namespace, not a dict"),
    "protocol 4": (lambda: saved({"a": torch.ones(3)}, pickle_protocol=4), "pickle protocol 4"),
    "plain pickle of tensors": (lambda: pickle.dumps({"a": torch.ones(2)}), "is a plain pickle of torch tensors"),
    "half a checkpoint": (done(entries(weight=WEIGHT)), "the data.pkl of a checkpoint that was unpacked"),
    "TorchScript": (
        archive({"x/data.pkl": b"", "x/constants.pkl": b"", "x/code/a.py": b""}),
        "is a TorchScript archive",
    ),
    "nested in a zip": (archive({"weights.pkl": pickle.dumps(Evil(), 2)}), "is a zip archive of something else"),
    "empty zip": (archive({}), "is a zip archive of something else"),
    "npz": (npz(), "numpy arrays (.npz)"),
    "Keras 3": (archive({"metadata.json": b"{}", "config.json": b"{}", "model.weights.h5": b""}), "is a Keras model"),
    "path out": (archive(checkpoint(b"") | {"x/../../etc/passwd": b""}), "a path out of it"),
    "absolute path": (archive(checkpoint(b"") | {"/etc/passwd": b""}), "a path out of it"),
    "path with backslashes": (archive(checkpoint(b"") | {"x/..\\..\\a": b""}), "a path out of it"),
    "guest": (archive(checkpoint(b"") | {"y/run.sh": b""}), "a checkpoint and something else"),
    "twice": (lambda: twice("x/data.pkl"), "the same name twice"),
    "twice but for its case": (archive(checkpoint(b"") | {"x/DATA.PKL": b""}), "the same name twice"),
    "encrypted": (directory(b"\0\0", b"\1\0", 8), "is an encrypted archive"),
    "overlapping": (directory(offset(b"x/data/0"), offset(b"x/data.pkl"), 42), "whose records overlap"),
    "lying sizes": (
        directory(struct.pack("<II", 16, 16), struct.pack("<II", 16, 10**9), 20),
        "is a compressed archive",
    ),
    "size beyond the end": (
        directory(struct.pack("<II", 16, 16), struct.pack("<II", 10**9, 10**9), 20),
        "beyond its end",
    ),
    "record elsewhere": (
        directory(offset(b"x/data/0"), struct.pack("<I", GOOD.index(b"x/data/0") - 29), 42),
        "directory does not fit",
    ),
    "bytes after the end": (GOOD + bytes(30), "is truncated"),
    "two directories": (GOOD[:-6] + struct.pack("<I", 4) + GOOD[-2:], "its directory is not where its end says"),
    "big-endian": (
        archive(checkpoint(done(entries(weight=WEIGHT))) | {"x/byteorder": b"big"}),
        "in another byte order",
    ),
    **{f"zip cut at {cut}": (GOOD[:cut], "is truncated") for cut in (4, 100, len(GOOD) // 2, -100, -30, -1)},
    **{
        f"legacy cut at {cut}": (legacy(entries(weight=tensor(OLD_STORAGE, 4)))[:cut], "truncated")
        for cut in (20, 100, -30, -10, -1)
    },
    "safetensors that overlap": (tensors_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}), "damaged safetensors"),
    "unknown dtype": (tensors_file({"a": entry([4], 0, 16, "F33")}), "damaged safetensors"),
    "safetensors cut": (tensors_file({"a": entry([4], 0, 16)})[:-4], "damaged safetensors"),
    "safetensors header cut": (tensors_file({"a": entry([4], 0, 16)})[:30], "truncated safetensors"),
    "safetensors without JSON": (tensors_file(b"{nonsense"), "damaged safetensors"),
    "safetensors names twice": (
        tensors_file(b'{"a":%s,"a":%s}' % ((json.dumps(entry([4], 0, 16)).encode(),) * 2)),
        "the same name twice",
    ),
    "array with too little data": (
        done(entries(a=array_pickle(number(9) + b"\x85", text("x")))),
        "array of 9 float32 and 1 b",
    ),
    "array of negative size": (
        done(entries(a=array_pickle(number(-1) + b"\x85", text("x")))),
        "array of the shape (-1,)",
    ),
    "pickle cut": (pickle.dumps({"model": {"a": np.zeros(9)}})[:-30], "truncated or damaged pickle"),
    "pickle of a list": (pickle.dumps([1, 2]), "holds a list, not a dict"),
    "pickle of protocol 9": (b"\x80\x09N.", "not a pickle of arrays"),
    "empty": (b"", "is empty"),
    "text": (b"hello world, these are my weights\n" * 30, "is a text file"),
    "noise": (np.random.default_rng(0).bytes(5000), "is not a checkpoint that can be read"),
    "zeros": (bytes(5000), "is not a checkpoint that can be read"),
    "web page": (b"\n<!DOCTYPE html><html><body>404 not found</body></html>", "is a web page"),
    "JSON": (b'{"error": "rate limit exceeded", "code": 429}\n', "is JSON, such as a server's error"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
    "tar": (tar(), "is a tar archive"),
    "gzip": (gzip.compress(GOOD), "is compressed"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 file"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(600), "is an ONNX or TensorFlow graph"),
    "TensorFlow index": (bytes(400) + reader.TENSORFLOW_INDEX, "is the index of a TensorFlow checkpoint"),
    "TensorFlow list": (b'model_checkpoint_path: "model.ckpt-1"\n', "is TensorFlow's list of checkpoints"),
    "npy": (b"\x93NUMPY\x01\0" + bytes(200), "is a numpy array"),
    "Flax": (b"\x82\xa6params\x81\xa6kernel\xc7" + bytes(100), "is msgpack such as Flax writes"),
}

FILES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    **{name: (content, f"wants to run code named {code}") for name, (content, code) in PICKLES.items()},
    **{name: (content, "wants to run code named ") for name, content in EVIL_NAMES.items()},
    **HARMFUL,
    **GREEDY,
    **BROKEN,
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """All of FILES in one folder, FILES' names with dashes."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (content, _) in FILES.items():
        (folder / file_name(name)).write_bytes(content() if callable(content) else content)
    return folder


def file_name(name: str) -> str:
    return f"{name.replace(' ', '-').replace(',', '')}.pth"


def refused(path: Path) -> str:
    """What is said of a file that is not read, after its path; it must be one line."""
    with pytest.raises(InputError) as found:
        read(path)
    message = str(found.value)
    assert message.startswith(f"{path} ") or message.startswith(f"cannot read {path}: "), message
    assert message.isprintable() and len(message) < len(str(path)) + 330, message
    return message.removeprefix(f"{path} ")


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_or_broken_file_is_refused_in_one_line(name, hostile, in_tmp):
    assert FILES[name][1] in refused(hostile / file_name(name))
    assert not Path(CANARY).exists()


def test_a_pickle_of_endless_steps_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(pickle_scan, "MOST", 1000)
    (tmp_path / "x.pth").write_bytes(fifty(b"N0" * 600 + b"N"))
    assert "has a pickle of more than 1,000 steps" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize("name", PICKLES | HARMFUL)
def test_such_a_file_does_run_its_command_where_nobody_checks(name, hostile, in_tmp):
    """The control: without it, the tests above would pass for files that do nothing."""
    path = hostile / file_name(name)
    if name in PICKLES:
        try:
            pickle.loads(path.read_bytes())
        except (TypeError, AttributeError):  # after its command ran
            pass
    else:
        torch.load(path, weights_only=False)
    assert Path(CANARY).exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.slow
def test_reading_hostile_files_takes_no_memory(hostile, in_tmp):
    """All of them in one process, which may have 2 GB of address space more than it starts with."""
    script = """
import re, resource, sys
from pathlib import Path
import torch
from moco_eval.untrusted.read import read
from moco_eval.errors import InputError

def kilobytes(what):
    return int(re.search(rf"{what}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

resource.setrlimit(resource.RLIMIT_AS, (1024 * kilobytes("VmSize") + (2 << 30),) * 2)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
before = kilobytes("VmRSS")
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read(path)
    except InputError as error:
        if "does not fit into" in str(error):
            print(error)
    else:
        print(path, "was read")
print("MB", (kilobytes("VmHWM") - before) // 1024)
"""
    command = [sys.executable, "-c", script, str(hostile)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    first, size = done.stdout.split()[:2]
    assert (first, done.stderr) == ("MB", "") and int(size) < 300, done.stdout + done.stderr
    assert not Path(CANARY).exists()


# Paths


def test_what_is_no_regular_file_is_named(tmp_path):
    (tmp_path / "dangling.pth").symlink_to("gone.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert refused(tmp_path / "dangling.pth") == "is a link to gone.pth, which does not exist: mend the link"
    assert "Too many levels of symbolic links" in refused(tmp_path / "loop.pth")
    assert "is not a regular file" in refused(tmp_path / "pipe.pth")
    assert "is not a regular file" in refused(Path("/dev/zero"))
    assert "is a folder" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "no" / "such.pth")
    assert "File name too long" in refused(tmp_path / f"{'x' * 300}.pth")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    (tmp_path / "x.pth").write_bytes(GOOD)
    (tmp_path / "x.pth").chmod(0)
    assert "Permission denied" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize("left", [20, len(GOOD)])
def test_a_file_that_changes_under_our_hands_is_refused(left, tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(GOOD)
    load = torch.load

    def late(*arguments, **how):
        os.truncate(path, left)
        os.utime(path, (0, 0))
        return load(*arguments, **how)

    monkeypatch.setattr(torch, "load", late)
    assert ("damaged" if left == 20 else "changed while it was read") in refused(path)


# What is read


WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)}


def same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_contents_say_the_format_not_the_name(tmp_path):
    contents = {
        "zip": saved(WEIGHTS),
        "legacy": saved(WEIGHTS, _use_new_zipfile_serialization=False),
        "safetensors": safetensors.torch.save(WEIGHTS),
        "pickle": pickle.dumps({name: tensor.numpy() for name, tensor in WEIGHTS.items()}),
    }
    for name, content in contents.items():
        for suffix in (".pth", ".safetensors", ".pkl", ""):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(content)
            assert same(read(path), WEIGHTS), path
    (tmp_path / "link.pth").symlink_to("zip.pth")
    assert same(read(tmp_path / "link.pth"), WEIGHTS)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from Linux's /proc")
@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_tensors_stay_on_disk(kind, tmp_path):
    path = tmp_path / f"{kind}.pth"
    path.write_bytes(saved(WEIGHTS) if kind == "zip" else safetensors.torch.save(WEIGHTS))
    found = read(path)
    for name in WEIGHTS:
        at = found[name].data_ptr()
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
        assert any(int(low, 16) <= at < int(high, 16) for low, high in (line[0].split("-") for line in lines))


@pytest.mark.parametrize("kind", ["legacy", "pickle", "zip called safetensors"])
def test_memory_is_announced_before_it_is_taken(kind, tmp_path, monkeypatch, capfd):
    legacy = kind == "legacy"
    path = tmp_path / ("x.safetensors" if "zip" in kind else "x.pth")
    path.write_bytes(
        pickle.dumps({"a": np.ones(3)})
        if kind == "pickle"
        else saved(WEIGHTS, _use_new_zipfile_serialization=not legacy)
    )
    read(path)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(reader, "LARGE", 10)
    read(path)
    said = capfd.readouterr().err
    assert said.startswith(f"warning: {path} is ") and said.count("\n") == 1 and "GB of memory; to avoid that" in said
    monkeypatch.setattr(reader, "_free_memory", lambda: 20)
    assert "0.0 GB are free" in refused(path)
    monkeypatch.setattr(reader, "_free_memory", lambda: None)
    read(path)


@pytest.mark.parametrize("module", ["torch", "safetensors"])
def test_a_file_that_cannot_be_mapped_does_not_fit(module, tmp_path, monkeypatch):
    def full(*_arguments, **_how):
        raise RuntimeError("unable to mmap 42949672960 bytes from file <x>: Cannot allocate memory (12)")

    (tmp_path / "x.pth").write_bytes(GOOD if module == "torch" else safetensors.torch.save(WEIGHTS))
    monkeypatch.setattr(*((torch, "load") if module == "torch" else (safetensors, "safe_open")), full)
    assert "does not fit into this machine's memory" in refused(tmp_path / "x.pth")


def test_free_memory_is_that_of_the_system():
    free = reader._free_memory()
    assert free is None or 1 << 20 < free < 1 << 50


def framework(monkeypatch, module: str, name: str, base: type = object) -> type:
    """A class as a framework has it, which can be pickled by its name."""
    found = type(name, (base,), {"__module__": module})
    parts = module.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[0]))
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: found}))
    return found


def with_state(kind: type, **state: object) -> object:
    made = kind()
    made.__dict__.update(state)
    return made


@pytest.mark.parametrize("zipped", [True, False])
def test_what_frameworks_store_beside_the_weights_is_read_and_not_made(zipped, tmp_path, monkeypatch):
    history = framework(monkeypatch, "mmengine.logging.history_buffer", "HistoryBuffer")
    config = framework(monkeypatch, "omegaconf.dictconfig", "DictConfig")
    node = framework(monkeypatch, "omegaconf.nodes", "AnyNode")
    callback = framework(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    dicts = {
        name: framework(monkeypatch, module, name, dict)
        for module, name in (
            ("easydict", "EasyDict"),
            ("yacs.config", "CfgNode"),
            ("vissl.utils.hydra_config", "AttrDict"),
            ("lightning.fabric.utilities.data", "AttributeDict"),
            ("mmcv.utils.config", "ConfigDict"),
        )
    }
    values = {
        "state_dict": collections.OrderedDict(WEIGHTS),
        "args": argparse.Namespace(lr=0.03, out=pathlib.PurePosixPath("/a")),
        "config": with_state(config, _content={"a": with_state(node, _val=1)}, _parent=None, _type=typing.Any),
        "history": with_state(history, _log=np.arange(5.0), _max=3),
        "callbacks": {callback: {"best": 1.5}},
        "dicts": [kind({"lr": 0.1, "inner": kind(a=1)}) for kind in dicts.values()],
        "milestones": collections.Counter([30, 30]),
        "default": collections.defaultdict(list, {"a": [1]}),
        "queue": collections.deque([1, 2], 5),
        "rng": np.random.RandomState(0).get_state(),
        "epoch": np.int64(200),
        "best": np.float32(67.5),
        "kind": torch.float32,
        "raw": b"\xff\0",
        "none": None,
    }
    (tmp_path / "x.pth").write_bytes(saved(values, _use_new_zipfile_serialization=zipped))
    for module in list(sys.modules):  # as on a machine without the frameworks
        if module.partition(".")[0] in (
            "mmengine",
            "omegaconf",
            "pytorch_lightning",
            "easydict",
            "yacs",
            "vissl",
            "mmcv",
        ):
            monkeypatch.delitem(sys.modules, module)
    found = read(tmp_path / "x.pth")
    assert same(found["state_dict"], WEIGHTS) and type(found["state_dict"]) is dict
    stand_ins = {name: value.of for name, value in found.items() if isinstance(value, StandIn)}
    assert stand_ins == {
        "args": "argparse.Namespace",
        "config": "omegaconf.dictconfig.DictConfig",
        "history": "mmengine.logging.history_buffer.HistoryBuffer",
        "kind": "torch.dtype",
    }
    assert str(found["args"]) == "<argparse.Namespace, not made>" and not hasattr(found["args"], "lr")
    assert [key.of for key in found["callbacks"]] == ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]
    assert found["dicts"] == [{"lr": 0.1, "inner": {"a": 1}}] * 5 and type(found["dicts"][0]) is dict
    assert (found["milestones"], found["default"], found["queue"]) == ({30: 2}, {"a": [1]}, [1, 2])
    assert (found["epoch"], found["best"], found["raw"], found["none"]) == (200, 67.5, b"\xff\0", None)
    assert type(found["epoch"]) is int and found["rng"][1].dtype == torch.uint32


def test_what_other_packages_take_for_safe_is_not_ours(tmp_path, in_tmp):
    (tmp_path / "x.pth").write_bytes(saved({"a": np.arange(3)}))
    (tmp_path / "evil.pth").write_bytes(HARMFUL["torch's shell in an archive"][0])
    from torch.utils.collect_env import run

    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([np.dtype, np.ndarray, run]):
        assert read(tmp_path / "x.pth")["a"].tolist() == [0, 1, 2]
        refused(tmp_path / "evil.pth")
        assert set(torch.serialization.get_safe_globals()) == before | {np.dtype, np.ndarray, run}
    assert set(torch.serialization.get_safe_globals()) == before and not Path(CANARY).exists()


def test_parameters_and_tensors_with_attributes_come_as_plain_tensors(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    weight.note = tagged = torch.zeros(3)
    tagged.clone = "no method"
    (tmp_path / "x.pth").write_bytes(saved({"weight": weight, "tagged": tagged}))
    found = read(tmp_path / "x.pth")
    assert all(type(value) is torch.Tensor and not value.requires_grad and not vars(value) for value in found.values())


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_a_pickle_become_tensors(protocol, tmp_path):
    arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(3, dtype=np.float16),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">i4"),
        "bool": np.array([True, False]),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4)),
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "number": np.float64(2), "words": np.array(["a"])}, protocol))
    found = read(path)
    for name, array in arrays.items():
        assert torch.equal(found["model"][name], torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))), name
    assert found["number"] == 2 and found["words"].of == "numpy.ndarray"


def test_arrays_of_either_numpy_and_of_python_2(tmp_path):
    path = tmp_path / "x.pkl"
    array = {"a": np.array([1.0, -2.5], dtype=np.float32)}
    pickle_read.write(path, {"model": array})  # numpy 1's names
    one = path.read_bytes()
    assert b"numpy.core.multiarray" in one
    two = one.replace(b"cnumpy.core.multiarray", b"cnumpy._core.multiarray")
    python_2 = done(entries(model=entries(a=array_pickle(number(2) + b"\x85", b"U\x08" + array["a"].tobytes()))))
    for content in (one, two[:2] + two[11:], python_2):
        path.write_bytes(content)
        assert read(path)["model"]["a"].tolist() == [1.0, -2.5]

"""The zip archive of a torch checkpoint, checked before anything in it is used; nothing is ever unpacked."""

import struct
import sys
import zipfile
from pathlib import PurePosixPath
from typing import BinaryIO

from moco_eval.untrusted.pickle_scan import DAMAGED, Refused, shown

LARGEST_DIRECTORY = 1 << 24  # bytes; 80 for each tensor
LARGEST_PICKLE = 1 << 28
LARGEST_NOTE = 1 << 20  # of torch's own: version, byte order, ...


def check(file: BinaryIO, size: int) -> tuple[dict[str, int], bytes]:
    """Show that an archive is as torch writes one: nothing compressed, hidden, overlapping or outside of it.

    Returns:
        The bytes of each record, by the name that torch gives it, and the record `data.pkl`.
    Raises:
        Refused: truncated, damaged, of something else, or made to harm.
    """
    _require_one_directory(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            root = _root(archive.namelist())
            records = _records(archive, file, root)
            if "byteorder" in records and archive.read(f"{root}/byteorder") != sys.byteorder.encode():
                raise Refused(
                    "was written in another byte order than this machine's: torch.save it again on one like this"
                )
            return records, archive.read(f"{root}/data.pkl")
    except Refused:
        raise
    except Exception as error:  # whatever a damaged archive makes zipfile raise
        raise Refused(f"is a damaged archive ({shown(error)}): {DAMAGED}") from None


def _require_one_directory(file: BinaryIO, size: int) -> None:
    """Show that the archive's directory is where every reader will look for it, and not too large to read."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    if tail[-22:-18] != b"PK\5\6":
        raise Refused(f"is truncated: the end of the archive is missing; {DAMAGED}")
    length, start, comment = struct.unpack("<LLH", tail[-10:])
    end, sound = size - 22, not comment
    if tail[-42:-38] == b"PK\6\7":  # beyond 4 GB
        length, start = struct.unpack("<QQ", tail[40:56])
        end = size - 98
        sound &= tail[:4] == b"PK\6\6" and struct.unpack("<Q", tail[64:72])[0] == end
    if not sound or start + length != end or length > LARGEST_DIRECTORY:
        raise Refused(f"is a damaged archive: its directory is not where its end says; {DAMAGED}")


def _root(names: list[str]) -> str:
    """The folder that everything in torch's archives is in; Refused for an archive of something else."""
    root = names[0].partition("/")[0] if names else ""
    if f"{root}/constants.pkl" in names or any(name.startswith(f"{root}/code/") for name in names):
        raise Refused("is a TorchScript archive, which holds code: have the state_dict() of its module saved instead")
    if names and all(name.endswith(".npy") for name in names):
        raise Refused("is an archive of numpy arrays (.npz), not a PyTorch checkpoint: write them with torch.save")
    if "model.weights.h5" in names:
        raise Refused("is a Keras model, not a PyTorch checkpoint: have its weights converted")
    if f"{root}/data.pkl" not in names:
        first = shown(", ".join(names[:3])) or "nothing"
        raise Refused(f"is a zip archive of something else (it holds {first}): give the checkpoint itself")
    return root


def _records(archive: zipfile.ZipFile, file: BinaryIO, root: str) -> dict[str, int]:
    """Bytes by name, without the root."""
    records: dict[str, int] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        name = entry.orig_filename
        _require_as_written(entry, root)
        if entry.header_offset < end:
            raise Refused(f"is an archive whose records overlap ({shown(name)}): {DAMAGED}")
        end = _start(entry, file) + entry.file_size
        if end > archive.start_dir:
            raise Refused(f"is an archive whose {shown(name)} reaches beyond its end: {DAMAGED}")
        records[name.removeprefix(f"{root}/")] = entry.file_size
    if len({name.lower() for name in records}) < len(archive.infolist()):  # torch does not tell a from A
        raise Refused(f"is an archive that holds the same name twice: {DAMAGED}")
    return records


def _require_as_written(entry: zipfile.ZipInfo, root: str) -> None:
    name = entry.orig_filename
    if name.startswith("/") or "\\" in name or not name.isprintable() or ".." in PurePosixPath(name).parts:
        raise Refused(f"is an archive with a path out of it ({shown(name)}); nothing was unpacked: {DAMAGED}")
    if not name.startswith(f"{root}/"):
        raise Refused(f"is an archive of a checkpoint and something else ({shown(name)}): {DAMAGED}")
    if entry.flag_bits & 1:
        raise Refused(f"is an encrypted archive ({shown(name)}): decrypt it first")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        ratio = f"{shown(name)}: {entry.file_size:,} bytes in {entry.compress_size:,}"
        raise Refused(
            f"is a compressed archive ({ratio}); torch writes none, nothing was unpacked: torch.save it again"
        )
    most = LARGEST_PICKLE if name == f"{root}/data.pkl" else LARGEST_NOTE
    if entry.file_size > most and not name.startswith(f"{root}/data/"):
        raise Refused(f"is an archive whose {shown(name)} has {entry.file_size:,} bytes: save the state_dict alone")


def _start(entry: zipfile.ZipInfo, file: BinaryIO) -> int:
    """Where a record's bytes begin."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4":
        raise Refused(f"is an archive whose directory does not fit it ({shown(entry.orig_filename)}): {DAMAGED}")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))

"""Checkpoints of Hugging Face's hub, hf:ORG/NAME[/FILE][@REVISION]: its client's downloads and cache, our proof."""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moco_eval.encoders.zoo import LARGEST
from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime import files
from moco_eval.runtime.connection import unreachable
from moco_eval.runtime.libraries import silenced
from moco_eval.untrusted.path import SUFFIXES

_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([^@]+))?(?:@(.+))?")
# what a repository's own weights are called, the first that is there
USUAL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHTS = (*SUFFIXES, ".bin", ".ckpt")
SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json", "config.yaml")  # beside the weights
TIMEOUT = 30.0  # seconds until the hub answers
EXTRA = "pip install 'moco-eval[hf]'"


@dataclass(frozen=True)
class HubName:
    """A repository of models, perhaps a file in it, at a branch, tag or commit; the default branch where None."""

    repo: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        return f"hf:{self.repo}{f'/{self.file}' if self.file else ''}{f'@{self.revision}' if self.revision else ''}"


def parse(rest: str) -> HubName:
    """What stands behind hf:. Raises InputError for what is no name of the hub."""
    match = _NAME.fullmatch(rest)
    if not match or ".." in PurePosixPath(rest).parts:
        raise InputError(
            f"hf:{rest} is not hf:ORG/NAME, hf:ORG/NAME/FILE or either with @REVISION, such as "
            "hf:facebook/dino-vits16; a file on this machine is given by its path alone"
        )
    return HubName(*match.groups())


def fetch(rest: str) -> Path:
    """The checkpoint's file in the hub's own cache, its files of settings beside it.

    Args:
        rest: what stands behind hf:.
    Raises:
        InputError: no such repository or file, several that may be meant, too large, or no network and no copy.
        RunFailed: what arrived is not what the hub lists.
    """
    wanted = parse(rest)
    try:
        from huggingface_hub import constants
    except ImportError:
        raise InputError(f"{wanted} needs Hugging Face's huggingface_hub; {EXTRA}") from None
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    try:
        with _quiet():
            return _downloaded(wanted, constants.ENDPOINT) if reason is None else _kept(wanted, reason)
    except (InputError, RunFailed):
        raise
    except Exception as error:  # whatever the hub's client makes of a server, a disk or a name
        raise InputError(f"{wanted} cannot be had from {constants.ENDPOINT} ({_reason(error)})") from None


def commit_of(path: Path) -> str:
    """The commit that a file of the cache belongs to."""
    return next((path.parents[at - 1].name for at, up in enumerate(path.parents) if up.name == "snapshots"), "")


def _downloaded(wanted: HubName, endpoint: str) -> Path:
    """Ask the hub what there is, have what is lacking, and hold it against the sha256 that the hub lists."""
    from huggingface_hub import HfApi, hf_hub_download

    about = HfApi(endpoint=endpoint).model_info(
        wanted.repo, revision=wanted.revision, files_metadata=True, timeout=TIMEOUT
    )
    listed = {one.rfilename: one for one in about.siblings or ()}
    chosen = _chosen(wanted, listed)
    names = [*_beside(chosen, listed), chosen]
    if (size := sum(listed[name].size or 0 for name in names)) > LARGEST:
        raise InputError(f"{wanted} has {size} bytes, and more than {LARGEST} are not fetched")
    for name in names:
        path = Path(hf_hub_download(wanted.repo, name, revision=wanted.revision, endpoint=endpoint))
        _verify(wanted, path, listed[name])
    return path


def _verify(wanted: HubName, path: Path, listed: Any) -> None:
    """Raises RunFailed where a file is not the one that the hub lists; it is removed, to be fetched again."""
    expected = listed.lfs.sha256 if listed.lfs else None
    if expected and (sha256 := files.sha256_of(path)) != expected:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise RunFailed(
            f"{listed.rfilename} of {wanted} has sha256 {sha256}, expected {expected} as the hub lists; it is not "
            "kept: run the same command to fetch it again"
        )


def _kept(wanted: HubName, reason: str) -> Path:
    """The copy of an earlier download. Raises InputError where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise InputError(
            f"{wanted}: cannot download it ({reason}), and there is no copy of an earlier download; without a network, "
            "give the path of a file"
        ) from None
    return folder / _chosen(wanted, [path.relative_to(folder).as_posix() for path in folder.rglob("*")])


def _chosen(wanted: HubName, names: Iterable[str]) -> str:
    """The file that is named; else the repository's own weights, or the only ones."""
    weights = [name for name in names if name.endswith(WEIGHTS)]
    shown = ", ".join(weights[:5]) + (", ..." if len(weights) > 5 else "")
    if wanted.file:
        if wanted.file not in names:
            raise InputError(f"{wanted}: no such file there; its weights are {shown or 'none'}")
        return wanted.file
    if usual := next((name for name in USUAL if name in names), None):
        return usual
    if len(weights) == 1:
        return weights[0]
    if not weights:
        raise InputError(f"{wanted} has no weights ({', '.join(WEIGHTS)}); give a repository of an encoder")
    raise InputError(f"{wanted} has several files of weights: {shown}. Name one, such as hf:{wanted.repo}/{weights[0]}")


def _beside(chosen: str, names: Iterable[str]) -> list[str]:
    """Files of settings in the same folder, and the shards that an index lists."""
    folder = PurePosixPath(chosen).parent
    stem = re.escape(chosen.removesuffix(".index.json").rpartition(".")[0])
    shard = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}\.\w+")
    settings = [f"{chosen}.json", *(str(folder / name) for name in SETTINGS)]
    sharded = chosen.endswith(".index.json")
    return [name for name in names if name in settings or (sharded and shard.fullmatch(name))]


def _reason(error: Exception) -> str:
    """Why the hub's client failed, in one line."""
    kind = type(error).__name__
    known = {
        "RepositoryNotFoundError": "no such repository, or a private one: HF_TOKEN lets you in",
        "GatedRepoError": "it is given out on its terms: accept them on its page, and set HF_TOKEN",
        "RevisionNotFoundError": "no such revision",
    }
    return known.get(kind) or " ".join(str(error).split())[:200] or kind


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's words about its attempts, and its bars where nobody looks."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        with silenced("huggingface_hub"):
            yield
    finally:
        if hidden:
            enable_progress_bars()

"""The files of known checkpoints: downloads that go on where they were cut, and are verified."""

import http.client
import math
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_eval import __version__
from moco_eval.encoders.zoo import LARGEST, MB, Entry, entry, is_safe
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.runtime import files

TIMEOUT = 30.0  # seconds without a byte
ANSWER = 120.0  # seconds until the file begins to arrive, redirects included
SLOWEST, WINDOW = 10_000.0, 60.0  # bytes a second at least, over so many seconds
DEADLINE = 24 * 3600.0  # seconds that a call takes at most


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's file is or will be.

    Attributes:
        name: the entry's.
        entry: what is known of the file.
        path: the file.
    """

    name: str
    entry: Entry
    path: Path

    @property
    def part(self) -> Path:
        """What has arrived so far."""
        return self._beside("part")

    @property
    def whole(self) -> Path:
        """Of what that is a part: its url, size and version (ETag or date)."""
        return self._beside("part.json")

    @property
    def record(self) -> Path:
        """The sha256 of what was fetched, in the form of `sha256sum`."""
        return self._beside("sha256")

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{ending}")

    @property
    def host(self) -> str:
        return urllib.parse.urlsplit(self.entry.url).netloc

    @property
    def by_hand(self) -> str:
        """What one can do without this machine's network."""
        return f"fetch {self.entry.url} by other means and put it at {self.path}"


def fetch(name: str, output: Path | None = None) -> Path:
    """Have a checkpoint's file here: download it where it is not there, go on where a download was cut, verify it.

    Args:
        name: of an entry.
        output: the file; where not given, `zoo/` in the cache.
    Raises:
        InputError: an unknown name, a place that cannot be written, a file in that place which is another one.
        RunFailed: not reachable, cut, or not what was published; the message says what is kept and the way out.
        Interrupted: Ctrl-C; what has arrived is kept.
    """
    checkpoint = entry(name)
    folder = files.cache_folder("zoo")
    path = output or folder / f"{name}{checkpoint.ending}"
    if path.is_dir():
        raise InputError(f"--output {path} is a folder; name a file in it")
    place = Place(name, checkpoint, files.output_file(path))
    with files.one_at_a_time(folder / name):
        if place.path.exists():
            _tell(place, "already there", _verify(place, place.path))
        else:
            _download(place)
            _tell(place, "fetched", _verify(place, place.part))
            with files.disk_errors_named(place.path):
                place.part.replace(place.path)
            _forget(place)
    return place.path


def _tell(place: Place, state: str, sha256: str) -> None:
    """That the file is there, and what is known of it; its sha256 is recorded for the next time."""
    from moco_eval.runtime.console import log, warn

    checksum = place.entry.checksum
    known = f"{checksum} as published" if checksum else f"no published checksum; sha256 of what was fetched: {sha256}"
    log(f"{place.name}: {state}, {known}")
    if _recorded(place) != sha256:
        try:
            files.write_text(place.record, f"{sha256}  {place.path.name}\n")
        except (InputError, RunFailed) as error:
            warn(f"the sha256 of {place.path} is not recorded for the next time ({error})")


def _verify(place: Place, file: Path) -> str:
    """Compare a file with what was published, and with the last one fetched under this name.

    Returns:
        Its sha256.
    Raises:
        RunFailed: what was downloaded has another size or checksum; it is removed.
        InputError: the same of a file that was there before; it stays.
    """
    sha256 = files.sha256_of(file)
    difference = _difference(place, file, sha256)
    if difference and file == place.part:
        _forget(place)
        raise RunFailed(f"{place.entry.url} has {difference}; it is not kept")
    if difference:
        raise InputError(f"{file} has {difference}; remove it to have it fetched again")
    return sha256


def _difference(place: Place, file: Path, sha256: str) -> str:
    """What was found and what was expected; empty where all is well."""
    size, checksum, before = file.stat().st_size, place.entry.checksum, _recorded(place)
    if place.entry.bytes not in (None, size):
        return f"{size} bytes, expected {place.entry.bytes} as published"
    if checksum:
        digest = sha256 if checksum.algorithm == "sha256" else files.digest_of(file, checksum.algorithm)
        if not digest.startswith(checksum.digest):
            return f"{checksum.algorithm} {digest}, expected {checksum} as published"
    if before not in (None, sha256) and not (checksum and checksum.whole):
        return f"sha256 {sha256}, expected {before} as the last time (to accept it, remove {place.record})"
    return ""


def _recorded(place: Place) -> str | None:
    """The sha256 of an earlier fetch, where there was one."""
    try:
        match = re.match(r"[0-9a-f]{64}\b", place.record.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return match[0] if match else None


def _forget(place: Place) -> None:
    """Remove what has arrived."""
    place.part.unlink(missing_ok=True)
    place.whole.unlink(missing_ok=True)


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to https, and to nothing else; of this machine's own server also to this machine."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        fp.close()  # or all of its body would be read
        if not is_safe(newurl) or (req.type == "https" and urllib.parse.urlsplit(newurl).scheme != "https"):
            raise RunFailed(f"{req.full_url} redirects to {newurl}; only https is fetched")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(place: Place) -> None:
    """Fill the partial file, from where it ends.

    Raises:
        RunFailed, InputError, Interrupted: as `fetch`; the partial file stays.
    """
    from moco_eval.runtime.console import progress

    _make_folder(place)
    have, whole = _arrived(place)
    if have and have == whole.get("bytes"):  # interrupted when nothing was left but to verify it
        return
    try:
        with _open(place, _rest(have, whole)) as response:
            have, total = _start(place, response, have)
            steps = math.ceil((total or 0) / MB)
            with progress(place.name, steps, done=have // MB, unit="MB") as advance:
                _save(place, response, have, total, advance)
    except KeyboardInterrupt:
        kept = _arrived(place)[0] / MB
        raise Interrupted(f"{place.name}: {kept:.1f} MB are kept; run the same command to go on") from None


def _make_folder(place: Place) -> None:
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {place.path}: {error.strerror}; choose another --output") from None


def _arrived(place: Place) -> tuple[int, dict[str, Any]]:
    """Bytes of the partial file, and of what it is a part; 0 where that is not known, or was at another url."""
    try:
        have, whole = place.part.stat().st_size, files.read_json(place.whole)
    except (OSError, InputError):
        return 0, {}
    return (have, whole) if isinstance(whole, dict) and whole.get("url") == place.entry.url else (0, {})


def _rest(have: int, whole: dict[str, Any]) -> dict[str, str]:
    """The headers that ask for what is lacking, or for all of it where the server's file has changed."""
    version = whole.get("version")
    return {"Range": f"bytes={have}-", "If-Range": str(version)} if have and version else {}


def _open(place: Place, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Ask for the file or a part of it.

    Raises:
        RunFailed: not reachable, or the server refuses.
    """
    url = place.entry.url
    request = urllib.request.Request(url, headers={"User-Agent": f"moco-eval/{__version__}", **headers})
    try:
        return _in_time(lambda: urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and headers:
            return _open(place, {})  # the server's file has become shorter
        raise RunFailed(
            f"{url} answers {error.code} {error.reason}; see {place.entry.source}, or {place.by_hand}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = _reason(getattr(error, "reason", error))
        raise RunFailed(f"cannot reach {place.host} ({reason}); {place.by_hand}") from None


def _in_time(ask: Callable[[], http.client.HTTPResponse]) -> http.client.HTTPResponse:
    """The server's answer. Raises TimeoutError where it takes longer than ANSWER, a byte now and then or not."""
    answers: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()

    def wait() -> None:
        try:
            answers.put(ask())
        except Exception as error:  # whatever it is, it belongs to who asked
            answers.put(error)

    threading.Thread(target=wait, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER)
    except queue.Empty:
        raise TimeoutError(f"no complete answer in {ANSWER:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _start(place: Place, response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Leave the partial file as it is where its rest arrives, and empty it where all of the file does.

    Returns:
        Bytes of the partial file; bytes of the whole, where the server says.
    Raises:
        RunFailed: another part than was asked for, or another size than was published.
    """
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != have:
            _forget(place)
            raise RunFailed(f"{place.host} sent another part than was asked for; run the same command to start again")
        total = int(match[2])
    else:
        have = 0
        with files.disk_errors_named(place.part), open(place.part, "wb", opener=files.open_own):
            pass
    _refuse_another_size(place, total)
    files.write_json(place.whole, {"url": place.entry.url, "bytes": total, "version": _version(response)})
    return have, total


def _version(response: http.client.HTTPResponse) -> str:
    """What If-Range takes: the strong ETag, or the date; empty where there is neither."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _refuse_another_size(place: Place, total: int | None) -> None:
    """Raises RunFailed before anything is downloaded."""
    expected = place.entry.bytes
    if total is not None and (total > LARGEST or expected not in (None, total)):
        _forget(place)
        limit = f"expected {expected} as published" if expected else f"and more than {LARGEST} are not fetched"
        raise RunFailed(f"{place.entry.url} has {total} bytes, {limit}")


def _save(place: Place, response: http.client.HTTPResponse, done: int, total: int | None, advance: Any) -> None:
    """Append what arrives, at most as much as was announced or published.

    Raises:
        RunFailed: too much, the connection broke, or the disk is full.
    """
    limit = total or place.entry.bytes or LARGEST
    with files.disk_errors_named(place.part), open(place.part, "ab", opener=files.open_own) as file:
        for block in _blocks(place, response):
            done += len(block)
            if done > limit:
                _forget(place)
                raise RunFailed(f"{place.entry.url} sends more than {limit} bytes; it is not kept")
            file.write(block)
            advance(done // MB - (done - len(block)) // MB)
    if total is not None and done < total:
        raise RunFailed(_cut(place, f"{total - done} bytes are missing"))
    files.flush(place.part)


def _blocks(place: Place, response: http.client.HTTPResponse) -> Iterator[bytes]:
    """What arrives. Raises RunFailed where the connection breaks, or is too slow."""
    began = since = time.monotonic()
    arrived = 0
    try:
        while block := response.read1(MB):
            yield block
            now, arrived = time.monotonic(), arrived + len(block)
            if now - began > DEADLINE:
                raise RunFailed(_cut(place, f"the download was not complete in {DEADLINE / 3600:.3g} hours"))
            if now - since > WINDOW:
                if arrived < SLOWEST * WINDOW:
                    raise RunFailed(_cut(place, f"less than {SLOWEST / 1000:.0f} kB a second in {WINDOW:.0f} s"))
                since, arrived = now, 0
    except (OSError, http.client.HTTPException) as error:
        raise RunFailed(_cut(place, _reason(error))) from None


def _cut(place: Place, reason: str) -> str:
    return f"the connection to {place.host} broke ({reason}); run the same command to go on"

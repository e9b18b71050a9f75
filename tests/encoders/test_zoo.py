import contextlib
import hashlib
import http.server
import io
import itertools
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from commands import environment, error_line, in_process, start

from moco_eval.config import load as configs
from moco_eval.encoders import download, zoo
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.papers.tables import load_table, tables
from moco_eval.runtime import files

WEIGHTS = bytes(range(256)) * 10_000  # 2.56 MB
CHANGED = WEIGHTS[::-1]
SHA256, MD5 = hashlib.sha256(WEIGHTS).hexdigest(), hashlib.md5(WEIGHTS).hexdigest()
SHIPPED = yaml.safe_load((configs.folder() / "zoo.yaml").read_text(encoding="utf-8"))["entries"]


# The shipped manifest


def test_every_shipped_entry_validates():
    known = zoo.entries()
    assert known.keys() == SHIPPED.keys() and len(known) > 100
    for name, one in known.items():
        assert one.url.startswith("https://"), name
        assert one.ending and one.source, name
        assert one.licence and one.recipe.dataset in ("imagenet", "coco"), name


def test_no_two_entries_have_one_url():
    assert max(Counter(one.url for one in zoo.entries().values()).values()) == 1


def test_the_prefixes_are_those_of_the_file_names_that_carry_them():
    for name, one in zoo.entries().items():
        if name.startswith(("torchvision_", "mmselfsup_", "mmpretrain_")):
            assert one.checksum.algorithm == "sha256", name
            assert one.url.endswith(f"-{one.checksum.digest}.pth"), name


PAPER_ROWS = {
    "moco_v1_200ep": "MoCo v1",
    "moco_v2_200ep": "(d) +MLP +aug +cos = MoCo v2",
    "moco_v2_800ep": "(e) MoCo v2 800 ep",
}


@pytest.mark.parametrize("name", PAPER_ROWS)
def test_published_numbers_agree_with_the_papers(name):
    table = load_table("moco-v2-1")
    (row,) = [row for row in table.rows if row.label == PAPER_ROWS[name]]
    compared = 0
    for column, where in table.columns.items():
        for found in zoo.entry(name).published:
            if (found.protocol, found.dataset) != (where.protocol, where.dataset):
                continue
            compared += 1
            if (name, column) == ("moco_v2_200ep", "top1"):  # the paper's is a mean; this file is one of its trials
                (trials,) = [row.trials for row in load_table("moco-repo-linear").rows if "v2" in row.label]
                assert found.metrics["top1"] in trials["top1"]
            else:
                assert found.metrics[where.metric] == row.published[column]
    assert compared == 4


def test_numbers_of_released_files_agree_with_the_tables():
    """Of every row that a released file stands in: its own number, or one of the trials that the row is a mean of."""
    trials = {row.released: row.trials["top1"] for row in load_table("moco-repo-linear").rows}
    compared = means = 0
    for table in (load_table(name) for name, _ in tables()):
        for row in (row for row in table.rows if row.released):
            for name, number in row.published.items():
                for own in own_numbers(row.released, table.columns[name]):
                    compared += 1
                    if own != number:
                        means += 1
                        assert table.columns[name].metric == "top1", (table.id, row.label)
                        assert own in trials[row.released] and number == round(fmean(trials[row.released]), 1)
    assert compared > means > 0


def own_numbers(released, column):
    """What the zoo says was published of a file in a column of that protocol, data set and metric."""
    where = (column.protocol, column.dataset)
    found = [one.metrics for one in zoo.entry(released).published if (one.protocol, one.dataset) == where]
    return [metrics[column.metric] for metrics in found if column.metric in metrics]


def test_list(capfd, monkeypatch):
    out, _ = in_process(capfd, monkeypatch, "fetch", "--list")
    heading, *lines = out.splitlines()
    assert heading.split() == ["NAME", "METHOD", "ARCHITECTURE", "LICENCE", "TOP-1"]
    assert lines[0].split() == ["moco_v1_200ep", "MoCo", "v1", "resnet50", "MIT", "60.6"]
    assert [line.split()[0] for line in lines] == list(SHIPPED)


def test_the_table_of_the_docs_names_every_entry():
    text = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("\n\nThe licence")[0].splitlines() if "`" in line and line.startswith("|")]
    names = []
    for row in rows:
        _, _, patterns, licence, verified, _ = (cell.strip() for cell in row.split("|"))
        for name in [name for pattern in re.findall("`([^`]+)`", patterns) for name in expanded(pattern)]:
            one = zoo.entry(name)
            checksum = one.checksum
            digits = "" if not checksum or checksum.whole else f", {len(checksum.digest)} digits"
            assert verified == (f"{checksum.algorithm}{digits}" if checksum else ""), name
            assert one.licence.name in licence.split(", "), name
            names.append(name)
    assert sorted(names) == sorted(SHIPPED)


def expanded(pattern):
    """'a_{b,c}' as a shell reads it."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


# What a manifest may hold


def entry_with(**changes):
    recipe = {"method": "MoCo", "arch": "resnet50", "dataset": "imagenet"}
    return {"url": "https://x.org/a.pth", "layout": "l", "source": "s", "recipe": recipe, **changes}


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Write a user's manifest."""

    def write(**entries):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"entries": entries}), encoding="utf-8")
        monkeypatch.setenv("MOCO_EVAL_ZOO", str(path))

    return write


def test_a_users_entries_come_after_the_shipped_ones(manifest):
    manifest(mine=entry_with())
    assert list(zoo.entries()) == [*SHIPPED, "mine"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "http://x.org/a.pth"}, r"entries.mine.url is 'http://x.org/a.pth' in mine.yaml line \d+: only https"),
        ({"url": "file:///etc/passwd"}, "only https is fetched"),
        ({"url": "ftp://x.org/a.pth"}, "only https is fetched"),
        ({"urls": "https://x.org"}, r"unknown key 'entries.mine.urls' .* Did you mean 'entries.url'"),
        ({"checksum": {"sha256": "ABCDEF01"}}, "checksum.sha256 is 'ABCDEF01'"),
        ({"checksum": {"sha256": "abc"}}, "checksum.sha256 is 'abc'"),
        ({"checksum": {"md5": "a" * 33}}, "checksum.md5"),
        ({"checksum": {"md5": 12345678}}, "checksum.md5 is 12345678"),
        ({"checksum": {"md5": "abcdef", "sha256": "abcdef"}}, "holds one of sha256 and md5"),
        ({"checksum": {}}, "holds one of sha256 and md5"),
        ({"bytes": -1}, "entries.mine.bytes is -1"),
        ({"bytes": True}, "a number is wanted"),
        ({"recipe": {"method": "x"}}, "lacks the key 'entries.mine.recipe.arch'"),
    ],
)
def test_what_does_not_validate_is_refused(manifest, changes, message):
    manifest(mine=entry_with(**changes))
    with pytest.raises(InputError, match=message):
        zoo.entries()


def test_a_shipped_name_is_taken(manifest):
    manifest(moco_v2_800ep=entry_with())
    with pytest.raises(InputError, match="'moco_v2_800ep', which is a shipped one"):
        zoo.entries()


@pytest.mark.parametrize("name", ["../x", "A", "a b", ".x"])
def test_a_name_is_a_file_name(manifest, name):
    manifest(**{name: entry_with()})
    with pytest.raises(InputError, match="may hold only small letters"):
        zoo.entries()


@pytest.mark.parametrize(
    ("url", "ending"),
    [
        ("https://x.org/a.pth.tar", ".pth.tar"),
        ("https://x.org/a.b/R-50.pkl", ".pkl"),
        ("https://x.org/a.pth?download=true", ".pth"),
        ("https://x.org/epoch%3D99-step%3D5.ckpt", ".ckpt"),
        ("https://x.org/moco_lr.03", ""),
        ("https://x.org/", ""),
    ],
)
def test_the_ending_of_a_file_name(url, ending):
    assert zoo.Entry.model_validate(entry_with(url=url)).ending == ending


# A server


class Server(http.server.ThreadingHTTPServer):
    """Serves one file under every path; the attributes say how well."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.date = WEIGHTS, '"one"', None
        self.ranges = self.if_range = self.length = True
        self.cut = self.status = self.location = self.content_range = None  # status: instead of the file
        self.pause, self.asked = 0.0, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/weights.pth"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        it = self.server
        it.asked.append(dict(self.headers))
        begin = self._begin()
        if self.path.startswith("/elsewhere"):
            it.status = None
        if it.status or begin > len(it.content):
            return self._answer(it.status or 416, {"Location": it.location, "Content-Length": "0"}, b"")
        body = it.content[begin:]
        fields = {"ETag": it.etag, "Last-Modified": it.date}
        if it.length:
            fields["Content-Length"] = str(len(body))
        if begin:
            whole = f"bytes {begin}-{len(it.content) - 1}/{len(it.content)}"
            fields["Content-Range"] = it.content_range or whole
        return self._answer(206 if begin else 200, fields, body[: it.cut])

    def _begin(self):
        """Where the answer starts: 0, or what Range asks for."""
        asked = self.headers.get("Range")
        if not asked or not self.server.ranges:
            return 0
        if self.server.if_range and self.headers.get("If-Range") not in (self.server.etag, self.server.date):
            return 0
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def _answer(self, status, fields, body):
        self.send_response(status)
        for name, value in fields.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(body), 100_000):
            self.wfile.write(body[at : at + 100_000])
            time.sleep(self.server.pause)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCO_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "zoo"


@pytest.fixture
def served(server, manifest, cache):
    """An entry `mine` of the server's file."""

    def describe(**changes):
        manifest(mine=entry_with(url=server.url, **changes))

    describe()
    return describe


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# Fetching


@pytest.mark.parametrize(
    ("checksum", "words"),
    [
        ({"sha256": SHA256}, f"fetched, sha256 {SHA256} as published"),
        ({"sha256": SHA256[:8]}, f"fetched, sha256 starting with {SHA256[:8]} as published"),
        ({"md5": MD5}, f"fetched, md5 {MD5} as published"),
        ({"md5": MD5[:8]}, f"fetched, md5 starting with {MD5[:8]} as published"),
        (None, f"fetched, no published checksum; sha256 of what was fetched: {SHA256}"),
    ],
)
def test_a_whole_download(served, cache, capfd, monkeypatch, checksum, words):
    served(checksum=checksum, bytes=len(WEIGHTS))
    out, err = in_process(capfd, monkeypatch, "fetch", "mine")
    assert out == f"{cache}/mine.pth\n" and words in err
    assert (cache / "mine.pth").read_bytes() == WEIGHTS
    assert left(cache) == ["mine.pth", "mine.pth.sha256"]
    assert (cache / "mine.pth.sha256").read_text() == f"{SHA256}  mine.pth\n"


def test_what_is_there_is_verified_and_not_fetched(served, server, cache, capfd, monkeypatch):
    download.fetch("mine")
    server.asked.clear()
    out, err = in_process(capfd, monkeypatch, "fetch", "mine")
    assert out == f"{cache}/mine.pth\n" and "mine: already there" in err and not server.asked
    assert download.fetch("mine") == cache / "mine.pth"


def test_output(served, tmp_path, capfd, monkeypatch):
    path = tmp_path / "new" / "r50.pth"
    out, _ = in_process(capfd, monkeypatch, "fetch", "mine", "--output", path)
    assert out == f"{path}\n" and path.read_bytes() == WEIGHTS
    assert left(path.parent) == ["r50.pth", "r50.pth.sha256"]


def test_a_file_put_there_by_hand_is_verified(served, server, cache):
    served(checksum={"md5": MD5[:6]})
    cache.mkdir(parents=True)
    (cache / "mine.pth").write_bytes(WEIGHTS)
    assert download.fetch("mine").read_bytes() == WEIGHTS and not server.asked
    (cache / "mine.pth").write_bytes(CHANGED)
    with pytest.raises(InputError, match=r"mine.pth has md5 \w{32}, expected md5 starting with .* remove it"):
        download.fetch("mine")
    assert (cache / "mine.pth").read_bytes() == CHANGED


def test_several_at_once_download_once(served, server):
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(download.fetch, ["mine"] * 4))) == 1
    assert len(server.asked) == 1


def test_a_record_that_cannot_be_written_is_told(served, cache, monkeypatch, capfd):
    def refuse(path, text):
        raise InputError(f"cannot write {path}")

    monkeypatch.setattr(files, "write_text", refuse)
    monkeypatch.setattr(files, "write_json", lambda path, value: None)
    download.fetch("mine")
    assert "is not recorded for the next time" in capfd.readouterr().err


# Going on


def cut(server, at=1_000_000):
    """A first fetch, whose connection breaks."""
    server.cut = at
    with pytest.raises(RunFailed, match=r"the connection to 127.0.0.1:\d+ broke .* run the same command to go on"):
        download.fetch("mine")
    server.cut = None
    return server.asked[-1]


def test_a_cut_download_goes_on(served, server, cache):
    cut(server)
    assert (cache / "mine.pth.part").read_bytes() == WEIGHTS[:1_000_000]
    assert not (cache / "mine.pth").exists()
    assert download.fetch("mine").read_bytes() == WEIGHTS
    assert (server.asked[-1]["Range"], server.asked[-1]["If-Range"]) == ("bytes=1000000-", '"one"')
    assert left(cache) == ["mine.pth", "mine.pth.sha256"]


def test_it_goes_on_by_date_where_there_is_no_strong_etag(served, server):
    server.etag, server.date = 'W/"weak"', "Wed, 18 Jan 2023 15:37:33 GMT"
    cut(server)
    assert download.fetch("mine").read_bytes() == WEIGHTS
    assert server.asked[-1]["If-Range"] == server.date and "Range" in server.asked[-1]


def test_without_etag_and_date_it_starts_anew(served, server):
    server.etag = None
    cut(server)
    assert download.fetch("mine").read_bytes() == WEIGHTS
    assert "Range" not in server.asked[-1]


def test_a_server_without_ranges_starts_anew(served, server):
    server.ranges = False
    cut(server)
    assert download.fetch("mine").read_bytes() == WEIGHTS
    assert "Range" in server.asked[-1]


def test_a_file_that_has_changed_is_not_glued_together(served, server):
    cut(server)
    server.content, server.etag = CHANGED, '"two"'
    assert download.fetch("mine").read_bytes() == CHANGED


def test_a_server_that_glues_is_found_out(served, server, cache):
    served(checksum={"sha256": SHA256})
    cut(server)
    server.content, server.if_range = CHANGED, False
    with pytest.raises(RunFailed, match=f"expected sha256 {SHA256}"):
        download.fetch("mine")
    assert not left(cache)


def test_another_url_starts_anew(served, server, manifest):
    cut(server)
    manifest(mine=entry_with(url=server.url.replace("weights", "others")))
    assert download.fetch("mine").read_bytes() == WEIGHTS
    assert "Range" not in server.asked[-1]


def test_a_part_that_was_not_asked_for_is_refused(served, server, cache):
    cut(server)
    server.content_range = "bytes 5-9/10"
    with pytest.raises(RunFailed, match="another part than was asked for"):
        download.fetch("mine")
    assert not left(cache)


def test_a_shorter_file_than_we_have_starts_anew(served, server):
    cut(server)
    server.content, server.if_range = WEIGHTS[:1000], False
    assert download.fetch("mine").read_bytes() == WEIGHTS[:1000]
    assert ["Range" in asked for asked in server.asked] == [False, True, False]


def test_what_was_interrupted_before_it_was_verified_is_not_asked_for_again(served, server, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "_verify", lambda place, file: signal.raise_signal(signal.SIGINT))
        download.fetch("mine")
    server.asked.clear()
    assert download.fetch("mine").read_bytes() == WEIGHTS and not server.asked


@pytest.mark.slow
def test_ctrl_c_keeps_what_has_arrived(served, server, cache):
    server.pause = 0.2
    fetching = start("fetch", "mine")
    part = cache / "mine.pth.part"
    while not (part.exists() and part.stat().st_size):
        assert fetching.poll() is None
        time.sleep(0.01)
    fetching.send_signal(signal.SIGINT)
    out, err = fetching.communicate(timeout=60)
    assert fetching.returncode == 3 and not out
    assert "Interrupted: mine: 1.0 MB are kept; run the same command to go on" in err and "Traceback" not in err
    server.pause = 0.0
    assert download.fetch("mine").read_bytes() == WEIGHTS
    assert server.asked[-1]["Range"] == "bytes=1000000-"


def test_interrupted_says_what_is_kept(served, capfd, monkeypatch):
    def two_blocks(place, response):
        yield response.read(zoo.MB)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_blocks", two_blocks)
    with pytest.raises(Interrupted, match=r"mine: 1.0 MB are kept"):
        download.fetch("mine")


# What is not what was published


@pytest.mark.parametrize("checksum", [{"sha256": "0" * 64}, {"sha256": "0" * 8}, {"md5": "0" * 32}, {"md5": "0" * 6}])
def test_a_wrong_checksum_removes_the_file(served, server, cache, capfd, monkeypatch, checksum):
    served(checksum=checksum)
    ((algorithm, digest),) = checksum.items()
    found = {"sha256": SHA256, "md5": MD5}[algorithm]
    line = error_line(capfd, monkeypatch, "fetch", "mine", code=1)
    assert line.startswith(f"Error: {server.url} has {algorithm} {found}, expected {algorithm} ")
    assert f"{digest} as published; it is not kept" in line
    assert not left(cache)


def test_another_size_is_not_even_fetched(served, server, cache, monkeypatch):
    served(bytes=100)
    monkeypatch.delattr(download, "_save")
    with pytest.raises(RunFailed, match="has 2560000 bytes, expected 100 as published"):
        download.fetch("mine")
    assert not left(cache)


@pytest.mark.parametrize(
    ("size", "message"), [(100, "sends more than 100 bytes"), (9_999_999, "has 2560000 bytes, expected 9999999")]
)
def test_another_size_that_is_not_announced(served, server, cache, size, message):
    served(bytes=size)
    server.length = False
    with pytest.raises(RunFailed, match=message):
        download.fetch("mine")
    assert not left(cache)


def test_a_stream_without_end_ends(served, server, cache, monkeypatch):
    monkeypatch.setattr(download, "LARGEST", 2 * zoo.MB)
    with pytest.raises(RunFailed, match="more than 2000000 are not fetched"):
        download.fetch("mine")
    server.length = False
    with pytest.raises(RunFailed, match="sends more than 2000000 bytes"):
        download.fetch("mine")
    assert not left(cache)


def test_without_a_published_checksum_the_last_one_counts(served, server, cache):
    path = download.fetch("mine")
    path.unlink()
    server.content, server.etag = CHANGED, '"two"'
    with pytest.raises(RunFailed, match=f"expected {SHA256} as the last time .to accept it, remove .*mine.pth.sha256"):
        download.fetch("mine")
    assert left(cache) == ["mine.pth.sha256"]
    (cache / "mine.pth.sha256").unlink()
    assert download.fetch("mine").read_bytes() == CHANGED


def test_a_whole_published_checksum_counts_more_than_the_last_one(served, cache):
    cache.mkdir(parents=True)
    (cache / "mine.pth.sha256").write_text("0" * 64 + "  mine.pth\n")
    served(checksum={"sha256": SHA256})
    download.fetch("mine")
    assert (cache / "mine.pth.sha256").read_text().startswith(SHA256)


# What cannot be reached


def test_not_found(served, server, capfd, monkeypatch):
    server.status = 404
    line = error_line(capfd, monkeypatch, "fetch", "mine", code=1)
    assert line.startswith(f"Error: {server.url} answers 404 Not Found; see s, or fetch {server.url} by other means")


def test_offline_says_where_to_put_the_file(served, server, cache, capfd, monkeypatch):
    server.shutdown()
    server.server_close()
    line = error_line(capfd, monkeypatch, "fetch", "mine", code=1)
    assert line == (
        f"Error: cannot reach 127.0.0.1:{server.server_port} (Connection refused); "
        f"fetch {server.url} by other means and put it at {cache}/mine.pth"
    )


def test_a_server_that_says_nothing(served, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.pause = 1.0
    with pytest.raises(RunFailed, match=r"broke .*timed out.*run the same command to go on"):
        download.fetch("mine")


def test_a_server_that_sends_a_byte_now_and_then(served, server, cache, monkeypatch):
    server.pause = 0.05
    monkeypatch.setattr(download, "WINDOW", 0.1)
    monkeypatch.setattr(download, "SLOWEST", 1e9)
    with pytest.raises(RunFailed, match=r"less than 1000000 kB a second in 0 s\); run the same command to go on"):
        download.fetch("mine")
    part = next(cache.glob("mine*.part"))
    assert 0 < part.stat().st_size < len(WEIGHTS)


def test_a_download_has_a_deadline(served, server, monkeypatch):
    server.pause = 0.05
    monkeypatch.setattr(download, "DEADLINE", 0.1)
    with pytest.raises(RunFailed, match=r"the download was not complete in .* hours\); run the same command to go on"):
        download.fetch("mine")


def test_an_answer_that_never_ends_to_begin(manifest, cache, monkeypatch):
    """A line of the header now and then, for ever."""
    monkeypatch.setattr(download, "ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        manifest(mine=entry_with(url=f"http://127.0.0.1:{listening.getsockname()[1]}/weights.pth"))

        def drip() -> None:
            connection, _ = listening.accept()
            with contextlib.suppress(OSError), connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                for number in range(40):
                    connection.sendall(f"X-{number}: 1\r\n".encode())
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(RunFailed, match=r"cannot reach .* \(no complete answer in 0 s\)"):
            download.fetch("mine")


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:80/admin", "http://localhost/", "http://x.org/a", "ftp://x.org"]
)
def test_https_redirects_to_https_alone(location):
    request, body = urllib.request.Request("https://x.org/weights.pth"), io.BytesIO(b"no end")
    with pytest.raises(RunFailed, match="only https is fetched"):
        download._SafeRedirects().redirect_request(request, body, 302, "Found", {}, location)
    assert body.closed


@pytest.mark.parametrize("location", ["http://x.org/weights.pth", "ftp://x.org/a", "file:///etc/passwd"])
def test_a_redirect_away_from_https_is_not_followed(served, server, location):
    server.status, server.location = 302, location
    with pytest.raises(RunFailed, match=f"redirects to {location}; only https is fetched|is not allowed"):
        download.fetch("mine")


def test_a_redirect_is_asked_for_the_same_part(served, server):
    cut(server)
    server.status, server.location = 302, server.url.replace("weights", "elsewhere")
    assert download.fetch("mine").read_bytes() == WEIGHTS
    assert [asked["Range"] for asked in server.asked[1:]] == ["bytes=1000000-"] * 2


# What the user got wrong


def test_an_unknown_name(capfd, monkeypatch):
    line = error_line(capfd, monkeypatch, "fetch", "moco_v2_80ep")
    assert line == "Error: no checkpoint named 'moco_v2_80ep' in the zoo. Did you mean 'moco_v2_800ep'?"


def test_no_name(capfd, monkeypatch):
    assert error_line(capfd, monkeypatch, "fetch") == "Error: fetch needs a NAME; moco-eval fetch --list names them"


def test_output_is_a_file(served, tmp_path, capfd, monkeypatch):
    line = error_line(capfd, monkeypatch, "fetch", "mine", "--output", tmp_path)
    assert line == f"Error: --output {tmp_path} is a folder; name a file in it"
    (tmp_path / "file").touch()
    line = error_line(capfd, monkeypatch, "fetch", "mine", "--output", tmp_path / "file" / "x.pth")
    assert line.endswith("choose another --output")


def test_the_users_manifest_is_yaml(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCO_EVAL_ZOO", str(tmp_path / "mine.json"))
    with pytest.raises(InputError, match="is not a YAML file"):
        zoo.entries()
    monkeypatch.setenv("MOCO_EVAL_ZOO", str(tmp_path / "mine.yaml"))
    with pytest.raises(InputError, match=r"mine.yaml does not exist"):
        zoo.entries()


def test_names_are_listed_without_torch():
    code = "import sys; from moco_eval.encoders import zoo; list(zoo.lines()); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_every_entry_is_of_a_layout_and_an_architecture_that_are_read():
    from moco_eval.encoders.architectures import architecture
    from moco_eval.encoders.layouts import LAYOUTS

    origins = {row.origin for row in LAYOUTS}
    for name, entry in zoo.entries().items():
        assert entry.layout in origins, name
        arch = entry.recipe.arch
        assert architecture(f"{arch}_224" if arch.startswith("vit") else arch), name

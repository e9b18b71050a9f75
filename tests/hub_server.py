"""A small hub of this machine's own: as much of the answers of Hugging Face's as its client asks for."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories by name (of data sets behind datasets/), each files by name."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.listed: dict[str, dict] = {}  # what is said of a file, where that is not the truth
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        """What was asked for of files themselves."""
        return [one for one in self.asked if one.startswith("GET ") and "/resolve/" in one]


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(self.path.partition("?")[0]).strip("/")
        if path.startswith("api/"):
            return self.of_api(path.removeprefix("api/").removeprefix("models/"))
        repo, _, place = path.partition("/resolve/")
        files = self.server.repositories.get(repo)
        if files is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        data = files.get(place.removeprefix("refs/").partition("/")[2])
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        repo = self.path.removeprefix("/api/").partition("/paths-info/")[0]
        files = self.server.repositories.get(repo, {})
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        return self.answer(
            200, json.dumps([self.entry(name, files[name]) for name in wanted if name in files]).encode()
        )

    def of_api(self, path: str) -> None:
        """What is there: all about a repository, or one of its folders."""
        name = next((name for name in self.server.repositories if f"{path}/".startswith(f"{name}/")), None)
        if name is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files, rest = self.server.repositories[name], path.removeprefix(name).strip("/")
        if not rest.startswith("tree/"):
            siblings = [self.sibling(*item) for item in files.items()]
            about = {"id": name.removeprefix("datasets/"), "sha": COMMIT, "private": False, "siblings": siblings}
            return self.answer(200, json.dumps(about).encode())
        folder = rest.removeprefix("tree/").partition("/")[2]
        inside = [self.entry(*item) for item in files.items() if item[0].rpartition("/")[0] == folder]
        folders = {name.partition("/")[0] for name in files if "/" in name and not folder}
        inside += [{"type": "directory", "path": name, "oid": "a" * 40, "size": 0} for name in sorted(folders)]
        return self.answer(200, json.dumps(inside).encode())

    def sibling(self, name: str, data: bytes) -> dict:
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"rfilename": name, "size": len(data), "lfs": lfs} | self.server.listed.get(name, {})

    def entry(self, name: str, data: bytes) -> dict:
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": name, "oid": lfs["oid"][:40], "size": len(data), "lfs": lfs}

    def answer(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass

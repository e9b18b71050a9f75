"""A headless Chromium driven through chromedriver's HTTP interface (W3C WebDriver), without any library."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Browser:
    """One window, as wide and high as asked for, in pixels."""

    def __init__(self, address: str, binary: str, profile: str, width: int, height: int):
        options = {
            "binary": binary,
            "args": [*FLAGS, f"--user-data-dir={profile}"],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1, "touch": False}},
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.address = f"{address}/session"
        session = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/{session['sessionId']}"

    def _ask(self, method: str, path: str, values: dict[str, Any] | None = None) -> Any:
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path | str) -> None:
        """A file, or an address."""
        self._ask("POST", "/url", {"url": page if isinstance(page, str) else page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """The value of a function body in the page."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, key: str) -> None:
        """A key, on what has the focus."""
        pressed = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": pressed}]})

    def enter_frame(self) -> None:
        """What follows is of the page's first frame, until another page is opened."""
        self._ask("POST", "/frame", {"id": 0})

    def as_printed(self, on: bool) -> None:
        """The page as it is laid out on paper, or on the screen again."""
        values = {"cmd": "Emulation.setEmulatedMedia", "params": {"media": "print" if on else ""}}
        self._ask("POST", "/goog/cdp/execute", values)

    def log(self) -> list[str]:
        """What the console has said since the last call."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", "")


@contextlib.contextmanager
def browser(width: int, height: int = 800) -> Iterator[Browser]:
    """A browser of its own; skips the test, with the reason, where there is none."""
    driver = shutil.which("chromedriver")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not driver or not binary:
        pytest.skip("needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    try:
        port = next(filter(None, (re.search(r"on port (\d+)\.", line) for line in process.stdout)))[1]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            window = Browser(f"http://127.0.0.1:{port}", binary, profile, width, height)
            try:
                yield window
            finally:
                window.close()
    finally:
        process.terminate()
        process.wait()

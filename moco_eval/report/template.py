"""What the pages share: the template's engine, scripts that the page itself allows, and how it is written."""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from moco_eval import __version__
from moco_eval.errors import InputError
from moco_eval.runtime import files

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Script:
    """A script in the page, and its hash, by which the page allows it and no other."""

    text: str
    hash: str


def render(name: str, scripts: tuple[str, ...] = ("page.js",), **contents: Any) -> bytes:
    """A template of this folder, filled in; every text is escaped. In UTF-8, other bytes of names as backslashes.

    Args:
        scripts: files of `parts/` that the page brings.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = [_script(script) for script in scripts]
    page = environment.get_template(name).render(version=__version__, scripts=own, **contents)
    return page.encode("utf-8", "backslashreplace")


def _script(name: str) -> Script:
    text = (HERE / "parts" / name).read_text(encoding="utf-8")
    return Script(text, base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())


def place_of(output: Path, option: str, usual: str) -> Path:
    """Where a page is written that the user names. Raises InputError where that is a folder, or not a regular file.

    Args:
        option: that names it; usual: a name for a file.
    """
    if output.is_dir():
        raise InputError(f"{option} {output} is a folder; name a file in it, such as {output / usual}")
    return files.output_file(output)

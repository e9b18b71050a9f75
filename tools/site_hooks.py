"""What `mkdocs build` does beside its plugins: the root's pages join those of docs/, and links follow them there."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "docs/tutorial.ipynb"
MOVED = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    NOTEBOOK: "tutorial.md",
}  # a file of the repository, and the page of the site that it becomes
SOURCES = {page: source for source, page in MOVED.items()}
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """Headings get the anchors that forges give them, so that a link is right in both places."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages of MOVED, under their names in the site."""
    for source, page in MOVED.items():
        if source.startswith("docs/"):
            files.remove(files.get_file_from_path(source.removeprefix("docs/")))
        files.append(File.generated(config, page, content=markdown_of(ROOT / source)))
    return files


def markdown_of(path: Path) -> str:
    """A page as Markdown; of a notebook, its cells and what they printed."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    from nbconvert import MarkdownExporter

    return MarkdownExporter().from_filename(str(path))[0]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Every link by where its target is in the site; of a file that is not in it, the text alone."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")
    return LINK.sub(lambda match: link_in_site(match, source, here), markdown)


def link_in_site(match: re.Match[str], source: str, here: str) -> str:
    """A link of the repository's file `source` as the site's page `here` writes it."""
    picture, text, target = match.groups()
    path, hash_, anchor = target.partition("#")
    if "://" in target or not path:
        return match[0]
    there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if there not in MOVED and not there.startswith("docs/"):
        return text
    there = MOVED.get(there, there.removeprefix("docs/"))
    relative = posixpath.relpath(there, posixpath.dirname(here) or ".")
    return f"{picture}[{text}]({relative}{hash_}{anchor})"

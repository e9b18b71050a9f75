"""What the pages show: their code blocks, commands, links and headings."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORDS = "docs/measurements.md"  # what was run once, on data and machines of its own
PROGRAMS = ("moco-eval", "make", "torchrun", "python", "python3", "sbatch", "srun", "pip", "git")
PLACEHOLDERS = r"[A-Z]+(_[A-Z]+)*"  # CHECKPOINT, FOLDER, RUN_A: the reader's own


class Command(NamedTuple):
    """One command of a page; `block` is the line its code block begins at, None in prose."""

    page: str
    line: int
    block: int | None
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def is_synopsis(self) -> bool:
        """Has options in brackets, alternatives or dots: a form to fill in, as prose and usage lines show it."""
        return any(re.search(r"[][|…]|\.\.\.", word) and "=" not in word for word in self.words)

    @property
    def has_placeholder(self) -> bool:
        return any(re.fullmatch(PLACEHOLDERS, word) for word in self.words[1:])

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {shlex.join(self.words)}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[tuple[int, str, list[str]]]:
    """First line, language and lines of each fenced block, and of each block indented by four behind an empty line."""
    found: list[tuple[int, str, list[str]]] = []
    fenced = indented = False
    above = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
            if fenced:
                found.append((number + 1, line[3:].strip(), []))
        elif fenced:
            found[-1][2].append(line)
        elif line.startswith("    ") and (indented or not above):
            if not indented:
                found.append((number, "", []))
            indented = True
            found[-1][2].append(line[4:])
        else:
            indented = False
        above = line.strip()
    return found


def prose(text: str) -> str:
    """The page with its blocks blanked, its lines where they were."""
    lines = text.splitlines()
    for first, _, block in blocks(text):
        lines[first - 1 : first - 1 + len(block)] = [""] * len(block)
    return "\n".join("" if line.startswith("```") else line for line in lines)


def words_of(line: str) -> tuple[str, ...]:
    """The words as a shell splits them, without the comment and what is set before the program."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z][A-Z_0-9]*=.*", words[0]):
        words = words[1:]
    return tuple(words)


def joined(first: int, block: list[str]) -> list[tuple[int, str]]:
    """The lines of a block with those that a backslash continues put together."""
    lines: list[tuple[int, str]] = []
    goes_on = False
    for number, line in enumerate(block, start=first):
        if goes_on:
            begun, before = lines.pop()
            lines.append((begun, f"{before} {line}"))
        else:
            lines.append((number, line))
        goes_on = line.endswith("\\")
        if goes_on:
            lines[-1] = (lines[-1][0], lines[-1][1][:-1])
    return lines


def is_shell(language: str, block: list[str]) -> bool:
    return language in ("", "bash", "sh", "console") and any(_program(line) for line in block)


def _program(line: str) -> bool:
    first = re.match(r"(?:[A-Z][A-Z_0-9]*=\S+\s+)*([\w.-]+)", line)
    return bool(first) and first.group(1) in PROGRAMS


def commands() -> list[Command]:
    """Every command of every page, in order; a shell block may hold nothing else."""
    found = []
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), name_of(page)
        for first, language, block in blocks(text):
            if not is_shell(language, block):
                continue
            for number, line in joined(first, block):
                words = words_of(line)
                assert not words or words[0] in PROGRAMS, f"{name}:{number} is no command: {line}"
                if words:
                    found.append(Command(name, number, first, words))
        plain = prose(text)
        for span in re.finditer(r"`([^`]+)`", plain):
            line = " ".join(span.group(1).split())
            if _program(line) and " " in line:
                number = plain[: span.start()].count("\n") + 1
                found.append(Command(name, number, None, words_of(line)))
    return found


def links(text: str) -> list[str]:
    """The targets of a page's links that lead into this repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in targets if "://" not in target]


def anchors(text: str) -> set[str]:
    """The names that a forge gives to a page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(text))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}

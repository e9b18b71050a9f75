"""A comparison as a LaTeX table."""

import re
from itertools import groupby

from moco_eval.papers import cells
from moco_eval.papers.match import Comparison, Line
from moco_eval.papers.todo import Missing, comment, script

LONGEST = 30  # lines that fit on a page; more make a longtable
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "−": "$-$",
    "α": r"$\alpha$",
    "τ": r"$\tau$",
    "→": r"$\rightarrow$",
    "–": "--",
    "—": "---",
    "’": "'",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
KNOWN = set("àáâãäåçèéêëìíîïñòóôõöùúûüýÿÀÁÂÃÄÅÇÈÉÊËÌÍÎÏÑÒÓÔÕÖÙÚÛÜÝßøØæÆ")  # in each of its encodings
WIDE = 30  # characters of a label; longer ones are broken
# A number and its spread are two columns, so that the numbers stand below each other.
NUMBERS = r"l r@{\ }l r@{\ }l r@{\ }l"


def latex(comparison: Comparison, missing: Missing) -> str:
    """A table that needs the package booktabs, and longtable where it is long; what is missing as comments."""
    table, long = comparison.table, len(comparison.lines) > LONGEST
    wide = max(len(line.row) for line in comparison.lines) > WIDE
    share = 0.25 if any(line.ours for line in comparison.lines) else 0.4
    columns = (rf"p{{{share}\linewidth}} " if wide else "l ") + NUMBERS
    packages = r"\usepackage{booktabs}" + (r" and \usepackage{longtable}" if long else "")
    caption = rf"\caption{{{escape(f'{cells.title(table)}. {table.caption}')}}}"
    head, rows = _head(), _rows(comparison.lines, r"\raggedright " if wide else "")
    size, below = r"\footnotesize\setlength{\tabcolsep}{3pt}", _below(comparison)
    if long:
        begin = [rf"\begingroup{size}", rf"\begin{{longtable}}{{{columns}}}", rf"{caption} \\", *head, r"\endhead"]
        end = [r"\bottomrule", r"\end{longtable}", below, r"\endgroup"]
    else:
        begin = [r"\begin{table}[htbp]", rf"\centering{size}", rf"{caption}\medskip"]
        begin += [rf"\begin{{tabular}}{{{columns}}}", *head]
        end = [r"\bottomrule", r"\end{tabular}", below, r"\end{table}"]
    return "\n".join([f"% needs {packages}", *begin, *rows, *end, *_comments(missing)])


def _head() -> list[str]:
    row, metric, *numbers = cells.HEADINGS
    headings = [row, metric, *(rf"\multicolumn{{2}}{{c}}{{{heading}}}" for heading in numbers)]
    return [r"\toprule", rf"{' & '.join(headings)} \\", r"\midrule"]


def _rows(lines: list[Line], before_label: str) -> list[str]:
    """Lines of one row together, its label on the first of them."""
    groups = [(label, list(group)) for label, group in groupby(lines, key=lambda line: line.row)]
    apart = any(len(group) > 1 for _, group in groups)
    rows: list[str] = []
    for label, group in groups:
        rows += [r"\addlinespace"] if rows and apart else []
        for number, line in enumerate(group):
            numbers = (*cells.published(line), *cells.ours(line), *cells.difference(line))
            first = "" if number else before_label + escape(label)
            rows.append(" & ".join((first, escape(cells.metric(line)), *map(_number, numbers))) + r" \\")
    return rows


def _number(text: str) -> str:
    """With a minus for a hyphen before a number."""
    return re.sub(r"-(?=\d)", "$-$", escape(text))


def _below(comparison: Comparison) -> str:
    notes = " ".join(rf"{escape(note)}\par" for note in cells.below(comparison))
    return rf"\par\medskip\begin{{minipage}}{{\linewidth}}\raggedright\footnotesize {notes}\end{{minipage}}"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; a character that it may not know becomes a question mark."""
    line = " ".join(text.split())  # an empty line would end a caption
    escaped = "".join(SPECIAL.get(letter, letter if _is_known(letter) else "?") for letter in line)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped  # not an optional argument of the \\ before it


def _is_known(letter: str) -> bool:
    return letter in KNOWN or (letter.isascii() and letter.isprintable())


def _comments(missing: Missing) -> list[str]:
    lines = cells.unobtainable(missing)
    if missing.steps:
        lines += [cells.heading(missing), *script(missing).splitlines(), missing.total]
    return [comment(line, "%") for line in lines]

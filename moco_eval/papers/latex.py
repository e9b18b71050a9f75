"""A comparison as a LaTeX table."""

from itertools import groupby

from moco_eval.papers import words
from moco_eval.papers.beside import Comparison, Line
from moco_eval.papers.missing import Missing, script

LONGEST = 42  # lines that fit on a page; more make a longtable
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
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
# A number and its spread are two columns, so that the numbers stand below each other.
COLUMNS = r"l@{\hskip 1.5em}l r@{\ }l r@{\ }l r@{\ }l"


def latex(comparison: Comparison, missing: Missing) -> str:
    """A table that needs the package booktabs, and longtable where it is long; what is missing as comments."""
    table, long = comparison.table, len(comparison.lines) > LONGEST
    packages = r"\usepackage{booktabs}" + (r" and \usepackage{longtable}" if long else "")
    caption = rf"\caption{{{escape(f'{words.title(table)}. {table.caption}')}}}"
    notes = " ".join(rf"{escape(one)}\par" for one in words.below(comparison))
    below = rf"\par\medskip\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"
    heads = [words.HEADINGS[0], words.HEADINGS[1], *(rf"\multicolumn{{2}}{{c}}{{{one}}}" for one in words.HEADINGS[2:])]
    head, rows = [r"\toprule", rf"{' & '.join(heads)} \\", r"\midrule"], _rows(comparison.lines)
    if long:
        begin = [r"\begingroup\small", rf"\begin{{longtable}}{{{COLUMNS}}}", rf"{caption} \\", *head, r"\endhead"]
        end = [r"\bottomrule", r"\end{longtable}", below, r"\endgroup"]
    else:
        begin = [r"\begin{table}[htbp]", r"\centering\small", caption, rf"\begin{{tabular}}{{{COLUMNS}}}", *head]
        end = [r"\bottomrule", r"\end{tabular}", below, r"\end{table}"]
    return "\n".join([f"% needs {packages}", *begin, *rows, *end, *_comments(missing)])


def _rows(lines: list[Line]) -> list[str]:
    """Rows of one label together, the label on the first of them."""
    found: list[str] = []
    for label, group in groupby(lines, key=lambda line: line.row):
        found += [r"\addlinespace"] if found else []
        for number, line in enumerate(group):
            numbers = (part for pair in (words.published, words.ours, words.difference) for part in pair(line))
            cells = ["" if number else label, words.metric(line), *numbers]
            found.append(" & ".join(map(escape, cells)) + r" \\")
    return found


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; a character that it may not know becomes a question mark."""
    found = "".join(
        SPECIAL.get(one, one if one.isascii() or (one.isalpha() and ord(one) < 0x180) else "?") for one in text
    )
    return f"{{}}{found}" if found.startswith("[") else found  # not an optional argument of the \\ before it


def _comments(missing: Missing) -> list[str]:
    lines = words.unobtainable(missing)
    if missing.steps:
        lines += [words.heading(missing), *script(missing).splitlines(), missing.total]
    return [f"% {line}" for line in lines]

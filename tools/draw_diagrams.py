"""Draw the diagrams of the documentation: SVG files that follow the reader's light or dark theme.

python tools/draw_diagrams.py [--folder docs/diagrams]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH = 600  # narrow: a telephone shows it at two thirds
STYLE = """
  text { font: 16px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1d1f23; text-anchor: middle; }
  .title { font-weight: 600; } .note { font-size: 14px; fill: #565b64; } .left { text-anchor: start; }
  .paper { fill: #fdfdfc; } .box { fill: #eef3fa; stroke: #1f5fae; } .file { fill: #fff8e6; stroke: #9a6b04; }
  .stop { fill: #fdeeee; stroke: #a02c2c; } .arrow { stroke: #686d76; fill: none; stroke-width: 1.5; }
  .head { fill: #686d76; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e6ea; } .note { fill: #a9aebb; } .paper { fill: #16181c; }
    .box { fill: #1f2936; stroke: #86b4f3; } .file { fill: #2b2616; stroke: #e2b95c; }
    .stop { fill: #331d1d; stroke: #e08a8a; } .arrow { stroke: #979daa; } .head { fill: #979daa; }
  }
"""
IMAGES = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#dd8844")


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of words whose baseline is at y."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, lines: Sequence[str], kind: str = "box") -> str:
    """A rectangle from its upper left corner: a title, and notes below it."""
    first = y + height / 2 + 6 - 10 * (len(lines) - 1)
    words = [
        text(x + width / 2, first + 20 * number, line, "note" if number else "title")
        for number, line in enumerate(lines)
    ]
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" class="{kind}"/>'
    return "\n".join([frame, *words])


def arrow(*points: tuple[float, float]) -> str:
    """A line through points, with a head at the last."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" class="arrow" marker-end="url(#head)"/>'


def picture(title: str, height: int, parts: Sequence[str]) -> str:
    """The whole file. `title` is what a screen reader says."""
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" class="head"/></marker>'
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">'
    )
    paper = f'<rect width="{WIDTH}" height="{height}" rx="10" class="paper"/>'
    return "\n".join([opening, f"<style>{STYLE}</style>", f"<defs>{head}</defs>", paper, *parts, "</svg>", ""])


def pipeline() -> str:
    """From images to a table."""
    parts = [
        box(20, 20, 130, 60, ["images", "no labels"], "file"),
        arrow((150, 50), (186, 50)),
        box(190, 20, 170, 60, ["pretrain", "MoCo v1, v2, v3"]),
        box(400, 20, 180, 60, ["any other encoder", "DINO, VISSL, timm, ..."]),
        arrow((275, 80), (275, 116)),
        arrow((490, 80), (490, 100), (350, 100), (350, 116)),
        box(150, 120, 300, 50, ["checkpoint"], "file"),
        arrow((300, 170), (300, 206)),
        box(150, 210, 300, 66, ["load with proof", "every tensor accounted for, or an error"]),
    ]
    for x, lines in (
        (20, ["frozen features", "kNN, linear, logistic", "SVM, retrieval"]),
        (210, ["fine-tuning", "1 %, 10 %", "or all labels"]),
        (400, ["dense prediction", "detection", "segmentation"]),
    ):
        parts += [
            arrow((300, 276), (300, 296), (x + 90, 296), (x + 90, 316)),
            box(x, 320, 180, 84, lines),
            arrow((x + 90, 404), (x + 90, 424), (300, 424), (300, 444)),
        ]
    parts += [box(110, 448, 380, 66, ["result.json", "metrics, spread, deviations, data, weights"], "file")]
    for x, lines in (
        (20, ["table", "beside the papers'"]),
        (210, ["report", "one page of all runs"]),
        (400, ["compare", "two runs, paired"]),
    ):
        parts += [arrow((300, 514), (300, 534), (x + 90, 534), (x + 90, 554)), box(x, 558, 180, 62, lines)]
    return picture("From images to a checkpoint, its proven load, the protocols, a result and a table", 640, parts)


def images(x: float, y: float, numbers: Sequence[int], name: str) -> list[str]:
    """A group whose images are normalised together, with its name below."""
    parts = [f'<rect x="{x:g}" y="{y:g}" width="112" height="58" rx="8" class="box"/>']
    for place, number in enumerate(numbers):
        left = x + 8 + 50 * place
        parts += [
            f'<rect x="{left:g}" y="{y + 8:g}" width="46" height="42" rx="4" fill="{IMAGES[number]}"/>',
            f'<text x="{left + 23:g}" y="{y + 35:g}" class="title" style="fill:#16181c">{number}</text>',
        ]
    return [*parts, text(x + 56, y + 76, name, "note")]


def row(y: float, title: str, groups: Sequence[Sequence[int]], name: str) -> list[str]:
    """Four groups side by side under a title."""
    parts = [text(20, y, title, "left")]
    for number, group in enumerate(groups):
        parts += images(20 + 149 * number, y + 12, group, f"{name} {number}")
    return parts


def batch_norm() -> str:
    """Shuffling BN on four GPUs, split BN on one."""
    process, modulo = [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)]
    permuted = [(5, 2), (0, 7), (3, 6), (1, 4)]
    parts = [
        text(20, 34, "Shuffling BN: one batch on four GPUs", "title left"),
        *row(66, "queries, as they come", process, "GPU"),
        *row(182, "keys, exchanged in a random order, and put back after the encoder", permuted, "GPU"),
        f'<line x1="20" x2="{WIDTH - 20}" y1="292" y2="292" class="arrow"/>',
        text(20, 326, "Split BN: the same batch on one GPU, in groups", "title left"),
        *row(358, "queries: image i is in group i mod 4", modulo, "group"),
        *row(474, "keys, permuted over the groups", permuted, "group"),
        text(20, 586, "A blue frame is what BN normalises together. A key is in other company than its", "note left"),
        text(20, 606, "query, so that the statistics do not give away which key belongs to which query.", "note left"),
    ]
    return picture("Shuffling BN permutes keys over GPUs, split BN over groups on one GPU", 624, parts)


def proof() -> str:
    """What a checkpoint goes through before it is judged, and before a copy gets its name."""
    steps = [
        (["checkpoint", "a stranger's file"], "file"),
        (["read", "sizes bounded, tensors only, nothing executed"], "box"),
        (["recognise", "by names and shapes, never by the file's name"], "box"),
        (["account for every tensor", "loaded, or left out for a reason that is listed"], "box"),
        (["encoder", "weights equal to the file's, bit for bit"], "file"),
        (["convert", "detectron2, torchvision, timm, safetensors"], "box"),
        (["read the copy back", "the same activations to the bit"], "box"),
        (["copy, with its proof in OUT.json", "sha256, pixels, hash of the activations"], "file"),
    ]
    refusals = {1: "names code", 2: "unknown layout", 3: "missing, left over,", 6: "differs"}
    parts = []
    for number, (lines, kind) in enumerate(steps):
        y = 20 + 86 * number
        parts.append(box(20, y, 380, 60, lines, kind))
        if number:
            parts.append(arrow((210, y - 26), (210, y - 4)))
        if number in refusals:
            more = ["wrong shape"] if number == 3 else []
            refusal = "".join(
                text(510, y + 35 - 10 * len(more) + 20 * line, words, "note")
                for line, words in enumerate([refusals[number], *more])
            )
            frame = f'<rect x="440" y="{y:g}" width="140" height="60" rx="8" class="stop"/>'
            parts += [arrow((400, y + 30), (436, y + 30)), frame, refusal]
    parts.append(text(510, 12 + 86, "or an error", "note"))
    return picture("A checkpoint is read, recognised and accounted for; a copy is proven before it is kept", 704, parts)


DIAGRAMS = {"pipeline": pipeline, "batch_norm": batch_norm, "proof": proof}


def main() -> None:
    """Write every diagram into the folder."""
    parser = argparse.ArgumentParser(description="Draw the diagrams of the documentation.")
    parser.add_argument("--folder", type=Path, default=Path("docs/diagrams"))
    folder = parser.parse_args().folder
    for name, draw in DIAGRAMS.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

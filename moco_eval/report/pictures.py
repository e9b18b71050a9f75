"""What the runs drew: views, neighbours, detections."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from moco_eval import limits
from moco_eval.data.pixels import open_image, reason_of
from moco_eval.errors import InputError
from moco_eval.report.figures import ACCENT, MUTED, TEXT, svg
from moco_eval.report.pick import by_encoder, by_test_set
from moco_eval.report.runs import Run, sha_of
from moco_eval.results import run_files
from moco_eval.results.plots import ROWS, bars_figure, best_first, loss_figure

PICTURES = 4  # drawn images per encoder
PICTURE_BYTES, PICTURE_PIXELS = 200_000, 1000  # larger pictures are made smaller
DRAWN_BYTES = 60_000  # and so are drawn images, of which there are many
CLASS_METRICS = ("APbb", "AP50", "IoU")  # the one shown of each class: COCO's, VOC's, or of a segmentation


def has(run: Run, name: str) -> bool:
    return run_files.is_there(run.path / name)


def neighbours(runs: list[Run], names: dict[str, str], order: list[str]) -> list[dict[str, Any]]:
    """A group for each test set: the picture of each encoder, of its newest run that drew one."""
    groups = []
    for data, tested in by_test_set(runs):
        chosen = by_encoder([run for run in tested if has(run, "neighbours.png")], names, order, lambda run: 0)
        if chosen:
            shown = [(name, image(run.path / "neighbours.png")) for name, run in chosen.items()]
            groups.append({"data": data, "encoders": shown})
    return groups


def detections(runs: list[Run], names: dict[str, str], order: list[str]) -> list[dict[str, Any]]:
    """Detections and segmentations by test set and protocol, in each by encoder: drawn images, class bars, losses.

    The images are the same ones in the same order for each encoder; of two runs of an encoder the newer counts.
    Runs that left none of these are passed over.
    """
    groups: dict[tuple[str, str], dict[str, Run]] = {}
    for data, tested in by_test_set(runs, dense=True):
        for run in tested:
            assert run.record
            groups.setdefault((data, run.record["protocol"]), {})[names[sha_of(run)]] = run
    shown = []
    for (dataset, protocol), by_name in groups.items():
        first = next((per_class for name in order if name in by_name and (per_class := _per_class(by_name[name]))), {})
        drawn = [_detection(name, by_name[name], first) for name in order if name in by_name]
        if drawn := [run for run in drawn if run["images"] or run["bars"] or run["losses"]]:
            shown.append({"dataset": dataset, "protocol": protocol, "runs": drawn})
    return shown


def _per_class(run: Run) -> dict[str, Any]:
    assert run.record
    each = run.record.get("per_class") or {}
    return {label: scores for label, scores in each.items() if isinstance(scores, dict)}


def _detection(name: str, run: Run, first: dict[str, Any]) -> dict[str, Any]:
    """What is drawn of one run; its bars in the order of the classes of `first`, the first encoder's."""
    pictures = sorted(run.path.glob("pictures/*.png")) or sorted(run.path.glob("trial_*/pictures/*.png"))
    per_class = _per_class(run)
    metric = next((m for m in CLASS_METRICS if any(scores.get(m) is not None for scores in per_class.values())), None)
    shades = (TEXT, ACCENT, MUTED)
    order = best_first(first, metric) if metric and first.keys() == per_class.keys() else None
    return {
        "name": name,
        "images": [image(path, DRAWN_BYTES) for path in pictures[:PICTURES]],
        "metric": metric,
        "bars": svg(bars_figure(per_class, metric, shades, order), f"{metric} of each class") if metric else None,
        "many": len(per_class) > ROWS,
        "losses": svg(loss_figure(run.trials, shades), "Losses against iteration") if run.trials else None,
    }


def image(path: Path, limit: int = PICTURE_BYTES) -> str:
    """A picture as a data address; one of more bytes is made smaller. Raises InputError where it is none."""
    try:
        data, kind = limits.read_bytes(path, "picture"), "png"
        with open_image(io.BytesIO(data), str(path), ("PNG",)) as image:
            limits.require(path, "picture_pixels", image.width * image.height)
            image.load()
            if len(data) > limit:
                data, kind = _smaller(image), "jpeg"
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a readable picture: it is no PNG image; run the evaluation again") from None
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise InputError(f"{path} is not a readable picture: {reason_of(error)}; run the evaluation again") from None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _smaller(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()

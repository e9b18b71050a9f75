"""Alarms in words: what the last lines of metrics say when a run goes wrong quietly."""

from statistics import median
from typing import Any

from pretraining import signs
from pretraining.plan import Plan
from pretraining.signs import is_vit

PATIENCE = 10  # log lines that must agree
CHANCE = 0.02  # nats below the chance level, for each loss that is summed
SPREAD = 0.05  # of q; about 1 when spread
LEAK = 99.9  # percent of pretext accuracy
DIP = 2.0  # points of kNN below its best so far
LEAP = 5.0  # times the median of the lines before
SKIPPED = 0.5  # share of the steps
RISEN = 0.1  # share of the full learning rate in the warm-up, below which a loss at chance is no wonder


def alarms(run: Plan, lines: list[dict[str, Any]], knn: list[float]) -> dict[str, str]:
    """What is wrong, by name, in words with the way out; empty when nothing is.

    Args:
        run: what is trained.
        lines: the last PATIENCE log lines (loss, accuracy, feature_std, step), the newest last.
        knn: every top-1 of the kNN monitor so far.
    """
    if len(lines) < PATIENCE or lines[0]["step"] <= run.full_step:
        return {}
    loss, accuracy, spread = (_mean(lines, name) for name in ("loss", "accuracy", "feature_std"))
    sounding = {}
    if spread < SPREAD:
        sounding["collapse"] = (
            f"features collapsed: the queries' spread is {spread:.3f} (about 1 when spread, 0 when all are alike); "
            f"{_slower(run)}"
        )
    schedule = run.config.schedule
    risen = lines[0]["step"] > RISEN * schedule.warmup_epochs * run.steps_per_epoch
    if risen and loss > run.chance - CHANCE * (1 + run.config.symmetric) * run.loss_scale:
        when = "" if run.config.mechanism == "moco_v3" else " after the queue has filled"
        sounding["chance"] = f"loss at chance{when}: {loss:.3f} nats, chance {run.chance:.3f}; {_slower(run)}"
    if accuracy > LEAK and len(knn) > 1 and knn[-1] < min(knn[-2], max(knn) - 1):
        sounding["leak"] = (
            f"pretext accuracy over {LEAK} % while kNN falls ({max(knn):.1f} to {knn[-1]:.1f}): batch statistics "
            f"leak which key is whose; {_tight(run)}"
        )
    if is_vit(run) and knn and knn[-1] < max(knn) - DIP:
        sounding["instability"] = (
            f"kNN dips from {max(knn):.1f} to {knn[-1]:.1f} %, as an unstable ViT's does (arXiv:2104.02057, Figures "
            f"1 to 3); {_steadier(run)}"
        )
    return sounding | _of_signs(run, lines)


def _of_signs(run: Plan, lines: list[dict[str, Any]]) -> dict[str, str]:
    """A leap of a ViT's first gradient, and fp16 that overflows again and again."""
    sounding = {}
    *before, now = [line[signs.GRADIENT] for line in lines if signs.GRADIENT in line] or [0.0]
    if len(before) == PATIENCE - 1 and now > LEAP * median(before):
        layer = "the first block" if run.config.freeze_patches else "the patch projection"
        sounding["leap"] = (
            f"the gradient of {layer} leaps to {now:.3g}, {now / median(before):.0f} times its median, as an unstable "
            f"ViT's does before its kNN dips (arXiv:2104.02057, Figure 4); {_steadier(run)}"
        )
    steps, skipped = lines[-1]["step"] - lines[0]["step"], sum(line.get(signs.SKIPPED, 0) for line in lines[1:])
    if skipped > SKIPPED * steps:
        sounding["overflow"] = (
            f"fp16 overflows: {skipped:.0f} of the last {steps} steps were skipped, the loss scale is down to "
            f"{lines[-1][signs.SCALE]:g}; take --precision bf16 or fp32 in a new run"
        )
    return sounding


def _steadier(run: Plan) -> str:
    """The way out of a ViT's instability: the paper freezes the random patch projection."""
    if run.config.freeze_patches or "conv" in run.config.arch:
        return "a smaller optimizer.lr or batch may help"
    return "take --set freeze_patches=true in a new run, or a smaller optimizer.lr"


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)


def _slower(run: Plan) -> str:
    """The way out of a dictionary that changes too fast."""
    if run.config.mechanism == "moco" and run.config.momentum < 0.99:
        return f"momentum {run.config.momentum:g} moves the keys too fast; the paper takes 0.999"
    return "a smaller optimizer.lr or a larger momentum may help"


def _tight(run: Plan) -> str:
    """The BN mode that does not leak here."""
    if run.config.mechanism == "memory_bank":
        return "its keys are of another epoch: look at the views"
    if run.config.mechanism == "moco_v3":
        return "take bn: sync" if run.bn != "sync" else "bn: sync is on: look at the views"
    mode = "shuffle" if run.processes > 1 else "split"
    wanted = f"bn: {mode} with bn_permute: true"
    return f"take {wanted}" if run.bn != mode or not run.config.bn_permute else f"{wanted} is on: look at the views"

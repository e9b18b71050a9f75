"""`--try`: a recipe shrunk to minutes on any machine. Every value that it changes is a deviation of the record."""

from typing import Any

IMAGES, BATCH = 200, 32  # of each split; over all processes
SMALL = 96  # pixels of a view; a ViT takes images of its own size only
FEW, PAIR = 16, 2  # the same, of detection and segmentation
REGIONS = {"roi.batch_per_image": 32, "rpn.post_nms_train": 200, "rpn.post_nms_test": 50}  # C4 runs res5 on each


def shrunk(kind: str, values: dict[str, Any]) -> list[str]:
    """Overrides for a recipe, as key=value.

    Args:
        kind: pretrain, linear, finetune, detect or segment.
        values: of the recipe's config, not checked yet.
    """
    if kind in ("detect", "segment"):
        return _by_iterations(kind, values)
    schedule = values.get("schedule", {})
    overrides = ["schedule.epochs=2"]
    if schedule.get("milestones"):
        overrides.append("schedule.milestones=[1]")
    if schedule.get("warmup_epochs"):
        overrides.append("schedule.warmup_epochs=1")
    if kind == "pretrain" and str(values.get("arch")).startswith(("resnet", "wide_resnet")):
        size = values.get("views", {}).get("size")
        overrides += [f"views.size={SMALL}"] if isinstance(size, int) and size > SMALL else []
    if kind == "pretrain" and values.get("mechanism", "moco") in ("moco", "memory_bank"):
        overrides.append(f"queue_size={4 * BATCH}")  # the others' is the batch
    return overrides


def _by_iterations(kind: str, values: dict[str, Any]) -> list[str]:
    overrides = ["schedule.iterations=20", "schedule.warmup=2"]
    if values.get("schedule", {}).get("steps"):
        overrides.append("schedule.steps=[15]")
    if kind == "detect":
        overrides += ["precise_bn=2", "accumulate=1"]
        overrides += [f"{name}={most}" for name, most in REGIONS.items() if _exceeds(values, name, most)]
        sizes = values.get("input", {})
        if not sizes.get("jitter") and sizes.get("min_size_test", 800) > 240:
            overrides += ["input.min_size_train=[240]", "input.min_size_test=240", "input.max_size=400"]
    return overrides


def _exceeds(values: dict[str, Any], name: str, most: int) -> bool:
    """Whether a recipe leaves a value at its default, which is a published one and large, or sets a larger one."""
    section, key = name.split(".")
    value = values.get(section, {}).get(key)
    return not isinstance(value, int) or value > most


def sizes_of(kind: str) -> tuple[int, int]:
    """How many images a try takes, of each split and in a batch; the rate is rescaled to that."""
    return (FEW, PAIR) if kind in ("detect", "segment") else (IMAGES, BATCH)

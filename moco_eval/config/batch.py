"""What a batch of another size carries along."""

from collections.abc import Iterable
from typing import Any

RATES = ("optimizer.lr", "learning_rates")  # what is rescaled, unless it is set


def rescaled(values: dict[str, Any], batch: int, settings: Iterable[str] = ()) -> tuple[list[str], str]:
    """Overrides that belong to a batch of another size: the rate linearly, and the dictionary that is the batch.

    Args:
        values: of a config, not checked yet.
        batch: the batch size that is asked for.
        settings: key=value, already in `values`; a rate among them stays as it is.
    Returns:
        The overrides, and what they change in a sentence; none and "" where the batch is the config's own.
    Source: Goyal et al. 2017, arXiv:1706.02677, the linear scaling rule.
    """
    before, optimizer = values.get("batch_size"), values.get("optimizer")
    if batch == before:
        return [], ""
    overrides, changes = [f"batch_size={batch}"], list[str]()
    stays = set(RATES) & {setting.partition("=")[0] for setting in settings}
    rate = optimizer.get("lr") if isinstance(optimizer, dict) else None
    if isinstance(before, int) and before and isinstance(rate, int | float) and "optimizer.lr" not in stays:
        overrides.append(f"optimizer.lr={rate * batch / before!r}")
        changes.append(f"lr {rate * batch / before:g} instead of {rate:g}")
    rates = values.get("learning_rates")
    if isinstance(before, int) and before and isinstance(rates, list) and "learning_rates" not in stays:
        overrides.append(f"learning_rates={[rate * batch / before for rate in rates]!r}")
        changes.append(f"learning rates times {batch / before:g}")
    mechanism = values.get("mechanism")
    parts = values.get("accumulate", 1) if mechanism == "end_to_end" else 1 if mechanism == "moco_v3" else None
    if isinstance(parts, int) and parts:
        overrides.append(f"queue_size={batch // parts}")
        changes.append(f"K {batch // parts} instead of {values.get('queue_size')}")
    changes = changes or (["all else as set"] if stays else [])
    return overrides, f"--batch-size {batch} instead of {before}: {', '.join(changes)}" if changes else ""

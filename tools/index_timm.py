"""Write the index by which encoders of timm's zoo are recognised: moco_eval/encoders/timm_index.txt.

Run it from a clone after an upgrade of timm: `python tools/index_timm.py`. Every network is built without memory; it
takes about four minutes on one core.
"""

import argparse
import hashlib
import types
import warnings
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from torch import nn

from moco_eval.encoders.timm_index import HEADS, digests

INDEX = Path(__file__).parents[1] / "moco_eval" / "encoders" / "timm_index.txt"
# Attributes of modules that no forward pass in evaluation mode depends on, once the tensors are loaded
WITHOUT_EFFECT = {
    *("training", "p", "drop_prob", "drop_rate", "drop", "dropout_rate", "attn_drop", "head_drop", "scale_by_keep"),
    *("inplace", "fused_attn", "fast_attn", "grad_checkpointing", "num_classes", "img_size", "default_cfg"),
    *("pretrained_cfg", "strict_img_size", "init_values", "num_patches", "grid_size", "is_scriptable"),
}


def described(value: object) -> str | None:
    """A plain value, or a function by its name; None for anything else."""
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    if isinstance(value, (tuple, list)):
        parts = [described(part) for part in value]
        return None if None in parts else f"({','.join(map(str, parts))})"
    if isinstance(value, (types.FunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return None


def computation(net: nn.Module) -> str:
    """Everything but the tensors that tells what a network computes: its modules and their plain attributes."""
    lines = []
    for name, module in net.named_modules():
        kind = type(module).__name__
        if kind in ("Dropout", "DropPath", "Identity"):
            continue
        plain = {key: described(value) for key, value in vars(module).items() if not key.startswith("_")}
        settings = sorted((key, value) for key, value in plain.items() if value and key not in WITHOUT_EFFECT)
        lines.append(f"{name} {kind} {settings}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shapes_of(name: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Names and shapes of a network without its classifier, and what it computes.

    Raises:
        AttributeError: the network has no classifier to take off.
        AssertionError: HEADS no longer says what a classifier is.
    """
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False)
        whole = set(net.state_dict())
        net.reset_classifier(0)
    tensors = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    heads = {key for key in whole | set(tensors) if HEADS.fullmatch(key)}
    assert heads == whole - set(tensors), f"{name}: HEADS does not say what its classifier is: {whole - set(tensors)}"
    return tensors, computation(net)


def index(networks: Iterable[str]) -> list[str]:
    """The lines of the index."""
    kinds: dict[str, list[str]] = {}
    lines = []
    for name in networks:
        try:
            shapes, computed = shapes_of(name)
        except AttributeError:  # an encoder of a language model, which gives no pooled feature
            continue
        loose, exact, modules = digests(shapes)
        alike = kinds.setdefault(exact, [])
        if computed not in alike:
            alike.append(computed)
        lines.append(f"{loose} {exact} {modules} {alike.index(computed)} {name}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=INDEX)
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    lines = index(timm.list_models())
    output.write_text(f"# timm {timm.__version__}, {len(lines)} networks; written by tools/index_timm.py\n")
    with output.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    print(f"{output}: {len(lines)} networks")


if __name__ == "__main__":
    main()

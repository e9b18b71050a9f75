"""Proof of load: every tensor of an architecture matched in name, shape and dtype, and arrived bit for bit."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from moco_eval.encoders.architectures import Architecture, architecture, build_backbone
from moco_eval.encoders.foreign import kind_of
from moco_eval.encoders.infer import OPTIONAL, expected, nearest, share, structure
from moco_eval.errors import InputError


def prove(source: str, tensors: dict[str, Tensor], arch: str, warnings: list[str]) -> nn.Module:
    """Build `arch`, load the tensors, and show that each arrived bit for bit.

    Args:
        source: for messages.
        tensors: the backbone's, under torchvision's names (timm's for a ViT), parameters and BN buffers alike.
        arch: a name that `architectures.architecture` knows.
        warnings: doubts are appended here.
    Raises:
        InputError: a tensor is missing, unexpected, of another shape or dtype, or not finite.
    """
    wanted = expected(arch)
    tensors = with_counts(tensors, wanted, warnings)
    _require_match(source, tensors, wanted, arch)
    require_finite(source, tensors)
    with torch.device("meta"):
        net = build_backbone(arch)
    if any(name not in wanted for name, _ in net.named_buffers()):
        net = build_backbone(arch)  # it computes tensors of its own, which no file holds
    # in one order in memory, whatever the file's: the same weights give the same features to the bit
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    net.load_state_dict(copies, assign=True)
    loaded = net.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)
    return net.eval()


def with_counts(tensors: dict[str, Tensor], wanted: Iterable[str], warnings: list[str]) -> dict[str, Tensor]:
    """The same with every batch norm's num_batches_tracked as torch has it; no forward pass in eval mode reads it.

    Args:
        wanted: the names that the network has.
        warnings: what was set or cast is appended here, once for backbone and head.
    """
    counts = [name for name in wanted if name.endswith(OPTIONAL)]
    absent = [name for name in counts if name not in tensors]
    zero = torch.zeros((), dtype=torch.int64)
    odd = {name: _as_count(tensors[name]) for name in counts if name in tensors and tensors[name].numel() == 1}
    odd = {name: count for name, count in odd.items() if (count.dtype, count.shape) != _kind(tensors[name])}
    if (absent or odd) and not any(warning.startswith(OPTIONAL) for warning in warnings):
        warnings.append(_counts_in_words(len(counts), len(absent), sorted({_stored(tensors[name]) for name in odd})))
    return tensors | odd | dict.fromkeys(absent, zero)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _counts_in_words(wanted: int, absent: int, stored: list[str]) -> str:
    if absent == wanted:
        return f"num_batches_tracked is absent ({absent} counts, as in old files) and was set to 0"
    said = [f"{absent} of {wanted} are absent and were set to 0"] if absent else []
    said += [f"stored as {', '.join(stored)}, taken as whole numbers"] if stored else []
    return f"num_batches_tracked, which no forward pass reads: {'; '.join(said)}"


def _stored(tensor: Tensor) -> str:
    shape = f" of the shape {size_words(tensor)}" if tensor.ndim else ""
    return f"{str(tensor.dtype).removeprefix('torch.')}{shape}"


def _as_count(tensor: Tensor) -> Tensor:
    """A whole number; 0 where half precision has run over."""
    value = tensor.reshape(())
    return value.to(torch.int64) if not value.is_floating_point() or value.isfinite() else torch.tensor(0)


def _require_match(source: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], arch: str) -> None:
    shared = [name for name in wanted if name in tensors]
    wrong: dict[str, list[str]] = {
        "have another shape": [name for name in shared if tensors[name].shape != wanted[name].shape],
        "are missing": [name for name in wanted if name not in tensors],
        "are unexpected": [name for name in tensors if name not in wanted],
        "have another dtype": [name for name in shared if tensors[name].dtype != wanted[name].dtype],
    }
    wrong = {problem: names for problem, names in wrong.items() if names}
    if not wrong:
        return
    counts = ", ".join(f"{len(names)} {problem}" for problem, names in wrong.items())
    problem, names = next(iter(wrong.items()))
    raise InputError(
        f"{source}: of the {len(wanted)} backbone tensors of {arch}, {counts} "
        f"(first: {names[0]}{_detail(problem, names[0], tensors, wanted)}). {_explanation(tensors, arch, wrong)}"
    )


def _detail(problem: str, name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    if problem == "have another shape":
        return f", {size_words(tensors[name])}, expected {size_words(wanted[name])}"
    if problem == "have another dtype":
        return f", {tensors[name].dtype}, expected {wanted[name].dtype}"
    return f", {size_words(wanted[name] if problem == 'are missing' else tensors[name])}"


def size_words(tensor: Tensor) -> str:
    """Such as '64x3x7x7'."""
    return "x".join(map(str, tensor.shape)) or "a single number"


def _explanation(tensors: Mapping[str, Tensor], arch: str, wrong: Mapping[str, list[str]]) -> str:
    """The nearest explanation of a mismatch, and the way out."""
    best, shared = nearest(tensors)
    if best != arch and shared > max(0.9, share(tensors, arch)):
        stem = " (CIFAR stem)" if _cifar_stem(best) and not _cifar_stem(arch) else ""
        return f"This looks like {best}{stem}: try --arch {best}."
    if wrong.keys() == {"are missing"} and _is_cut(wrong["are missing"], expected(arch)):
        return f"The rest is a {arch}: the file is incomplete; save it again where it was trained."
    if kind := kind_of(tensors):
        return f"It is {kind.sentence}: {kind.way_out}."
    if structure(tensors) != structure(expected(arch)):
        return f"The file holds {structure(tensors)}, which is not built here: moco_eval.wrap judges any network."
    if wrong.keys() == {"have another dtype"}:
        kinds = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in wrong["have another dtype"]})
        return f"Weights are read as floating-point numbers: have them saved in float32, not in {', '.join(kinds)}."
    if wrong.keys() == {"are unexpected"}:
        return (
            f"The rest is a {arch}: a network with more to compute than that is not built here (moco_eval.wrap judges "
            "any); save a head of your own in another file."
        )
    return f"The rest is a {arch}: the file is incomplete or was altered; save it again where it was trained."


def _is_cut(missing: list[str], wanted: Mapping[str, Tensor]) -> bool:
    """Whether a few tensors are missing here and there, and not all of a kind, as other norm layers would."""
    kinds = {name.rpartition(".")[2] for name in missing}
    whole = any(all(name in missing for name in wanted if name.endswith(f".{kind}")) for kind in kinds)
    return len(missing) <= len(wanted) // 10 and not whole


def _cifar_stem(name: str) -> bool:
    arch = architecture(name)
    return isinstance(arch, Architecture) and arch.cifar_stem


def require_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError for a value that is infinite or not a number."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{source}: {name} has {count} values that are not finite, of {tensor.numel()}; the training that "
                "wrote it diverged: take an earlier checkpoint"
            )


# Doubts


def doubts(tensors: Mapping[str, Tensor], folded: bool = False) -> list[str]:
    """What makes a network look as if it had not been trained, or its features unsound, in words.

    Args:
        folded: its batch norms have their statistics in scale and shift.
    """
    means = [tensor for name, tensor in tensors.items() if name.endswith("running_mean")]
    variances = [tensor for name, tensor in tensors.items() if name.endswith("running_var")]
    initial = all(not mean.any() for mean in means) and all((variance == 1).all() for variance in variances)
    reasons = []
    if means and initial and not folded:
        reasons.append("every BN running statistic is at its initial value: this encoder never saw data in train mode")
    if untrained(tensors):
        reasons.append("every norm layer is as initialised, scale 1 (or 0) and shift 0: these weights look untrained")
    if any((variance < 0).any() for variance in variances):
        reasons.append("a BN running variance is negative: the features will not be finite")
    return reasons


def untrained(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all scales of norm layers are 1, or 0 as a zero-initialised residual has them, and all shifts 0."""
    scales = [name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.ndim == 1]
    shifts = [name.removesuffix("weight") + "bias" for name in scales]
    return bool(scales) and all(
        bool((tensors[scale] == tensors[scale].flatten()[0]).all())
        and float(tensors[scale].flatten()[0]) in (0.0, 1.0)
        and not tensors.get(shift, torch.zeros(1)).any()
        for scale, shift in zip(scales, shifts)
    )

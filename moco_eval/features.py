"""Features of a whole data set, in order, from however many processes."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from moco_eval.data.images import ImageSet
from moco_eval.data.loader import Batches, Examples, Normalise, clean_transform, loader, resident
from moco_eval.encoders.build import architecture
from moco_eval.encoders.encoder import Encoder, Preprocessing
from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime import autocast, gather, progress, rank, to_device, world_size


def network(encoder: Encoder, feature: str) -> nn.Module:
    """What gives a feature: (N, 3, H, W) to (N, D).

    Args:
        feature: `pooled`, the backbone's output; `head`, the projection head's; or a stage of the network, averaged
            over its places (`layer3` of a ResNet) or its normalised class token (`blocks.8` of a ViT).
    Raises:
        InputError: a head or stage that the encoder does not have.
    """
    if feature == "pooled":
        return encoder.backbone
    if feature != "head":
        return _Stage(encoder, feature)
    if encoder.head is None:
        raise InputError(
            f"{encoder.source} has no projection head ({encoder.origin}); evaluate its pooled feature instead "
            "(--feature pooled)"
        )
    return nn.Sequential(encoder.backbone, encoder.head)


class _Stage(nn.Module):
    """The backbone up to one of its stages."""

    def __init__(self, encoder: Encoder, stage: str):
        super().__init__()
        stages = architecture(encoder.arch).stages if encoder.tensors_loaded else ()
        if stage not in stages:
            has = f"it has pooled, head and {', '.join(stages)}" if stages else "it has pooled alone"
            raise InputError(f"--feature {stage!r} is no stage of {encoder.arch}; {has}")
        self.backbone, self.stage = encoder.backbone, stage

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.stage.startswith("blocks."):
            block = int(self.stage.partition(".")[2])
            return self.backbone.get_intermediate_layers(images, n=[block], return_prefix_tokens=True, norm=True)[0][1][
                :, 0
            ]
        x = images
        for name, module in self.backbone.named_children():
            x = module(x)
            if name == self.stage:
                break
        return x.mean(dim=(2, 3))


@torch.no_grad()
def extract(
    net: Callable[[torch.Tensor], torch.Tensor],
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    title: str = "features",
    tolerant: bool = False,
) -> torch.Tensor:
    """Features of the clean images, (images, D) float32 on the CPU, in the data set's order, on every rank.

    Args:
        net: (N, 3, H, W) to (N, D), in evaluation mode.
        batch_size: images per step, over all processes.
        tolerant: put a grey image in the place of one that cannot be read.
    Raises:
        InputError: an image cannot be read; it names the file.
        RunFailed: a feature is not finite.
    """
    batches = Batches(len(images), batch_size, 0, range(1), shuffle=False, drop_last=False)
    rows = []
    with progress(title, len(batches), batch_size) as advance:
        clean = _in_memory if _fits_as_it_is(images, preprocessing) else _loaded
        for step, views in enumerate(clean(images, preprocessing, batches, device, workers, tolerant)):
            with autocast(device, precision):
                mine = net(views).flatten(1).float()[: batches.mine(step)]
            rows.append(in_order(mine, batches.size(step)).cpu())
            advance()
    features = torch.cat(rows)
    if not features.isfinite().all():
        raise RunFailed(f"{title}: the encoder gives features that are not finite; are its BN statistics damaged?")
    return features


def _fits_as_it_is(images: ImageSet, preprocessing: Preprocessing) -> bool:
    """Whether the images are in memory and neither resized nor cropped."""
    side = preprocessing.size
    return images.pixels is not None and images.pixels.shape[1:3] == (side, side) and preprocessing.resize == side


def _in_memory(
    images: ImageSet, preprocessing: Preprocessing, batches: Batches, device: torch.device, *_: object
) -> Iterator[torch.Tensor]:
    """Normalised images of each batch, from the device's memory."""
    pixels, normalise = resident(images, device), Normalise(preprocessing)
    for items in batches:
        yield normalise(pixels[to_device(torch.tensor([index for _, index in items]), device)])


def _loaded(
    images: ImageSet, preprocessing: Preprocessing, batches: Batches, device: torch.device, workers: int, tolerant: bool
) -> Iterator[torch.Tensor]:
    """Resized, cropped and normalised images of each batch, from loader workers."""
    examples = Examples(images, clean_transform(preprocessing), tolerant=tolerant)
    for views, _, _ in loader(examples, batches, workers, device):
        yield views.to(device, non_blocking=True)


def in_order(mine: torch.Tensor, batch: int) -> torch.Tensor:
    """All rows of a batch from the ranks' contiguous shares of it; see `data.loader.share`."""
    ranks = world_size()
    if ranks == 1:
        return mine
    bounds = [batch * r // ranks for r in range(ranks + 1)]
    longest = max(bounds[r + 1] - bounds[r] for r in range(ranks))
    assert len(mine) == bounds[rank() + 1] - bounds[rank()]
    padded = mine.new_zeros((longest, *mine.shape[1:]))
    padded[: len(mine)] = mine
    everyone = gather(padded)
    return torch.cat([everyone[r * longest : r * longest + bounds[r + 1] - bounds[r]] for r in range(ranks)])

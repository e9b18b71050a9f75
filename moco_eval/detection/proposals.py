"""The region proposal network: where an object may be, on one map or on the levels of a pyramid.

Source: Ren et al. 2015, arXiv:1506.01497, with detectron2's definitions (facebookresearch/detectron2@02b5c4e,
modeling/anchor_generator.py and proposal_generator/): anchors, filtering and losses.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from moco_eval.config.detection import Anchors, Rpn
from moco_eval.detection.matching import clip, decode, encode, match, sample, solid

Target = dict[str, Tensor]
Size = tuple[int, int]  # height, width


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Boxes around the origin, sizes before ratios, (S * R, 4): of area size squared, height over width the ratio."""
    side = torch.tensor(sizes, dtype=torch.float64)[:, None]
    slim = torch.tensor(ratios, dtype=torch.float64).sqrt()[None, :]
    width, height = (side / slim).flatten(), (side * slim).flatten()
    return (torch.stack((-width, -height, width, height), dim=1) / 2).float()


def anchors_on(cells: Tensor, stride: int, height: int, width: int) -> Tensor:
    """The anchors at each place of a map, row by row, (height * width * A, 4); the first place is pixel (0, 0)."""
    rows, columns = (stride * torch.arange(side, device=cells.device, dtype=cells.dtype) for side in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
    return (places + cells).reshape(-1, 4)


def _one_after_the_other(convolutions: list[nn.Conv2d]) -> nn.Sequential:
    """With ReLU between them."""
    layers = OrderedDict[str, nn.Module]()
    for number, convolution in enumerate(convolutions):
        layers |= {f"relu{number}": nn.ReLU()} if layers else {}
        layers[f"conv{number}"] = convolution
    return nn.Sequential(layers)


class ProposalNetwork(nn.Module):
    """A 3x3 convolution, then for each anchor a logit (object or not) and how its box is moved; one for all levels.

    `convolutions`: how many of the first kind. Scores and boxes are in fp32 whatever the precision: bf16 places a box
    to three digits only.
    """

    def __init__(self, channels: int, strides: Sequence[int], anchors: Anchors, rpn: Rpn, convolutions: int = 1):
        super().__init__()
        levels = [anchors.sizes] if len(strides) == 1 else [(size,) for size in anchors.sizes]
        self.strides, self.rpn = strides, rpn
        for level, sizes in enumerate(levels):
            self.register_buffer(f"cells_{level}", cell_anchors(sizes, anchors.ratios), persistent=False)
        count = len(self.cells[0])
        hidden = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convolutions)]
        self.conv: nn.Module = hidden[0] if convolutions == 1 else _one_after_the_other(hidden)
        self.logits = nn.Conv2d(channels, count, 1)
        self.deltas = nn.Conv2d(channels, 4 * count, 1)
        for layer in (*hidden, self.logits, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @property
    def cells(self) -> list[Tensor]:
        """The anchors of a place, level by level."""
        return [self.get_buffer(f"cells_{level}") for level in range(len(self.strides))]

    def forward(
        self, maps: list[Tensor], sizes: list[Size], targets: list[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of each image, (P, 4), best first; in training also the losses."""
        logits, deltas = zip(*[self.predict(level) for level in maps])
        anchors = [
            anchors_on(cells, stride, *level.shape[-2:]) for cells, stride, level in zip(self.cells, self.strides, maps)
        ]
        losses = {}
        if self.training:
            assert targets is not None
            losses = self.losses(torch.cat(anchors), torch.cat(logits, dim=1), torch.cat(deltas, dim=1), targets)
        return self._propose(anchors, logits, deltas, sizes), losses

    def predict(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, H * W * A) and deltas (N, H * W * A, 4) of a map, in the order of its anchors."""
        x = F.relu(self.conv(level))
        logits = self.logits(x).float().permute(0, 2, 3, 1).flatten(1)
        deltas = self.deltas(x).float().permute(0, 2, 3, 1).reshape(*logits.shape, 4)
        return logits, deltas

    def losses(self, anchors: Tensor, logits: Tensor, deltas: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Binary cross entropy and L1, summed over the anchors sampled and divided by how many were asked for."""
        positive, negative, wanted = [], [], []
        for number, boxes in enumerate(target["boxes"] for target in targets):
            matched, kind = match(boxes, anchors, self.rpn.background_iou, self.rpn.foreground_iou, closest=True)
            foreground, background = self.sample(kind)
            wanted.append(encode(boxes[matched[foreground]], anchors[foreground]))
            positive.append(foreground + number * len(anchors))
            negative.append(background + number * len(anchors))
        objects = torch.cat(positive)
        chosen = logits.flatten()[torch.cat((objects, *negative))]
        truth = (torch.arange(len(chosen), device=chosen.device) < len(objects)).to(chosen)
        asked = self.rpn.batch_per_image * len(targets)
        classes = F.binary_cross_entropy_with_logits(chosen, truth, reduction="sum")
        places = F.l1_loss(deltas.flatten(0, 1)[objects], torch.cat(wanted), reduction="sum")
        return {"loss_rpn_cls": classes / asked, "loss_rpn_loc": places / asked}

    def sample(self, kind: Tensor) -> tuple[Tensor, Tensor]:
        """The anchors of an image that are trained on: places of foreground and of background."""
        return sample(kind, self.rpn.batch_per_image, self.rpn.positive_fraction)

    @torch.no_grad()
    def _propose(
        self, anchors: Sequence[Tensor], logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: list[Size]
    ) -> list[Tensor]:
        """The best of each level by logit, moved; then, image by image, what is left of them."""
        before = self.rpn.pre_nms_train if self.training else self.rpn.pre_nms_test
        boxes, scores, levels = [], [], []
        for level, (grid, logit, delta) in enumerate(zip(anchors, logits, deltas)):
            best, places = logit.topk(min(before, logit.shape[1]), dim=1)
            moves = delta.gather(1, places[:, :, None].expand(-1, -1, 4))
            boxes.append(decode(moves, grid[places]))
            scores.append(best)
            levels.append(torch.full_like(places[0], level))
        level_of = torch.cat(levels)
        images = zip(torch.cat(boxes, dim=1), torch.cat(scores, dim=1), sizes)
        return [self._suppress(*image, level_of) for image in images]

    def _suppress(self, boxes: Tensor, scores: Tensor, size: Size, levels: Tensor) -> Tensor:
        """Cut to the image, without the empty, after NMS level by level: the best of all levels by logit."""
        after = self.rpn.post_nms_train if self.training else self.rpn.post_nms_test
        finite = boxes.isfinite().all(dim=1) & scores.isfinite()
        boxes = clip(boxes, size)
        keep = finite & solid(boxes)
        boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        return boxes[batched_nms(boxes, scores, levels, self.rpn.nms)[:after]]

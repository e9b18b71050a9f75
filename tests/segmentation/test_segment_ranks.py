"""Two gloo processes train one segmentation: the losses of one process, its images, its interrupted state."""

import pytest
import torch
from ranks import run_ranks
from segmentation_runs import CPU, encoder, tiny

from moco_eval.data.masks.folder import read_mask_folder
from moco_eval.data.masks.samples import IGNORED
from moco_eval.data.masks.scenes import write_mask_scenes
from moco_eval.results.record import Cost
from moco_eval.runtime import rank
from moco_eval.runtime.batch_norm import share_statistics
from moco_eval.runtime.stop import Stop
from moco_eval.segmentation import inputs
from moco_eval.segmentation.evaluate import counts_of_heads
from moco_eval.segmentation.networks import build_segmenter
from moco_eval.segmentation.train import Trainer

NAMES = ("digits_fcn16s", "digits_linear")


def few_steps(folder, name):
    """Losses of three steps, in double precision, on images of which one process has fewer labelled pixels; counts."""
    config = tiny(name, "batch_size=4")
    data = read_mask_folder(folder / "scenes", classes=("background", *"0123456789"))
    place = rank.rank(), rank.world_size()
    model = share_statistics(build_segmenter(encoder(), 11, config), "sync").double()
    for body in model.outside:
        body.double()
    model.enlarged = _in_double(model)
    trainer = Trainer(model, config, folder / f"{name}_{place[1]}", CPU, Cost("cpu"))
    model.train()
    losses = []
    for number, (images, masks) in enumerate(inputs.training_batches(data, data.train, config, 0, (0, 0, 0), place)):
        places = range(place[0] * len(masks), (place[0] + 1) * len(masks))
        for row, at in enumerate(places):
            masks[row, : 12 * at] = IGNORED
        losses.append(trainer.step((images, masks), number)["loss"])
    with Stop() as stop:
        counts = counts_of_heads(model, data, data.test, config, CPU, stop, [0])
    return torch.stack(losses), torch.from_numpy(counts)


def _in_double(model):
    """`enlarged` without its fp32, so that only the arithmetic of several processes differs."""

    def enlarged(scores, size):
        full = [side + model._missing(side) for side in size]
        align = model.recipe.align_corners
        large = torch.nn.functional.interpolate(scores, full, mode="bilinear", align_corners=align)
        return large[:, :, : size[0], : size[1]]

    return enlarged


def of_rank(folder):
    return {name: few_steps(folder, name) for name in NAMES}


@pytest.mark.slow
def test_two_processes_have_the_losses_and_the_answers_of_one(tmp_path):
    write_mask_scenes(tmp_path / "scenes", train=6, test=3)
    alone, both = of_rank(tmp_path), run_ranks(of_rank, tmp_path, tmp_path)
    for name in NAMES:
        for losses, counts in (each[name] for each in both):
            assert torch.allclose(losses, alone[name][0], atol=1e-6, rtol=0)
            assert torch.equal(counts, alone[name][1])

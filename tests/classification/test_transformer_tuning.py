"""Fine-tuning of ViTs by DeiT's, MAE's, iBOT's and MoCo v3's recipes: their settings, and each part by itself."""

import json
import math
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import in_process
from PIL import Image
from ranks import run_ranks
from test_finetune import bits, same, task, tiny_encoder, watched
from torch import nn

from moco_eval.classification import finetune
from moco_eval.classification.judge import canonical, check, judge, judge_in_memory
from moco_eval.classification.protocols import by_name, load_config
from moco_eval.classification.task import Task
from moco_eval.classification.training_loop import Loop
from moco_eval.classification.transformer_tuning import adamw, adapted, drop_paths
from moco_eval.config import load as configs
from moco_eval.config.classification import FinetuneAugmentation, FinetuneConfig
from moco_eval.config.deviations import differences
from moco_eval.config.learning_rate import rate_of_step
from moco_eval.data.loader import Batches, draw_seed
from moco_eval.data.training_cut import posterize, rand_augment, training_cut
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, Interrupted
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime.device import seeded_host

CPU = torch.device("cpu")
VIT = "random:vit_narrow_patch16_32"
SETTINGS = ["batch_size=16", "mixup.groups=2", "schedule.epochs=3", "schedule.warmup_epochs=1", "workers=0"]
TRANSFER = ("mocov3-transfer", "mocov3-transfer-cifar100", "mocov3-transfer-flowers", "mocov3-transfer-pets")


def shipped(name: str, *settings: str) -> FinetuneConfig:
    return configs.load(name, "finetune", FinetuneConfig, settings)


def recipe(*settings: str, name: str = "mocov3-deit") -> FinetuneConfig:
    return shipped(name, *SETTINGS, *settings)


def vit_task(**rest) -> Task:
    """Ninety digits, and a transformer of two narrow blocks."""
    return task(encoder=load(VIT), **rest)


def augmentation(**settings) -> FinetuneAugmentation:
    return FinetuneAugmentation.model_validate({"rand_augment": {}, "interpolation": "bicubic", **settings})


# As published


@pytest.mark.parametrize(
    ("name", "base", "per", "decay", "layers", "head", "mixing", "paths", "repeats"),
    [
        ("mocov3-deit", 5e-4, 512, 0.05, 1, "deit", (0.8, 1.0, 16), 0.1, 3),
        ("mocov3-transfer", 3e-4, 512, 0.1, 1, "deit", (0.8, 1.0, 8), 0.1, 1),
        ("mocov3-transfer-cifar100", 3e-4, 512, 0.1, 1, "deit", (0.5, 1.0, 8), 0.1, 1),
        ("mocov3-transfer-flowers", 3e-4, 512, 0.3, 1, "deit", None, 0.1, 1),
        ("mocov3-transfer-pets", 3e-4, 512, 0.1, 1, "deit", (0.8, 0.0, 8), 0.0, 1),
        ("mae", 5e-4, 256, 0.05, 0.65, "near_zero", (0.8, 1.0, 32), 0.1, 1),
        ("ibot", 4e-3, 1024, 0.05, 0.65, "near_zero", (0.8, 1.0, 8), 0.2, 1),
    ],
)
def test_the_recipes_are_as_published(name, base, per, decay, layers, head, mixing, paths, repeats):
    """deit@7e160fe, main.py; moco-v3@c349e6e, transfer/README.md; mae@efb2a80, FINETUNE.md; ibot@da316d8, run.sh."""
    config = shipped(name)
    settings = config.optimizer
    assert (settings.kind, config.batch_size, settings.lr) == ("adamw", 1024, pytest.approx(base * 1024 / per))
    assert (settings.weight_decay, settings.layer_decay, config.head_init) == (decay, layers, head)
    assert (config.mixup and (config.mixup.alpha, config.mixup.cutmix, config.mixup.groups)) == mixing
    assert (config.drop_path, config.repeated_augmentation, config.smoothing) == (paths, repeats, 0.1)
    assert config.drop_last and config.pooling == ("mean" if name == "mae" else None)
    cut = config.augmentation
    if name in TRANSFER:
        assert (cut.crop_scale, cut.interpolation, cut.rand_augment, cut.erasing) == ((0.05, 1), "bilinear", None, 0)
        assert config.test_interpolation == "bilinear"
    else:
        strength = (cut.rand_augment.magnitude, cut.rand_augment.magnitude_std)
        assert (cut.crop_scale, cut.interpolation, strength, cut.erasing) == ((0.08, 1), "bicubic", (9, 0.5), 0.25)
        assert config.test_interpolation == ("bilinear" if name == "ibot" else "bicubic")
    if config.expect:
        assert shipped(name, "drop_path=0.3").expect is None


@pytest.mark.parametrize(("name", "epochs", "warmup"), [("mocov3-deit", 150, 5), ("mocov3-transfer", 100, 3)])
def test_deits_rates_are_timms_stepped_after_each_epoch(name, epochs, warmup):
    from timm.scheduler import CosineLRScheduler

    config = shipped(name)
    lr, schedule = config.optimizer.lr, config.schedule
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    settings = {"t_initial": epochs, "lr_min": 1e-5, "warmup_t": warmup, "warmup_lr_init": 1e-6, "cycle_limit": 1}
    scheduler, rates = CosineLRScheduler(theirs, **settings), []
    for epoch in range(epochs):
        rates.append(theirs.param_groups[0]["lr"])
        scheduler.step(epoch)
    ours = [rate_of_step(schedule, lr, 7 * epoch + step, 7) for epoch in range(epochs) for step in (0, 6)]
    assert ours[::2] == ours[1::2] == pytest.approx(rates)
    assert rates[:3] == pytest.approx([1e-6, 1e-6, 1e-6 + (lr - 1e-6) / warmup])
    cosine = [1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi * t / epochs)) / 2 for t in (warmup, epochs - 2)]
    assert [rates[warmup + 1], rates[-1]] == pytest.approx(cosine)


@pytest.mark.parametrize(("name", "lr", "warmup"), [("mae", 2e-3, 5), ("ibot", 4e-3, 20)])
def test_maes_rates_rise_and_fall_step_by_step(name, lr, warmup):
    schedule, per_epoch = shipped(name).schedule, 1251
    end, last = warmup * per_epoch, 100 * per_epoch - 1
    rates = [rate_of_step(schedule, lr, step, per_epoch) for step in (0, 1, end - 1, end, last)]
    left = (100 - warmup) * per_epoch
    final = 1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * (left - 1) / left)) / 2
    assert rates == pytest.approx([0, lr / end, lr * (end - 1) / end, lr, final], rel=1e-12)


@pytest.mark.parametrize(
    ("protocol", "data", "encoder", "differs"),
    [
        ("finetune/mocov3-transfer@1", "flowers102", VIT, {"optimizer.weight_decay", "mixup.alpha"}),
        ("linear/mocov3@1", "digits", VIT, {"optimizer.lr"}),
    ],
)
def test_in_python_too_a_protocol_takes_the_config_of_the_task(protocol, data, encoder, differs, monkeypatch):
    import moco_eval as me

    train, test = (replace(part, name=data) for part in me.images("digits"))
    monkeypatch.setattr("moco_eval.api.judged", lambda task, config, output, place: (task, config))
    task, config = me.judge(me.load(encoder), train, test, protocol)
    deviations = differences(config, canonical(by_name(protocol), task))
    plain = load_config(by_name(protocol).name.name, by_name(protocol).name.kind)
    assert deviations == []
    assert differs <= {words.split()[0] for words in differences(plain, canonical(by_name(protocol), task))}


def test_moco_v3s_transfer_has_settings_of_its_own_by_data_set():
    work = task()
    names = [
        finetune.recipe_for("mocov3-transfer", replace(work, train=replace(work.train, name=name)))
        for name in ("cifar10", "cifar100", "flowers102", "pets")
    ]
    assert names == list(TRANSFER)
    assert finetune.recipe_for("finetune/mocov3-transfer", work) == "mocov3-transfer"
    assert finetune.recipe_for("lightly", replace(work, train=replace(work.train, name="pets"))) == "lightly"


@pytest.mark.parametrize("name", ["lightly", "openselfsup-1percent", "openselfsup-10percent", "digits"])
def test_configs_of_before_are_dumped_as_before(name):
    """A run directory that was begun before goes on, and its record stays the same."""
    dumped = shipped(name).model_dump(mode="json")
    known = {"protocol", "batch_size", "precision", "workers", "seed", "optimizer", "head_lr", "head_init", "schedule"}
    assert dumped.keys() == known | {"augmentation", "bn_groups", "drop_last", "test_every", "expect"}
    assert dumped["optimizer"].keys() == {"lr", "sgd_momentum", "weight_decay"}
    assert dumped["schedule"].keys() == {"kind", "epochs", "milestones", "gamma"}
    assert dumped["augmentation"].keys() == {"crop_scale", "flip"}


# Parameters


def test_each_parameter_has_the_rate_of_its_layer():
    """0.65 to the power of the layers above: embeddings are 0, block i is i + 1, norm and head last."""
    encoder, config = load("random:vit_tiny_patch16_32"), recipe(name="mae")
    net = finetune.new_classifier(encoder, 10, config, 0)
    optimizer, multiples = adamw(net, config.optimizer)
    names = {parameter: name for name, parameter in net.named_parameters()}
    found = {
        names[parameter]: (multiple, group["weight_decay"])
        for group, multiple in zip(optimizer.param_groups, multiples, strict=True)
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    for name, (multiple, decay) in found.items():
        part = name.removeprefix("backbone.").split(".")
        embeds = part[0] in ("cls_token", "pos_embed", "patch_embed")
        layer = 0 if embeds else int(part[1]) + 1 if part[0] == "blocks" else 13
        assert multiple == pytest.approx(0.65 ** (13 - layer)), name
        plain = name.endswith(".bias") or "norm" in name or part[0] in ("cls_token", "pos_embed")
        assert decay == (0 if plain else 0.05), name
    assert {found[name][0] for name in ("backbone.fc_norm.weight", "head.weight")} == {1}


def test_the_last_norm_is_in_the_heads_layer_with_the_class_token_too():
    encoder, config = load(VIT), recipe(name="ibot")
    net = finetune.new_classifier(encoder, 10, config, 0)
    optimizer, multiples = adamw(net, config.optimizer)
    ones = [group for group, multiple in zip(optimizer.param_groups, multiples, strict=True) if multiple == 1]
    sizes = sorted(tuple(parameter.shape) for group in ones for parameter in group["params"])
    assert sizes == [(10,), (10, 48), (48,), (48,)]


def test_the_rates_of_a_step_are_the_layers():
    work, config = vit_task(), recipe("optimizer.layer_decay=0.5", "mixup=null")
    learner = finetune.EndToEnd(work, config, 5, 0, CPU)
    for _ in range(11):
        learner.train_step(torch.randn(4, 3, 32, 32), torch.arange(4), 0, 4)
    rate = rate_of_step(config.schedule, config.optimizer.lr, 10, 5)
    assert sorted({group["lr"] for group in learner.optimizer.param_groups}) == pytest.approx(
        [rate * 0.5**power for power in (3, 2, 1, 0)]
    )


# Drop-path and pooling


def test_drop_path_acts_in_training_alone_and_rises_by_the_block():
    net = load("random:vit_tiny_patch16_32").backbone
    drop_paths(net, 0.9)
    rates = [block.drop_path1.drop_prob for block in net.blocks]
    assert rates == pytest.approx([0.9 * i / 11 for i in range(12)])
    assert all(block.drop_path1 is not block.drop_path2 for block in net.blocks)
    images = torch.randn(1, 3, 32, 32).expand(16, -1, -1, -1)
    net.eval()
    clean = net(images)
    assert torch.equal(clean, load("random:vit_tiny_patch16_32").backbone.eval()(images))
    net.train()
    assert len({tuple(row) for row in net(images).tolist()}) == 16


def test_the_draws_of_drop_path_are_the_steps_and_not_the_hosts(monkeypatch):
    work, config = vit_task(), recipe("drop_path=0.5", "mixup=null")
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    losses = []
    for host in (1, 2):
        torch.manual_seed(host)
        before = torch.random.get_rng_state()
        learner = finetune.EndToEnd(work, config, 5, 0, CPU)
        losses.append([learner.train_step(images, labels, 0, 8) for _ in range(2)])
        assert torch.equal(torch.random.get_rng_state(), before)
    assert losses[0] == losses[1]
    later = finetune.EndToEnd(work, config, 5, 0, CPU)
    later.done = 1
    assert later.train_step(images, labels, 0, 8) != losses[0][0]
    other = finetune.EndToEnd(work, config, 5, 1, CPU)  # another seed; its head too
    other.net.load_state_dict(finetune.EndToEnd(work, config, 5, 0, CPU).net.state_dict())
    assert other.train_step(images, labels, 0, 8) != losses[0][0]
    monkeypatch.setattr(finetune, "rank", lambda: 1)
    assert finetune.EndToEnd(work, config, 5, 0, CPU).train_step(images, labels, 0, 8) != losses[0][0]


def test_mean_pooling_is_maes():
    """The mean of the last block's patch tokens without a norm, then a new layer norm."""
    encoder, images, backbone = load(VIT), torch.randn(5, 3, 32, 32), load(VIT).backbone
    nn.init.uniform_(backbone.norm.weight)  # as trained: it is not the new norm's
    nn.init.uniform_(backbone.norm.bias)
    net = adapted(backbone, recipe("drop_path=0", name="mae")).eval()
    kept = {}
    encoder.backbone.blocks[-1].register_forward_hook(lambda _module, _inputs, output: kept.update(tokens=output))
    encoder.backbone(images)
    mean = kept["tokens"][:, 1:].mean(1)
    expected = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(net(images), expected, atol=1e-5)
    assert isinstance(net.norm, nn.Identity) and net.fc_norm.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "settings", "lacking"),
    [
        ("mocov3-deit", [], "drop_path could adapt; add --set drop_path=0, or take --protocol lightly"),
        ("mae", [], "could adapt; add --set drop_path=0 --set optimizer.layer_decay=1 --set pooling=null, or"),
        ("ibot", ["drop_path=0"], "optimizer.layer_decay could adapt; add --set optimizer.layer_decay=1, or"),
    ],
)
def test_a_resnet_under_a_transformers_recipe_is_refused_in_a_line(name, settings, lacking):
    work = task(encoder=load("random:resnet18_quarter"))
    with pytest.raises(InputError, match=f"^resnet18_quarter is no transformer that .*{lacking}"):
        check(work, recipe(*settings, name=name))
    check(work, recipe("drop_path=0", "optimizer.layer_decay=1", "pooling=null", name=name))


def test_a_resnet_takes_the_rest_of_deits_recipe():
    judged = judge_in_memory(task(), recipe("drop_path=0", "schedule.epochs=2"), CPU)
    assert "drop_path 0.0 instead of 0.1" in judged.record["deviations"]


# Mixing


def restated(images, labels, classes, settings, smoothing, seed):
    """Mixup or cutmix of one group as their papers have it, with the draws of the same generator."""
    draws, flipped = np.random.RandomState(seed % 2**32), images.flip(0)
    assert draws.rand() < 1  # whether to mix at all
    cut = settings.cutmix and (not settings.alpha or draws.rand() < 0.5)
    share = draws.beta(*[settings.cutmix if cut else settings.alpha] * 2)
    if not cut:
        mixed = images * share + flipped * (1 - share)
    else:
        height, width = images.shape[-2:]
        tall, wide = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
        y, x = draws.randint(0, height), draws.randint(0, width)
        top, bottom = max(0, y - tall // 2), min(height, y + (tall + 1) // 2)
        left, right = max(0, x - wide // 2), min(width, x + (wide + 1) // 2)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = flipped[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    one = torch.zeros(len(labels), classes)
    for row, label in enumerate(labels.tolist()):
        one[row, label] += share
        one[row, labels.flip(0)[row]] += 1 - share
    return mixed, one * (1 - smoothing) + smoothing / classes


@pytest.mark.parametrize(("alpha", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixed_images_and_labels_are_the_naive_ones(alpha, cutmix):
    work, config = vit_task(), recipe(f"mixup.alpha={alpha}", f"mixup.cutmix={cutmix}")
    learner = finetune.EndToEnd(work, config, 5, 0, CPU)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    numpy_before, python_before = np.random.get_state()[1].copy(), random.getstate()
    for learner.done in range(6):
        views, shares = learner.mixed(images.clone(), labels)
        assert torch.allclose(shares.sum(1), torch.ones(16), atol=1e-6)
        for group, rows in enumerate((slice(0, 8), slice(8, 16))):
            seed = draw_seed(0, learner.done, group)
            pixels, wanted = restated(images[rows], labels[rows], 10, config.mixup, 0.1, seed)
            assert torch.allclose(views[rows], pixels, atol=1e-5)
            assert torch.allclose(shares[rows], wanted.float(), atol=1e-6)
    assert np.array_equal(np.random.get_state()[1], numpy_before) and random.getstate() == python_before


def test_a_process_mixes_its_own_groups(monkeypatch):
    """The second of two processes has the second half of the batch, mixed as one process mixes it."""
    learner = finetune.EndToEnd(vit_task(), recipe("drop_path=0"), 5, 0, CPU)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    views, shares = learner.mixed(images.clone(), labels)
    monkeypatch.setattr(finetune, "rank", lambda: 1)
    monkeypatch.setattr(finetune, "world_size", lambda: 2)
    mine = learner.mixed(images[8:].clone(), labels[8:])
    assert torch.equal(mine[0], views[8:]) and torch.equal(mine[1], shares[8:])


def test_each_image_counts_the_same_however_the_processes_share_them(monkeypatch):
    """Six of ten images in one of two processes, whose gradients DDP averages."""
    learner = finetune.EndToEnd(vit_task(), recipe("drop_path=0", "mixup=null", "smoothing=0"), 5, 0, CPU)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    wanted = nn.CrossEntropyLoss(reduction="sum")(learner.net(images), labels) * 2 / 10
    monkeypatch.setattr(finetune, "world_size", lambda: 2)
    assert learner.train_step(images, labels, 0, 10).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_loss_of_mixed_images_is_the_soft_cross_entropy():
    """Smoothed once: it is in the mixed labels."""
    from timm.loss import SoftTargetCrossEntropy

    learner, other = (finetune.EndToEnd(vit_task(), recipe("drop_path=0"), 5, 0, CPU) for _ in range(2))
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    views, shares = other.mixed(images.clone(), labels)
    wanted = SoftTargetCrossEntropy()(other.net(views), shares)
    assert learner.train_step(images.clone(), labels, 0, 16).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_smoothing_without_mixing_is_in_the_loss():
    work, config = vit_task(), recipe("mixup=null", "drop_path=0", name="mocov3-transfer-flowers")
    learner = finetune.EndToEnd(work, config, 5, 0, CPU)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    logs = learner.net(images).log_softmax(1)
    wanted = -(0.9 * logs[range(6), labels] + 0.1 * logs.mean(1)).mean()
    assert learner.train_step(images, labels, 0, 6).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("settings", [["mixup.groups=3"], ["mixup.groups=16"], ["drop_last=false"]])
def test_groups_without_pairs_are_refused(settings):
    with pytest.raises(InputError, match=r"mixup.groups .* batch_size that .* divides, not 16, and drop_last true"):
        recipe(*settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["head_lr=2"], "head_lr 2 is SGD's"),
        (["optimizer.kind=sgd", "optimizer.layer_decay=0.5"], "layer_decay 0.5 needs optimizer.kind adamw"),
        (["mixup.alpha=0", "mixup.cutmix=0"], "for no mixing say mixup: null"),
        (["schedule.kind=cosine"], "takes no warmup_epochs"),
        (["schedule.warmup_epochs=3"], "warmup_epochs 3 leave nothing of 3 epochs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        recipe(*settings)


# Images


def test_posterize_at_its_greatest_strength_leaves_black_and_else_is_timms():
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    for left in range(9):
        kept = np.asarray(image) & (255 << (8 - left) & 255)
        assert np.array_equal(np.asarray(posterize(image, left)), kept), left
    operations = rand_augment(Preprocessing(32, 32), augmentation()).step.ops
    (ours,) = [one.aug_fn for one in operations if one.name == "PosterizeIncreasing"]
    assert ours is posterize


@pytest.mark.parametrize("erasing", [0.0, 1.0])
def test_the_training_cut_is_timms_and_leaves_the_hosts_generators(erasing):
    """Crop and flip, then timm's RandAugment and erasing with the draws that follow from torch's."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 70, 3), np.uint8))
    pixels = Preprocessing(32)
    cut = training_cut(pixels, augmentation(erasing=erasing, crop_scale=[0.3, 1]))
    before = np.random.get_state()[1].copy(), random.getstate()
    changed = 0
    for seed in range(8):
        torch.manual_seed(seed)
        found = cut.on_device(cut.in_workers(image))
        torch.manual_seed(seed)
        crop = transforms.RandomResizedCrop(32, scale=(0.3, 1), interpolation=InterpolationMode.BICUBIC)
        plain = transforms.RandomHorizontalFlip()(crop(image))
        theirs = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
        with seeded_host(int(torch.randint(2**63 - 1, ()))):
            view = rand_augment_transform("rand-m9-mstd0.5-inc1", theirs)(plain)
        changed += view != plain
        wanted = transforms.Normalize(pixels.mean, pixels.std)(transforms.ToTensor()(view))
        if erasing:
            clean = wanted.clone()
            with seeded_host(int(torch.randint(2**63 - 1, ()))):
                wanted = RandomErasing(1.0, mode="pixel", device="cpu")(wanted)
            assert 0.01 < (wanted != clean).any(0).float().mean() < 0.4
        assert torch.allclose(found, wanted, atol=1e-6)
    assert changed > 3 and cut.floats == bool(erasing)
    assert np.array_equal(np.random.get_state()[1], before[0]) and random.getstate() == before[1]


def test_repeated_augmentation_is_deits_on_so_many_gpus():
    """Each part of a batch holds what that GPU's sampler gives, in its order; repeats are drawn apart."""
    from timm.data.distributed_sampler import RepeatAugSampler

    batches = Batches(600, 64, 0, range(1), shuffle=False, drop_last=True, repeats=3, groups=4)
    gpus = [list(RepeatAugSampler(range(600), 4, gpu, shuffle=False)) for gpu in range(4)]
    rows = list(batches)
    assert batches.steps_per_epoch == len(rows) == 8 and {len(row) for row in rows} == {64}
    for step, row in enumerate(rows):
        wanted = [index for gpu in gpus for index in gpu[16 * step : 16 * step + 16]]
        assert [index for _, index in row] == wanted
    items = [item for row in rows for item in row]
    assert len(set(items)) == len(items) == 512 and {epoch for epoch, _ in items} == {0, 1, 2}
    later = Batches(600, 64, 0, range(1, 2), shuffle=True, drop_last=True, repeats=3, groups=4)
    again = replace(later, first_step=5)
    assert list(later)[5:] == list(again) and {epoch for epoch, _ in next(iter(later))} == {3, 4, 5}


# Whole runs


def test_step_by_step_against_a_plain_restatement():
    """Losses and weights of torch's AdamW with a rate for each layer, without drop-path and mixing."""
    settings = ["drop_path=0", "mixup=null", "augmentation.rand_augment=null", "augmentation.erasing=0"]
    work, config = vit_task(), recipe(*settings, "repeated_augmentation=1", name="mae")
    images = work.training_images(0)
    batches = finetune.epoch_batches(len(images), config, 0)
    learner = finetune.EndToEnd(work, config, batches.steps_per_epoch, 0, CPU)
    plain = finetune.EndToEnd(work, config, batches.steps_per_epoch, 0, CPU).net
    named = dict(plain.named_parameters())
    layer = dict.fromkeys(named, 3) | {f"backbone.{name}": 0 for name in ("cls_token", "pos_embed")}
    layer |= {name: 0 for name in named if "patch_embed" in name}
    layer |= {name: int(name.split(".")[2]) + 1 for name in named if ".blocks." in name}
    groups = [
        {"params": [one], "weight_decay": 0.05 * (one.ndim > 1 and "token" not in name and "pos_embed" not in name)}
        for name, one in named.items()
    ]
    optimizer, theirs = torch.optim.AdamW(groups, 1.0), []
    cut = training_cut(work.preprocessing, config.augmentation)
    losses, seen = watched(learner), []
    step = learner.train_step
    learner.train_step = lambda views, *rest: seen.append((views.clone(), rest[0])) or step(views, *rest)
    Loop(learner, images, config, work.preprocessing, 0, None, CPU, batches, cut).run("finetune")
    for number, (views, labels) in enumerate(seen):
        rate = rate_of_step(config.schedule, config.optimizer.lr, number, batches.steps_per_epoch)
        for group, name in zip(optimizer.param_groups, named, strict=True):
            group["lr"] = rate * 0.65 ** (3 - layer[name])
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)(plain(views), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.detach())
    assert len(losses) == 15 and torch.allclose(torch.stack(losses), torch.stack(theirs), rtol=0, atol=1e-5)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(learner.net.state_dict()[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("steps", [7, pytest.param(5, marks=pytest.mark.slow)])
def test_interrupted_it_goes_on_and_ends_the_same(steps, tmp_path, monkeypatch):
    """Mixing, RandAugment, erasing and drop-path included, whatever the host's generators hold."""
    whole = judge(vit_task(), recipe(), tmp_path / "whole", CPU)
    step, count = finetune.EndToEnd.train_step, []

    def stops(self, *given):
        loss = step(self, *given)
        count.append(1)
        if len(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(finetune.EndToEnd, "train_step", stops)
    with pytest.raises(Interrupted, match=f"step {steps} of 15 is saved"):
        judge(vit_task(), recipe(), tmp_path / "parts", CPU)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    parts = judge(vit_task(), recipe(), tmp_path / "parts", CPU)
    assert len(count) == 15 and parts["trials"] == whole["trials"]
    scores = [np.load(tmp_path / name / "predictions.npz")["scores"] for name in ("whole", "parts")]
    assert np.array_equal(*scores)
    assert parts["preprocessing"]["interpolation"] == "bicubic"


def test_the_encoder_stays_and_its_last_norm_too():
    work = vit_task()
    before = bits(work.encoder.backbone)
    record = judge_in_memory(work, recipe("schedule.epochs=2", name="mae"), CPU).record
    assert same(before, bits(work.encoder.backbone)) and work.encoder.backbone.global_pool == "token"
    assert not any("pooling" in words for words in record["deviations"])


def test_images_of_224_pixels_are_the_transfers_own(monkeypatch):
    work = replace(vit_task(), encoder=replace(tiny_encoder(), preprocessing=Preprocessing(224)))
    small = replace(work, train=replace(work.train, name="cifar10"), test=replace(work.test, name="cifar10"))
    zeros = torch.zeros(len(work.test), 10)
    code = replace(finetune.CODE, run_trial=lambda *_: finetune.Outcome(zeros, 1), check=lambda *_: None)
    monkeypatch.setattr(finetune, "CODE", code)
    told = {}
    for name in ("mocov3-transfer", "mocov3-deit"):
        told[name] = judge_in_memory(small, shipped(name), CPU).record["deviations"]
    pixels = "images of 224 pixels (resized to 256) instead of 32 (32)"
    assert pixels in told["mocov3-deit"] and pixels not in told["mocov3-transfer"]


def on_ranks(folder) -> dict:
    judge(vit_task(), recipe("drop_path=0"), folder / "both", CPU)
    with pytest.raises(InputError, match=r"mixup\.groups 3 cannot be divided among 2 processes.*, such as 1$"):
        finetune.EndToEnd(vit_task(), recipe("batch_size=18", "mixup.groups=3"), 5, 0, CPU)
    paths = judge(vit_task(), recipe("drop_path=0.5", "schedule.epochs=2"), folder / "paths", CPU)
    return {"top1": paths["metrics"]["top1"]}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Each mixes its own groups with their own draws: the scores of one process, nearly."""
    judge(vit_task(), recipe("drop_path=0"), tmp_path / "alone", CPU)
    run_ranks(on_ranks, tmp_path, tmp_path)
    alone, both = (np.load(tmp_path / name / "predictions.npz")["scores"] for name in ("alone", "both"))
    assert np.allclose(alone, both, atol=1e-4)


@pytest.mark.slow
def test_the_command_on_digits(capfd, monkeypatch, tmp_path):
    arguments = ("finetune", "random:vit_narrow_patch16_64", "--dataset", "digits", "--protocol", "digits_vit")
    out, _ = in_process(capfd, monkeypatch, *arguments, "--device", "cpu", "--output", tmp_path)
    assert "finetune/mocov3-deit@1 digits top1" in out
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["over"] == "finetune" and "mixup.groups 2 instead of 16" in record["deviations"]
    assert record["metrics"]["top1"] > 30  # chance is 10

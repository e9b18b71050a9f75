"""Views of whole data sets: from files, from memory, by the published pipeline, by any number of workers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pil
import pytest
import torch
from PIL import Image
from torchvision import transforms

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.augment.decode import photo
from moco_eval.data.augment.steps import Crop, Flip, PilGaussianBlur, Solarize, ViewRecipe
from moco_eval.data.augment.two_views import TwoViews
from moco_eval.data.catalogue import open_images
from moco_eval.data.image_set import ImageSet
from moco_eval.data.loader import Batches, loader
from moco_eval.errors import InputError
from pretraining.feed import Feed
from pretraining.plan import plan
from pretraining.views import RECIPES, SECOND, recipes

CPU = torch.device("cpu")
ITEMS = [(0, 2), (0, 0), (3, 2), (1, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight photos: JPEG, grey JPEG, CMYK JPEG, PNG with a palette."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(pil.photos((120, 90), 8)):
        mode, suffix = {5: ("L", "jpg"), 6: ("CMYK", "jpg"), 7: ("P", "png")}.get(i, ("RGB", "jpg"))
        image.convert(mode).save(folder / f"{i}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def photos(folder) -> ImageSet:
    return open_images("flat", folder, "train")


def test_every_kind_of_file_gives_the_pixels_pil_gives(photos):
    for index in range(len(photos)):
        assert torch.equal(photo(photos, index), pil.tensor([photos.image(index)])[0])


def test_a_damaged_jpeg_is_left_to_pil(folder, tmp_path):
    data = (folder / "0.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_bytes(b"\xff\xd8\xffhello")
    images = open_images("flat", tmp_path, "train")
    for index, name in enumerate(("cut.jpg", "text.jpg")):
        with pytest.raises(InputError, match=name):
            photo(images, index)


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "cifar10"])
def test_views_of_files_are_the_published_ones_with_the_same_numbers(photos, name):
    views = TwoViews(photos, RECIPES[name], 48, seed=3)
    drawn, index, substitute, numbers = views.__getitems__(ITEMS)
    assert drawn.shape == (2, 4, 3, 48, 48) and index.tolist() == [2, 0, 2, 5] and (substitute == -1).all()
    for view, u in zip(drawn, numbers.numpy()):
        theirs = [pil.view(RECIPES[name], photos.image(i), u[n], 48) for n, (_, i) in enumerate(ITEMS)]
        assert (view.int() - pil.tensor(theirs).int()).abs().float().mean() < 0.6  # 16-bit resampling weights
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("reference", [False, True])
def test_a_view_belongs_to_seed_epoch_and_image_alone(photos, reference):
    views = TwoViews(photos, RECIPES["moco_v2"], 32, seed=3, reference=reference)
    together = views.__getitems__(ITEMS)[0]
    for n, item in enumerate(ITEMS):
        assert torch.equal(views.__getitems__([item])[0][:, 0], together[:, n])
        assert not torch.equal(*together[:, n])  # two views of an image
    other = TwoViews(photos, RECIPES["moco_v2"], 32, seed=4, reference=reference)
    assert not torch.equal(other.__getitems__(ITEMS)[0], together)


def test_cut_then_finished_elsewhere_is_the_whole(photos):
    whole = TwoViews(photos, RECIPES["moco_v2"], 32, 0)
    halves = TwoViews(photos, RECIPES["moco_v2"], 32, 0, finished=False)
    views, _, _, numbers = halves.__getitems__(ITEMS)
    expected = whole.__getitems__(ITEMS)[0]
    assert not torch.equal(views, expected)
    assert torch.equal(halves.finish(views, numbers.numpy()), expected)


def test_one_view_is_the_first_of_two(photos):
    one, two = (TwoViews(photos, RECIPES["moco_v2"], 32, 0, count=count) for count in (1, 2))
    first = one.__getitems__(ITEMS)[0]
    assert len(first) == 1 and torch.equal(first[0], two.__getitems__(ITEMS)[0][0])


def test_workers_deliver_what_the_main_process_would(photos):
    views, batches = TwoViews(photos, RECIPES["moco_v2"], 32, 0), Batches(8, 4, 0, range(3), True, True)
    alone, shared = (list(loader(views, batches, workers, CPU)) for workers in (0, 2))
    assert len(alone) == len(shared) == 6
    assert all(torch.equal(a, b) for left, right in zip(alone, shared) for a, b in zip(left, right))


def parts(transform) -> list:
    """A pipeline as nested lists of types and what they hold."""
    if isinstance(transform, transforms.Compose | transforms.RandomApply):
        inner = [parts(one) for one in transform.transforms]
        return [*inner, transform.p] if isinstance(transform, transforms.RandomApply) else inner
    held = {key: value for key, value in vars(transform).items() if not key.startswith("_") and key != "training"}
    return [type(transform).__name__, held]


def test_recipes_are_the_published_ones():
    """main_moco.py's two and the CIFAR-10 demo's, written out: order, ranges, probabilities."""
    jitter, v1_jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1), transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)
    published = {
        "moco_v1": [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([v1_jitter], p=1.0),
            transforms.RandomHorizontalFlip(),
        ],
        "moco_v2": [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([PilGaussianBlur((0.1, 2.0))], p=0.5),
            transforms.RandomHorizontalFlip(),
        ],
        "cifar10": [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
        ],
    }
    for name, steps in published.items():
        assert parts(RECIPES[name].reference(224)) == parts(transforms.Compose(steps))


def published_v3(crop_min: float, blur: float, solarize: float) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(crop_min, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([PilGaussianBlur((0.1, 2.0))], p=blur),
            transforms.RandomSolarize(128, p=solarize),
            transforms.RandomHorizontalFlip(),
        ]
    )


@pytest.mark.parametrize(("config", "crop_min"), [("moco_v3_r50", 0.2), ("moco_v3_vit_base", 0.08)])
def test_moco_v3_s_two_views_are_byol_s(config, crop_min):
    first, second = recipes(configs.load(config, "pretrain", PretrainConfig).views)
    assert parts(first.reference(224)) == parts(published_v3(crop_min, 1.0, 0.0))
    assert parts(second.reference(224)) == parts(published_v3(crop_min, 0.1, 0.2))


def test_each_view_has_its_own_recipe_on_the_device(photos, monkeypatch):
    """The same numbers by PIL, each view by its own steps."""
    pair = RECIPES["moco_v3"], SECOND["moco_v3"]
    drawn, _, _, numbers = TwoViews(photos, pair[0], 48, seed=3, second=pair[1]).__getitems__(ITEMS)
    for recipe, view, u in zip(pair, drawn, numbers.numpy()):
        theirs = [pil.view(recipe, photos.image(i), u[n], 48) for n, (_, i) in enumerate(ITEMS)]
        assert (view.int() - pil.tensor(theirs).int()).abs().float().mean() < 0.6
    whole, late = (TwoViews(photos, pair[0], 48, 3, finished=done, second=pair[1]) for done in (True, False))
    cuts, *_, u = late.__getitems__(ITEMS)
    one_by_one = whole.__getitems__(ITEMS)[0]
    assert torch.equal(late.finish(cuts, u.numpy()), one_by_one)
    for module in ("steps", "two_views"):
        monkeypatch.setattr(f"moco_eval.data.augment.{module}.is_for_all", lambda images, fuse: True)  # as on a GPU
    assert torch.equal(late.finish(cuts, u.numpy()), one_by_one)


@pytest.mark.parametrize("reference", [False, True])
def test_the_second_view_alone_is_solarised_in_both_backends(reference):
    """White images turn black where they are solarised."""
    steps = (Crop((0.5, 1.0)), Solarize(0.0)), (Crop((0.5, 1.0)), Solarize(0.2))
    digits = open_images("digits", None, "train")
    bright = replace(digits, pixels=np.full_like(digits.pixels, 255))
    views = TwoViews(bright, ViewRecipe(steps[0]), 8, 0, reference=reference, second=ViewRecipe(steps[1]))
    first, second = views.__getitems__([(0, index) for index in range(600)])[0]
    assert (first == 255).all()
    share = (second == 0).flatten(1).all(dim=1).float().mean().item()
    assert share == pytest.approx(0.2, abs=5 * (0.16 / 600) ** 0.5)


def settings(*changes: str) -> PretrainConfig:
    small = ("views.size=32", "batch_size=8", "bn_groups=4", "queue_size=64", "workers=0", "knn=null")
    return configs.load("digits", "pretrain", PretrainConfig, [*small, *changes])


def test_a_feed_from_memory_is_a_feed_from_workers():
    """The built-in digits, kept on the device or handed to a loader."""
    run = plan(settings(), "digits", None, 1)
    feed = Feed(run, CPU)
    assert feed.in_memory
    batches = [batch for (batch, _), _ in zip(feed(160), range(4))]
    views = TwoViews(run.images, RECIPES["digits"], 32, run.config.seed)
    wanted = list(loader(views, Batches(len(run.images), 8, run.config.seed, range(0, 2), True, True, 160), 0, CPU))[:4]
    for batch, (pair, index, _, _) in zip(batches, wanted):
        assert torch.equal(batch.index, index)
        assert torch.equal(batch.view_q, pair[0]) and torch.equal(batch.view_k, pair[1])


def test_a_feed_gives_each_view_its_own_recipe():
    run = plan(settings("views.recipe=moco_v3"), "digits", None, 1)
    batch, _ = next(Feed(run, CPU)(0))
    pixels = torch.from_numpy(run.images.pixels[batch.index]).permute(0, 3, 1, 2)
    for number, view in enumerate((batch.view_q, batch.view_k)):
        recipe = (RECIPES, SECOND)[number]["moco_v3"]
        u = recipe.uniforms(run.config.seed, np.zeros(8), batch.index.numpy(), number)
        assert torch.equal(view, recipe.apply(pixels, u, 32))


def test_the_reference_backend_feeds_published_views():
    run = plan(settings("views.backend=reference"), "digits", None, 1)
    feed = Feed(run, CPU)
    assert not feed.in_memory
    batch, unreadable = next(feed(0))
    views = TwoViews(run.images, RECIPES["digits"], 32, run.config.seed, reference=True)
    items = [(0, index) for index in batch.index.tolist()]
    assert torch.equal(batch.view_q, views.__getitems__(items)[0][0]) and unreadable == []


def test_a_recipe_that_does_not_start_with_a_crop_is_finished_image_by_image(photos):
    views = TwoViews(photos, RECIPES["digits"], 32, 0, finished=False)
    assert views.finished
    drawn, _, _, numbers = views.__getitems__(ITEMS)
    theirs = [pil.view(RECIPES["digits"], photos.image(i), numbers[1, n].numpy(), 32) for n, (_, i) in enumerate(ITEMS)]
    assert (drawn[1].int() - pil.tensor(theirs).int()).abs().float().mean() < 0.1


def statistics_of(views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over all pixels, and its histogram in 32 bins, (3, 32), sum 1."""
    channels = views.permute(1, 0, 2, 3).flatten(1)
    histogram = torch.stack([torch.bincount(channel.long() // 8, minlength=32) for channel in channels])
    values = channels.double()
    return torch.stack([values.mean(1), values.std(1)]), histogram / channels.shape[1]


def agree(views: torch.Tensor, others: torch.Tensor) -> bool:
    """Moments within 0.005 levels of 255, histograms within 0.001 in all."""
    (moments, colours), (expected, published) = statistics_of(views), statistics_of(others)
    return bool((moments - expected).abs().max() < 0.005 and (colours - published).abs().sum(1).max() < 0.001)


@pytest.mark.data
@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "cifar10"])
def test_two_thousand_photos_have_the_published_colours(shared_data, name):
    """By the same numbers as in PIL; a range changed by a tenth shows (a flip changes no colour)."""
    photos, size, recipe = real_photos(shared_data, name), (32 if name == "cifar10" else 64), RECIPES[name]
    items = [(0, index) for index in range(1000)]
    ours, _, _, numbers = TwoViews(photos, recipe, size, 0).__getitems__(items)
    theirs = torch.cat(
        [
            pil.tensor([pil.view(recipe, photos.image(i), u[n], size) for n, (_, i) in enumerate(items)])
            for u in numbers.numpy()
        ]
    )
    assert agree(ours.flatten(0, 1), theirs)
    for place, step in enumerate(recipe.steps):
        for changed in pil.changed_by_a_tenth(step).values():
            if not isinstance(step, Flip):
                other = ViewRecipe((*recipe.steps[:place], changed, *recipe.steps[place + 1 :]))
                assert not agree(TwoViews(photos, other, size, 0).__getitems__(items)[0].flatten(0, 1), theirs), changed


@pytest.mark.data
@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "cifar10"])
def test_two_thousand_photos_by_the_published_pipeline_itself(shared_data, name):
    """With draws of its own: as near as chance allows."""
    photos, size, recipe = real_photos(shared_data, name), (32 if name == "cifar10" else 64), RECIPES[name]
    items = [(0, index) for index in range(1000)]
    ours, theirs = (
        TwoViews(photos, recipe, size, seed, reference=seed == 1).__getitems__(items)[0].flatten(0, 1).double()
        for seed in (0, 1)
    )
    moments, expected = (torch.stack([views.mean((2, 3)), views.std((2, 3))]) for views in (ours, theirs))
    chance = (moments.var(1) / 2000 + expected.var(1) / 2000).sqrt()
    assert ((moments.mean(1) - expected.mean(1)) / chance).abs().max() < 4
    assert (statistics_of(ours)[1] - statistics_of(theirs)[1]).abs().sum(1).max() < 0.1


def real_photos(shared_data: Path, name: str) -> ImageSet:
    if name == "cifar10":
        return open_images("cifar10", shared_data, "train")
    paths = sorted((shared_data / "imagenette2-224").rglob("*.JPEG"))[:1000]
    pixels = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths])
    return ImageSet("flat", "train", (), None, "", pixels=pixels)

"""Augmentations of batches against PIL, operation by operation and recipe by recipe, with forced parameters.

Tolerances are mean absolute errors per pixel and channel, in levels of 0 to 255, over real photos.
"""

from functools import lru_cache, partial
from itertools import permutations, product

import numpy as np
import pil
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as tv

from moco_eval.data.augment import pixel_ops, steps, two_views
from moco_eval.data.augment.decode import cut
from moco_eval.data.augment.steps import Affine, Blur, Crop, Flip, Grey, Jitter, Solarize, ViewRecipe
from moco_eval.data.catalogue import open_images
from pretraining.views import RECIPES

PHOTOS = pil.photos((96, 80), 12)

OPERATIONS = {  # name: ours, PIL's, smallest and largest parameter, tolerance
    "brightness": (pixel_ops.brightness, tv.adjust_brightness, 0.6, 1.4, 0),
    "contrast": (pixel_ops.contrast, tv.adjust_contrast, 0.6, 1.4, 0),
    "saturation": (pixel_ops.saturation, tv.adjust_saturation, 0.6, 1.4, 0),
    "hue": (pixel_ops.hue, tv.adjust_hue, -0.5, 0.5, 0.02),
    "blur": (
        lambda images, sigma: pixel_ops.blur(images, sigma, 2),
        lambda image, sigma: image.filter(ImageFilter.GaussianBlur(radius=sigma)),
        0.1,
        2.0,
        0.01,
    ),
    "grey": (lambda images, _: pixel_ops.grey(images), lambda image, _: tv.rgb_to_grayscale(image, 3), 0, 1, 0),
    "solarize": (lambda images, _: pixel_ops.solarize(images), lambda image, _: ImageOps.solarize(image), 0, 1, 0),
    "flip": (lambda images, _: pixel_ops.flip(images), lambda image, _: ImageOps.mirror(image), 0, 1, 0),
}


def error(ours: torch.Tensor, theirs: list[Image.Image]) -> float:
    return (ours.int() - pil.tensor(theirs).int()).abs().float().mean().item()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_pixels_pil_gives(name):
    ours, theirs, low, high, tolerance = OPERATIONS[name]
    values = np.linspace(low, high, len(PHOTOS)).astype(np.float32)
    images = pil.tensor(PHOTOS)
    before = images.clone()
    result = ours(images, torch.from_numpy(values))
    assert result.dtype == torch.uint8 and torch.equal(images, before)
    assert error(result, [theirs(image, float(value)) for image, value in zip(PHOTOS, values)]) <= tolerance


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_treats_each_image_alone(name):
    ours, _, low, high, _ = OPERATIONS[name]
    values, images = torch.linspace(low, high, len(PHOTOS)), pil.tensor(PHOTOS)
    alone = [ours(images[n : n + 1], values[n : n + 1]) for n in range(len(images))]
    assert torch.equal(ours(images, values), torch.cat(alone))


@pytest.mark.parametrize("image", [Image.new("RGB", (9, 7), color) for color in ("black", "white", "#808080", "red")])
def test_plain_images_survive_every_operation(image):
    for ours, theirs, low, high, _ in OPERATIONS.values():
        values = torch.linspace(low, high, 5)
        expected = [theirs(image, float(value)) for value in values]
        difference = ours(pil.tensor([image] * 5), values).int() - pil.tensor(expected).int()
        assert difference.abs().max() <= 1


@pytest.mark.parametrize("size", [32, 64, 24, 160])
def test_a_batch_of_crops_gives_the_pixels_pil_gives(size):
    boxes = torch.tensor([[0, 0, 80, 96], [3, 10, 30, 40], [70, 80, 10, 16], [1, 2, 64, 64]])
    cropped = pixel_ops.crop(pil.tensor(PHOTOS[:4]), boxes, size)
    theirs = [tv.resized_crop(image, *box, [size, size]) for image, box in zip(PHOTOS, boxes.tolist())]
    assert error(cropped, theirs) <= 0.1


@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_worker_cuts_the_pixels_pil_cuts(size):
    """Within a level: torch keeps its resampling weights in 16 bits."""
    boxes = [[0, 0, 80, 96], [3, 10, 30, 40], [70, 80, 10, 16], [1, 2, 64, 64]]
    ours = torch.stack([cut(image, np.array(box), size) for image, box in zip(pil.tensor(PHOTOS), boxes)])
    theirs = [tv.resized_crop(image, *box, [size, size]) for image, box in zip(PHOTOS, boxes)]
    assert error(ours, theirs) <= 0.3
    assert (ours.int() - pil.tensor(theirs).int()).abs().max() <= 2


def test_rotation_and_slant_give_the_pixels_pil_gives():
    images = open_images("digits", None, "train")
    digits = [images.image(i).crop((0, 4, 32, 28)) for i in range(16)]
    angle, shear = torch.linspace(-15, 15, 16), torch.linspace(12, -9, 16)
    bilinear = tv.InterpolationMode.BILINEAR
    theirs = [
        tv.affine(digit, float(a), [0, 0], 1.0, [float(s), 0.0], interpolation=bilinear)
        for digit, a, s in zip(digits, angle, shear)
    ]
    assert error(pixel_ops.affine(pil.tensor(digits), angle, shear), theirs) <= 0.01


SOLARIZED = ViewRecipe((*RECIPES["moco_v2"].steps, Solarize(0.2)))  # a part of MoCo v3's second view


@pytest.mark.parametrize(
    ("recipe", "size", "tolerance"),
    [
        *((RECIPES[name], 64, 0.1) for name in ("moco_v1", "moco_v2")),
        (SOLARIZED, 64, 0.2),
        (RECIPES["cifar10"], 32, 0.1),
        (RECIPES["digits"], 64, 0.1),
    ],
    ids=["moco_v1", "moco_v2", "solarize", "cifar10", "digits"],
)
def test_a_recipe_gives_the_pixels_pil_gives(recipe, size, tolerance):
    """All steps of whole views, by the same numbers."""
    images, u = pil.tensor(PHOTOS), recipe.uniforms(3, np.arange(len(PHOTOS)), np.arange(len(PHOTOS)), 0)
    theirs = [pil.view(recipe, image, numbers, size) for image, numbers in zip(PHOTOS, u)]
    assert error(recipe.apply(images, u, size), theirs) <= tolerance


def test_every_order_of_the_jitter_is_taken_as_torchvision_takes_it():
    """All 24 orders, two images each; a wrong order is told from a right one."""
    recipe = ViewRecipe((Jitter(0.4, 0.4, 0.4, 0.4),))
    u = np.random.default_rng(0).random((4000, 9))
    ranks = recipe.steps[0].order(u) @ (64, 16, 4, 1)
    chosen = [n for rank in np.unique(ranks) for n in np.flatnonzero(ranks == rank)[:2]]
    assert len(chosen) == 48
    images = pil.photos((40, 32), 48)
    theirs = [pil.view(recipe, image, u[n], 0) for image, n in zip(images, chosen)]
    assert error(recipe.apply(pil.tensor(images), u[chosen], 32), theirs) <= 0.1
    backwards = u[chosen].copy()
    backwards[:, 1:5] = 1 - backwards[:, 1:5]
    assert error(recipe.apply(pil.tensor(images), backwards, 32), theirs) > 1


def test_a_view_does_not_depend_on_its_neighbours_nor_on_how_many_there_are():
    recipe, images = RECIPES["moco_v2"], pil.tensor(PHOTOS)
    u = recipe.uniforms(0, np.zeros(len(images)), np.arange(len(images)), 1)
    for size in (32, 160):  # all at once, and a few at a time
        whole = recipe.apply(images, u, size)
        alone = torch.cat([recipe.apply(images[n : n + 1], u[n : n + 1], size) for n in range(len(images))])
        assert (whole.int() - alone.int()).abs().max() <= 1  # a product of matrices adds in another order
    assert torch.equal(images, pil.tensor(PHOTOS))


def test_the_boxes_of_a_blur_reach_as_far_as_its_sigma_needs():
    images = pil.tensor(PHOTOS[:1])
    for sigma in (0.1, 1.0, 1.41, 1.42, 2.0):
        value, reach = torch.tensor([sigma]), pixel_ops.box_reach(sigma)
        assert torch.equal(pixel_ops.blur(images, value, reach), pixel_ops.blur(images, value, reach + 1))
        assert reach == 1 or not torch.equal(
            pixel_ops.blur(images, value, reach - 1), pixel_ops.blur(images, value, reach)
        )


ALONE = {  # each step by itself, and jitters that leave operations out
    "crop": Crop((0.2, 1.0)),
    "flip": Flip(),
    "grey": Grey(0.5),
    "solarize": Solarize(0.5),
    "blur": Blur((0.1, 2.0), 0.5),
    "wide blur": Blur((0.1, 5.0), 0.5),
    "affine": Affine(15, 15),
    "jitter": Jitter(0.4, 0.4, 0.4, 0.4, p=0.8),
    "only hue": Jitter(0, 0, 0, 0.4, p=0.5),
    "no hue": Jitter(0.4, 0.4, 0.4, 0, p=0.5),
    "two of four": Jitter(0.4, 0, 0, 0.1),
    "nothing": Jitter(0, 0, 0, 0),
}
TOGETHER = {name: ViewRecipe((step,)) for name, step in ALONE.items()} | RECIPES | {"solarized": SOLARIZED}


def for_all(recipe: ViewRecipe, images: torch.Tensor, u: np.ndarray, size: int) -> torch.Tensor:
    """What a GPU does, on the CPU: every operation for all images."""
    return recipe._views(images.clone(), recipe._parameters(u, images, 0), size, 0, True)


def drawn(recipe: ViewRecipe, count: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """So many photos, and numbers for a view of each."""
    return pil.tensor(PHOTOS[:count]), recipe.uniforms(seed, np.zeros(count), np.arange(count), 0)


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_operations_for_all_images_give_the_pixels_of_those_for_the_drawn_ones(name, count):
    """To the bit: whichever images are drawn, in whatever order of the jitter."""
    recipe = TOGETHER[name]
    for seed in range(12 // count):
        images, u = drawn(recipe, count, seed)
        assert torch.equal(for_all(recipe, images, u, 32), recipe.apply(images, u, 32))


def test_every_order_of_the_jitter_has_its_places():
    """All 24 orders for all images and for the drawn ones, with the parts of the jitter that a recipe may leave out."""
    ranks = np.array(list(permutations(range(4))))
    u = np.random.default_rng(0).random((24, 9))
    u[:, 1:5] = (ranks + 0.5) / 4
    images = pil.tensor(pil.photos((16, 12), 24))
    for wanted in product((0, 0.4), repeat=4):
        recipe = ViewRecipe((Jitter(*wanted),))
        assert torch.equal(for_all(recipe, images, u, 0), recipe.apply(images, u, 1000))


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_is_asked_for_the_same_whatever_is_drawn(name, monkeypatch):
    """No operator waits for the host or depends on the draws; the parameters of both views are one copy."""
    copies = []
    monkeypatch.setattr(steps, "to_device", lambda tensor, device: copies.append(tensor.shape) or tensor)
    monkeypatch.setattr(steps, "is_for_all", lambda images, fuse: True)
    monkeypatch.setattr(two_views, "is_for_all", steps.is_for_all)
    views = two_views.TwoViews(open_images("digits", None, "train"), RECIPES[name], 32, 0)
    asked = []
    for epoch, count in ((0, 3), (1, 16), (2, 16)):
        images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
        numbers = views.numbers(np.full(count, epoch), np.arange(count))
        with Called() as called:
            assert views.of_pixels(images, numbers).shape == (2, count, 3, 32, 32)
        asked.append(called.names)
    assert len(copies) == len(asked) and all(columns == 2 * 16 for _, columns in copies[1:])
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) < 500 and not any(name.startswith(WAITING) for name in asked[0])


WAITING = tuple(f"aten.{name}" for name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique"))


def variants(recipe: ViewRecipe, counts: tuple[int, ...]) -> list[int]:
    """How often the steps of a recipe have been compiled after each of several batches."""
    torch._dynamo.reset()
    counter, compiled = CompileCounterWithBackend("eager"), []
    fuse = lru_cache(partial(torch.compile, backend=counter, fullgraph=True))
    for seed, count in enumerate(counts):
        images, u = drawn(recipe, count, seed)
        assert torch.equal(recipe.apply(images, u, 24, fuse=fuse), recipe.apply(images, u, 24))
        compiled.append(counter.frame_count)
    return compiled


def test_steps_are_compiled_once_whatever_is_drawn():
    recipe = ViewRecipe((Crop((0.2, 1.0)), Jitter(0.4, 0, 0, 0.1, p=0.5), Blur((0.1, 2.0), 0.3), Flip()))
    assert variants(recipe, (12, 12, 12, 12)) == [1, 1, 1, 1]
    assert variants(recipe, (1, 1, 1)) == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_steps_are_compiled_once_more_for_any_other_number_of_images(name):
    assert variants(RECIPES[name], (12, 12, 7, 9, 3, 1, 2, 4, 11)) == [1, 1, *[2] * 7]
    assert variants(RECIPES[name], (3, 1, 12, 2))[-1] == 2


@pytest.mark.slow
def test_compiled_steps_give_the_same_pixels():
    recipe = ViewRecipe((Jitter(0.4, 0.4, 0.4, 0.1), Blur((0.1, 2.0), 0.5), Flip()))
    fuse = lru_cache(torch.compile)
    for count in (12, 7, 1):
        images, u = drawn(recipe, count, count)
        ours = recipe.apply(images, u, 96, fuse=fuse)
        assert (ours.int() - recipe.apply(images, u, 96).int()).abs().float().mean() < 0.01


def test_a_view_of_which_nothing_is_left_to_do_is_the_image_itself():
    """A crop without a flip, cut by the loader already."""
    images, u = drawn(ViewRecipe((Crop((0.7, 1.0)),)), 3, 0)
    view = ViewRecipe((Crop((0.7, 1.0)),)).apply(images, u, images.shape[-1], skip=1)
    assert torch.equal(view, images) and view.data_ptr() != images.data_ptr()

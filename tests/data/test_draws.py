"""What is drawn: the parameters' distributions against torchvision's own samplers, and where each number comes from.

Two-sample Kolmogorov-Smirnov tests, at least 20,000 draws a side; a range stretched or cut by a tenth must fail them.
"""

from functools import lru_cache

import numpy as np
import pytest
import torch
from pil import changed_by_a_tenth
from scipy.stats import ks_2samp
from torchvision import transforms

from moco_eval.data.augment.random_draws import crop_boxes, uniforms
from moco_eval.data.augment.steps import Affine, Blur, Crop, Flip, Grey, Jitter, PilGaussianBlur, Solarize, ViewStep
from pretraining.views import RECIPES

THEIRS, OURS = 20_000, 200_000  # torchvision draws one at a time
HEIGHT, WIDTH = 375, 500


def every_step() -> dict[str, ViewStep]:
    """Each different step of the shipped recipes, and MoCo v3's solarize."""
    found: dict[str, ViewStep] = {}
    for name, recipe in RECIPES.items():
        for step in recipe.steps:
            if step not in found.values():
                found[f"{name}-{type(step).__name__.lower()}"] = step
    return found | {"solarize": Solarize(0.2)}


STEPS = every_step()


@lru_cache
def ours(step: ViewStep) -> dict[str, np.ndarray]:
    """Our parameters of a step, by name."""
    u = uniforms(7, np.zeros(OURS), np.arange(OURS), 0, step.draws)
    if isinstance(step, Crop):
        return box_statistics(step.boxes(u, np.full(OURS, HEIGHT), np.full(OURS, WIDTH)))
    if isinstance(step, Affine):
        return dict(zip(("degrees", "shear"), step.angles(u)))
    found = {"p": (u[:, 0] < step.p).astype(float)}
    if isinstance(step, Blur):
        found["sigma"] = step.sigmas(u)
    if isinstance(step, Jitter):
        names = ("brightness", "contrast", "saturation", "hue")
        found |= {name: step.factors(u)[:, i] for i, name in enumerate(names) if getattr(step, name)}
        found["order"] = step.order(u) @ (64, 16, 4, 1)
    return found


def box_statistics(boxes: np.ndarray) -> dict[str, np.ndarray]:
    top, left, height, width = boxes.T.astype(float)
    random = np.random.default_rng(1).random((2, len(boxes)))  # spreads whole positions over their pixel
    return {
        "scale": height * width,
        "ratio": width / height,
        "top": (top + random[0]) / (HEIGHT - height + 1),
        "left": (left + random[1]) / (WIDTH - width + 1),
    }


@lru_cache
def theirs(step: ViewStep) -> dict[str, np.ndarray]:
    """torchvision's, from the step's own reference transform."""
    torch.manual_seed(0)
    transform = step.reference(32)
    if isinstance(step, Crop):
        image = torch.empty(3, HEIGHT, WIDTH)
        return box_statistics(
            np.array([transform.get_params(image, transform.scale, transform.ratio) for _ in range(THEIRS)])
        )
    if isinstance(step, Affine):
        ranges = (transform.degrees, transform.translate, transform.scale, transform.shear)
        drawn = [transform.get_params(*ranges, [32, 32]) for _ in range(THEIRS)]
        return {"degrees": np.array([one[0] for one in drawn]), "shear": np.array([one[3][0] for one in drawn])}
    marked = torch.tensor([[[255, 7]], [[9, 11]], [[200, 3]]], dtype=torch.uint8)
    if isinstance(step, Blur):  # works on PIL images only; what is asked is how often it is called
        transform = replace_inside(transform, lambda image: image + 1)
    if isinstance(step, Jitter):
        transform = replace_inside(transform, lambda image: image + 1)
    found = {"p": np.array([float(not torch.equal(transform(marked), marked)) for _ in range(THEIRS)])}
    if isinstance(step, Blur):
        found["sigma"] = np.array([sigma_of(PilGaussianBlur(step.sigma)) for _ in range(THEIRS)])
    if isinstance(step, Jitter):
        jitter = step.reference(32).transforms[0]
        ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        drawn = [jitter.get_params(*ranges) for _ in range(THEIRS)]
        found["order"] = np.stack([one[0].numpy() for one in drawn]) @ (64, 16, 4, 1)
        for i, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
            if drawn[0][i] is not None:
                found[name] = np.array([one[i] for one in drawn])
    return found


def replace_inside(apply: transforms.RandomApply, operation) -> transforms.RandomApply:
    return transforms.RandomApply([operation], apply.p)


def sigma_of(blur: PilGaussianBlur) -> float:
    class Recorder:
        def filter(self, gaussian):
            return gaussian.radius

    return blur(Recorder())


def agree(step: ViewStep, other: ViewStep, name: str) -> bool:
    return ks_2samp(ours(step)[name], theirs(other)[name]).pvalue > 1e-3


# A step of the small recipes differs from the paper's of its kind in its settings alone.
OF_THE_PAPER = {label.partition("-")[2] for label in STEPS if label.startswith("moco_")}
SMALL = [
    label for label in STEPS if label.startswith(("cifar10-", "digits-")) and label.partition("-")[2] in OF_THE_PAPER
]


def each(names) -> list:
    """A step and the name of one of its parameters; the small recipes' are slow."""
    return [
        pytest.param(label, name, marks=pytest.mark.slow if label in SMALL else ())
        for label, step in STEPS.items()
        for name in names(step)
    ]


PARAMETERS, RANGES = each(ours), each(changed_by_a_tenth)


@pytest.mark.parametrize(("label", "name"), PARAMETERS)
@pytest.mark.slow
def test_parameters_are_drawn_as_torchvision_draws_them(label, name):
    assert agree(STEPS[label], STEPS[label], name)


@pytest.mark.parametrize(("label", "name"), RANGES)
def test_a_range_changed_by_a_tenth_is_noticed(label, name):
    step = STEPS[label]
    assert not agree(changed_by_a_tenth(step)[name], step, name)


def test_one_sided_distributions_would_be_noticed():
    """The order of a jitter, and where a crop lies."""
    u = uniforms(7, np.zeros(OURS), np.arange(OURS), 0, 22)
    later = u.copy()
    later[:, 20] = 0.9 * u[:, 20]
    crop = STEPS["moco_v1-crop"]
    boxes = crop.boxes(later, np.full(OURS, HEIGHT), np.full(OURS, WIDTH))
    assert ks_2samp(box_statistics(boxes)["top"], theirs(crop)["top"]).pvalue < 1e-3
    jitter = STEPS["moco_v2-jitter"]
    sorted_pairs = np.sort(u[:, 1:5].reshape(-1, 2, 2), axis=2).reshape(-1, 4).argsort(axis=1) @ (64, 16, 4, 1)
    assert ks_2samp(sorted_pairs, theirs(jitter)["order"]).pvalue < 1e-3


def test_numbers_belong_to_seed_epoch_image_and_view():
    index = np.arange(5)
    base = uniforms(1, np.full(5, 2), index, 0, 30)
    assert np.array_equal(uniforms(1, np.full(1, 2), index[3:4], 0, 30), base[3:4])
    assert np.array_equal(uniforms(1, np.full(5, 2), index, 0, 7), base[:, :7])
    others = (uniforms(2, np.full(5, 2), index, 0, 30), uniforms(1, np.full(5, 3), index, 0, 30))
    for other in (*others, uniforms(1, np.full(5, 2), index, 1, 30), uniforms(1, np.full(5, 2), index + 5, 0, 30)):
        assert not np.isin(other, base).any()
    assert base.min() >= 0 and base.max() < 1


def test_numbers_of_neighbours_are_not_correlated():
    for view in (0, 1):
        numbers = uniforms(0, np.zeros(100_000), np.arange(100_000), view, 4)
        pairs = [(numbers[:-1, 0], numbers[1:, 0]), (numbers[:, 0], numbers[:, 1]), (numbers[:, 2], numbers[:, 3])]
        for left, right in pairs:
            assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(100_000)
    views = [uniforms(0, np.zeros(100_000), np.arange(100_000), view, 1)[:, 0] for view in (0, 1)]
    assert abs(np.corrcoef(*views)[0, 1]) < 4 / np.sqrt(100_000)


@pytest.mark.parametrize(("height", "width"), [(100, 1), (1, 100), (1, 1), (3, 2)])
def test_crops_of_odd_images_lie_inside(height, width):
    """Where no try fits, the largest allowed piece of the middle, as torchvision takes it."""
    u = np.random.default_rng(0).random((500, 22))
    boxes = crop_boxes(u, np.full(500, height), np.full(500, width), (0.2, 1.0))
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    if max(height, width) == 100:
        image = torch.empty(3, height, width)
        assert (boxes == transforms.RandomResizedCrop.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3))).all()


@pytest.mark.parametrize("step", [Blur((0.1, 2.0), 0.1), Jitter(0.4, 0.4, 0.2, 0.1, p=0.8)])
def test_how_much_is_independent_of_whether(step):
    """Of MoCo v3's second view: what is drawn seldom is drawn from the whole range."""
    drawn = ours(step)
    for name in drawn.keys() - {"p"}:
        assert abs(np.corrcoef(drawn["p"], drawn[name])[0, 1]) < 5 / np.sqrt(OURS), name


def test_flip_and_grey_are_independent_of_the_jitter():
    """Steps take different numbers of an image's stream."""
    recipe = RECIPES["moco_v2"]
    u = recipe.uniforms(0, np.zeros(50_000), np.arange(50_000), 0)
    places = np.cumsum([0, *(step.draws for step in recipe.steps)])
    assert u.shape[1] == places[-1]
    chosen = [u[:, start] < 0.5 for start, step in zip(places, recipe.steps) if isinstance(step, Jitter | Grey | Flip)]
    for i in range(3):
        assert abs(np.corrcoef(chosen[i], chosen[(i + 1) % 3])[0, 1]) < 0.02

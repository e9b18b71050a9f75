"""Further test sets of the same classes: found, matched, masked, and judged by every protocol's one trained state."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco_eval.classification import further
from moco_eval.classification.judge import judge, judge_in_memory
from moco_eval.classification.protocols import load_config
from moco_eval.classification.task import Task
from moco_eval.data.catalogue import open_images
from moco_eval.encoders.load import load
from moco_eval.errors import InputError

CPU = torch.device("cpu")


def write(folder, images, rows, names=None):
    """Images of a set as class folders, as they are."""
    for row in rows:
        name = images.classes[images.labels[row]]
        place = folder / (names or {}).get(name, name)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels[row]).save(place / f"{row}.png")


@pytest.fixture(scope="module")
def digits():
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    return train, test.take(np.arange(150))


@pytest.fixture(scope="module")
def sets(digits, tmp_path_factory):
    """The test images again, in another order; three classes of them; two severities, the second with other labels."""
    _, test = digits
    folder = tmp_path_factory.mktemp("also")
    write(folder / "again", test, range(len(test)))
    write(folder / "few", test, [row for row in range(len(test)) if test.labels[row] in (2, 5, 7)])
    write(folder / "c" / "1", test, range(60))
    wrong = {name: test.classes[(i + 1) % 10] for i, name in enumerate(test.classes)}
    write(folder / "c" / "2", test, range(60), wrong)
    return folder


PROTOCOLS = {
    "knn": ("digits",),
    "logistic": ("digits", "path.count=1", "path.low=1.0"),
    "linear": ("quick", "schedule.epochs=2", "schedule.milestones=[1]", "crops=0"),
}
SLOW = {
    "svm": ("digits", "costs=[0.1]"),
    "finetune": ("digits", "schedule.epochs=1"),
    "linear/digits": ("digits", "schedule.epochs=1", "schedule.milestones=[]"),
    "linear/sweep": ("sweep", "schedule.epochs=1", "schedule.kind=cosine", "learning_rates=[0.1]"),
}


def task_of(digits, given, **options):
    train, test = digits
    few = train.few_labels(10, 0)
    return Task(load("random:resnet18_quarter"), few, test, further=further.open_further(given, train), **options)


def by_name(record, images):
    """Scores of in-memory test images in the order in which a folder lists them: by class, then by name."""
    order = sorted(range(len(images)), key=lambda row: (images.classes[images.labels[row]], f"{row}.png"))
    return record.arrays["scores"][0][order], np.asarray(images.labels)[order]


@pytest.mark.parametrize("kind", [*PROTOCOLS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_the_same_images_get_the_same_numbers_from_every_protocol(kind, digits, sets):
    """As a further set they score what they do as the test set; a part of the classes is told among these alone."""
    config = (PROTOCOLS | SLOW)[kind]
    config = load_config(config[0], kind.partition("/")[0], (*config[1:], "workers=0"))
    given = (f"again={sets / 'again'},few={sets / 'few'}", f"c={sets / 'c'}")
    found = judge_in_memory(task_of(digits, given), config, CPU)
    also = found.record["also"]
    assert list(also) == ["again", "few", "c"]
    assert also["again"]["metrics"]["top1"] == pytest.approx(found.record["metrics"]["top1"], abs=1e-6)
    scores, labels = by_name(found, digits[1])
    own = np.isin(labels, (2, 5, 7))
    kept = scores[own][:, [2, 5, 7]]
    right = kept.argmax(axis=1) == np.searchsorted([2, 5, 7], labels[own])
    guessed = kept.max(axis=1) > -np.inf
    assert also["few"]["metrics"]["top1"] == pytest.approx(100 * (right & guessed).mean(), abs=1e-6)
    assert (also["few"]["classes"], also["few"]["of_classes"], also["few"]["images"]) == (3, 10, int(own.sum()))
    low, high = also["few"]["interval"]["top1"]
    assert low <= also["few"]["metrics"]["top1"] <= high
    parts = also["c"]["parts"]
    assert set(parts) == {"c/1", "c/2"} and also["c"]["images"] == 120
    assert also["c"]["metrics"]["top1"] == pytest.approx((parts["c/1"]["top1"] + parts["c/2"]["top1"]) / 2)
    if kind in PROTOCOLS:  # those that have learned something; the same images in other classes' folders
        assert parts["c/2"]["top1"] < parts["c/1"]["top1"]


def test_trials_that_are_kept_say_the_same_and_the_lines_name_each_set(digits, sets, tmp_path):
    from moco_eval.results.result import lines

    config = load_config("digits", "knn", ("workers=0",))
    given = (f"few={sets / 'few'}", f"c={sets / 'c'}")
    record = judge(task_of(digits, given), config, tmp_path / "run", CPU)
    assert record["also"] == judge_in_memory(task_of(digits, given), config, CPU).record["also"]
    shown = [line for line in lines(record) if "few (3 of 10 classes) top1" in line]
    assert shown and any("c (10 of 10 classes, mean of 2 parts) top1" in line for line in lines(record))
    with pytest.raises(InputError, match="another"):
        judge(task_of(digits, ()), config, tmp_path / "run", CPU)


def test_a_set_that_was_not_asked_for_leaves_no_trace(digits):
    found = judge_in_memory(task_of(digits, ()), load_config("digits", "knn", ("workers=0",)), CPU)
    assert "also" not in found.record and "also" not in found.resolved


def test_an_image_without_a_guess_among_its_own_classes_is_wrong():
    inf = torch.inf
    scores = torch.tensor([[3.0, -inf, -inf], [1, 2, -inf], [-inf, 1, 0]])
    own = further.of_own_classes(scores, np.array([1, 2]))
    assert own.argmax(dim=1).tolist() == [2, 0, 0]
    assert further.of_own_classes(scores[1:], np.array([1, 2])).shape == (2, 2)


def test_folders_may_be_numbers_of_the_classes(tmp_path):
    """As those of ImageNet-V2; but not where a class has a number for its name."""
    names = ["n01", "n02", "n03"]
    assert [further._place(name, names) for name in ("n02", "2", "3", "x", "²")] == [1, 2, None, None, None]
    assert further._place("2", ["1", "2", "5"]) == 1 and further._place("0", ["1", "2", "5"]) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("imagenet-a", "'imagenet-a' is not NAME=FOLDER; for example"),
        ("a=", "is not NAME=FOLDER"),
        ("a=/nowhere", "/nowhere is not a folder"),
        ("a={0},a={0}", "names 'a' twice"),
        ("a={0}/odd", "has a folder 'seven', which is not one of the 10 training classes"),
        ("a={0}/empty", "is empty"),
        ("a={0}/whole", "holds splits; give the one to test on: a={0}/whole/val"),
    ],
)
def test_what_is_no_further_set_is_refused(given, message, digits, tmp_path):
    for path in ("odd/1", "odd/seven", "empty", "whole/train/1", "whole/val/1"):
        (tmp_path / path).mkdir(parents=True)
    message = message.format(str(tmp_path).replace("+", r"\+"))
    with pytest.raises(InputError, match=message):
        further.open_further([given.format(tmp_path)], digits[0])


def test_low_shot_and_several_classes_an_image_have_none(digits, sets):
    from dataclasses import replace

    from moco_eval.classification.judge import check

    config = load_config("digits-low-shot", "svm", ("workers=0", "shots=[1]"))
    with pytest.raises(InputError, match="low-shot trains many"):
        check(task_of(digits, (f"few={sets / 'few'}",)), config)
    several = replace(digits[0], labels=np.eye(10, dtype=np.int64)[digits[0].labels])
    with pytest.raises(InputError, match="several classes an image"):
        further.open_further((f"few={sets / 'few'}",), several)

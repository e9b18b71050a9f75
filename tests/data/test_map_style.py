"""Images that a Python program gives: arrays, map-style data sets, Hugging Face's."""

import hashlib
import multiprocessing

import numpy as np
import pytest
import torch
from own_network import encoder, refusal
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, FakeData

import moco_eval as me
from moco_eval.data.map_style import MapStyle
from moco_eval.errors import InputError

from_arrays, from_dataset = me.ImageSet.from_arrays, me.ImageSet.from_dataset


def pixels(count: int = 6, *shape: int) -> np.ndarray:
    shape = shape or (8, 8, 3)
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


# Arrays


def test_colour_and_grey_arrays():
    colour = pixels()
    images = from_arrays(colour, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(images.pixels, colour)
    assert images.classes == ("0", "1", "2") and images.labels.dtype == np.int64 and len(images) == 6
    grey = from_arrays(colour[..., 0], torch.tensor([0, 0, 0, 1, 1, 1]), classes=["a", "b", "c"], name="x", split="y")
    np.testing.assert_array_equal(grey.pixels, np.repeat(colour[..., :1], 3, axis=3))
    assert (grey.name, grey.split, grey.classes) == ("x", "y", ("a", "b", "c"))


def test_a_set_is_known_by_its_content():
    colour, labels = pixels(6, 4, 8, 3), [0, 1, 2, 0, 1, 2]
    one = from_arrays(colour, labels).fingerprint
    assert from_arrays(colour.copy(), np.array(labels)).fingerprint == one
    others = [
        from_arrays(colour[::-1], labels),
        from_arrays(colour, labels[::-1]),
        from_arrays(colour.reshape(6, 8, 4, 3), labels),
    ]
    assert len({one, *(images.fingerprint for images in others)}) == 4


def test_other_labels_are_another_run(tmp_path):
    train, test = pixels(20), pixels(10)
    labels = np.arange(20) % 2
    sets = from_arrays(train, labels), from_arrays(test, labels[:10])
    me.judge(encoder(), *sets, "knn/digits", k=3, output=tmp_path / "run")
    turned = from_arrays(train, 1 - labels), sets[1]
    message = refusal(me.judge, encoder(), *turned, "knn/digits", k=3, output=tmp_path / "run")
    assert "holds another run: dataset.train.fingerprint" in message


@pytest.mark.parametrize(
    ("images", "labels", "classes", "words"),
    [
        (pixels() / 255, [0] * 6, None, "pixels are float64; give 8-bit images, uint8 of 0 to 255"),
        (pixels(6, 3, 8, 8), [0] * 6, None, "pixels are 6 x 3 x 8 x 8; give (N, H, W, 3)"),
        (pixels(6, 8, 8, 4), [0] * 6, None, "pixels are 6 x 8 x 8 x 4"),
        (pixels(6, 8), [0] * 6, None, "pixels are 6 x 8;"),
        (pixels(0), [], None, "pixels are 0 x 8 x 8 x 3"),
        (pixels(), [0.0] * 6, None, "labels are float64; give integers"),
        (pixels(), ["cat"] * 6, None, "give integers that count the classes from 0"),
        (pixels(), [0] * 5, None, "labels are 5 for 6 images; give one for each"),
        (pixels(), [[0]] * 6, None, "labels are 6 x 1 for 6 images"),
        (pixels(), [0, 1, -1, 0, 0, 0], None, "labels[2] is -1; classes count from 0"),
        (pixels(), [0, 1, 3, 0, 0, 0], None, "labels go from 0 to 3 and leave out 2"),
        (pixels(), [1, 2, 3, 1, 1, 1], None, "labels go from 0 to 3 and leave out 0"),
        (pixels(), [0, 1, 2, 0, 0, 0], ["a", "b"], "labels[2] is 2, and classes names 2"),
    ],
)
def test_arrays_that_are_no_images_or_labels(images, labels, classes, words):
    assert words in refusal(from_arrays, images, labels, classes=classes)


# Map-style data sets


class Pairs(Dataset):
    """(image, label) of lists; `asked` counts the items."""

    def __init__(self, images, labels):
        self.images, self.labels, self.asked = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked += 1
        return self.images[index], self.labels[index]


def photos(*sizes: int) -> list[Image.Image]:
    return [Image.fromarray(pixels(n + 1, size, size, 3)[n]) for n, size in enumerate(sizes)]


@pytest.mark.parametrize("label", [int, np.int64, np.uint8, torch.tensor], ids=["int", "int64", "uint8", "tensor"])
def test_items_of_pictures_and_arrays(label):
    colour = pixels()
    labels = [label(n % 2) for n in range(6)]
    of_photos = from_dataset(Pairs([Image.fromarray(one) for one in colour], labels))
    of_arrays = from_dataset(list(zip(colour, labels)), name="own", split="train")
    np.testing.assert_array_equal(of_photos.pixels, colour)
    np.testing.assert_array_equal(of_arrays.pixels, colour)
    assert of_photos.labels.tolist() == of_arrays.labels.tolist() == [0, 1] * 3
    assert of_photos.fingerprint == of_arrays.fingerprint == from_arrays(colour, [0, 1] * 3).fingerprint
    assert (of_photos.name, of_photos.split) == ("Pairs", "test")
    assert (of_arrays.name, of_arrays.split) == ("own", "train")


def test_pictures_of_other_modes():
    grey = Image.fromarray(pixels(1, 8, 8)[0])
    deep = Image.fromarray(np.full((8, 8), 256 * 7, np.uint16))
    images = from_dataset([(grey, 0), (deep, 1), (grey.convert("P"), 0), (pixels(1, 8, 8, 1)[0], 1)])
    np.testing.assert_array_equal(images.pixels[0], np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    assert (images.pixels[1] == 7).all() and images.pixels.shape == (4, 8, 8, 3)


def test_a_data_set_of_torchvision_and_a_part_of_it():
    fake = FakeData(12, (3, 8, 8), 3)
    whole = from_dataset(fake, classes=["a", "b", "c"])
    assert len(whole) == 12 and whole.name == "FakeData" and whole.classes == ("a", "b", "c")
    part = from_dataset(Subset(fake, [5, 1]), classes=["a", "b", "c"])
    np.testing.assert_array_equal(part.pixels, whole.pixels[[5, 1]])
    assert part.labels.tolist() == whole.labels[[5, 1]].tolist()
    tensors = FakeData(4, (3, 8, 8), 3, transform=transforms.ToTensor())
    assert "dataset[0] gives a Tensor; give PIL images or uint8 arrays (H, W, 3), without a transform" in refusal(
        from_dataset, tensors, classes=["a", "b", "c"]
    )


def cifar(**attributes) -> CIFAR10:
    """As torchvision makes it, without its files."""
    data = CIFAR10.__new__(CIFAR10)
    held = {"data": pixels(4), "targets": [0, 1, 1, 0], "transform": None, "target_transform": None, "train": True}
    vars(data).update(held | {"classes": [*"abcdefghij"]} | attributes)
    return data


def test_targets_are_taken_without_asking_for_items():
    lazy = Pairs(photos(8, 9, 8), [0, 1, 0])
    lazy.targets = np.array([0, 1, 0])
    assert MapStyle.open(lazy).labels().tolist() == [0, 1, 0] and lazy.asked == 0
    assert MapStyle.open(Pairs(photos(8, 9), [1, 0])).labels().tolist() == [1, 0]
    data = from_dataset(cifar())
    assert from_dataset(cifar(transform=lambda image: image.rotate(90))).name == "CIFAR10"  # these are others
    assert (data.name, data.split, data.labels.tolist()) == ("cifar10", "train", [0, 1, 1, 0])
    assert data.classes == (*"abcdefghij",)
    assert data.fingerprint == hashlib.sha256(pixels(4).tobytes()).hexdigest()  # as `images` has it


def test_targets_that_are_not_the_labels_of_the_items():
    assert from_dataset(cifar(target_transform=lambda target: 1 - target)).labels.tolist() == [1, 0, 0, 1]
    odd = Pairs(photos(8, 8), [0, 1])
    for targets in ([0], {"a": 0, "b": 1}, lambda: [1, 0]):  # of another length; no list at all
        odd.targets = targets
        assert from_dataset(odd).labels.tolist() == [0, 1]


class Breaks(Pairs):
    def __getitem__(self, index):
        if index == 2 and self.asked > 2:
            raise OSError("the disk\nis gone")
        return super().__getitem__(index)


class Stream(IterableDataset):
    def __iter__(self):
        yield photos(8)[0], 0


class Unpaired(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": photos(8)[0], "label": 0}


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Stream(), "dataset is a Stream; give a map-style data set, with a length and items by index"),
        (7, "dataset is a int"),
        ([], "dataset is an empty list"),
        (Unpaired(), "dataset[0] is a dict; give (image, label)"),
        (photos(8), "dataset[0] is a Image; give (image, label)"),
        ([(photos(8)[0],)], "dataset[0] is a tuple; give (image, label)"),
        (TensorDataset(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)), "dataset[0] gives a Tensor; give"),
        ([(pixels(1)[0] / 255, 0)], "dataset[0] gives a float64 (8, 8, 3); give PIL images or uint8 arrays"),
        ([(pixels(1, 3, 8, 8)[0], 0)], "dataset[0] gives a uint8 (3, 8, 8)"),
        ([(photos(8)[0], 0), (photos(8)[0], "cat")], "dataset[1] has the label 'cat'; give integers"),
        ([(photos(8)[0], torch.tensor([0]))], "dataset[0] has the label"),
        ([(photos(8)[0], None)], "dataset[0] has the label None"),
        ([(photos(8)[0], True)], "dataset[0] has the label True"),
        (Breaks(photos(8, 8, 8, 8), [0, 1, 0, 1]), "dataset[2] raised OSError: the disk is gone"),
    ],
)
def test_what_is_no_data_set_of_images(dataset, words):
    assert words in refusal(from_dataset, dataset)


def test_images_of_several_sizes_are_asked_for_when_needed():
    sizes = [32 + n % 3 for n in range(20)]
    train, test = (from_dataset(Pairs(photos(*sizes), [n % 2 for n in range(20)]), split=split) for split in "ab")
    assert train.pixels is None and np.asarray(train.image(1)).shape == (33, 33, 3)
    usual = me.judge(encoder(), train, test, "knn/digits", k=3)
    np.testing.assert_array_equal(me.judge(encoder(), train, test, "knn/digits", k=3, workers=2).scores, usual.scores)
    assert usual.metrics["top1"] > 60  # they are the same images; three neighbours vote
    crops = {"crops": 1, "schedule": {"epochs": 1, "milestones": [], "kind": "cosine"}, "workers": 0}
    me.judge(encoder(), train, test, "linear/quick@1", **crops)
    other = from_dataset(Pairs(photos(*sizes), [1 - n % 2 for n in range(20)]))
    assert len({train.fingerprint, test.fingerprint, other.fingerprint}) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_had_later_is_named_in_one_line(workers):
    data = Pairs(photos(*[32, 33] * 10), [0, 1] * 10)
    images = from_dataset(data)
    data.images[7] = None
    message = refusal(me.judge, encoder(), images, images, "knn/digits", k=3, workers=workers)
    assert message.startswith("dataset[7] gives a NoneType; give PIL images")
    assert multiprocessing.active_children() == []
    taken = images.take(np.array([3, 7]))
    assert "dataset[7]" in refusal(me.features, encoder(), taken, workers=workers)


@pytest.mark.data
def test_cifar10_is_cifar10_wherever_it_comes_from(shared_data):
    for images, train in zip(me.images("cifar10", shared_data), (True, False)):
        ours = from_dataset(CIFAR10(shared_data, train=train, download=False))
        assert (ours.name, ours.split, ours.classes) == (images.name, images.split, images.classes)
        assert ours.fingerprint == images.fingerprint
        np.testing.assert_array_equal(ours.labels, images.labels)
        np.testing.assert_array_equal(ours.pixels, images.pixels)


# Hugging Face


class Feature:
    names = ("cat", "dog")


class Quacks:
    """What is asked of a datasets.Dataset."""

    column_names, split = ["img", "label"], "validation"

    def __init__(self, images, labels, named: bool = True):
        self.columns = {"img": images, "label": labels}
        self.features = {"img": object(), "label": Feature() if named else object()}

    def __len__(self):
        return len(self.columns["img"])

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: held[key] for name, held in self.columns.items()}


def test_a_data_set_of_hugging_face():
    images = me.ImageSet.from_huggingface(Quacks(photos(8, 8, 8), [0, 1, 0]), image="img")
    assert (images.name, images.split, images.classes) == ("datasets", "validation", ("cat", "dog"))
    assert images.labels.tolist() == [0, 1, 0] and images.pixels.shape == (3, 8, 8, 3)
    unnamed = Quacks(photos(8, 9, 8), [0, 1, 2], named=False)
    images = me.ImageSet.from_huggingface(unnamed, image="img", name="own", split="train")
    assert (images.name, images.split, images.classes, images.pixels) == ("own", "train", ("0", "1", "2"), None)


def test_what_is_no_data_set_of_hugging_face():
    of, quacks = me.ImageSet.from_huggingface, Quacks(photos(8, 8), [0, 1])
    assert "image 'image' is not a column; there are img, label" in refusal(of, quacks)
    assert "label 'fine' is not a column" in refusal(of, quacks, image="img", label="fine")
    assert "dataset is a dict; give one split of a datasets.Dataset" in refusal(of, {"train": quacks})
    assert "dataset[1] has the label 'dog'" in refusal(of, Quacks(photos(8, 8), [0, "dog"]), image="img")


@pytest.mark.peers
def test_the_library_itself():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install '.[peers]')")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    colour = pixels()
    rows = {"image": [Image.fromarray(one) for one in colour], "label": [0, 1] * 3}
    held = datasets.Dataset.from_dict(rows, features=features, split="train")
    images = me.ImageSet.from_huggingface(held)
    np.testing.assert_array_equal(images.pixels, colour)
    assert (images.split, images.classes, images.labels.tolist()) == ("train", ("cat", "dog"), [0, 1] * 3)
    with pytest.raises(InputError, match="give one split"):
        me.ImageSet.from_huggingface(datasets.DatasetDict(train=held))
    with pytest.raises(InputError):
        me.ImageSet.from_huggingface(held.to_iterable_dataset())
    with pytest.raises(InputError, match="gives a Tensor"):
        me.ImageSet.from_huggingface(held.with_format("torch"))

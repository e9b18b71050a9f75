"""Data sets: what is read, what is converted, what is refused."""

import pickle

import numpy as np
import pytest
from PIL import Image

from moco_eval.data.catalogue import open_images, open_splits, split_deviations
from moco_eval.data.image_set import decode_bytes
from moco_eval.data.loader import Batches, Examples, clean_transform, crop_transform
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing


def picture(path, mode="RGB", size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.arange(size[0] * size[1]).reshape(size[1], size[0]) % 256).astype(np.uint8)).convert(mode).save(
        path
    )


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(3):
                picture(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_digits_are_split_once_and_for_all():
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1297, 500)
    assert train.image(0).size == (32, 32) and train.image(0).mode == "RGB"
    assert train.fingerprint != test.fingerprint
    assert train.fingerprint == open_images("digits", None, "train").fingerprint
    assert set(train.labels) == set(test.labels) == set(range(10))


def test_imagefolder_reads_classes_labels_and_a_fingerprint_of_names_and_sizes(folder):
    images = open_images("imagefolder", folder, "test")
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    before = images.fingerprint
    (folder / "val" / "cat" / "0.png").write_bytes(b"other")
    assert open_images("imagefolder", folder, "test").fingerprint != before


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture(path, mode)
    assert decode_bytes(path.read_bytes(), "x").mode == "RGB"


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(decode_bytes(path.read_bytes(), "x"))[0, :, 0].tolist() == [0, 1, 255]


def test_bad_images_are_named(tmp_path):
    picture(tmp_path / "whole.jpg", size=(64, 64))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(InputError, match=name):
            decode_bytes((tmp_path / name).read_bytes(), name)


def test_missing_and_empty_folders_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_images("imagefolder", folder / "nowhere", "train")
    (folder / "train" / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no images"):
        open_images("imagefolder", folder, "train")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="has no train/ folder"):
        open_images("imagefolder", tmp_path / "bare", "train")
    with pytest.raises(InputError, match="holds no images"):
        open_images("flat", tmp_path / "bare", "train")
    with pytest.raises(InputError, match="is a file"):
        open_images("flat", folder / "train" / "cat" / "0.png", "train")
    with pytest.raises(InputError, match="needs --data"):
        open_images("imagefolder", None, "train")
    with pytest.raises(InputError, match="2 class folders, ImageNet has 1000"):
        open_images("imagenet", folder, "test")
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        open_images("cifar11", None, "train")


def test_splits_of_other_classes_are_refused(folder):
    (folder / "val" / "dog").rename(folder / "val" / "dogs")
    with pytest.raises(InputError, match=r"2 classes are in one split only .first: 'dog'"):
        open_splits("imagefolder", folder)


def test_flat_is_for_pretraining_only(folder):
    assert len(open_images("flat", folder, "train")) == 12
    assert open_images("flat", folder, "train").labels is None
    with pytest.raises(InputError, match="pretraining only"):
        open_images("flat", folder, "test")


def write_cifar(root, payload=None):
    root = root / "cifar-10-batches-py"
    root.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
        batch = payload or {b"data": rows, b"labels": [i % 10 for i in range(20)]}
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    return rows


def test_cifar10_reads_the_original_layout(tmp_path):
    rows = write_cifar(tmp_path)
    images = open_images("cifar10", tmp_path, "train")
    assert len(images) == 100
    assert split_deviations(images) == ["cifar10 train of 100 images instead of 50000"]
    assert np.asarray(images.image(3))[2, 5].tolist() == rows[3].reshape(3, 32, 32)[:, 2, 5].tolist()


def write_stl10(root):
    """Three images of each file, whose pixels say where they are; returns them, (9, 96, 96, 3)."""
    root = root / "stl10_binary"
    root.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (9, 96, 96, 3), dtype=np.uint8)
    for part, name in enumerate(("train", "test", "unlabeled")):
        mine = images[3 * part : 3 * part + 3]
        columns = [
            image[row, column, c] for image in mine for c in range(3) for column in range(96) for row in range(96)
        ]
        (root / f"{name}_X.bin").write_bytes(bytes(columns))
        if name != "unlabeled":
            (root / f"{name}_y.bin").write_bytes(bytes([1, 10, 3]))
    return images


def test_stl10_reads_the_binary_files(tmp_path):
    images = write_stl10(tmp_path)
    train, test, both = (open_images("stl10", tmp_path, split) for split in ("train", "test", "pretrain"))
    assert np.array_equal(train.pixels, images[:3]) and np.array_equal(test.pixels, images[3:6])
    assert np.array_equal(both.pixels, images[[0, 1, 2, 6, 7, 8]]) and both.labels is None
    assert train.labels.tolist() == test.labels.tolist() == [0, 9, 2]
    assert split_deviations(both) == ["stl10 pretrain of 6 images instead of 105000"]
    (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(bytes([1, 10]))
    with pytest.raises(InputError, match="3 images of train and 2 labels"):
        open_images("stl10", tmp_path, "train")
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").write_bytes(bytes(7))
    with pytest.raises(InputError, match="has 7 bytes, no whole number of 27648"):
        open_images("stl10", tmp_path, "pretrain")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_cifar_batch_is_refused_and_nothing_runs(tmp_path):
    canary = tmp_path / "canary"
    write_cifar(tmp_path, Canary(canary))
    with pytest.raises(InputError, match="wants to run"):
        open_images("cifar10", tmp_path, "test")
    assert not canary.exists()
    pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()).close()
    assert canary.exists()  # the control: plain unpickling does run it


def test_few_labels_draws_equal_counts_from_the_seed():
    train = open_images("digits", None, "train")
    few, again, other = (train.few_labels(10, seed) for seed in (0, 0, 1))
    assert np.bincount(few.labels).tolist() == [10] * 10
    assert np.array_equal(few.pixels, again.pixels) and not np.array_equal(few.pixels, other.pixels)
    with pytest.raises(InputError, match="2000-per-class"):
        train.few_labels(2000, 0)


def test_every_draw_depends_on_seed_epoch_and_image_alone():
    images = open_images("digits", None, "test")
    examples = Examples(images, crop_transform(Preprocessing(32, 32)), seed=1)
    first = examples[2, 7][0]
    examples[0, 1]
    assert (examples[2, 7][0] == first).all()
    assert (examples[3, 7][0] != first).any()


def test_batches_see_every_image_once_and_can_start_in_the_middle():
    whole = Batches(50, 8, seed=3, epochs=range(2), shuffle=True, drop_last=False)
    rows = list(whole)
    assert len(rows) == len(whole) == 14
    assert sorted(index for row in rows[:7] for _, index in row) == list(range(50))
    order = np.random.default_rng((3, 1)).permutation(50)  # resumed runs rely on it
    assert [index for row in rows[7:] for _, index in row] == order.tolist()
    later = Batches(50, 8, seed=3, epochs=range(0, 2), shuffle=True, drop_last=False, first_step=4)
    assert list(later) == rows[4:] and len(later) == 10


def test_validation_transform_is_resize_then_centre_crop():
    image = Image.new("RGB", (300, 512), (255, 0, 0))
    tensor = clean_transform(Preprocessing())(image)
    assert tensor.shape == (3, 224, 224)
    assert tensor[:, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], abs=1e-5)


@pytest.mark.data
def test_the_real_cifar10(shared_data):
    train, test = (open_images("cifar10", shared_data, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (50000, 10000)
    assert np.bincount(train.labels).tolist() == [5000] * 10

"""Subsets of a training split: drawn, listed, held out; and what --labels says."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, in_process
from PIL import Image

from moco_eval.data import label_subsets as choices
from moco_eval.data.catalogue import open_images, split_deviations
from moco_eval.data.label_option import Labels, parse_labels
from moco_eval.data.label_subsets import held_out
from moco_eval.errors import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    """An imagefolder of 3 cats and 3 dogs a split; each class has a 0.png, and names of its own."""
    for split in ("train", "val"):
        for shade, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i, stem in enumerate(("0", f"{name}_1", f"{name}_2")):
                Image.new("RGB", (9, 9), (99 * shade, 30 * i, 0)).save(tmp_path / split / name / f"{stem}.png")
    return tmp_path


def names(images) -> list[str]:
    return [Path(images.name_of(i)).relative_to(images.files.root).as_posix() for i in range(len(images))]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# Subsets


def test_rows_of_a_subset_of_a_subset_are_those_of_the_whole():
    whole = open_images("digits", None, "train")
    first = whole.take(np.array([5, 9, 100, 3]), "four")
    second = first.take(np.array([2, 0]), "two")
    assert whole.rows is None and first.rows.tolist() == [5, 9, 100, 3] and second.rows.tolist() == [100, 5]
    assert np.array_equal(second.pixels, whole.pixels[[100, 5]])
    assert second.labels.tolist() == whole.labels[[100, 5]].tolist()
    assert second.fingerprint == whole.fingerprint and second.whole is whole and whole.whole is None
    assert second.regime() == {"subset": "two of four"} and whole.regime() == {}
    assert split_deviations(whole) == []


def test_few_labels_say_which_rows_they_are(folder):
    whole = open_images("imagefolder", folder, "train")
    few = whole.few_labels(2, 4)
    assert names(few) == [names(whole)[row] for row in few.rows]
    assert few.regime() == {"labels_per_class": 2, "subset": "2 labels per class, seed 4"}
    assert few.record() == whole.record() | few.regime() | {"images": 4}
    assert split_deviations(few) == []


def test_few_labels_are_the_draw_that_earlier_records_were_made_with():
    train = open_images("digits", None, "train")
    generator = np.random.default_rng(7)
    chosen = [generator.permutation(np.flatnonzero(train.labels == label))[:3] for label in range(10)]
    assert train.few_labels(3, 7).rows.tolist() == sorted(np.concatenate(chosen).tolist())


def test_a_list_names_images_by_name_or_by_class_and_name(folder):
    whole = open_images("imagefolder", folder, "train")
    some = whole.listed(write(folder / "list.txt", "dog_2.png", "", "cat/0.png", " cat_1.png ", "train/dog/0.png"))
    assert names(some) == ["train/cat/0.png", "train/cat/cat_1.png", "train/dog/0.png", "train/dog/dog_2.png"]
    assert some.labels.tolist() == [0, 0, 1, 1]
    assert some.rows.tolist() == [0, 1, 3, 5]
    digest = hashlib.sha256((folder / "list.txt").read_bytes()).hexdigest()
    assert some.subset == f"the 4 images of an unpublished list, sha256 {digest}"
    assert split_deviations(some) == [f"{whole.name} train: {some.subset}"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["cat_1.png", "cow_9.png", "pig.png"], "'cow_9.png' is not an image of the training split"),
        (["0.png"], r"'0.png' may be .*train/cat/0.png and .*train/dog/0.png; write CLASS/NAME"),
        (["cat_1.png", "cat_2.png", "cat_1.png"], "'cat_1.png' and 'cat_1.png' are one image"),
        (["cat_1.png", "cat/cat_1.png"], "'cat/cat_1.png' and 'cat_1.png' are one image"),
        (["dog/cat_1.png"], "'dog/cat_1.png' is not an image"),
        (["", " "], "names no images"),
        ([], "names no images"),
    ],
)
def test_lists_that_do_not_fit_are_refused_by_their_first_offender(lines, words, folder):
    with pytest.raises(InputError, match=words):
        open_images("imagefolder", folder, "train").listed(write(folder / "list.txt", *lines))


def test_lists_that_cannot_be_read_are_refused(folder):
    images = open_images("imagefolder", folder, "train")
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        images.listed(folder / "nowhere.txt")
    (folder / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        images.listed(folder / "list.txt")
    with pytest.raises(InputError, match="the images of digits have no file names"):
        open_images("digits", None, "train").listed(folder / "list.txt")


def test_a_list_that_starts_with_a_byte_order_mark_is_read(folder):
    images = open_images("imagefolder", folder, "train")
    plain = images.listed(write(folder / "list.txt", "cat_1.png", "dog_1.png"))
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "list.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert images.listed(folder / "marked.txt").rows.tolist() == plain.rows.tolist() and len(plain) == 2


def test_a_published_list_goes_by_its_name_and_is_no_deviation(folder, monkeypatch):
    path = write(folder / "1percent.txt", "cat_1.png", "dog_1.png")
    monkeypatch.setitem(choices.PUBLISHED, hashlib.sha256(path.read_bytes()).hexdigest(), "our own 1 %")
    some = parse_labels("1%").of(open_images("imagefolder", folder, "train"), 0)
    assert some.regime() == {"subset": "our own 1 %"} and split_deviations(some) == []
    few = some.few_labels(1, 3)
    assert few.subset == "1 labels per class, seed 3 of our own 1 %" and few.rows.tolist() == [1, 4]


# Held out


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_every_class_of_two_keeps_images_on_both_sides(share):
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 5], [1, 2, 30, 200]))
    train, held = held_out(labels, share, 3)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(held) > 0)
    parts = {label: (np.sum(labels[train] == label), np.sum(labels[held] == label)) for label in (0, 1, 2, 5)}
    assert parts[0] == (1, 0) and parts[1] == (1, 1)
    assert parts[2][1] == round(30 * share) and parts[5][1] == round(200 * share)


def test_the_held_out_part_comes_from_the_seed_alone():
    labels = np.arange(100) % 5
    first, again, other = (held_out(labels, 0.2, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    shown = np.zeros((50, 3), np.int8)
    train, held = held_out(shown, 0.3, 0)
    assert (len(train), len(held)) == (35, 15) and sorted([*train, *held]) == list(range(50))


# --labels


def test_labels_are_parsed(folder):
    assert parse_labels(None) is None
    assert parse_labels("10-per-class") == Labels(per_class=10)
    assert parse_labels("1%") == Labels(share="1%")
    path = write(folder / "my.txt", "cat_1.png")
    assert parse_labels(str(path)) == Labels(list_file=path)
    assert [one.name for one in (Labels(per_class=3), Labels(share="10%"), Labels(list_file=path))] == [
        "3-per-class",
        "10percent",
        "my",
    ]
    for text in ("0-per-class", "per-class", "-3-per-class", "1.5-per-class", "5%", "", "nowhere.txt", str(folder)):
        with pytest.raises(InputError, match="is not N-per-class, 1%, 10% or a list file"):
            parse_labels(text)


def test_a_missing_published_list_says_where_it_is_published(folder):
    with pytest.raises(InputError, match=r"10percent.txt, which does not exist; .* published at https://github.com/"):
        parse_labels("10%").of(open_images("imagefolder", folder, "train"), 0)
    with pytest.raises(InputError, match="which digits does not have"):
        parse_labels("1%").of(open_images("digits", None, "train"), 0)


def test_linear_trains_on_a_list_and_says_so(folder, capfd, monkeypatch):
    import json

    path = write(folder / "mine.txt", "cat_1.png", "dog_1.png", "dog_2.png")
    monkeypatch.chdir(folder)
    arguments = ["linear", "pixels", "--dataset", "imagefolder", "--data", folder, "--protocol", "digits_few"]
    arguments += ["--set", "schedule.epochs=1", "--workers", "0", "--labels"]
    out, _ = in_process(capfd, monkeypatch, *arguments, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"the 3 images of an unpublished list, sha256 {digest}" in out
    (run,) = (folder / "runs").glob("linear-*")
    assert "-imagefolder-" in run.name and "-mine-" in run.name
    record = json.loads((run / "result.json").read_text())
    assert record["dataset"]["subset"].endswith(digest) and "labels_per_class" not in record["dataset"]
    assert "cow.png" in error_line(capfd, monkeypatch, *arguments, write(folder / "bad.txt", "cow.png"))

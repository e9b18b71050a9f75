"""Data sets of the datasets library: the numbers of the files they were made of, and what is refused, in one line."""

import builtins
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from commands import environment, error_line
from hf_tables import column_of, digits_folder, parquet, saved, table_of
from hub_server import running
from own_network import encoder
from PIL import Image

import moco_eval as me
from moco_eval.data import hugging_face, tables
from moco_eval.data.catalogue import check, open_images, open_splits
from moco_eval.data.repeats import repeats
from moco_eval.errors import InputError

datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install '.[hf]')")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return digits_folder(tmp_path_factory.mktemp("digits") / "own")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of nobody's, for the library in this process and in others."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setenv("HF_HOME", str(home))
    return home


@pytest.fixture(scope="module")
def disk(root) -> Path:
    return saved(datasets, root, root.parent / "on_disk")


@pytest.fixture(scope="module")
def hub_like(root) -> Path:
    return parquet(datasets, root, root.parent / "tables")


@pytest.fixture(params=["disk", "hub_like"])
def place(request) -> Path:
    return request.getfixturevalue(request.param)


def refused(text: str, **more) -> str:
    """The one line of a data set that cannot be judged on."""
    with pytest.raises(InputError) as error:
        open_splits(text, None, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# The same as the files


def test_the_same_pixels_labels_and_classes_as_the_image_files(root, place):
    for ours, theirs in zip(open_splits("imagefolder", root), open_splits(f"hf:{place}", None)):
        assert (theirs.classes, len(theirs)) == (ours.classes, len(ours)) == (("nought", "one", "two"), len(ours))
        np.testing.assert_array_equal(theirs.labels, ours.labels)
        assert all(theirs.read(index) == ours.read(index) for index in range(len(ours)))
        assert all((theirs.array(index) == ours.array(index)).all() for index in range(len(ours)))
        assert theirs.sample == ours.sample and theirs.limited(5).image(4).size == ours.image(len(ours) - 1).size


@pytest.mark.library
@pytest.mark.parametrize(
    ("protocol", "settings"),
    [("knn/instdisc@1", {"k": 3}), ("linear/quick@1", {"crops": 1, "schedule": {"epochs": 2, "milestones": [1]}})],
)
def test_the_same_numbers_and_answers_as_the_image_files(root, place, protocol, settings):
    of_files, of_tables = (
        me.judge(encoder(), *me.images(*where), protocol, workers=0, **settings)
        for where in (("imagefolder", root), (f"hf:{place}",))
    )
    assert of_tables.metrics == of_files.metrics and 0 < of_files.metrics["top1"] < 100
    assert of_tables.arrays.keys() == of_files.arrays.keys()
    for name, array in of_files.arrays.items():
        np.testing.assert_array_equal(of_tables.arrays[name], array)


def test_one_fingerprint_of_one_content_and_another_of_another(root, disk, hub_like, tmp_path):
    of_disk, of_parquet = ([images.fingerprint for images in open_splits(f"hf:{at}", None)] for at in (disk, hub_like))
    assert of_disk == of_parquet and len(set(of_disk)) == 2
    table = table_of(datasets, root / "train")
    other = [{**row, "bytes": row["bytes"][:-1] + b"x"} for row in undecoded(table)]
    for name, change in (
        ("bytes", lambda: other[:1] + undecoded(table)[1:]),
        ("order", lambda: undecoded(table)[1:2] + undecoded(table)[:1] + undecoded(table)[2:]),
    ):
        column_of(datasets, tmp_path / name, image=(datasets.Image(), change()), label=labels(table))
        assert open_images(f"hf:{tmp_path / name}", None, "pretrain").fingerprint != of_disk[0], name
    moved = (datasets.ClassLabel(names=["nought", "one", "two"]), [2, *table["label"][1:]])
    column_of(datasets, tmp_path / "labels", image=(datasets.Image(), undecoded(table)), label=moved)
    assert open_images(f"hf:{tmp_path / 'labels'}", None, "pretrain").fingerprint != of_disk[0]


def undecoded(table) -> list[dict]:
    return list(table.cast_column("image", datasets.Image(decode=False))["image"])


def labels(table) -> tuple:
    return table.features["label"], list(table["label"])


def test_a_loader_process_is_given_paths_and_no_contents(place):
    train, _ = open_splits(f"hf:{place}", None)
    packed = pickle.dumps(train.files)
    assert len(packed) < 4000 < sum(train.files.sizes)
    assert pickle.loads(packed).read(7) == train.read(7)


def test_copies_among_the_test_images_are_found(root, disk, tmp_path):
    train, test = open_splits(f"hf:{disk}", None)
    assert repeats(train, test).rows == ()
    twice = datasets.concatenate_datasets([table_of(datasets, root / "val"), table_of(datasets, root / "train")])
    datasets.DatasetDict(train=table_of(datasets, root / "train"), test=twice).save_to_disk(str(tmp_path / "twice"))
    copies = repeats(*open_splits(f"hf:{tmp_path / 'twice'}", None))
    assert copies.rows == tuple(range(len(test), len(twice))) and copies.first == f"hf:twice test[{len(test)}]"


# Splits and columns


def test_validation_before_test_and_what_is_chosen_before_both(root, tmp_path):
    tables = {name: table_of(datasets, root / "val") for name in ("train", "test", "validation", "more")}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "four"))
    name = f"hf:{tmp_path / 'four'}"
    splits = lambda *given: tuple(images.split for images in open_splits(*given))  # noqa: E731
    assert splits(name, None) == ("train", "validation")
    assert splits(f"{name},train=more,test=test", None) == ("more", "test")
    assert splits(name, None, "more", "test") == ("more", "test")
    assert open_images(f"{name},train=more", None, "pretrain").split == "more"
    assert "has no split 'best'; it has train, test, validation, more" in refused(f"{name},test=best")
    assert "has validation to test on; leave the option out" in refused(name, val_fraction=0.5)


def test_a_single_split_is_parted_like_a_single_folder(root, hub_like):
    file = next(hub_like.glob("train-*"))
    assert "has no split to test on, but train; --val-fraction 0.2 tests on a fifth" in refused(f"hf:{file}")
    ours = open_splits("imagefolder", root / "train", val_fraction=0.25)
    theirs = open_splits(f"hf:{file}", None, val_fraction=0.25)
    for mine, other in zip(ours, theirs):
        np.testing.assert_array_equal(mine.rows, other.rows)
        assert (mine.split, mine.subset) == (other.split, other.subset)
    assert theirs[0].name == "hf:train-00000-of-00001"


def picture() -> bytes:
    """A PNG of 2 x 2 pixels."""
    return png(2, 2, b"\0" + b"\1\2\3" * 2 + b"\0" + b"\4\5\6" * 2)


def png(width: int, height: int, rows: bytes) -> bytes:
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def four(second: object) -> tuple:
    """A column of four images, the second given: bytes, or what the library stores."""
    encoded = [picture(), second, picture(), picture()]
    return datasets.Image(), [{"bytes": one, "path": None} if isinstance(one, bytes) else one for one in encoded]


IMAGES = four(picture())
CLASSES = (datasets.ClassLabel(names=["cat", "dog"]), [0, 0, 1, 1])
WORDS = (datasets.Value("string"), ["dog", "cat", "cat", "dog"])
NUMBERS = (datasets.Value("int64"), [4, 2, 2, 4])


def test_columns_are_found_by_their_type_and_chosen_where_two_may_be_meant(tmp_path):
    at = lambda name, **columns: f"hf:{column_of(datasets, tmp_path / name, **columns)}"  # noqa: E731
    both = at("both", img=IMAGES, thumb=IMAGES, fine=CLASSES, coarse=CLASSES, text=WORDS)
    assert f"2 columns that may be the image: img, thumb. Choose one: {both},image=img" in refused(
        both, val_fraction=0.5
    )
    chosen = f"{both},image=thumb"
    assert f"2 columns that may be the label: fine, coarse. Choose one: {chosen},label=fine" in refused(
        chosen, val_fraction=0.5
    )
    train, test = open_splits(f"{chosen},label=coarse", None, val_fraction=0.5)
    assert (train.classes, train.name) == (("cat", "dog"), "hf:both-coarse") and test.files.column == "thumb"
    assert "no column 'word'; its columns are img (Image), thumb (Image), fine (ClassLabel)" in refused(
        f"{chosen},label=word", val_fraction=0.5
    )


def test_words_and_numbers_are_classes_where_they_are_chosen(tmp_path):
    for kind, values, names, expected in (
        ("words", WORDS, ("cat", "dog"), [1, 0, 0, 1]),
        ("numbers", NUMBERS, ("2", "4"), [1, 0, 0, 1]),
    ):
        name = f"hf:{column_of(datasets, tmp_path / kind, image=IMAGES, kind=values)}"
        assert f"no column of classes (ClassLabel); its columns are image (Image), kind ({values[0].dtype})" in (
            refused(name, val_fraction=0.5)
        )
        images = open_images(f"{name},label=kind", None, "pretrain")
        assert images.classes == names and images.labels.tolist() == expected
        assert open_images(name, None, "pretrain").labels is None
    several = (datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"])), [[0], [0, 1], [1], [1]])
    name = f"hf:{column_of(datasets, tmp_path / 'several', image=IMAGES, kinds=several)}"
    assert "give one class an image: numbers or words" in refused(f"{name},label=kinds", val_fraction=0.5)


def test_a_test_image_of_a_class_that_nothing_was_trained_on(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    tables = {
        split: datasets.Dataset.from_dict({"image": IMAGES[1], "kind": kinds}, features=features)
        for split, kinds in {"train": ["cat", "dog", "cat", "dog"], "test": ["dog", "owl", "cat", "cat"]}.items()
    }
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "owls"))
    assert "hf:owls-kind test[1] is of class 'owl', which no training image has" in refused(
        f"hf:{tmp_path / 'owls'},label=kind"
    )


def test_hidden_labels_are_told_with_a_split_that_has_some(tmp_path):
    tables = {}
    for split, values in {"train": [0, 0, 1, 1], "validation": [-1, 1, 1, 1], "test": [0, 0, 1, 1]}.items():
        table = {"image": IMAGES[1], "label": values}
        features = datasets.Features({"image": datasets.Image(), "label": CLASSES[0]})
        tables[split] = datasets.Dataset.from_dict(table, features=features)
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "hidden"))
    name = f"hf:{tmp_path / 'hidden'}"
    assert f"no label for 1 of 4 images (first: row 0); judge on another split: {name},test=test" in refused(name)
    assert open_images(f"{name},train=validation", None, "pretrain").labels is None


def test_a_parquet_file_of_another_writer(tmp_path):
    """Without the library's words about its columns: structs of bytes and paths, and bytes where they are chosen."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image": [{"bytes": picture(), "path": "a.png"}] * 2, "raw": [picture()] * 2, "kind": ["cat", "dog"]}
    (tmp_path / "others").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "others/train.parquet")
    name = f"hf:{tmp_path / 'others'},label=kind"
    for images in (open_images(name, None, "pretrain"), open_images(f"{name},image=raw", None, "pretrain")):
        assert images.array(1).tolist() == [[[1, 2, 3]] * 2, [[4, 5, 6]] * 2] and images.classes == ("cat", "dog")
    assert "are kept as string; give a column of encoded images" in refused(f"{name},image=kind", val_fraction=0.5)


def test_a_gif_is_what_a_file_of_these_bytes_is(tmp_path):
    """By its content, whatever its name: the first of its pictures, as in a folder of files called .png."""
    frames = [Image.new("P", (4, 4), colour) for colour in (1, 2)]
    frames[0].putpalette([0, 0, 0, 200, 10, 20, 30, 240, 50])
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    data = (tmp_path / "moving.gif").read_bytes()
    (tmp_path / "files").mkdir()
    (tmp_path / "files/moving.png").write_bytes(data)
    of_file = open_images("flat", tmp_path / "files", "pretrain").array(0)
    column_of(datasets, tmp_path / "gif", image=four(data), label=CLASSES)
    of_table = open_images(f"hf:{tmp_path / 'gif'}", None, "pretrain").array(1)
    np.testing.assert_array_equal(of_table, of_file)
    assert of_table[0, 0].tolist() == [200, 10, 20]


# Refused


def test_an_image_of_another_format_damaged_or_too_large(in_tmp, tmp_path, capfd, monkeypatch):
    huge = png(20_000, 20_000, b"")
    for kind, data, words in (
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image that Pillow reads as JPEG, PNG, WEBP"),
        ("cut", picture()[:45], "cannot be decoded"),
        ("huge", huge, "has more than the 178,956,970 pixels that one image may have"),
        ("program", b"%!PS-Adobe-3.0 EPSF-3.0\n", "is PostScript, which is a program and not an image"),
    ):
        column_of(datasets, tmp_path / kind, image=four(data), label=CLASSES)
        name = f"hf:{tmp_path / kind}"
        line = error_line(
            capfd, monkeypatch, "knn", "pixels", "--dataset", name, "--val-fraction", "0.5", "--set", "k=1"
        )
        assert line.startswith(f"Error: hf:{kind} train[1] ") and words in line
        told = check(name, None, val_fraction=0.5)
        assert sum("1 of 2 images: " in line and f"hf:{kind} train[1]" in line for line in told) == 1
    monkeypatch.setenv("MOCO_EVAL_LIMITS", "1")
    monkeypatch.setitem(hugging_face.limits.LIMITS, "image", hugging_face.limits.Limit(50, "bytes", "image file"))
    assert "bytes, and 50 are the most that one image file may have" in refused(
        f"hf:{tmp_path / 'svg'}", val_fraction=0.5
    )


def test_an_image_that_only_its_path_stands_for(tmp_path):
    columns = {"image": four({"bytes": None, "path": "/etc/passwd"}), "label": CLASSES}
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    table = datasets.Dataset.from_dict({name: held for name, (_, held) in columns.items()}, features=features)
    import pyarrow.parquet as pq

    (tmp_path / "paths").mkdir()
    pq.write_table(table.data.table, tmp_path / "paths/train.parquet")
    assert "1 images of hf:paths train are not in the table (first: row 1)" in refused(
        f"hf:{tmp_path / 'paths'}", val_fraction=0.5
    )


def test_a_data_set_of_texts_and_places_where_none_is(root, hub_like, tmp_path):
    texts = column_of(datasets, tmp_path / "texts", text=WORDS, label=CLASSES)
    assert "hf:texts train has no column of images; its columns are text (string), label (ClassLabel)" in refused(
        f"hf:{texts}", val_fraction=0.5
    )
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere} does not exist; give a folder, a .parquet file, or ORG/NAME" in refused(f"hf:{nowhere}")
    assert "holds no .parquet or .arrow files" in refused(f"hf:{root}")
    with pytest.raises(InputError, match="leave --data out"):
        open_splits(f"hf:{hub_like}", root)
    assert "has no configuration 'en'; choose one, such as" in refused(f"hf:{hub_like}:en")


def test_a_damaged_or_pretended_parquet_file(root, tmp_path):
    whole = next(parquet(datasets, root, tmp_path / "whole", ["train"]).iterdir()).read_bytes()
    for name, data, words in (
        ("cut", whole[:-300], "cannot be read ("),
        ("footer", whole[:-8] + b"\xff\xff\xff\x7fPAR1", "cannot be read ("),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n", "is no parquet file but a Git LFS pointer"),
        ("page", b"<!DOCTYPE html><html>", "is no parquet file but a web page"),
        ("empty", b"", "is no parquet file but empty"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.parquet").write_bytes(data)
        assert words in refused(f"hf:{tmp_path / name}"), name


def test_offsets_that_leave_the_table_are_refused():
    """A column of bytes says where each image lies; a file whose numbers lead elsewhere is not read from there."""
    import pyarrow as pa

    offsets, held = pa.py_buffer(np.array([0, 1 << 30, 8], np.int32).tobytes()), pa.py_buffer(b"12345678")
    wild = pa.Array.from_buffers(pa.binary(), 2, [None, offsets, held])
    table = pa.table({"image": wild, "label": pa.array([0, 1])})
    with pytest.raises(InputError, match=r"column image of hf:wild is damaged .*; fetch it again"):
        tables.TableImages.open("hf:wild", table, "image")


def test_nothing_that_a_data_set_brings_is_run(root, tmp_path):
    folder = parquet(datasets, root, tmp_path / "script", ["train"])
    (folder / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "hf:" in refused(f"hf:{folder}") and not (tmp_path / "ran").exists()


def test_other_readers_of_the_library_are_not_used(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/train.csv").write_text("image,label\na.png,0\n")
    assert "holds no .parquet or .arrow files" in refused(f"hf:{tmp_path / 'csv'}")
    (tmp_path / "csv/other.parquet").write_bytes(b"PAR1")
    (tmp_path / "csv/more.csv").write_text("image,label\na.png,0\n")
    assert "holds csv, and images are read from parquet and arrow here" in refused(f"hf:{tmp_path / 'csv'}")


def test_a_name_of_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr(hugging_face, "unreachable", lambda url: f"no way to {url}")
    assert refused("hf:somebody/pets") == (
        "hf:somebody/pets: no such folder here, and the hub cannot be reached (no way to https://huggingface.co); for "
        "the copy of an earlier download set HF_HUB_OFFLINE=1"
    )
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert refused("hf:somebody/pets").startswith("hf:somebody/pets cannot be had from the hub (")


OF_THE_HUB = """
import moco_eval as me
for name in ("hf:somebody/digits", "hf:somebody/none"):
    try:
        train, test = me.images(name)
        print(train.name, train.fingerprint, test.split, test.fingerprint)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_data_set_of_the_hub_and_its_copy_without_a_network(hub_like, own_cache):
    """In a process of its own, whose library is told where the hub is."""
    train, test = (images.fingerprint for images in open_splits(f"hf:{hub_like}", None))
    with running() as hub:
        hub.repositories["datasets/somebody/digits"] = {
            f"data/{path.name}": path.read_bytes() for path in hub_like.iterdir()
        }
        own = {name: value for name, value in environment().items() if "proxy" not in name.lower()}
        own |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(own_cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        for more in ({}, {"HF_HUB_OFFLINE": "1"}):
            told = subprocess.run([sys.executable, "-c", OF_THE_HUB], env=own | more, capture_output=True, text=True)
            digits, none = told.stdout.splitlines()
            assert digits == f"hf:somebody_digits {train} validation {test}" and not told.stderr
            assert none.startswith("hf:somebody/none cannot be had from the hub (")
        assert len(hub.downloads()) == 2


def test_the_library_is_not_there_or_runs_scripts(disk, monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    assert "datasets 3.6.0 runs the scripts that a data set brings along; take 4 or newer" in refused(f"hf:{disk}")
    real = builtins.__import__

    def without(name, *more, **options):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "needs Hugging Face's datasets library; pip install 'moco-eval[hf]'" in refused(f"hf:{disk}")


def test_the_librarys_switches_are_as_before(disk, tmp_path):
    shown = datasets.utils.is_progress_bar_enabled()
    refused(f"hf:{tmp_path / 'none'}")
    open_splits(f"hf:{disk}", None)
    assert datasets.utils.is_progress_bar_enabled() == shown

"""Folders of image files: listed as before, kept in an index, believed only while it holds."""

import hashlib
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from commands import in_process
from PIL import Image

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data import index
from moco_eval.data.catalogue import check, open_images, open_splits
from moco_eval.data.index import EXTENSIONS, ImageFiles, cache_folder, list_images
from moco_eval.errors import InputError
from pretraining.plan import plan

NAMES = ("cat/b.jpg", "cat/a.PNG", "cat/deep/er/c.jpeg", "cat-2/ä.webp", "dog/x.jpg", "dog/x.txt", "dog/.y.bmp")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Class folders that changed an hour ago; sets of any size have an index."""
    monkeypatch.setenv("MOCO_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "KEPT_FROM", 1)
    folder = tmp_path / "data"
    for number, name in enumerate(NAMES):
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * number)
    return aged(folder)


def aged(folder: Path, seconds: float = 3600) -> Path:
    for path, _, _ in os.walk(folder):
        changed = Path(path).stat().st_mtime_ns - int(seconds * 1e9)
        os.utime(path, ns=(changed, changed))
    return folder


@pytest.fixture
def scans(monkeypatch) -> list:
    """Every folder that is listed."""
    seen, scan = [], index.scan

    def counted(folder, start, endings):
        seen.append(start)
        return scan(folder, start, endings)

    monkeypatch.setattr(index, "scan", counted)
    return seen


def naive(folder: Path, below: str) -> tuple[list[str], str]:
    """Paths class by class and the fingerprint, as the first version of this program made them."""
    found = []
    for top in sorted(p for p in (folder / below).iterdir() if p.is_dir()):
        paths = [p for p in top.rglob("*") if p.name.lower().endswith(EXTENSIONS)]
        found += sorted((str(p), p.stat().st_size) for p in paths)
    digest = hashlib.sha256()
    for path, size in sorted((str(Path(path).relative_to(folder)), size) for path, size in found):
        digest.update(f"{Path(path).as_posix()}\0{size}\n".encode())
    return [path for path, _ in found], digest.hexdigest()


def test_order_labels_and_fingerprint_are_those_of_a_naive_listing(folder):
    paths, fingerprint = naive(folder, "train")
    images = open_images("imagefolder", folder, "train")
    assert [images.name_of(i) for i in range(len(images))] == paths and len(paths) == 6
    assert images.fingerprint == fingerprint
    assert images.classes == ("cat", "cat-2", "dog") and images.labels.tolist() == [0, 0, 0, 1, 2, 2]
    flat = open_images("flat", folder, "train")
    assert flat.fingerprint == fingerprint
    assert [flat.name_of(i) for i in range(6)] == sorted(paths)


# What systems leave

LEFT = (
    *(
        "train/.ipynb_checkpoints/b-checkpoint.jpg",
        "train/__MACOSX/._b.jpg",
        "train/@eaDir/b.jpg/SYNOPHOTO_THUMB_S.jpg",
    ),
    *("train/.Trash-1000/files/gone.png", "train/cat/._b.jpg", "train/cat/.ipynb_checkpoints/b-checkpoint.jpg"),
    *(
        "train/dog/Thumbs.db",
        "train/cat-2/$RECYCLE.BIN/x.jpg",
        "train/.DS_Store",
        "train/System Volume Information/x.jpg",
    ),
)


def leave(folder: Path) -> Path:
    for name in LEFT:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    return aged(folder)


def test_what_systems_leave_is_passed_over_and_the_set_is_the_same(folder, scans):
    """Also from the index; a file that is merely hidden is an image, as before."""
    paths, fingerprint = naive(folder, "train")
    leave(folder)
    for _ in range(2):
        images = open_images("imagefolder", folder, "train")
        assert [images.name_of(i) for i in range(len(images))] == paths
        assert (images.classes, images.fingerprint) == (("cat", "cat-2", "dog"), fingerprint)
        words = "10 hidden or system entries passed over: train/.DS_Store, train/.Trash-1000, train/.ipynb_checkpoints"
        assert images.passed_over == f"{words}, ..."
        flat = open_images("flat", folder, "train")
        assert (flat.fingerprint, flat.passed_over) == (fingerprint, f"{words}, ...")
    assert len(scans) == 4


def test_check_names_the_classes_and_what_was_passed_over(folder):
    """The second split lies in a folder of its own; only what is passed over differs."""
    for name in NAMES:
        for split in ("train", "val"):
            path = folder / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path, "PNG") if name[-3:] != "txt" else path.write_text("")
    leave(folder)
    lines = check("imagefolder", folder)
    assert "classes: cat, cat-2, dog" in lines and "3 classes; metric top1" in lines
    (said,) = [line for line in lines if "passed over" in line]
    assert said.startswith("imagefolder:data train: 10 hidden or system entries passed over: train/.DS_Store")


def test_many_classes_are_named_in_part(monkeypatch):
    monkeypatch.setattr("moco_eval.data.catalogue.NAMED", 3)
    assert "classes: 0, 1, 2, ... and 7 more" in check("digits", None)


def test_an_evaluation_and_pretraining_say_what_was_passed_over(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("moco_eval.data.glance._told", set())
    for split in ("train", "val"):
        for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
            path = tmp_path / "set" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(len(list((tmp_path / "set").rglob("*.png")))).integers(0, 256, (8, 8, 3))
            Image.fromarray(noise.astype(np.uint8)).save(path)
    (tmp_path / "set" / "train" / ".ipynb_checkpoints").mkdir()
    said = "imagefolder:set train: 1 hidden or system entries passed over: train/.ipynb_checkpoints"
    command = ("knn", "random:resnet18_quarter", "--dataset", "imagefolder", "--data", tmp_path / "set", "--set", "k=2")
    _, err = in_process(capfd, monkeypatch, *command, "--device", "cpu", "--dry-run")
    assert err.count(said) == 1
    settings = configs.load("digits", "pretrain", PretrainConfig, ["batch_size=4", "bn_groups=2", "queue_size=8"])
    assert said in plan(settings, "imagefolder", tmp_path / "set", 1).warnings


def test_nothing_but_what_systems_leave_is_refused_with_the_count(folder):
    shutil.rmtree(folder / "train" / "dog")
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "._x.jpg").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"dog holds no images \(1 hidden or system entries passed over: train/dog/._x"
    ):
        list_images(folder, "train")
    shutil.rmtree(folder / "train")
    (folder / "train" / ".Trash-1000").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no class folders \(1 hidden or system entries passed over: train/.Trash"):
        list_images(folder, "train")


def test_one_folder_under_two_class_names_is_refused(folder):
    (folder / "train" / "kitty").symlink_to(folder / "train" / "cat", target_is_directory=True)
    with pytest.raises(InputError, match=r"class folders 'cat' and 'kitty' of .*train are one folder \(a link\)"):
        list_images(folder, "train")


def test_names_in_two_unicode_forms_are_refused_and_in_two_cases_are_two(folder):
    for name in ("Cat", "caf\u00e9"):
        (folder / "train" / name).mkdir()
        (folder / "train" / name / "a.jpg").write_bytes(b"1")
    (folder / "train" / "cat" / "A.png").write_bytes(b"1")  # beside a.PNG
    listing = list_images(folder, "train")
    assert listing.classes == ("Cat", "caf\u00e9", "cat", "cat-2", "dog") and len(listing.files) == 9
    (folder / "train" / "cafe\u0301").mkdir()
    with pytest.raises(InputError, match=r"'cafe\\u0301' and 'caf\\xe9' of .* are one name in two Unicode forms"):
        list_images(folder, "train")


@pytest.mark.parametrize(("one", "other"), [("Cat", "cat"), ("caf\u00e9", "cafe\u0301")])
def test_splits_whose_classes_are_spelled_in_two_ways_say_so(tmp_path, one, other):
    for split, name in (("train", one), ("val", other)):
        for below in (name, "dog"):
            (tmp_path / split / below).mkdir(parents=True)
            (tmp_path / split / below / "0.png").write_bytes(b"1")
    with pytest.raises(InputError, match="differ only in capitals or in the Unicode form of a letter; rename one"):
        open_splits("imagefolder", tmp_path)


def test_an_index_is_written_used_and_gives_the_same(folder, scans):
    first = list_images(folder, "train")
    assert len(scans) == 3 and len(list(cache_folder().glob("*.npz"))) == 1
    again = list_images(folder, "train")
    assert len(scans) == 3
    assert list(again.files) == list(first.files) and again.files.sizes.tolist() == first.files.sizes.tolist()
    assert (again.labels == first.labels).all() and again.classes == first.classes
    assert (again.fingerprint, again.folders) == (first.fingerprint, first.folders)
    assert list_images(folder, None).classes == () and len(scans) == 4  # the same folder as a flat one


def change_added(folder):
    (folder / "train" / "cat" / "deep" / "new.jpg").write_bytes(b"")


def change_removed(folder):
    (folder / "train" / "dog" / "x.jpg").unlink()


def change_renamed(folder):
    (folder / "train" / "dog" / "x.jpg").rename(folder / "train" / "dog" / "z.jpg")


def change_class(folder):
    (folder / "train" / "emu").mkdir()
    (folder / "train" / "emu" / "a.jpg").write_bytes(b"")


def change_size_in_place(folder):
    with (folder / "train" / "dog" / "x.jpg").open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    "change",
    [change_added, change_removed, change_renamed, change_class, change_size_in_place],
    ids=lambda f: f.__name__,
)
def test_what_changes_in_the_folder_is_seen(folder, scans, change):
    before = list_images(folder, "train").fingerprint
    change(folder)
    after = list_images(folder, "train")
    assert (list(after.files), after.fingerprint) == naive(folder, "train")
    assert len(scans) > 3 and after.fingerprint != before


def test_a_file_rewritten_in_place_beside_the_sample_is_refused_when_read(folder, scans, monkeypatch):
    monkeypatch.setattr(index, "SAMPLE", 0)
    list_images(folder, "train")
    change_size_in_place(folder)
    files = list_images(folder, "train").files
    assert len(scans) == 3
    at = list(files).index(str(folder / "train" / "dog" / "x.jpg"))
    with pytest.raises(InputError, match=r"dog/x.jpg has 8 bytes, but 4 when it was listed; touch its folder"):
        files.read(at)
    assert files.read(0) == b"x"
    os.utime(folder / "train" / "dog")
    assert len(list_images(folder, "train").files.read(at)) == 8  # the way out that the message names
    (folder / "train" / "dog" / "x.jpg").unlink()
    with pytest.raises(InputError, match=r"dog/x.jpg cannot be read"):
        files.read(at)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:300], lambda data: b"no zip" * 99])
def test_a_damaged_index_is_made_anew(folder, scans, damage):
    whole = list_images(folder, "train")
    (path,) = cache_folder().glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert list_images(folder, "train").fingerprint == whole.fingerprint and len(scans) == 6
    list_images(folder, "train")
    assert len(scans) == 6


def test_a_bit_that_flipped_in_an_index_is_noticed(folder, scans):
    list_images(folder, "train")
    (path,) = cache_folder().glob("*.npz")
    data = bytearray(path.read_bytes())
    data[data.index(b"cat/a.PNG")] ^= 1
    path.write_bytes(data)
    assert (list(list_images(folder, "train").files), len(scans)) == (naive(folder, "train")[0], 6)


def test_an_index_of_another_version_is_made_anew(folder, scans, monkeypatch):
    list_images(folder, "train")
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    list_images(folder, "train")
    assert len(scans) == 6


def test_a_cache_that_cannot_be_written_is_said_once_and_no_error(folder, scans, monkeypatch, capsys):
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("MOCO_EVAL_CACHE", str(folder.parent / "file"))
    index.say_not_kept.cache_clear()
    for _ in range(2):
        assert len(list_images(folder, "train").files) == 6
    assert len(scans) == 6 and capsys.readouterr().err.count("no index of the images is kept") == 1


def test_small_sets_and_folders_that_have_just_changed_have_no_index(folder, monkeypatch):
    monkeypatch.setattr(index, "KEPT_FROM", 7)
    list_images(folder, "train")
    monkeypatch.setattr(index, "KEPT_FROM", 6)
    change_removed(folder)
    change_added(folder)
    list_images(folder, "train")
    assert not list(cache_folder().glob("*.npz"))
    list_images(aged(folder), "train")
    assert list(cache_folder().glob("*.npz"))


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "train" / "cat" / "up").symlink_to(folder / "train", target_is_directory=True)
    (folder / "train" / "dog" / "link").symlink_to(folder / "train" / "cat-2", target_is_directory=True)
    names = [Path(name).relative_to(folder / "train").as_posix() for name in list_images(folder, "train").files]
    assert "cat/up/dog/x.jpg" in names and "dog/link/ä.webp" in names
    assert not any("up" in name.partition("up/")[2] for name in names)


def test_a_dangling_link_is_named(folder):
    (folder / "train" / "cat" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    with pytest.raises(InputError, match=r"cannot read .*gone.jpg: No such file"):
        list_images(folder, "train")


def test_some_files_alone_keep_their_order_and_names_may_be_any_bytes(folder):
    odd = os.fsencode(folder / "train" / "dog") + b"/\xff\xfe.jpg"
    Path(os.fsdecode(odd)).write_bytes(b"seven..")
    files = list_images(folder, "train").files
    chosen = files.take(np.array([len(files) - 1, 0]))
    assert list(chosen) == [os.fsdecode(odd), files[0]]
    assert chosen.read(0) == b"seven.." and chosen.read(1) == files.read(0)
    few = open_images("imagefolder", folder, "train").few_labels(1, 0)
    assert few.labels.tolist() == [0, 1, 2] and [Path(few.name_of(i)).parts[-2] for i in (1, 2)] == ["cat-2", "dog"]


def test_files_hold_three_arrays_and_travel_to_other_processes(folder):
    files = list_images(folder, "train").files
    assert {type(value) for value in vars(files).values()} == {str, np.ndarray}
    assert isinstance(files, ImageFiles) and list(pickle.loads(pickle.dumps(files))) == list(files)


def listed_at_once(folder: Path, both_ready, answers) -> None:
    """What one of two processes sees: how many folders it listed, what it found, how an empty folder is refused."""
    seen, scan = [], index.scan

    def slow(*arguments):
        seen.append(arguments)
        time.sleep(0.05)
        return scan(*arguments)

    index.scan = slow
    both_ready.wait()
    found = list_images(folder, "train")
    try:
        list_images(folder.parent / "empty", "train")
    except InputError as error:
        answers.put((len(seen), len(found.files), found.fingerprint, str(error)))


def test_of_two_processes_one_lists_and_both_are_refused(folder):
    (folder.parent / "empty" / "train").mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    both_ready, answers = fork.Barrier(2), fork.Queue()
    started = [fork.Process(target=listed_at_once, args=(folder, both_ready, answers)) for _ in range(2)]
    for process in started:
        process.start()
    one, two = (answers.get(timeout=20) for _ in started)
    for process in started:
        process.join()
    assert sorted([one[0], two[0]]) == [0, 3]
    assert one[1:3] == two[1:3] == (6, naive(folder, "train")[1])
    assert one[3] == two[3] and "holds no class folders" in one[3]

"""Images in tar shards: which there are, what is damaged, in which order they come, and a whole run over them."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line
from tars import jpeg, write, write_shards

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data import index, loader, shards
from moco_eval.data.catalogue import check, open_images
from moco_eval.data.index import cache_folder
from moco_eval.data.loader import WINDOW, Batches
from moco_eval.errors import InputError, RunFailed
from pretraining.plan import plan
from pretraining.train import Trainer, pretrain

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Nine shards of four pictures, each with its class beside it."""
    monkeypatch.setenv("MOCO_EVAL_CACHE", str(tmp_path / "cache"))
    return write_shards(tmp_path / "data")


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def all_of(images) -> dict[str, bytes]:
    return {images.name_of(i): images.read(i) for i in range(len(images))}


# What there is


def test_every_image_is_read_by_its_place_and_companions_are_counted(folder):
    images = open_images("webdataset", folder, "train")
    held = all_of(images)
    assert list(held)[:5] == [f"0/shard-000000.tar/{i:05}.jpg" for i in range(4)] + ["0/shard-000002.tar/00008.jpg"]
    assert len(images) == 36 and all(data == jpeg(int(name[-9:-4])) for name, data in held.items())
    assert images.labels is None and images.damaged == () and images.image(7).size == (40, 40)
    assert images.shards.tolist() == list(range(4, 37, 4))
    assert images.record() | {"fingerprint": ""} == {
        "name": "webdataset:data", "split": "train", "fingerprint": "", "images": 36, "classes": 0, "shards": 9,
        "other_members": 36,
    }  # fmt: skip
    sizes = [(os.fsencode(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*.tar")]
    assert images.fingerprint == index.fingerprint(sizes)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_headers_are_read_as_tarfile_reads_them(tmp_path, form):
    long = "g" * (99 if form == tarfile.USTAR_FORMAT else 180)
    names = ["a.jpg", f"{'d' * 80}/{'e' * 60}/b.jpg", "f" * 96 + ".txt", long, "ä/ö.png"]
    members = {name: bytes(size) for name, size in zip(names, (0, 1, 511, 512, 513))}
    write(tmp_path / "x.tar", members, form)
    with tarfile.open(tmp_path / "x.tar", "a", format=form) as tar:
        folder, link = tarfile.TarInfo("folder.jpg"), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.LNKTYPE, "a.jpg"
        link.size = 5000  # of the file it links to: nothing of it follows
        for about in (folder, link, tarfile.TarInfo("last.bmp")):
            tar.addfile(about)
    with tarfile.open(tmp_path / "x.tar") as tar, (tmp_path / "x.tar").open("rb") as file:
        expected = [
            (m.name + "/" * m.isdir(), m.offset, m.offset_data, m.size * m.isreg(), m.isreg(), True, m.linkname)
            for m in tar
        ]
        found = list(shards.members(file.fileno(), (tmp_path / "x.tar").stat().st_size))
    assert found == expected and len(found) == 8


def test_sizes_over_eight_gigabytes_are_read(tmp_path):
    """GNU writes them in base 256, pax in a record: the last member of a sparse file."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        about, size = tarfile.TarInfo("large.png"), 9 << 30
        about.size = size
        path = tmp_path / f"{form}.tar"
        path.write_bytes(about.tobuf(form))
        at = path.stat().st_size
        os.truncate(path, at + size + 1024)
        with path.open("rb") as file:
            (found,) = shards.members(file.fileno(), path.stat().st_size)
        assert (found.data, found.size, found.whole) == (at, size, True)


def test_parity_with_the_webdataset_library(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "s-%04d.tar"), maxcount=5, verbose=0) as writer:
        for i in range(12):
            key = f"{i:04}" + "long" * 40 * (i == 7)
            writer.write({"__key__": key, "jpg": jpeg(i), "cls": i, "json": {"i": i}})
    paths = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = {
        f"{Path(sample['__url__']).name}/{sample['__key__']}.jpg": sample["jpg"]
        for sample in webdataset.WebDataset(paths, shardshuffle=False)
    }
    images = open_images("webdataset", tmp_path, "train")
    assert all_of(images) == theirs and len(theirs) == 12 and images.record()["other_members"] == 24


def test_what_cannot_be_read_by_place_or_is_not_there_is_refused(folder, tmp_path, capfd, monkeypatch):
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"holds no .tar files; for image files take --dataset flat"):
        open_images("webdataset", tmp_path / "bare", "train")
    write(tmp_path / "bare" / "x.tar", {"a.txt": b"", "b.cls": b""})
    with pytest.raises(InputError, match=r"the 1 tar files in .* hold no images .*, but 2 other members"):
        open_images("webdataset", tmp_path / "bare", "train")
    (folder / "more.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 compressed shards \(first: more.tar.gz\).*unpack"):
        open_images("webdataset", folder, "train")
    with pytest.raises(InputError, match="pretraining only"):
        open_images("webdataset", folder, "test")
    command = ("pretrain", "digits", "--dataset", "webdataset", "--data", tmp_path / "nowhere")
    assert "does not exist" in error_line(capfd, monkeypatch, *command)


# What is damaged


def test_a_shard_that_ends_early_keeps_what_is_before_the_break(folder):
    whole = all_of(open_images("webdataset", folder, "train"))
    first, second = folder / "0" / "shard-000002.tar", folder / "1" / "shard-000003.tar"
    with tarfile.open(first) as tar:
        cut(first, tar.getmember("00010.jpg").offset_data + 100)
    with tarfile.open(second) as tar:
        data = bytearray(second.read_bytes())
        broken_header = tar.getmember("00013.cls").offset
        data[broken_header + 5] ^= 1
        second.write_bytes(data)
    (folder / "1" / "text.tar").write_text("no tar" * 200)
    (folder / "1" / "void.tar").write_bytes(b"")
    for _ in range(2):  # from the tar files, then from their indices
        images = open_images("webdataset", folder, "train")
        assert images.damaged == (
            "0/shard-000002.tar/00010.jpg",
            f"1/shard-000003.tar (from byte {broken_header})",
            "1/text.tar (from byte 0)",
            "1/void.tar (from byte 0)",
        )
        lost = {f"0/shard-000002.tar/{i:05}.jpg" for i in (10, 11)}
        lost |= {f"1/shard-000003.tar/{i:05}.jpg" for i in (14, 15)}
        assert all_of(images) == {name: data for name, data in whole.items() if name not in lost}


def test_a_missing_end_mark_is_damage_that_costs_no_image(folder):
    path = folder / "0" / "shard-000000.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    cut(path, end)
    images = open_images("webdataset", folder, "train")
    assert len(images) == 36 and images.damaged == (f"0/shard-000000.tar (from byte {end})",)


@pytest.mark.parametrize("field", [b"-0000000777\0", b"9999999999\0\0", b"\x80" + b"\xff" * 11])
def test_impossible_sizes_are_damage(tmp_path, field):
    header = bytearray(tarfile.TarInfo("x.jpg").tobuf())
    header[124:136] = field
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    (tmp_path / "x.tar").write_bytes(header + bytes(2048))
    with (tmp_path / "x.tar").open("rb") as file:
        (found,) = shards.members(file.fileno(), 2560)
    assert not found.whole
    write_shards(tmp_path)
    images, _, damaged = shards.open_shards(tmp_path)
    assert len(images) == 36 and len(damaged) == 1 and damaged[0].startswith("x.tar")


def test_damage_beyond_bad_images_is_refused_and_within_it_is_said(folder):
    cut(folder / "0" / "shard-000000.tar", 700)
    (folder / "1" / "void.tar").write_bytes(b"")
    settings = ["arch=resnet18_quarter", "batch_size=16", "bn_groups=4", "queue_size=64", "symmetric=false"]
    with pytest.raises(
        InputError, match=r"2 damaged in webdataset:data: 0/shard-000000.tar.*, 1/void.tar.*bad_images=2"
    ):
        plan(config(*settings, "bad_images=1"), "webdataset", folder, 1)
    run = plan(config(*settings, "bad_images=2"), "webdataset", folder, 1)
    (warning,) = [words for words in run.warnings if "damaged" in words]
    assert (
        warning.startswith("2 damaged in webdataset:data: 0/shard-000000.tar")
        and f"warning: {warning}" in run.describe()
    )


# Nothing is lost without a word: against GNU tar


def gnu(*arguments: str | Path) -> str:
    """What GNU tar says."""
    if shutil.which("tar") is None or b"GNU" not in subprocess.run(["tar", "--version"], capture_output=True).stdout:
        pytest.skip("no GNU tar")
    return subprocess.run(["tar", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def pictures(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True)
    for i in numbers:
        (folder / f"{i:03}.jpg").write_bytes(jpeg(i))
    return folder


def opened(folder: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    images = open_images("webdataset", folder, "train")
    return all_of(images), images.damaged


def test_archives_joined_by_cat_are_read_as_gnu_tar_reads_them(tmp_path):
    parts = [tmp_path / f"{i}.part" for i in range(3)]
    for i, path in enumerate(parts):
        write(path, {f"{n:03}.jpg": jpeg(n) for n in range(4 * i, 4 * i + 4)})
    parts[1].write_bytes(parts[1].read_bytes().rstrip(b"\0") + bytes(512 + 1024))  # ended by two blocks, not a record
    size = parts[1].stat().st_size
    parts[1].write_bytes(parts[1].read_bytes()[: size - size % 512])
    (tmp_path / "set").mkdir()
    joined = tmp_path / "set" / "all.tar"
    joined.write_bytes(b"".join(path.read_bytes() for path in parts))
    held, damaged = opened(tmp_path / "set")
    assert [name.rpartition("/")[2] for name in held] == gnu("-tif", joined).split() and len(held) == 12
    assert list(held.values()) == [jpeg(n) for n in range(12)] and damaged == ()


@pytest.mark.parametrize(
    ("start", "stop"), [(3, 9), (3, None), (3, 5)], ids=["to a header", "to the end", "into an image"]
)
def test_a_hole_of_zeros_is_a_break(folder, start, stop):
    """An unfinished download whose place was kept: of GNU tar's a file ends there, or goes on behind without a word."""
    members = {f"{i:03}.jpg": jpeg(i) * 12 for i in range(16)}
    path = folder / "hole.tar"
    write(path, members)
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar]
    data = bytearray(path.read_bytes())
    end = len(data) if stop is None else places[stop] + (1024 if stop == 5 else 0)
    assert end - places[start] > shards.LONGEST_END
    data[places[start] : end] = bytes(end - places[start])
    path.write_bytes(data)
    held, damaged = opened(folder)
    assert damaged == (f"hole.tar (zeros from byte {places[start]})",)
    assert [name for name in held if name.startswith("hole")] == [f"hole.tar/{i:03}.jpg" for i in range(3)]


@pytest.mark.parametrize("zeros", [1, 2, 21, 22])
def test_only_zeros_that_a_writer_leaves_join_archives(folder, zeros):
    data = [tarfile.TarInfo("a.jpg").tobuf(), bytes(512 * zeros), tarfile.TarInfo("b.jpg").tobuf(), bytes(1024)]
    (folder / "x.tar").write_bytes(b"".join(data))
    held, damaged = opened(folder)
    whole = zeros in (2, 21)
    assert ("x.tar/b.jpg" in held) == whole and (damaged == ()) == whole and "x.tar/a.jpg" in held


def test_an_end_mark_of_one_block_or_with_a_newline_behind_it_is_whole(folder):
    for name, tail in {"one.tar": bytes(512), "line.tar": bytes(1024) + b"\n", "twenty.tar": bytes(21 * 512)}.items():
        (folder / name).write_bytes(tarfile.TarInfo("a.jpg").tobuf() + tail)
    held, damaged = opened(folder)
    assert len(held) == 39 and damaged == ()
    (folder / "text.tar").write_bytes(tarfile.TarInfo("a.jpg").tobuf() + bytes(1024) + b"text" * 256)
    assert opened(folder)[1] == ("text.tar (zeros from byte 512)",)


def test_links_are_followed_as_gnu_tar_unpacks_them(tmp_path):
    tree = pictures(tmp_path / "tree" / "x", range(6)).parent
    pictures(tree / "y", range(6, 9))
    for i in range(6):
        (tree / "y" / f"{i:03}.jpg").hardlink_to(tree / "x" / f"{i:03}.jpg")
    (tree / "a").mkdir()
    (tree / "a" / "first.jpg").symlink_to("../y/008.jpg")  # comes before what it leads to
    (tree / "y" / "chain.jpg").symlink_to("../a/first.jpg")
    (tmp_path / "set").mkdir()
    for form in ("gnu", "posix", "ustar"):
        gnu("-C", tree, f"--format={form}", "-cf", tmp_path / "set" / f"{form}.tar", "a", "x", "y")
    held, damaged = opened(tmp_path / "set")
    expected = {
        f"{form}.tar/{path.relative_to(tree)}": path.read_bytes()
        for form in ("gnu", "posix", "ustar")
        for path in tree.rglob("*.jpg")
    }
    assert held == expected and len(held) == 3 * 17 and damaged == ()


def test_links_of_long_names_are_followed(tmp_path):
    long = "d" * 120
    tree = pictures(tmp_path / "tree" / long, range(2)).parent
    (tree / "z").mkdir()
    (tree / "z" / "hard.jpg").hardlink_to(tree / long / "000.jpg")
    (tree / "z" / "soft.jpg").symlink_to(f"../{long}/001.jpg")
    (tmp_path / "set").mkdir()
    for form in ("gnu", "posix"):
        gnu("-C", tree, f"--format={form}", "-cf", tmp_path / "set" / f"{form}.tar", long, "z")
    held, damaged = opened(tmp_path / "set")
    assert len(held) == 8 and damaged == ()
    assert [held[f"gnu.tar/z/{name}.jpg"] for name in ("hard", "soft")] == [jpeg(0), jpeg(1)]


@pytest.mark.parametrize("target", ["gone.jpg", "/etc/x.jpg", "link.jpg"])
def test_a_link_to_nowhere_is_named(folder, target):
    about = tarfile.TarInfo("link.jpg")
    about.type, about.linkname = tarfile.SYMTYPE, target
    (folder / "x.tar").write_bytes(tarfile.TarInfo("a.jpg").tobuf() + about.tobuf() + bytes(1024))
    for _ in range(2):
        held, damaged = opened(folder)
        assert damaged == (f"x.tar/link.jpg (a link to {target}, which is not in it)",)
        assert len(held) == 37 and "x.tar/a.jpg" in held


def test_what_macos_leaves_in_a_shard_is_passed_over_and_named_once(folder):
    twins = {f"./._{i:05}.jpg": b"\0\5\x16\7" for i in range(3)} | {"__MACOSX/a.jpg": b"", "x/.thumbs/a.jpg": b""}
    write(folder / "mac.tar", twins | {"./00000.jpg": jpeg(0), "x/.hidden.jpg": jpeg(1)})
    (folder / "._mac.tar").write_bytes(b"\0\5\x16\7")
    for _ in range(2):
        images = open_images("webdataset", folder, "train")
        assert len(images) == 38 and images.damaged == ()
        assert images.passed_over == (
            "1 hidden or system entries passed over: ._mac.tar; "
            "5 hidden or system members passed over: mac.tar/./._00000.jpg, ..."
        )
    assert f"webdataset:data train: {images.passed_over}" in check("webdataset", folder)


def test_tar_files_in_a_tar_file_are_named(folder, tmp_path):
    """ImageNet's own: a tar file for each class."""
    inner = (folder / "0" / "shard-000000.tar").read_bytes()
    write(tmp_path / "outer" / "train.tar", {"n01440764.tar": inner, "n01443537.tar": inner})
    words = r"hold no images .*train.tar/n01440764.tar \(an archive in a shard: unpack the shard\)"
    with pytest.raises(InputError, match=words):
        open_images("webdataset", tmp_path / "outer", "train")
    shutil.copy(tmp_path / "outer" / "train.tar", folder / "train.tar")
    named = tuple(
        f"train.tar/{name}.tar (an archive in a shard: unpack the shard)" for name in ("n01440764", "n01443537")
    )
    assert opened(folder)[1] == named


COMPRESSORS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", [*COMPRESSORS, "zip", "LFS", "page"])
def test_what_is_no_tar_file_is_called_by_what_it_is(folder, kind):
    path = folder / "0" / "shard-000000.tar"
    if kind in COMPRESSORS:
        data, words = COMPRESSORS[kind](path.read_bytes()), f"compressed by {kind}: unpack it"
    elif kind == "zip":
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as archive:
            archive.write(path, "a.tar")
        data, words = held.getvalue(), "a zip archive: unpack it, and make a tar file"
    elif kind == "LFS":
        data, words = b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer: git lfs pull fetches it"
    else:
        data, words = b"<!DOCTYPE html>" + b"x" * 2000, "a web page: fetch it again"
    path.write_bytes(data)
    held_images, damaged = opened(folder)
    assert damaged == (f"0/shard-000000.tar ({words})",) and len(held_images) == 32


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_members_are_a_break(folder, tmp_path, form):
    """They are not stored as they are: a map of their holes comes first."""
    tree = pictures(tmp_path / "tree", range(2))
    with (tree / "001.jpg").open("ab") as file:
        file.truncate(1 << 20)
    gnu("-C", tree, f"--format={form}", "-Scf", folder / "sparse.tar", "000.jpg", "001.jpg")
    held, (damage,) = opened(folder)
    assert "sparse.tar/000.jpg" in held and damage.startswith("sparse.tar/") and damage.endswith("001.jpg")


# The index


@pytest.fixture
def indexed(monkeypatch) -> list[str]:
    """Every shard that is indexed in this process."""
    seen, index_of = [], shards.index_of

    def counted(shard):
        seen.append(shard.name)
        return index_of(shard)

    monkeypatch.setattr(shards, "index_of", counted)
    monkeypatch.setattr(shards, "_in_parallel", lambda missing: map(shards._summary, missing))
    return seen


def test_a_shard_is_indexed_once_and_again_when_it_changes(folder, indexed):
    before = all_of(open_images("webdataset", folder, "train"))
    assert all_of(open_images("webdataset", folder, "train")) == before and len(indexed) == 9
    write(folder / "0" / "shard-000000.tar", {"new.png": b"x"})
    images = open_images("webdataset", folder, "train")
    assert len(images) == 33 and indexed[9:] == ["0/shard-000000.tar"]
    assert images.name_of(0) == "0/shard-000000.tar/new.png" and images.read(0) == b"x"


def test_a_damaged_index_or_one_that_goes_away_is_made_anew(folder, indexed):
    before = all_of(open_images("webdataset", folder, "train"))
    kept = sorted((cache_folder() / "shards").glob("*.npy"))
    np.save(folder / "other.npy", np.zeros(5))
    other = (folder / "other.npy").read_bytes()
    for path, data in zip(kept, (b"", b"no array" * 99, kept[2].read_bytes()[:150], other)):
        path.unlink()
        path.write_bytes(data)
    shards._open.cache_clear()
    assert all_of(open_images("webdataset", folder, "train")) == before and len(indexed) == 13
    images = open_images("webdataset", folder, "train")
    for path in kept:
        path.unlink()
    shards._open.cache_clear()
    assert all_of(images) == before and len(indexed) == 22


def test_a_cache_that_cannot_be_written_is_said_and_no_error(folder, indexed, monkeypatch, capsys):
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("MOCO_EVAL_CACHE", str(folder.parent / "file"))
    index.say_not_kept.cache_clear()
    images = open_images("webdataset", folder, "train")
    assert len(all_of(images)) == 36 and capsys.readouterr().err.count("no index of the images is kept") == 1


def test_several_processes_index_as_one_does(folder, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found, _ = shards._list(folder)
    assert list(shards._in_parallel(found)) == [shards._summary(shard) for shard in found]


def test_a_shard_that_changes_under_a_run_is_refused(folder):
    images = open_images("webdataset", folder, "train")
    images.read(0)
    write(folder / "0" / "shard-000002.tar", {"other.jpg": b""})
    with pytest.raises(InputError, match=r"shard-000002.tar has changed since it was indexed"):
        images.read(4)
    (folder / "0" / "shard-000004.tar").unlink()
    with pytest.raises(InputError, match=r"shard-000004.tar cannot be read .No such file"):
        images.read(8)
    cut(folder / "0" / "shard-000000.tar", 100)
    with pytest.raises(InputError, match=r"shard-000000.tar has become shorter"):
        images.read(0)


def test_few_shards_are_open_at_a_time_also_in_another_process(folder, monkeypatch):
    monkeypatch.setattr(shards, "_open", shards.functools.lru_cache(2)(shards._Open))
    images = pickle.loads(pickle.dumps(open_images("webdataset", folder, "train")))

    def descriptors() -> int:
        return sum(str(link.resolve()).endswith(".tar") for link in Path("/proc/self/fd").iterdir())

    before = descriptors()
    for i in (*range(36), *range(36)):
        assert images.read(i) == jpeg(int(images.name_of(i)[-9:-4])) and descriptors() - before <= 2


# The order


def batches(ends: np.ndarray, **given) -> Batches:
    settings = {"batch_size": 32, "seed": 3, "epochs": range(2), "shuffle": True, "drop_last": False} | given
    return Batches(int(ends[-1]), shards=ends, **settings)


@pytest.fixture
def ends() -> np.ndarray:
    """Of a hundred shards with 0 to 20 images."""
    return np.cumsum(np.random.default_rng(0).integers(0, 21, 100))


def test_each_image_comes_once_an_epoch_and_epochs_and_seeds_differ(ends):
    rows = list(batches(ends))
    assert len(rows) == len(batches(ends)) and {len(row) for row in rows[:-1]} >= {32}
    epochs = [[index for row in rows for epoch, index in row if epoch == wanted] for wanted in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(ends[-1]))
    assert epochs[0] != epochs[1] and epochs[0] != [i for row in batches(ends, seed=4) for _, i in row][: ends[-1]]
    whole = list(batches(ends, drop_last=True))
    assert len(whole) == len(batches(ends, drop_last=True)) == 2 * (ends[-1] // 32)


def test_images_of_few_shards_meet_and_are_mixed_among_them(ends):
    order = [index for row in batches(ends, epochs=range(1)) for _, index in row]
    shard_of = np.searchsorted(ends, order, side="right")
    shuffled = np.random.default_rng((3, 0)).permutation(100)
    at = 0
    for first in range(0, 100, WINDOW):
        window = shuffled[first : first + WINDOW]
        count = int(np.diff(ends, prepend=0)[window].sum())
        assert set(shard_of[at : at + count]) <= set(window)
        assert np.count_nonzero(np.diff(shard_of[at : at + count])) > count / 2
        at += count
    assert at == len(order)


@pytest.mark.parametrize("first_step", [1, 7, 20, 29])
def test_resumed_inside_an_epoch_the_rest_is_the_same_and_nothing_before_is_drawn(ends, first_step, monkeypatch):
    rows = list(batches(ends))
    drawn, default_rng = [], np.random.default_rng
    monkeypatch.setattr(loader.np.random, "default_rng", lambda seed: (drawn.append(seed), default_rng(seed))[1])
    later = batches(ends, first_step=first_step)
    assert list(later) == rows[first_step:] and len(later) == len(rows) - first_step
    windows = [seed[2] for seed in drawn if len(seed) == 3 and seed[1] == 0]
    sizes = np.diff(ends, prepend=0)[default_rng((3, 0)).permutation(100)]
    passed = int((np.cumsum([sizes[at : at + WINDOW].sum() for at in range(0, 100, WINDOW)]) <= 32 * first_step).sum())
    assert windows == list(range(1 + passed, 8))


def test_a_billion_images_start_at_once():
    """10^5 shards of 10^4: one window is drawn, 160,000 numbers, wherever the run starts."""
    ends = np.arange(1, 10**5 + 1) * 10**4
    for first_step in (0, 3_000_000):
        row = next(iter(batches(ends, batch_size=256, first_step=first_step)))
        assert len({index for _, index in row}) == 256 and len({index // 10**4 for _, index in row}) <= WINDOW


def test_ranks_share_each_batch_of_the_one_order(ends, monkeypatch):
    alone = [[index for _, index in row] for row in batches(ends, drop_last=True)]
    monkeypatch.setattr(loader, "world_size", lambda: 3)
    parts = []
    for number in range(3):
        monkeypatch.setattr(loader, "rank", lambda number=number: number)
        parts.append([[index for _, index in row] for row in batches(ends, drop_last=True)])
    assert [[*one, *two, *three] for one, two, three in zip(*parts)] == alone


# A whole run


def config(*settings: str) -> PretrainConfig:
    base = ["arch=resnet18_quarter", "views.size=32", "workers=0", "knn=null", "schedule.epochs=1"]
    return configs.load("digits", "pretrain", PretrainConfig, [*base, *settings])


def test_a_run_over_damaged_shards_names_each_thing_once_and_ends(folder, tmp_path, capsys):
    images = {f"{i:05}.jpg": jpeg(i) for i in range(100, 108)}
    corrupt = images["00101.jpg"][:250] + bytes(200)
    write(folder / "bad.tar", images | {"00101.jpg": corrupt, "text.jpg": b"no image", "00102.cls": b"3"})
    cut(folder / "1" / "shard-000005.tar", 3000)
    settings = ("batch_size=8", "bn_groups=2", "queue_size=16", "symmetric=false", "schedule.epochs=2")
    run = plan(config(*settings, "bad_images=3"), "webdataset", folder, 1)
    (broken,) = run.images.damaged
    last = pretrain(run, tmp_path / "run", torch.device("cpu"))
    state = torch.load(last, weights_only=True)
    assert state["step"] == run.steps == 2 * (len(run.images) // 8)
    said = capsys.readouterr().err + run.describe()
    for name in (broken, "bad.tar/00101.jpg", "bad.tar/text.jpg"):
        assert said.count(name) == 1
    assert said.count("another image is used in its place") == 2
    first = next(Trainer(run, tmp_path / "order", torch.device("cpu")).batches()).index.tolist()
    assert first == [i for _, i in next(iter(batches(run.images.shards, batch_size=8, seed=run.config.seed)))]
    with pytest.raises(RunFailed, match="more than 2 images cannot be read"):
        run = plan(config(*settings, "bad_images=2"), "webdataset", folder, 1)
        pretrain(run, tmp_path / "two", torch.device("cpu"))
    with pytest.raises(InputError, match="1 damaged in webdataset"):
        plan(config(*settings, "bad_images=0"), "webdataset", folder, 1)

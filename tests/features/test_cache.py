"""The feature cache: addressed by what it depends on, whole shards or none, the same from any number of processes."""

import hashlib
import io
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from moco_eval.config.base import Augmentation
from moco_eval.data.catalogue import open_images
from moco_eval.data.image_set import ImageSet
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.features import cache
from moco_eval.features import extract as features
from moco_eval.features.cache import Features, Source, features_of, several_features_of
from moco_eval.features.extract import Crops, extract
from moco_eval.features.stages import Several, network
from moco_eval.preprocessing import Preprocessing

CPU = torch.device("cpu")
SMALL = Preprocessing(32, 32, (0.3,) * 3, (0.3,) * 3)
MILD = Augmentation(crop_scale=(0.5, 1.0), flip=True)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 100)


def encoder() -> Encoder:
    return load("random:resnet18_quarter")


def source(count: int = 250, **rest) -> Source:
    images = open_images("digits", None, "train")
    images = replace(images, pixels=images.pixels[:count], labels=images.labels[:count])
    return Source(rest.pop("encoder", None) or encoder(), images, SMALL, **rest)


def shard_files(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


def test_cached_features_are_those_of_the_network_in_order(tmp_path):
    asked = source(batch_size=64)
    direct = extract(asked.encoder.backbone, asked.images, SMALL, CPU, batch_size=250)
    for _ in range(2):
        found = features_of(asked, tmp_path, CPU)
        assert found.shape == (250, 128) and [len(part) for part in found.parts] == [100, 100, 50]
        assert torch.allclose(found.tensor(), direct, atol=1e-5)
    assert torch.equal(found.tensor(), features_of(asked, tmp_path, CPU).tensor())


def test_what_is_there_is_not_extracted_again(tmp_path, monkeypatch):
    features_of(source(), tmp_path, CPU)
    monkeypatch.setattr(cache, "pixels", lambda *_: pytest.fail("extracted again"))
    features_of(source(), tmp_path, CPU)


def test_rows_by_slice_and_by_number(tmp_path):
    found = features_of(source(), tmp_path, CPU)
    whole, rows = found.tensor(), np.array([249, 0, 100, 99, 0, 150])
    assert torch.equal(found[rows], whole[rows])
    for start, stop in ((0, 250), (90, 210), (100, 200), (249, 250), (240, 999), (5, 5)):
        assert torch.equal(found[start:stop], whole[start:stop])


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": load("random:resnet18_quarter", seed=1)},
        {"feature": "layer3"},
        {"preprocessing": Preprocessing(32, 32, (0.4,) * 3, (0.3,) * 3)},
        {"preprocessing": Preprocessing(32, 36, (0.3,) * 3, (0.3,) * 3)},
        {"precision": "bf16"},
        {"precision": "tf32"},
        {"crops": Crops(MILD, 0, 0)},
    ],
)
def test_another_question_has_another_address(change, tmp_path):
    asked = source()
    other = replace(asked, **change)
    assert other.folder(tmp_path) != asked.folder(tmp_path)


def test_each_crop_and_each_set_has_its_own(tmp_path):
    asked = replace(source(), crops=Crops(MILD, 0, 0))
    crops = [Crops(MILD, 1, 0), Crops(MILD, 0, 1), Crops(Augmentation(), 0, 0)]
    changed = [replace(asked, crops=one) for one in crops] + [replace(asked, images=source(249).images)]
    changed.append(replace(asked, images=asked.images.take(np.arange(249, -1, -1))))
    folders = {one.folder(tmp_path) for one in (asked, *changed)}
    assert len(folders) == 6
    assert replace(asked, batch_size=7, workers=3).folder(tmp_path) in folders


def test_an_interrupted_extraction_goes_on_with_the_missing_shards(tmp_path, monkeypatch):
    asked, real, calls = source(batch_size=50), Several.forward, []

    def stops(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, images)

    monkeypatch.setattr(Several, "forward", stops)
    with pytest.raises(Interrupted, match="1 of 3 shards of train features, clean crop are kept"):
        features_of(asked, tmp_path, CPU)
    before = shard_files(tmp_path)
    assert len(before) == 1 and not list(tmp_path.rglob(".*.npy"))
    found = features_of(asked, tmp_path, CPU)
    assert sum(calls[3:]) == 150  # the two missing shards and nothing else
    assert before.items() <= shard_files(tmp_path).items()
    assert torch.equal(found.tensor(), features_of(asked, tmp_path / "whole", CPU).tensor())


def test_a_flipped_byte_is_found_and_only_that_shard_made_anew(tmp_path, capfd):
    asked = source()
    whole, before = features_of(asked, tmp_path, CPU).tensor(), shard_files(tmp_path)
    damaged = sorted(tmp_path.rglob("000001-*.npy"))[0]
    data = bytearray(damaged.read_bytes())
    data[-100] ^= 1
    damaged.write_bytes(data)
    found = features_of(asked, tmp_path, CPU)
    assert f"{damaged.name} is damaged" in " ".join(capfd.readouterr().err.split())
    assert torch.equal(found.tensor(), whole)
    after = shard_files(tmp_path)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [damaged.name]


def test_a_folder_that_says_something_else_is_refused(tmp_path):
    asked = source()
    features_of(asked, tmp_path, CPU)
    key = asked.folder(tmp_path) / "key.json"
    key.write_text(key.read_text().replace("pooled", "head"))
    with pytest.raises(InputError, match="does not agree with this folder's name"):
        features_of(asked, tmp_path, CPU)


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    asked = source()
    asked.encoder.backbone.layer4[1].bn2.running_var.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not finite"):
        features_of(asked, tmp_path, CPU)
    assert not shard_files(tmp_path)


def test_bf16_features_take_half_the_bytes(tmp_path):
    found = features_of(source(precision="bf16"), tmp_path, CPU)
    exact = features_of(source(), tmp_path, CPU)
    assert found.parts[0].nbytes * 2 == exact.parts[0].nbytes
    assert found.stored().dtype == torch.bfloat16 and found[:3].dtype == torch.float32
    assert torch.allclose(found.tensor(), exact.tensor(), rtol=0.05, atol=0.05)
    assert not torch.equal(found.tensor(), exact.tensor())


def test_a_subset_is_taken_from_the_whole_where_that_is_there(tmp_path, monkeypatch):
    asked, rows = source(), np.array([3, 200, 17])
    subset = replace(asked, images=asked.images.take(rows))
    alone = features_of(subset, tmp_path, CPU).tensor()
    whole = features_of(asked, tmp_path / "both", CPU)
    monkeypatch.setattr(cache, "pixels", lambda *_: pytest.fail("extracted again"))
    found = features_of(subset, tmp_path / "both", CPU).tensor()
    assert torch.equal(found, whole[rows]) and torch.allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize("kept", [True, False])
def test_several_features_in_one_pass(kept, tmp_path):
    asked = source()
    names = ("layer3", "pooled", "layer1")
    found = several_features_of([replace(asked, feature=name) for name in names], tmp_path if kept else None, CPU)
    for name, one in zip(names, found):
        direct = extract(network(asked.encoder, name).eval(), asked.images, SMALL, CPU)
        assert torch.allclose(one.tensor(), direct, atol=1e-5)


def test_several_stages_of_a_vit_are_those_of_one_at_a_time():
    vit = load("random:vit_tiny_patch16_224")
    images, names = torch.randn(2, 3, 224, 224), ["blocks.8", "pooled", "blocks.11"]
    with torch.no_grad():
        together = Several(vit, names).eval()(images)
        for name, one in zip(names, together):
            assert torch.allclose(one, network(vit, name).eval()(images).flatten(1), atol=1e-5)


def test_crops_are_the_published_pipelines_to_pils_pixels(tmp_path):
    """Torch's draws aside: the crop that our numbers ask for, cut by PIL, flipped where they say so."""
    images, crops = open_images("digits", None, "test"), Crops(MILD, 5, 3)
    recipe, rows = crops.recipe(), np.arange(20)
    views = next(features.pixels(images, SMALL, crops, [[(3, int(i)) for i in rows]], CPU, 0))
    u = recipe.uniforms(5, np.full(20, 3), rows, 0)
    boxes = recipe.steps[0].boxes(u[:, :22], np.full(20, 32), np.full(20, 32))
    for i in rows:
        top, left, height, width = boxes[i].tolist()
        theirs = images.image(int(i)).crop((left, top, left + width, top + height)).resize((32, 32), 2)
        theirs = np.asarray(theirs).astype(np.float32)
        theirs = theirs[:, ::-1] if u[i, 22] < 0.5 else theirs
        ours = (views[i] * 0.3 + 0.3).permute(1, 2, 0).numpy() * 255
        assert np.abs(ours - theirs).max() <= 1.01


def test_crops_of_files_are_those_of_pixels(tmp_path):
    """Cut by loader workers or from memory, the same draw gives the same crop, as PIL and torch round."""
    digits = open_images("digits", None, "test")
    for i in range(6):
        folder = tmp_path / "val" / str(digits.labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        digits.image(i).save(folder / f"{i}.png")
    files = open_images("imagefolder", tmp_path, "test")
    order = [int(files.files[i].rsplit("/", 1)[1][:-4]) for i in range(6)]
    held = ImageSet("digits", "test", digits.classes, files.labels, "x", pixels=digits.pixels[order])
    batches = [[(1, i) for i in range(6)]]
    ours, theirs = (next(features.pixels(one, SMALL, Crops(MILD, 0, 1), batches, CPU, 0)) for one in (files, held))
    assert (ours - theirs).abs().max() * 0.3 * 255 <= 2.01


def on_ranks(folder, count: int) -> dict:
    cache.SHARD = 100
    asked = source(count, batch_size=64, encoder=load("random:resnet18_quarter"))
    found = features_of(asked, folder / "cache", CPU)
    crops = features_of(replace(asked, crops=Crops(MILD, 0, 2)), folder / "cache", CPU)
    return {"clean": found.tensor(), "crops": crops.tensor()}


@pytest.mark.slow
@pytest.mark.parametrize("count", [301, 1])
def test_two_processes_give_one_processs_features(count, tmp_path):
    """In order, none missing, none doubled, for numbers of images that divide by nothing."""
    alone = source(count)
    wanted = {
        "clean": features_of(alone, tmp_path / "alone", CPU).tensor(),
        "crops": features_of(replace(alone, crops=Crops(MILD, 0, 2)), tmp_path / "alone", CPU).tensor(),
    }
    for rank in run_ranks(on_ranks, tmp_path, tmp_path, count):
        for name, tensor in wanted.items():
            assert rank[name].shape == tensor.shape and torch.allclose(rank[name], tensor, atol=1e-5)


def test_parts_that_follow_each_other():
    parts = [np.arange(6, dtype=np.float32).reshape(3, 2), np.full((1, 2), 9, np.float32)]
    found = Features(parts)
    assert len(found) == 4 and torch.equal(found[2:4], torch.tensor([[4.0, 5], [9, 9]]))


def folder_of_bitmaps(folder, shade: int) -> None:
    """Two classes of uncompressed images: the same names and sizes, whatever is on them."""
    for label in ("a", "b"):
        for split in ("train", "val"):
            (folder / split / label).mkdir(parents=True)
            pixels = np.full((32, 32, 3), shade + (100 if label == "b" else 0), np.uint8)
            Image.fromarray(pixels).save(folder / split / label / "0.bmp")


def test_two_folders_of_the_same_names_and_sizes_are_two_sets(tmp_path):
    found = []
    for name, shade in (("one", 10), ("two", 60)):
        folder_of_bitmaps(tmp_path / name, shade)
        asked = replace(source(), images=open_images("imagefolder", tmp_path / name, "train"))
        found.append((asked.images.fingerprint, features_of(asked, tmp_path / "cache", CPU).tensor()))
    assert found[0][0] == found[1][0] and not torch.allclose(found[0][1], found[1][1])


def test_what_was_in_the_cache_is_told_from_what_passed(tmp_path):
    assert [features_of(source(), tmp_path, CPU).passed for _ in range(2)] == [250, 0]


def test_two_commands_may_fill_one_cache(tmp_path, monkeypatch):
    """Another command writes the same shard between our writing and our naming of it."""
    asked, write = source(), cache._Entry.write

    def twice(self, number, tensor):
        write(self, number, tensor + 0)
        write(self, number, tensor)

    monkeypatch.setattr(cache._Entry, "write", twice)
    found = features_of(asked, tmp_path, CPU)
    assert torch.equal(found.tensor(), features_of(asked, tmp_path, CPU).tensor()) and len(found) == 250


def test_a_cache_that_cannot_be_written_names_its_option(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write features to .*file.*--cache"):
        features_of(source(), tmp_path / "file", CPU)


def test_a_key_that_cannot_be_read_says_the_way_out(tmp_path):
    features_of(source(), tmp_path, CPU)
    next(tmp_path.rglob("key.json")).write_text("{")
    with pytest.raises(InputError, match="remove that folder of features"):
        features_of(source(), tmp_path, CPU)


# What others may have put there


def replaced(path, array):
    """An array in the place of a shard, under a name that carries its own sha256."""
    path.unlink()
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    other = path.with_name(f"{path.name[:6]}-{hashlib.sha256(file.getvalue()).hexdigest()}.npy")
    other.write_bytes(file.getvalue())
    return other


@pytest.mark.parametrize("kind", ["noise", "objects", "one dimension"])
def test_a_shard_that_certifies_itself_is_not_believed(kind, tmp_path, capfd):
    asked = source()
    whole = features_of(asked, tmp_path, CPU).tensor()
    shard = sorted(tmp_path.rglob("000001-*.npy"))[0]
    arrays = {
        "noise": np.ones((100, 128), np.float32),
        "objects": np.array([None] * 100),
        "one dimension": np.ones(100),
    }
    other = replaced(shard, arrays[kind])
    assert cache.missing(asked, tmp_path) == 100
    with pytest.raises(InputError, match="holds features of 150 of 250 images"):
        cache.open_folder(shard.parent)
    assert torch.equal(features_of(asked, tmp_path, CPU).tensor(), whole)
    assert torch.equal(cache.open_folder(shard.parent).tensor(), whole)
    said = capfd.readouterr().err
    assert f"{other.name} is not named in manifest.json and is not read; shard 1 is extracted again" in said


def adopted(folder, array, number=0):
    """The same, named in the manifest too, as only who may write there can do."""
    other = replaced(sorted(folder.glob(f"{number:06}-*.npy"))[0], array)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][str(number)] = [other.stem.partition("-")[2]]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([None] * 100), "is not an array of features: .*remove it"),
        (np.ones((100, 3)), "of type float64 and shape"),
        (np.ones(100, np.float32), r"shape \(100,\)"),
        (np.ones((100, 3), np.float32), "holds features of 3 and of 128 dimensions"),
    ],
)
def test_shards_that_are_no_features_are_refused_in_a_line(array, words, tmp_path):
    asked = source()
    features_of(asked, tmp_path, CPU)
    adopted(asked.folder(tmp_path), array)
    for read in (lambda: features_of(asked, tmp_path, CPU), lambda: cache.open_folder(asked.folder(tmp_path))):
        with pytest.raises(InputError, match=words) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["0x.npy", "000000-.npy", "000000-abc.npy", "000000.npy", "x.npy"])
def test_a_stray_file_is_refused_in_a_line(name, tmp_path):
    asked = source()
    features_of(asked, tmp_path, CPU)
    (asked.folder(tmp_path) / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{name} is not a shard of features, and is not read; move it away"):
        features_of(asked, tmp_path, CPU)


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(tmp_path):
    asked = source()
    features_of(asked, tmp_path, CPU)
    shard = sorted(tmp_path.rglob("0*.npy"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(InputError, match="is not a shard of features"):
        features_of(asked, tmp_path, CPU)


@pytest.mark.parametrize("text", ["{", "[]", '{"key": "x", "shards": {}}', '{"key": 1}', '{"shards": {"0": ["../x"]}}'])
def test_a_manifest_of_something_else_is_refused(text, tmp_path):
    asked = source()
    features_of(asked, tmp_path, CPU)
    (asked.folder(tmp_path) / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json is (damaged|not readable)"):
        features_of(asked, tmp_path, CPU)


def test_a_folder_of_an_earlier_version_is_reused_and_said(tmp_path, capfd):
    asked = source()
    whole, before = features_of(asked, tmp_path, CPU).tensor(), shard_files(tmp_path)
    (asked.folder(tmp_path) / "manifest.json").unlink()
    assert torch.equal(features_of(asked, tmp_path, CPU).tensor(), whole) and shard_files(tmp_path) == before
    assert "is of an earlier version, without manifest.json: its 3 shards are reused" in capfd.readouterr().err
    assert (asked.folder(tmp_path) / "manifest.json").is_file()


def test_a_cache_is_its_owners_alone_unless_its_folder_was_made_for_others(tmp_path, capfd):
    asked = source(100)
    features_of(asked, tmp_path / "runs" / "own", CPU)
    folder = asked.folder(tmp_path / "runs" / "own")
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    assert "own if in doubt" not in capfd.readouterr().err
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o775)
    before = os.umask(0o002)
    try:
        features_of(asked, tmp_path / "shared", CPU)
    finally:
        os.umask(before)
    assert asked.folder(tmp_path / "shared").stat().st_mode & 0o777 == 0o775
    assert "may be written by others, who may put any features there" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_features_of_another_user_are_said(tmp_path, capfd):
    asked = source(100)
    features_of(asked, tmp_path / "a", CPU)
    (tmp_path / "a").rename(tmp_path / "b")
    os.chown(next((tmp_path / "b").rglob("0*.npy")), 12345, 0)
    features_of(asked, tmp_path / "b", CPU)
    assert "belongs to user 12345, who may put any features there" in capfd.readouterr().err


# Shards of other nodes


def late_shard(tmp_path, appears: bool) -> cache._Entry:
    """A whole folder of features, one shard of which cannot be seen; with `appears`, for the first two looks only."""
    asked = source()
    features_of(asked, tmp_path, CPU)
    entry, looks = cache._Entry(asked, asked.folder(tmp_path)), []

    def seen(self=entry):
        looks.append(1)
        there = cache._Entry.shards(entry)
        return there if appears and len(looks) > 2 else {n: path for n, path in there.items() if n != 1}

    entry.shards = seen
    return entry


def test_a_shard_that_another_node_has_written_may_be_seen_late(tmp_path, monkeypatch):
    entry = late_shard(tmp_path, appears=True)
    monkeypatch.setattr(cache, "world_size", lambda: 2)
    monkeypatch.setattr(cache, "LOOK", 0.01)
    assert len(entry.open()) == 250


@pytest.mark.parametrize(("ranks", "words"), [(2, "in use, for 0 s (1 of 3, first number 1)"), (1, "in use (1 of 3,")])
def test_a_shard_that_never_comes_is_lost(ranks, words, tmp_path, monkeypatch):
    entry = late_shard(tmp_path, appears=False)
    monkeypatch.setattr(cache, "world_size", lambda: ranks)
    monkeypatch.setattr(cache, "LOOK", 0.01)
    monkeypatch.setattr(cache, "LATE", 0.05 if ranks > 1 else 60.0)  # a process alone waits for nobody
    with pytest.raises(RunFailed) as refused:
        entry.open()
    assert words in str(refused.value)


def test_what_another_process_has_taken_out_of_the_manifest_is_named_again(tmp_path, monkeypatch):
    """Where locks do not work, one of two that write the manifest at once undoes the other's line."""
    asked = source()
    entry = cache._Entry(asked, asked.folder(tmp_path))
    features_of(asked, tmp_path, CPU)
    monkeypatch.setattr(cache, "world_size", lambda: 2)
    monkeypatch.setattr(cache, "LOOK", 0.01)
    entry.written = {number: path.stem.partition("-")[2] for number, path in entry.shards().items()}
    manifest = json.loads((entry.folder / cache.MANIFEST).read_text())
    del manifest["shards"]["1"]
    (entry.folder / cache.MANIFEST).write_text(json.dumps(manifest))
    assert len(entry.open()) == 250


def test_a_closed_folder_is_not_said_to_be_open_whatever_the_umask_is(tmp_path, capfd):
    before = os.umask(0o002)
    try:
        features_of(source(100), tmp_path / "new", CPU)
    finally:
        os.umask(before)
    assert "may be written by others" not in capfd.readouterr().err

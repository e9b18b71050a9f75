"""The report's maps, confusion, paired differences, feature health and published logs, each on small invented runs."""

import io
import json
import re
import zipfile
from collections import Counter

import numpy as np
import pytest
import yaml

from moco_eval import limits
from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.errors import InputError
from moco_eval.features import sample
from moco_eval.papers import tables
from moco_eval.report import confusion, health, maps, paired, pictures, published
from moco_eval.report.page import write_report
from moco_eval.report.runs import encoder_names, read_runs

HOSTILE = '<script>alert("x")</script>'
SCHEMA = "moco-eval/result@1"
ENCODERS = {
    "trained": {"path": "runs/mine/checkpoints/last.pth", "sha256": "a" * 64, "origin": "moco-eval/1", "arch": "r"}
    | {"pretraining": {"protocol": "pretrain/moco-v2@1", "epochs": 60, "config": {"seed": 0}}},
    "random": {"path": "random:r", "sha256": "b" * 64, "origin": "random", "arch": "r", "pretraining": None},
    "pixels": {"path": "pixels", "sha256": "c" * 64, "origin": "raw pixels", "arch": "pixels", "pretraining": None},
}
NAMES = {"trained": "MoCo v2 (epoch 60)", "random": "random initialisation", "pixels": "raw pixels"}


def write_run(
    folder,
    encoder="trained",
    labels=None,
    predictions=None,
    protocol="linear/moco-lincls@1",
    classes=3,
    held=None,
    time=0,
    few=None,
    images=None,
    feature="pooled",
    **more,
):
    """An evaluation with invented answers, of one trial for each row of predictions."""
    folder.mkdir(parents=True)
    about = {"command": protocol.split("/")[0], "encoder": {"feature": feature}}
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    (folder / "environment.json").write_text(json.dumps({"time": f"2026-01-01T00:00:{time:02}+0000"}))
    predictions = None if predictions is None else np.atleast_2d(predictions)
    top1 = 50.0 if predictions is None else 100 * float((predictions == labels).mean())
    count = images or (6 if labels is None else len(labels))
    record = {
        "schema": SCHEMA,
        "protocol": protocol,
        "dataset": {"name": "shapes", "split": "test", "fingerprint": "f00d", "images": count, "classes": classes}
        | ({"labels_per_class": few} if few else {}),
        "encoder": ENCODERS[encoder],
        "metrics": {"top1": top1},
        "std": {},
        "interval": {},
        "trials": [
            {"seed": seed, "metrics": {"top1": top1}} for seed in range(1 if predictions is None else len(predictions))
        ],
        "over": "head",
        "selection": "last-epoch",
        "equivalences": [],
        "deviations": [],
        "cost": {"seconds": 1.0, "images": 10, "peak_memory_MB": 1.0, "device": "cpu"},
        **more,
    }
    (folder / "result.json").write_text(json.dumps(record))
    if predictions is not None:
        np.savez(folder / "predictions.npz", prediction=predictions, label=np.asarray(labels))
    if held is not None:
        sample.write(folder / sample.NAME, held)
    return folder


def blobs(count=60, classes=("a", "b", "c"), several=False, seed=0):
    """A sample whose classes lie far apart."""
    random = np.random.default_rng(seed)
    label = np.arange(count) % len(classes)
    features = random.normal(size=(count, 8)) + 12 * np.eye(len(classes), 8)[label]
    shown = np.eye(len(classes), dtype=int)[label] if several else label
    return sample.Sample(np.arange(count), shown, tuple(classes), *sample.principal_components(features))


def read(root):
    runs = read_runs([root])
    names = encoder_names(runs)
    return runs, names, [name for name in NAMES.values() if name in names.values()]


def page_of(root):
    write_report([root], root / "report.html")
    return (root / "report.html").read_text()


# All of them


def test_runs_without_these_files_have_none_of_these_sections(tmp_path):
    write_run(tmp_path / "run")
    given = read(tmp_path)
    assert maps.maps(*given) == confusion.confusion(*given) == health.health(*given) == []
    assert paired.paired(*given, {NAMES["trained"]: "trained"}) == []
    page = page_of(tmp_path)
    for words in ("Maps of features", "Which classes are confused", "class by class", "Health of"):
        assert words not in page


@pytest.mark.parametrize("name", ["sample.npz", "predictions.npz"])
def test_a_damaged_file_is_named(name, tmp_path):
    labels = np.arange(60) % 3
    write_run(tmp_path / "run", labels=labels, predictions=labels, held=blobs())
    (tmp_path / "run" / name).write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=rf"{name} cannot be read"):
        page_of(tmp_path)


def damage_sample(folder, **arrays):
    """sample.npz with other arrays in place of its own."""
    with np.load(folder / sample.NAME) as held:
        kept = dict(held)
    np.savez(folder / sample.NAME, **(kept | arrays))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"variance": np.zeros((2, 4), np.float32)}, "is damaged: .*variance"),
        ({"variance": np.full(8, 9, np.float32)}, "a share of the variance is not between 0 and 1"),
        ({"variance": np.zeros(8)}, "variance of type float64"),
        ({"variance": np.zeros(0, np.float32), "components": np.zeros((60, 0), np.float32)}, "is damaged: index"),
        ({"components": np.zeros((60, 8), int)}, "components of type int64"),
        ({"components": np.full((60, 8), np.nan, np.float32)}, "a component is not finite"),
        ({"components": np.array([{}] * 60)}, "cannot be read"),  # objects, which no one unpickles
        ({"index": np.zeros((60, 1), int)}, r"is damaged: index \(60, 1\)"),
        ({"index": np.zeros(60)}, "index of type float64"),
        ({"label": np.zeros(60, np.uint64)}, "label of type uint64"),
        ({"label": np.full((60, 3), 7)}, "a label is none of 1, 0 and -1"),
        ({"label": np.full(60, 3)}, "a label is none of its 3 classes"),
        ({"classes": np.array([2**31 - 1] * 3, np.uint32).view("U1")}, "cannot be read"),  # no characters
    ],
)
@pytest.mark.slow
def test_a_damaged_sample_is_told_in_a_line(arrays, message, tmp_path):
    write_run(tmp_path / "run", held=blobs())
    damage_sample(tmp_path / "run", **arrays)
    with pytest.raises(InputError, match=rf"sample\.npz .*{message}.*; run the evaluation again") as error:
        page_of(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_a_sample_that_is_one_array_is_told(tmp_path):
    write_run(tmp_path / "run", held=blobs())
    with (tmp_path / "run" / sample.NAME).open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match=r"sample\.npz cannot be read"):
        page_of(tmp_path)


def test_a_sample_is_not_made_as_large_as_it_says(tmp_path):
    """Neither where its header says more than it holds, nor where it holds more than any sample."""

    def header(count):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|i1", "fortran_order": False, "shape": (count,)})
        return file.getvalue()

    share = limits.LIMITS["sample"].most // 5 + 1
    for content, words in (
        (header(10**13), r"index\.npy of shape \(10000000000000,\) has 128 bytes"),
        (header(share) + bytes(share), r"100,000,000 are the most that one sample\.npz \(unpacked\) may have"),
    ):
        with zipfile.ZipFile(tmp_path / "sample.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sample.ARRAYS:
                archive.writestr(f"{name}.npy", content)
        with pytest.raises(InputError, match=words):
            sample.read(tmp_path / "sample.npz")


def test_class_names_are_text_on_the_page(tmp_path):
    """In every part that shows them, none as markup."""
    classes, labels = (HOSTILE, "b", "c"), np.arange(60) % 3
    for number, encoder in enumerate(("trained", "random")):
        write_run(tmp_path / encoder, encoder, labels, np.roll(labels, number), held=blobs(classes=classes))
    page = page_of(tmp_path)
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    assert page.count("<section") == page.count("</section>") and page.count("<svg") == page.count("</svg>")


# Maps


def dots(svg):
    return len(re.findall(r"M[\d.]+ [\d.]+h\.01", svg))


def test_each_image_is_a_dot_in_both_maps_and_each_class_has_its_name(tmp_path):
    write_run(tmp_path / "run", held=blobs(), images=600)
    (group,) = maps.maps(*read(tmp_path))
    (one,) = group["encoders"]
    assert dots(one["pca"]) == dots(one["tsne"]) == 60
    assert sorted(re.findall(r">([abc])</text>", one["tsne"])) == ["a", "b", "c"]
    assert "60 evenly spread of 600 test images" in page_of(tmp_path)


def test_a_map_of_a_thousand_images_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "tsne", lambda held: held.components[:, 2:4])  # as many places, in no time
    write_run(tmp_path / "run", held=blobs(1000, classes=tuple("abcdefgh")))
    (group,) = maps.maps(*read(tmp_path))
    for svg in (group["encoders"][0]["pca"], group["encoders"][0]["tsne"]):
        assert dots(svg) == 1000 and len(svg.encode()) < 60_000


def test_tsne_is_the_same_each_time_and_keeps_groups_together():
    held = blobs(90)
    first, again = maps.tsne(held), maps.tsne(held)
    assert np.array_equal(first, again)
    distance = np.linalg.norm(first[:, None] - first, axis=2) + 1e9 * np.eye(90)
    assert (held.label[distance.argmin(axis=1)] == held.label).all()


@pytest.mark.parametrize("count", [1, 2, maps.FEWEST - 1])
def test_too_few_images_have_no_tsne(count, tmp_path):
    write_run(tmp_path / "run", held=blobs(count))
    (group,) = maps.maps(*read(tmp_path))
    assert group["encoders"][0]["tsne"] is None and dots(group["encoders"][0]["pca"]) == count


def test_equal_features_make_a_map_of_one_place(tmp_path):
    same = sample.Sample(np.arange(20), np.zeros(20, int), ("a",), *sample.principal_components(np.ones((20, 4))))
    write_run(tmp_path / "run", held=same)
    (group,) = maps.maps(*read(tmp_path))
    pca = group["encoders"][0]["pca"]
    assert len(set(re.findall(r"M([\d.]+ [\d.]+)h\.01", pca))) == 1 and group["encoders"][0]["tsne"] is None


@pytest.mark.slow
def test_of_many_classes_the_most_frequent_are_coloured(tmp_path):
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(30), np.arange(1, 31))
    features = random.normal(size=(len(label), 4))
    held = sample.Sample(
        np.arange(len(label)), label, tuple(f"class {n}" for n in range(30)), *sample.principal_components(features)
    )
    assert maps.coloured(label, 30) == list(range(20, 30))
    write_run(tmp_path / "run", held=held, classes=30)
    page = page_of(tmp_path)
    assert "Coloured are 10 of 30 classes" in page
    assert ">class 29</text>" in page and ">class 19</text>" not in page
    assert maps.coloured(np.array([0, 2, 2]), 3) == [0, 2]


def test_images_of_several_classes_are_grey(tmp_path):
    held = blobs(30, several=True)
    held.label[:5] = 1
    write_run(tmp_path / "run", held=held)
    (group,) = maps.maps(*read(tmp_path))
    grey = re.search(r'<path d="([^"]*)"[^>]*var\(--muted\)', group["encoders"][0]["pca"])
    assert grey and dots(grey[1]) == 5 and "several classes are grey" in page_of(tmp_path)


def test_an_encoders_pooled_feature_is_mapped_before_its_head(tmp_path):
    write_run(tmp_path / "pooled", held=blobs(20), time=1)
    write_run(tmp_path / "head", held=blobs(30), time=2, feature="head", protocol="knn/cifar10-demo@1")
    (group,) = maps.maps(*read(tmp_path))
    assert [one["feature"] for one in group["encoders"]] == ["pooled"] and dots(group["encoders"][0]["pca"]) == 20


def luminance(colour):
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", ["#fdfdfc", "#16181c"])
def test_the_colours_stand_out_from_light_and_dark_paper(paper):
    for colour in maps.COLOURS:
        low, high = sorted((luminance(colour), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) > 2.3
    assert len(set(maps.COLOURS)) == 12


def test_names_do_not_lie_on_each_other():
    placed = maps.apart([("cat", 100, 100), ("dog", 103, 101), ("cow", 98, 102), ("far", 250, 100)])
    assert {name: y for name, _, y in placed}["far"] == 100
    near = sorted(y for name, _, y in placed if name != "far")
    assert np.diff(near).min() >= 12


# Confusion


def test_the_counts_are_a_naive_loops_mean_over_trials(tmp_path):
    random = np.random.default_rng(0)
    labels, predictions = random.integers(0, 4, 50), random.integers(0, 4, (3, 50))
    write_run(tmp_path / "run", labels=labels, predictions=predictions, classes=4)
    pairs = Counter((int(t), int(p)) for row in predictions for t, p in zip(labels, row))
    wanted = [[pairs[t, p] / 3 for p in range(4)] for t in range(4)]
    (run,) = read(tmp_path)[0]
    np.testing.assert_allclose(confusion._dense(*confusion.count(run)), wanted)
    (group,) = confusion.confusion(*read(tmp_path))
    assert group["encoders"][0]["description"] == "linear/moco-lincls@1, mean of 3 trials"


def test_the_matrix_is_in_percent_of_its_rows(tmp_path):
    svg = confusion.matrix(np.array([[3.0, 1.0], [0.0, 0.0]]), ("ant", "bee"), "it")
    assert "ant taken for bee: 1 of 4 (25.0 %)" in svg and "ant taken for ant: 3 of 4 (75.0 %)" in svg
    assert re.findall(r">(\d+)</text>", svg) == ["75", "25"] and "bee taken" not in svg


def test_the_linear_classifier_on_all_labels_is_shown_first_and_the_newest(tmp_path):
    labels = np.arange(12) % 3
    right = {"labels": labels, "predictions": labels}
    write_run(tmp_path / "few", **right, few=5, time=9)
    write_run(tmp_path / "knn", **right, protocol="knn/instdisc@1", time=8)
    write_run(tmp_path / "old", labels=labels, predictions=(labels + 1) % 3, time=1)
    write_run(tmp_path / "new", **right, time=2)
    (group,) = confusion.confusion(*read(tmp_path))
    (one,) = group["encoders"]
    assert one["description"] == "linear/moco-lincls@1" and "1 taken for 1: 4 of 4" in one["matrix"]


def test_of_many_classes_the_most_confused_pairs_are_listed(tmp_path):
    labels = np.repeat(np.arange(25), 4)
    predictions = labels.copy()
    predictions[[0, 1, 8]] = [7, 7, 3]  # class 0 twice for 7, class 2 once for 3
    names = tuple(f"class {n}" for n in range(25))
    held = sample.Sample(np.arange(25), np.arange(25), names, *sample.principal_components(np.eye(25)))
    write_run(tmp_path / "run", labels=labels, predictions=predictions, classes=25, held=held)
    (group,) = confusion.confusion(*read(tmp_path))
    (one,) = group["encoders"]
    assert one["matrix"] is None
    assert [(pair["true"], pair["taken"], pair["count"], pair["share"]) for pair in one["pairs"]] == [
        ("class 0", "class 7", "2", 50.0),
        ("class 2", "class 3", "1", 25.0),
    ]
    assert "<td>class 7</td>" in page_of(tmp_path)
    wrong = (*(side.ravel() for side in np.indices((40, 40))), np.ones(1600))
    assert len(confusion.most_confused(wrong, [str(n) for n in range(40)])) == confusion.PAIRS


@pytest.mark.parametrize("answer", [3, -1])
def test_a_class_that_is_none_is_refused(answer, tmp_path):
    write_run(tmp_path / "run", labels=np.array([0, 1, 2]), predictions=np.array([0, 1, answer]))
    with pytest.raises(InputError, match=r"predictions\.npz is damaged: a class is none of 3"):
        confusion.confusion(*read(tmp_path))


# Two encoders


def test_the_difference_of_each_class_is_the_naive_one():
    random = np.random.default_rng(0)
    labels, difference = random.integers(0, 3, 90), random.integers(-1, 2, 90).astype(float)
    rows = paired.by_class(difference, labels, "abc")
    for name, value, low, high, coloured in rows:
        own = difference[labels == "abc".index(name)]
        assert value == pytest.approx(100 * own.mean()) and low <= value <= high and coloured == (not low <= 0 <= high)
        error = 100 * own.std() / len(own) ** 0.5  # the bootstrap's standard error, of a mean
        assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.12)
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)


def test_a_trained_encoder_is_set_against_each_other_kind(tmp_path):
    """One answer in a class more or less; over all as compare says."""
    labels = np.arange(60) % 3
    worse, better = (labels + (labels == 0)) % 3, labels
    write_run(tmp_path / "a", "trained", labels, better)
    write_run(tmp_path / "b", "random", labels, worse)
    write_run(tmp_path / "c", "pixels", labels, better, protocol="knn/instdisc@1")
    write_run(tmp_path / "d", "trained", labels, better, protocol="knn/instdisc@1")
    kinds = {NAMES[kind]: kind for kind in NAMES}
    first, second = paired.paired(*read(tmp_path), kinds)
    assert (first["rival"], second["rival"]) == (NAMES["random"], NAMES["pixels"])
    assert (first["description"], second["description"]) == ("linear/moco-lincls@1", "knn/instdisc@1")
    assert first["difference"] == "+33.3" and second["difference"] == "+0.0" and second["p"] == "p = 1.000"
    assert "0: +100.0 points, [+100.0, +100.0]" in first["plot"] and "var(--accent)" in first["plot"]
    assert "1: +0.0 points" in second["plot"] and "var(--accent)" not in second["plot"]
    page = page_of(tmp_path)
    assert "MoCo v2 (epoch 60) less random initialisation" in page and "p\u00a0&lt;\u00a00.001" in page


@pytest.mark.parametrize("other", [{"few": 2}, {"protocol": "knn/instdisc@1"}, {"deviations": ["k 20 instead of 200"]}])
def test_encoders_judged_in_different_ways_are_not_compared(other, tmp_path):
    labels = np.arange(6) % 3
    write_run(tmp_path / "a", "trained", labels, labels)
    write_run(tmp_path / "b", "random", labels, labels, **other)
    assert paired.paired(*read(tmp_path), {NAMES[kind]: kind for kind in NAMES}) == []


def test_other_kinds_come_before_trained_rivals():
    kinds = {"moco": "trained", "older": "trained", "random": "random"}
    assert list(paired.pairs(list(kinds), kinds)) == [("moco", "random"), ("older", "random"), ("moco", "older")]


def test_of_many_classes_the_two_ends_are_drawn():
    rows = [(str(n), float(-n), 0.0, 0.0) for n in range(100)]
    shown = [int(row[0]) for row in paired.extremes(rows)]
    assert shown == [*range(20), *range(80, 100)] and paired.extremes(rows[:40]) == rows[:40]


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-1, 1.7), (-8, 33), (-100, 100), (-57, 1)])
def test_ticks_are_round_and_within(low, high):
    ticks = paired.ticks_within(low, high)
    assert 0 in ticks and low <= min(ticks) and max(ticks) <= high and 3 <= len(ticks) <= 9
    assert len(set(np.diff(ticks))) == 1 and ticks[0] - np.diff(ticks)[0] < low and ticks[-1] + np.diff(ticks)[0] > high


def test_detections_are_no_classifications(tmp_path):
    """Detection of a data set of the same name does not take part."""
    write_run(tmp_path / "run", held=blobs(10))
    other = write_run(tmp_path / "detect", protocol="detect/x@1", images=77)
    assert yaml.safe_load((other / "config.yaml").read_text())["command"] == "detect"
    assert [group["data"] for group in maps.maps(*read(tmp_path))] == ["shapes test"]


# Health


def healthy(**more):
    one = {"images": 500, "dimensions": 128, "uniformity": -1.234, "alignment": None, "alignment_images": 0}
    return one | {"effective_rank": 31.46, "dead_dimensions": 3} | more


def test_health_is_shown_with_an_alignment_where_any_run_has_one(tmp_path):
    write_run(tmp_path / "linear", health=healthy(alignment=0.321, alignment_images=256), time=1)
    write_run(tmp_path / "knn", protocol="knn/instdisc@1", health=healthy(), time=2)
    write_run(tmp_path / "pixels", "pixels", protocol="knn/instdisc@1", health=healthy(dimensions=200))
    (group,) = health.health(*read(tmp_path))
    assert [(row["name"], row["alignment"]) for row in group["rows"]] == [
        (NAMES["trained"], 0.321),
        (NAMES["pixels"], None),
    ]
    page = page_of(tmp_path)
    for words in ("<td>0.32</td>", "<td>-1.23</td>", "31.5<small>of 128", "3<small>of 200", "Wang and Isola 2020"):
        assert words in page


def test_without_any_alignment_it_has_no_column(tmp_path):
    write_run(tmp_path / "knn", protocol="knn/instdisc@1", health=healthy(uniformity=None))
    page = page_of(tmp_path)
    assert "<td>-</td>" in page and "<h2>Health" in page and "lignment<" not in page and "Alignment" not in page


def test_features_are_not_mixed(tmp_path):
    write_run(tmp_path / "pooled", health=healthy())
    write_run(tmp_path / "head", health=healthy(), feature="head", protocol="knn/cifar10-demo@1")
    assert [group["data"] for group in health.health(*read(tmp_path))] == ["shapes test", "shapes test, head feature"]


# The published log


def write_pretraining(folder, name="cifar10", dataset="cifar10", bn="split", overrides=()):
    folder.mkdir(parents=True)
    values = configs.load(name, "pretrain", PretrainConfig, overrides).model_dump(mode="json")
    about = {"command": "pretrain", "dataset": {"name": dataset}, "processes": 1, "bn": bn, "config": values}
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    (folder / "environment.json").write_text("{}")
    lines = [{"step": 97 * epoch, "epoch": epoch, "loss": 8.0 - epoch / 10} for epoch in range(1, 4)]
    lines += [{"step": 97 * epoch, "epoch": epoch, "knn_top1": 30.0 + epoch} for epoch in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_of_the_recipe_has_its_published_log(tmp_path):
    write_pretraining(tmp_path / "mine")
    (run,) = read_runs([tmp_path])
    curve = published.published(run)
    assert curve == tables.load_table("cifar10-demo").curve
    losses = published.in_steps(curve, run.metrics)
    assert losses[0] == (97 * 0.5, curve.points[0].train_loss) and losses[-1][0] == 97 * 199.5
    page = page_of(tmp_path)
    assert page.count(">published</text>") == 2 and "Dashed: the published log" in page and curve.source in page


@pytest.mark.parametrize(
    "other",
    [
        {"overrides": ("symmetric=true",)},
        {"overrides": ("schedule.epochs=400",)},
        {"overrides": ("momentum=0.999",)},
        {"overrides": ("bn_permute=false",)},
        {"dataset": "cifar100"},
        {"bn": "none"},
        {"name": "digits", "dataset": "digits"},
    ],
)
def test_another_run_has_none(other, tmp_path):
    write_pretraining(tmp_path / "mine", **other)
    (run,) = read_runs([tmp_path])
    assert published.published(run) is None


# Runs that must not be mixed


def test_confusion_takes_what_the_encoders_share(tmp_path):
    """Not the newest: a run of another feature or with other settings is passed over where the others have none."""
    labels = np.arange(60) % 3
    for encoder in ("trained", "random"):
        write_run(tmp_path / encoder, encoder, labels, labels, protocol="knn/instdisc@1", time=1)
    write_run(tmp_path / "stage", "trained", labels, 0 * labels, protocol="knn/instdisc@1", time=2, feature="layer1")
    other = {"deviations": ["k 1000 instead of 200"]}
    write_run(tmp_path / "many", "trained", labels, 0 * labels, protocol="knn/instdisc@1", time=3, **other)
    (group,) = confusion.confusion(*read(tmp_path))
    assert [one["description"] for one in group["encoders"]] == ["knn/instdisc@1"] * 2
    assert all(
        "3 taken for" not in one["matrix"] and one["matrix"].count("<g><title>") == 3 for one in group["encoders"]
    )


def test_a_run_that_stands_alone_says_its_settings(tmp_path):
    labels = np.arange(60) % 3
    write_run(tmp_path / "trained", "trained", labels, labels, **{"deviations": ["k 20 instead of 200"]})
    write_run(tmp_path / "random", "random", labels, labels)
    (group,) = confusion.confusion(*read(tmp_path))
    assert sorted(one["description"] for one in group["encoders"]) == [
        "linear/moco-lincls@1, with k 20 instead of 200",
        "linear/moco-lincls@1, with the protocol's own settings",
    ]


def test_alignments_of_other_crops_are_left_out(tmp_path):
    healthy = {"images": 60, "dimensions": 8, "uniformity": -1.0, "effective_rank": 3.0, "dead_dimensions": 0}
    for encoder, scale in (("trained", 0.7), ("random", 0.7), ("pixels", 0.08)):
        found = healthy | {"alignment": 0.1, "alignment_images": 60, "crops": {"crop_scale": [scale, 1.0]}}
        write_run(tmp_path / encoder, encoder, health=found)
    (group,) = health.health(*read(tmp_path))
    assert [row["alignment"] for row in group["rows"]] == [0.1, 0.1, None]


def test_a_class_of_few_images_and_the_ends_of_many_are_not_coloured():
    difference = np.concatenate([np.ones(9), np.ones(10)])
    labels = np.repeat([0, 1], [9, 10])
    assert [row[4] for row in sorted(paired.by_class(difference, labels, "ab"))] == [False, True]
    many = [(str(n), 1.0, 0.5, 2.0, True) for n in range(paired.CLASSES + 1)]
    assert not any(row[4] for row in paired.extremes(many)) and all(row[4] for row in paired.extremes(many[:-1]))


def test_pairs_that_are_not_shown_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(paired, "PAIRS", 1)
    labels = np.arange(60) % 3
    for encoder in ENCODERS:
        write_run(tmp_path / encoder, encoder, labels, labels)
    (one,) = paired.paired(*read(tmp_path), dict(zip(NAMES.values(), ("trained", "random", "pixels"))))
    assert one["not_shown"] == 1 and "1 more pair of encoders met these images" in page_of(tmp_path)


def test_the_summary_says_what_the_paired_difference_says(tmp_path):
    """Alone the two intervals overlap."""
    labels = np.arange(60) % 3
    wrong = np.where(np.arange(60) < 8, (labels + 1) % 3, labels)
    more = {"interval": {"top1": [80.0, 100.0]}}
    write_run(tmp_path / "trained", "trained", labels, labels, **more)
    write_run(tmp_path / "random", "random", labels, wrong, **more)
    assert "MoCo v2 (epoch 60) is ahead of random initialisation in linear top-1" in page_of(tmp_path)


def test_every_metric_that_decides_a_benchmark_is_shown(tmp_path):
    write_run(tmp_path / "shots", metrics={"mAP_4": 41.0, "mAP_16": 52.0}, protocol="svm/voc07-low-shot@1")
    write_run(tmp_path / "flowers", metrics={"mean_per_class": 71.0, "top5": 99.0})
    page = page_of(tmp_path)
    for words in ("mean per class", "71.0", "mAP, 4 shots", "52.0"):
        assert words in page
    assert page.index("mAP, 4 shots") < page.index("mAP, 16 shots") and "99.0" not in page


def test_data_of_one_name_are_numbered_among_their_own_kind(tmp_path):
    def data(fingerprint):
        return {"name": "shapes", "split": "test", "fingerprint": fingerprint, "images": 6, "classes": 3}

    write_run(tmp_path / "one", dataset=data("a"))
    write_run(tmp_path / "scenes", dataset=data("s"), protocol="detect/voc-r50-c4-24k@1", metrics={"AP50": 3.0})
    assert "shapes, data" not in page_of(tmp_path)
    write_run(tmp_path / "two", "random", dataset=data("b"))
    page = page_of(tmp_path)
    assert "shapes, data 1" in page and "shapes, data 2" in page and "shapes, data 3" not in page


def test_detections_of_other_images_stand_in_groups_of_their_own(tmp_path):
    for name, fingerprint in (("trained", "a"), ("random", "b")):
        data = {"name": "scenes", "split": "test", "fingerprint": fingerprint, "images": 6, "classes": 3}
        more = {"dataset": data, "metrics": {"AP50": 3.0}, "per_class": {"a": {"AP50": 3.0}, "b": {"AP50": 2.0}}}
        write_run(tmp_path / name, name, protocol="detect/voc-r50-c4-24k@1", **more)
    groups = pictures.detections(*read(tmp_path))
    assert sorted([one["name"] for one in group["runs"]] for group in groups) == [[NAMES["trained"]], [NAMES["random"]]]
    assert len({group["dataset"] for group in groups}) == 2

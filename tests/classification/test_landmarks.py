"""Revisited Oxford and Paris: against a literal loop, and the whole command on made-up photographs."""

import json
import pickle

import numpy as np
import pytest
from commands import in_process
from PIL import Image

from moco_eval.classification.landmarks import PLACES, RULES, average_precision, metrics, scores
from moco_eval.data import landmarks
from moco_eval.data.landmarks import Query, open_landmarks
from moco_eval.errors import InputError


def literal(ranking, right, neither):
    """As the authors say it: images that count neither way do not take a place; trapezoids; P@k no further than all."""
    if not right:
        return None
    ranks, place = [], 0
    for image in ranking:
        if image in neither:
            continue
        if image in right:
            ranks.append(place)
        place += 1
    area = 0.0
    for found, rank in enumerate(ranks):
        ahead = 1.0 if rank == 0 else found / rank
        area += (ahead + (found + 1) / (rank + 1)) / 2 / len(right)
    at = []
    for k in PLACES:
        k = min(k, ranks[-1] + 1)
        at.append(sum(rank < k for rank in ranks) / k)
    return [100 * value for value in (area, *at)]


def test_against_a_literal_loop():
    random = np.random.default_rng(0)
    queries, rankings = [], []
    for _ in range(40):
        groups = np.split(random.permutation(50)[:30], np.sort(random.integers(0, 31, 2)))
        queries.append(Query("q", (0, 0, 1, 1), *groups))
        rankings.append(random.permutation(50))
    table = scores(np.array(rankings), queries)
    for rule, (right, neither) in RULES.items():
        for row, ranking, query in zip(table[rule], rankings, queries):
            sets = [{int(v) for kind in kinds for v in getattr(query, kind)} for kinds in (right, neither)]
            expected = literal(ranking.tolist(), *sets)
            assert np.isnan(row).all() if expected is None else row == pytest.approx(expected)
    assert any(np.isnan(rows).any() for rows in table.values())
    means, intervals = metrics(table)
    assert means["mAP_hard"] == pytest.approx(np.nanmean(table["hard"][:, 0]))
    assert intervals["mP@5_easy"][0] < means["mP@5_easy"] < intervals["mP@5_easy"][1]


def test_closed_forms():
    """Right at places 1 and 3 of four: ((1 + 1)/2 + (1/2 + 2/3)/2) / 2; what counts neither way takes no place."""
    ranking, right = np.array([7, 3, 8, 4]), np.array([7, 8])
    expected = 100 * ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert average_precision(ranking, right, np.array([], int)) == pytest.approx([expected, 100, 200 / 3, 200 / 3])
    assert average_precision(ranking, right, np.array([3])) == pytest.approx([100] * 4)
    assert average_precision(ranking, np.array([4]), np.array([3, 8])) == pytest.approx(
        [100 * (0 + 1 / 2) / 2, 0, 50, 50]
    )


# On disk


def write(root, monkeypatch, change=lambda values: None):
    """Four photographs of a tower, four of a dome; a query of each, in whose box alone the landmark is."""
    folder = root / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    random = np.random.default_rng(0)
    looks = [random.integers(0, 255, (8, 8, 3)) for _ in range(2)]

    def photograph(kind, noise):
        pixels = np.kron(looks[kind], np.ones((8, 8, 1))) + random.normal(0, noise, (64, 64, 3))
        return pixels.clip(0, 255).astype(np.uint8)

    names = [f"{kind}_{number:06}" for kind in ("tower", "dome") for number in range(4)]
    for place, name in enumerate(names):
        Image.fromarray(photograph(place // 4, 10 + 10 * (place % 4))).save(folder / "jpg" / f"{name}.jpg")
    for kind, name in enumerate(("ask_tower", "ask_dome")):
        whole = photograph(1 - kind, 5).repeat(2, axis=0).repeat(2, axis=1)
        whole[20:84, 30:94] = photograph(kind, 5)
        Image.fromarray(whole).save(folder / "jpg" / f"{name}.jpg", quality=95)
    answers = [
        {
            "bbx": [30.2, 19.8, 93.9, 84.0],
            "easy": np.array([4 * kind, 4 * kind + 1]),
            "hard": np.array([4 * kind + 2]),
            "junk": np.array([4 * kind + 3]),
        }
        for kind in range(2)
    ]
    values = {"imlist": names, "qimlist": ["ask_tower", "ask_dome"], "gnd": answers}
    change(values)
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(values, protocol=2))
    monkeypatch.setattr(landmarks, "COUNTS", {"roxford5k": (8, 2)})
    return root


def test_queries_are_cut_to_their_landmark(tmp_path, monkeypatch):
    opened = open_landmarks("roxford5k", write(tmp_path, monkeypatch))
    assert (len(opened.database), len(opened.asking)) == (8, 2)
    assert opened.asking.image(0).size == (64, 64) and opened.database.image(0).size == (64, 64)
    assert opened.queries[1].hard.tolist() == [6]
    assert open_landmarks("roxford5k", tmp_path / "roxford5k").database.fingerprint == opened.database.fingerprint


def test_the_command_leaves_a_record(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", monkeypatch)
    words = ("retrieve", "pixels", "--dataset", "roxford5k", "--data", "data", "--device", "cpu", "--workers", "0")
    planned, _ = in_process(capfd, monkeypatch, *words, "--output", "run", "--dry-run")
    assert "retrieve/revisited@1 of pixels" in planned and "2 queries in 8 images" in planned
    out, _ = in_process(capfd, monkeypatch, *words, "--output", "run")
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["metrics"]["mAP_medium"] == record["metrics"]["mP@1_easy"] == 100
    assert list(record["metrics"])[:4] == ["mAP_medium", "mP@1_medium", "mP@5_medium", "mP@10_medium"]
    assert record["queries"] == 2 and record["unanswered"] == {"medium": 0, "hard": 0, "easy": 0}
    assert "retrieve/revisited@1 roxford5k mAP_medium 100.00" in out
    again, _ = in_process(capfd, monkeypatch, *words, "--output", "run")
    assert again == out


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


DAMAGES = [
    (lambda v: v.pop("gnd"), "is no dict with lists imlist, qimlist and gnd"),
    (lambda v: v["imlist"].append("x"), "lists 9 images and 2 queries, and roxford5k has 8 and 2"),
    (lambda v: v["gnd"].pop(), "has answers to 1 of 2 queries"),
    (lambda v: v["imlist"].__setitem__(0, "../../etc/passwd"), "is no name of a photograph"),
    (lambda v: v["imlist"].__setitem__(0, "lost"), "lost.jpg does not exist"),
    (lambda v: v["gnd"][0].pop("junk"), "query ask_tower needs bbx, easy, hard and junk"),
    (lambda v: v["gnd"][0].update(easy=np.array([8])), "has answers that are no places in its 8 images"),
    (lambda v: v["gnd"][0].update(easy=np.array([0.5])), "has answers that are no places in its 8 images"),
    (lambda v: v["gnd"][1].update(bbx=[5, 5, 5, 9]), "the box of query ask_dome is [5, 5, 5, 9]"),
    (lambda v: v.update(gnd=Harmful()), "wants to run code"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_bad_files_are_refused_in_one_line(tmp_path, monkeypatch, capfd, damage, words):
    with pytest.raises(InputError) as error:
        open_landmarks("roxford5k", write(tmp_path, monkeypatch, damage))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "executed" not in capfd.readouterr().out


def test_a_split_of_a_database_is_refused(tmp_path, capfd, monkeypatch):
    write(tmp_path, monkeypatch)
    words = ("retrieve", "pixels", "--dataset", "roxford5k", "--data", str(tmp_path), "--split", "train")
    _, err = in_process(capfd, monkeypatch, *words, code=2)
    assert "leave --split, --val-fraction and --limit out" in err

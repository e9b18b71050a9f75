import copy
import csv
import hashlib
import itertools
import json
import re
import shlex
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from commands import in_process
from PIL import Image

from moco_eval.config import load as configs
from moco_eval.config import yaml_read
from moco_eval.config.base import WHOLE
from moco_eval.config.deviations import flatten
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.catalogue import OFFICIAL
from moco_eval.detection.recipe import PROTOCOLS
from moco_eval.errors import InputError
from moco_eval.papers import match, render, tables
from moco_eval.papers import steps as chain
from pretraining.plan import plan

IDS = [name for name, _ in tables.tables()]
PROMISED = [
    "cifar10-demo",
    "moco-v1-fig3",
    "moco-v1-momentum",
    "moco-v1-1",
    "moco-v1-2a",
    "moco-v1-2b",
    "moco-v1-3",
]
PROMISED += [
    "moco-v1-4",
    "moco-v1-5a",
    "moco-v1-5b",
    "moco-v1-5c",
    "moco-v1-5d",
    "moco-v2-1",
    "moco-v2-2",
    "moco-v2-3",
    "moco-v1-a1",
    "moco-v1-memory-bank-nce",
    "moco-v1-6",
    "moco-v2-temperature",
    "moco-v3-1",
    "digits",
]
# sha256 over every published number, column and way to have a row, in order; recompute it only for a correction checked
# with the paper
PUBLISHED_SHA256 = "a48a3016182356a03da1a38a632a866cdadb6f142bee8ae75bc3fd6fcc35a2f1"


def cifar_record(top1=82.0, *, seed=0, epochs=200, deviations=(), time="2026-01-01T00:00:00+0000", **changes):
    """A record as `knn` writes it for an encoder of the CIFAR-10 recipe; a fixture, not a measurement."""
    settings = {
        "protocol": "pretrain/cifar10-demo@2",
        "arch": "resnet18_cifar",
        "queue_size": 4096,
        "momentum": 0.99,
        "temperature": 0.1,
        "views": {"recipe": "cifar10", "size": 32},
        "bn": "split",
        "batch_size": 512,
        "optimizer": {"lr": 0.06, "weight_decay": 5e-4},
        "schedule": {"kind": "cosine", "epochs": epochs, "count_from": 1},
        "seed": seed,
    }
    recipe = PretrainConfig.model_validate({**settings, **changes}).model_dump(mode="json")
    pretraining = {
        "protocol": recipe["protocol"],
        "dataset": {"name": "cifar10", "fingerprint": "ab"},
        "bn": recipe["bn"],
        "processes": 1,
        "epochs": epochs,
        "deviations": [],
        "config": recipe,
    }
    return {
        "protocol": "knn/cifar10-demo@1",
        "dataset": {"name": "cifar10", "split": "test", "fingerprint": "cd", "images": 10000, "classes": 10},
        "encoder": {
            "path": "epoch_0200.pth",
            "sha256": f"{seed}{time}",
            "origin": "moco-eval/1",
            "arch": "resnet18_cifar",
            "pretraining": pretraining,
        },
        "metrics": {"top1": top1},
        "std": {},
        "trials": [{"seed": 0, "metrics": {"top1": top1}}],
        "over": "head",
        "deviations": list(deviations),
        "environment": {"time": time},
        "run": f"runs/{seed}",
    }


def ours(records, table="cifar10-demo"):
    """Lines that hold something of ours."""
    return [line for line in match.compare(tables.load_table(table), records).lines if line.ours]


def changed(record, path, value):
    record = copy.deepcopy(record)
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return record


# The published numbers


def numbers(table):
    """Every published number of a table, in order, with where it stands."""
    for row in table.rows:
        for kind in ("published", "std", "trials"):
            for name, value in getattr(row, kind).items():
                yield f"{table.id}/{row.label}/{kind}/{name}", value
    for point in table.curve.points if table.curve else ():
        yield f"{table.id}/curve/{point.epoch}", (point.knn_top1, point.train_loss)


def statements(table):
    """What each column is, and how each row is had: in order."""
    columns = [column.model_dump() for column in table.columns.values()]
    return columns + [(row.label, row.model_dump(exclude={"published", "std", "trials", "note"})) for row in table.rows]


def test_published_numbers_have_not_moved():
    every = [tables.load_table(name) for name in sorted(IDS)]
    words = json.dumps([[*numbers(table), *statements(table)] for table in every])
    assert hashlib.sha256(words.encode()).hexdigest() == PUBLISHED_SHA256


@pytest.fixture(scope="module")
def reference(shared_data):
    path = shared_data.parent / "reference" / "paper_tables.yaml"
    if not path.is_file():
        pytest.skip("no reference file")
    return {entry["id"]: entry for entry in yaml.load(path.read_text(), Loader=yaml_read.BASE)["entries"]}


def flat(values):
    """Numbers, lists opened, in one list of words."""
    return sorted(str(one) for value in values for one in (value if isinstance(value, list | tuple) else [value]))


@pytest.mark.data
@pytest.mark.parametrize("name", IDS)
def test_numbers_equal_the_reference_file(name, reference):
    """Of tables that the file has; others print nothing, or name the commit of the page that they were read from."""
    table = tables.load_table(name)
    if not table.reference:
        printed = [value for _, value in numbers(table) if value is not None]
        assert not printed or re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{7,}:\S+\.md", table.source), table.source
        return
    theirs = []
    for entry in (reference[name] for name in table.reference):
        spread = list(entry["protocol"].get("expected_std", {}).values())
        theirs += [value for row in entry["rows"] for value in (*row["metrics"].values(), *spread)]
    assert flat(value for _, value in numbers(table)) == flat(theirs)
    assert all(reference[name]["source"].startswith(table.source[:12]) for name in table.reference)
    assert reference[table.reference[0]]["source"] == table.source


ENDS = {"ViT-B/16": "vit_b", "ViT-L/16": "vit_l", "ViT-H/14": "vit_h", "top1_mean": "top1"}  # of our columns' names


def gathered(table, reference):
    """Each row here with the rows of the reference file that it holds, in their order; without a training curve's."""
    found = [(row, []) for row in table.rows]
    for entry in (reference[name] for name in table.reference):
        for place, theirs in enumerate(row for row in entry["rows"] if "epoch" not in row):
            label = label_here(table, entry, theirs)
            index = place if label is None else [row.label for row in table.rows].index(label)
            assert label is not None or len(table.rows) == len(entry["rows"])
            found[index][1].append(theirs)
    return found


def label_here(table, entry, theirs):
    """What tells their row apart, where rows do not stand one to one."""
    method = theirs["method"]
    if "detector" in theirs:
        return method
    if table.id == "moco-v3-ablations":
        varied = entry["caption"].removesuffix(".").split("ablation: ")[1].replace("in MLP", "in the MLP")
        return f"{method}, {varied}: {theirs['setting']}"
    if table.id == "cifar10-demo":  # the linear classifier stands in the row of its encoder
        loss, _, more = method.partition(",")
        return f"{loss.split()[0]} loss, {theirs['epochs']} epochs{', no shuffling BN' * ('without' in more)}"
    return None


@pytest.mark.data
@pytest.mark.parametrize("name", IDS)
def test_each_number_of_the_reference_file_stands_in_its_own_cell(name, reference):
    """In its row and in the column of its metric, with the data that row was pretrained on."""
    for row, rows in gathered(tables.load_table(name), reference):
        spread = {"top1_std": row.std, "top1_trials": row.trials}
        cells = [(theirs, metric) for theirs in rows for metric in theirs["metrics"]]
        for theirs, metric in [cell for cell in cells if cell[1] in spread]:
            assert flat([spread[metric]["top1"]]) == flat([theirs["metrics"][metric]])
        cells = [cell for cell in cells if cell[1] not in spread]
        assert len(cells) == len(row.published) or not rows
        for (theirs, metric), (column, number) in zip(cells, row.published.items(), strict=bool(rows)):
            detector = theirs.get("detector", "").removeprefix("R50-").replace(" ", "_").lower()
            assert number == theirs["metrics"][metric], (row.label, column)
            assert column.startswith(detector) and column.endswith(ENDS.get(metric, metric)), (row.label, column)
            never = theirs["pretrain_data"] in ("IG-1B", "JFT-300M")
            assert never == (row.unavailable == "data never public")


@pytest.mark.data
def test_the_published_curve_is_the_reference_files(reference):
    points = [
        (point.epoch, point.knn_top1, point.train_loss) for point in tables.load_table("cifar10-demo").curve.points
    ]
    rows = reference["moco_cifar_demo_log"]["rows"]
    assert points == [(row["epoch"], row["metrics"]["knn_top1"], row["metrics"]["train_loss"]) for row in rows]


ARCHS = {"RX50 (ResNeXt-50 32x8d)": "resnext50_32x8d", "R50w2x": "resnet50_w2", "R50w4x": "resnet50_w4"}


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name in IDS if name != "digits"])
def test_recipes_have_the_parts_that_the_reference_file_names(name, reference):
    """Mechanism, architecture, head, augmentation, schedule, symmetric loss and shuffling BN of every recipe."""
    table = tables.load_table(name)
    for row, rows in gathered(table, reference):
        for theirs in rows if row.recipe else ():
            run = row.recipe.resolved()
            found = (run.mechanism, run.arch, run.head, run.views.recipe, run.schedule.kind, run.symmetric)
            assert (*found, run.bn_permute) == parts(table, theirs), row.label


def parts(table, theirs):
    """The same from the words of a row; what MoCo v2 is made of, where it is named as a whole."""
    words = f"{theirs['method']} {theirs.get('series', '')}"
    if "MoCo v3" in words:
        said = " ".join([words, str(theirs.get("arch", "")), *theirs["metrics"]])
        size = "small_12h" if re.search(r"ViT[- ]+S", said) else "base" if "ViT" in said else ""
        return ("moco_v3", f"vit_{size}_patch16_224" if size else "resnet50", "mlp", "moco_v3", "cosine", True, True)
    mechanism = next((one for one in ("end-to-end", "memory bank") if words.startswith(one)), "moco")
    v2 = "MoCo v2" in words or table.id == "moco-v2-3"
    cifar = table.id == "cifar10-demo"
    return (
        mechanism.replace("-", "_").replace(" ", "_"),
        "resnet18_cifar" if cifar else ARCHS.get(theirs.get("arch"), "resnet50"),
        "mlp" if v2 or theirs.get("mlp") or "MLP head" in words else "linear",
        "cifar10" if cifar else "moco_v2" if v2 or theirs.get("aug_plus") else "moco_v1",
        "cosine" if cifar or v2 or theirs.get("cos") else "step",
        bool(re.search(r"\bsymmetric\b", words)),
        "without shuffl" not in words.lower(),
    )


@pytest.mark.data
def test_every_entry_of_the_reference_file_is_in_one_table(reference):
    gathered = [entry for name in IDS for entry in tables.load_table(name).reference]
    assert sorted(gathered) == sorted(reference)


@pytest.mark.data
def test_recipes_are_what_the_reference_file_states(reference):
    """K, m, tau, epochs and batch, read from its words: of each row whose entry describes a pretraining."""
    checked = 0
    for table in map(tables.load_table, IDS):
        entries = [reference[name] for name in table.reference]
        if len(entries) != 1 or "pretrain" not in entries[0]["protocol"]:
            continue
        if "moco_v3" in table.reference[0]:
            continue  # no queue: test_moco_v3_s_recipes_are_the_specification_s
        for row, theirs in zip(table.rows, entries[0]["rows"], strict=True):
            if row.states:
                said = row.states.model_dump(exclude={"arch", "data"})
                assert said == stated(entries[0]["protocol"], theirs), (table.id, row.label)
                assert (row.states.data == "imagenet") == (theirs["pretrain_data"] == "IN-1M")
                checked += 1
    assert checked > 40


def test_moco_v3_s_recipes_are_the_specification_s():
    """Batch and length of every row; m, tau, rate and decay by architecture and length."""
    rows = [row for name in IDS if name.startswith("moco-v3-") for row in tables.load_table(name).rows if row.recipe]
    ours = [(row, row.recipe.resolved()) for row in rows if row.recipe.config.startswith("moco_v3")]
    assert len(ours) == 55
    long = dict.fromkeys((800, 1000), (0.3, 1.5e-6, 0.996))
    for row, run in ours:
        assert run.batch_size == row.states.K == row.states.batch
        assert run.batch_size == int((re.findall(r"batch (\d+)", row.label) or [4096])[0]), row.label
        if run.arch == "resnet50":
            rate, decay, m = ({100: (0.6, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99)} | long)[run.schedule.epochs]
            expected, warmup, tau = (rate * 16, decay, m), 10, 1.0
        else:
            rate = float(
                (re.findall(r"lr ([\d.e-]+)", row.label) or ["1e-4" if ", batch" in row.label else "1.5e-4"])[0]
            )
            decay = 1e-3 if "LAMB" in row.label else 0.1
            expected, warmup, tau = (rate * run.batch_size / 256, decay, row.states.m), 40, 0.2
            short = run.schedule.epochs == 100  # of Sec. 4, where patches are learned unless it says so
            assert run.freeze_patches == (not short or "frozen" in row.label), row.label
            assert run.optimizer.kind == ("lamb" if "LAMB" in row.label else "adamw"), row.label
            assert run.predictor == ("head: without" not in row.label) and run.head_bn == (
                "without BN" not in row.label
            )
            assert run.positions == (re.findall("embedding: (learned|none)", row.label) or ["sincos"])[0], row.label
        actual = (run.optimizer.lr, run.optimizer.weight_decay, run.momentum)
        assert actual == pytest.approx(expected), row.label
        assert (run.schedule.warmup_epochs, run.temperature) == (warmup, tau), row.label


def stated(protocol, row):
    """What the words of an entry and the fields of its row say of a pretraining."""
    words, method = protocol["pretrain"], row["method"]
    number = {name: float(re.search(rf"\b{name} ([\d.]+\d)", words)[1]) for name in ("K", "m", "tau", "batch")}
    K = int(row.get("K") or (protocol["K"] if isinstance(protocol.get("K"), int) else number["K"]))
    K = int(re.search(r"K=(\d+)", method)[1]) if "K=" in method else K
    lasts = re.search(r"(\d+) ep\b", method) or re.search(r"(\d+) ep\b", words)
    no_queue = method.startswith(("end-to-end", "memory bank"))
    return {
        "epochs": row.get("epochs") or int(lasts[1]),
        "batch": K if method.startswith("end-to-end") else row.get("batch", number["batch"]),
        "K": K,
        "m": None if no_queue else row.get("m", number["m"]),
        "tau": row.get("tau", 0.2 if "mlp" in row or "v2" in method else number["tau"]),
    }


def test_each_row_that_cannot_be_had_says_why():
    """Every row is had in some way or has a reason of the closed list; both kinds exist, and are counted by --list."""
    told = dict(tables.tables())
    for table in map(tables.load_table, IDS):
        reasons = [row.unavailable for row in table.rows if row.unavailable]
        closed = {"data never public", "recipe never published", "not yet built"}
        assert all(reason in closed or reason.startswith("not built: ") for reason in reasons)
        assert not table.id.startswith("moco-v3-") or "not yet built" not in reasons
        had = sum(chain.why_none(table, row) is None for row in table.rows)
        assert f"{len(table.rows)} row{'s' if len(table.rows) > 1 else ''}, {had or 'none'} to be had" in told[table.id]
    assert any(row.unavailable for name in IDS for row in tables.load_table(name).rows)


def test_a_table_whose_recipe_contradicts_the_paper_is_refused(tmp_path):
    values = yaml.safe_load((configs.folder() / "papers" / "moco-v1-momentum.yaml").read_text())
    values["rows"][0]["recipe"]["set"]["momentum"] = 0.5
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"m 0.0 in the paper, 0.5 in it"):
        configs.load(str(tmp_path / "mine.yaml"), "papers", tables.Table)


def test_the_promised_tables_are_there_under_their_own_names():
    assert set(PROMISED) <= set(IDS)
    for name in IDS:
        table = tables.load_table(name)
        assert table.id == name and table.rows and table.caption and table.source


def test_unknown_table_names_the_nearest():
    with pytest.raises(InputError, match=r"no table 'cifar-demo'. Did you mean 'cifar10-demo'\?"):
        tables.load_table("cifar-demo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(colums=1), "unknown key 'colums'"),
        (lambda t: t["rows"][0].update(unavailable="too hard"), "unavailable"),
        (lambda t: t["rows"][0].pop("recipe"), "needs match, recipe, released or unavailable"),
        (lambda t: t["rows"][0].update(unavailable="not yet built"), "has one of match, recipe and unavailable"),
        (lambda t: t["rows"][0]["published"].update(top9=1.0), "which is no column"),
        (lambda t: t["columns"]["linear_top1"].update(title="kNN top-1"), "two columns of one title"),
        (lambda t: t["columns"]["linear_top1"].pop("protocol"), "go together"),
        (lambda t: t["rows"][0].update(match={"weights": "pretrained", "arch": "resnet50"}), "weights"),
        (lambda t: t["rows"][0]["recipe"].update(config="cifar"), "config named 'cifar'. Did you mean 'cifar10'"),
        (lambda t: t["rows"][0]["recipe"].update(set={"queue": 1}), "unknown key 'queue' in --set queue=1"),
        (lambda t: t["rows"][0]["recipe"].update(set={"queue_size": 256}), "queue_size 256 holds less than one step's"),
        (lambda t: t["rows"][0]["recipe"].update(set={"momentum": "fast"}), "momentum is 'fast'"),
        (lambda t: t["rows"][0]["recipe"].update(set={"schedule": {"kind": "cosine", "epochs": 9}}), "group of keys"),
    ],
)
def test_a_table_file_with_a_mistake_is_refused(change, message, tmp_path):
    values = yaml.safe_load((configs.folder() / "papers" / "cifar10-demo.yaml").read_text())
    change(values)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=message):
        configs.load(str(path), "papers", tables.Table)


# How a row's encoder is pretrained

RECIPES = [(name, row.label) for name in IDS if name != "digits" for row in tables.load_table(name).rows if row.recipe]
recipes = pytest.mark.parametrize(("name", "label"), RECIPES)


def row_of(name, label):
    table = tables.load_table(name)
    (row,) = [row for row in table.rows if row.label == label]
    return table, row


class Published:
    """As many images as a data set was published with, and nothing in them."""

    split, labels_per_class, subset, whole, damaged, passed_over = "train", None, None, None, (), ""
    channels, bands = 3, None

    def __init__(self, name):
        self.name = name

    def __len__(self):
        return OFFICIAL[self.name, "train"]

    def limited(self, limit):
        assert limit is None
        return self

    def image(self, index):
        return Image.effect_noise((8, 8), 60).convert("RGB")

    def name_of(self, index):
        return f"image {index}"

    def record(self):
        return {"name": self.name, "split": "train", "fingerprint": "ab", "images": len(self), "classes": 0}


@recipes
def test_a_run_of_a_row_would_start_and_is_the_rows_own_without_deviations(name, label, monkeypatch):
    """On 8 processes and on one: what the run's checkpoint would say of itself belongs to the row."""
    table, row = row_of(name, label)
    monkeypatch.setattr("pretraining.plan.open_images", lambda dataset, data, split: Published(dataset))
    for processes in (1, 8):
        record = of_run(tables.recipe(table, row), row, processes)
        assert match._is_encoder(record["encoder"], row)
        split = row.recipe.resolved().bn == "split" and processes > 1  # eight groups in each process
        assert match._deviations(record, row) == ["encoder: batch norm in 64 groups instead of 8"] * split


def of_run(settings, row, processes):
    """A record of the encoder that such a run would leave."""
    run = plan(settings, row.recipe.dataset, None, processes)
    about = run.about()
    pretraining = about["pretraining"] | {"epochs": run.config.schedule.epochs}
    encoder = {"origin": "moco-eval", "path": "x.pth", "arch": about["arch"], "pretraining": pretraining}
    return {"encoder": encoder, "deviations": [f"encoder: {words}" for words in run.deviations]}


@pytest.mark.parametrize(("processes", "groups"), [(2, 2), (4, 4), (64, 64)])
def test_other_groups_of_batch_norm_than_the_papers_are_a_deviation(processes, groups, monkeypatch):
    table, row = row_of("moco-v1-2b", "MoCo, IN-1M")
    monkeypatch.setattr("pretraining.plan.open_images", lambda dataset, data, split: Published(dataset))
    record = of_run(tables.recipe(table, row), row, processes)
    assert match._deviations(record, row) == [f"encoder: batch norm in {groups} groups instead of 8"]


@recipes
def test_each_setting_of_a_row_changes_the_shipped_config(name, label):
    _, row = row_of(name, label)
    shipped = configs.load(row.recipe.config, "pretrain", PretrainConfig).model_dump(mode="json", context=WHOLE)
    flat, resolved = flatten(shipped), row.recipe.settings()
    assert not [key for key in row.recipe.set if resolved[key] == flat[key]]


@pytest.mark.parametrize("name", IDS)
def test_rows_of_one_recipe_print_one_number_or_measure_different_things(name):
    """The default of an ablation stands in each of its parts; a linear probe and a fine-tuning are of one encoder."""
    by_recipe = defaultdict(list)
    for row in tables.load_table(name).rows:
        if row.recipe:
            by_recipe[json.dumps(row.recipe.settings(), sort_keys=True)].append(row.published)
    for rows in by_recipe.values():
        for one, other in itertools.combinations(rows, 2):
            same = all(one[column] == other[column] for column in one.keys() & other.keys())
            assert same or name == "moco-v1-a1"  # two curves of one run


def test_a_recipe_expects_its_own_rows_number():
    expect = tables.recipe(*row_of("moco-v1-fig3", "MoCo, K=256")).expect
    assert (expect.protocol, expect.metrics, expect.std) == ("linear/moco-lincls@1", {"top1": 54.7}, None)
    assert expect.source == "arXiv:1911.05722v3, p.5"
    repeated = tables.recipe(*row_of("moco-repo-linear", "MoCo v1 200 ep")).expect
    assert (repeated.metrics, repeated.std) == ({"top1": 60.8}, 0.2)
    assert tables.recipe(*row_of("moco-v1-2b", "MoCo, IN-1M")).expect.metrics == {"AP50": 81.5}
    for name, label in (("moco-v1-momentum", "MoCo, m=0"), ("moco-v2-3", "MoCo, batch 256")):
        assert tables.recipe(*row_of(name, label)).expect is None


def test_the_three_mechanisms_of_figure_3():
    resolved = {
        label: tables.recipe(*row_of("moco-v1-fig3", label))
        for label in ("end-to-end, K=1024", "memory bank, K=65536", "MoCo, K=65536")
    }
    assert [one.mechanism for one in resolved.values()] == ["end_to_end", "memory_bank", "moco"]
    end_to_end = resolved["end-to-end, K=1024"]
    assert (end_to_end.queue_size, end_to_end.batch_size, end_to_end.optimizer.lr) == (1024, 1024, 0.12)
    assert (resolved["memory bank, K=65536"].queue_size, resolved["memory bank, K=65536"].batch_size) == (65536, 256)


def test_a_row_without_a_recipe_says_why():
    with pytest.raises(InputError, match=r"row 'MoCo, IG-1B' of moco-v1-2b has no recipe: data never public"):
        tables.recipe(*row_of("moco-v1-2b", "MoCo, IG-1B"))
    with pytest.raises(InputError, match="its encoder is not pretrained: random"):
        tables.recipe(*row_of("moco-v1-2b", "random init"))


def pretrainings(table):
    """Row labels and words of each pretraining that a table's rows take."""
    steps = chain.steps(table, table.rows, chain.Places())
    return [(sorted({label for label, _ in step.cells}), step) for step in steps if step.kind == "pretrain"]


@pytest.mark.parametrize("name", IDS)
def test_commands_give_what_the_recipes_give(name):
    """Read back as the command line reads them; two runs share a folder only where they are the same run."""
    table = tables.load_table(name)
    rows = {row.label: row for row in table.rows if row.recipe and chain.why_none(table, row) is None}
    folders, seen = {}, []
    for labels, step in pretrainings(table):
        words = shlex.split(step.command)
        assert words[:2] == ["moco-eval", "pretrain"] and "--dataset" in words
        settings = [value for option, value in pairwise(words) if option == "--set"]
        given = configs.load(words[2], "pretrain", PretrainConfig, settings).model_copy(update={"expect": None})
        seen += labels
        for label in labels:
            assert given == tables.recipe(table, rows[label]).model_copy(update={"expect": None})
        folder = words[words.index("--output") + 1]
        assert folders.setdefault(folder, given) == given
    assert sorted(seen) == sorted(rows)


def test_one_recipe_is_one_command_in_all_tables():
    by_recipe = {}
    for table in map(tables.load_table, IDS):
        rows = {row.label: row for row in table.rows}
        for labels, step in pretrainings(table):
            by_recipe.setdefault(configs.dump(rows[labels[0]].recipe.resolved()), set()).add(step.command)
    assert all(len(commands) == 1 for commands in by_recipe.values())
    assert len(set.union(*by_recipe.values())) == len(by_recipe)


def test_the_commands_are_shown(capfd, monkeypatch, quick_probe):
    out, _ = in_process(capfd, monkeypatch, "table", "cifar10-demo", "--commands")
    stop, folder, first, _, command, *_ = out.splitlines()
    assert (stop, first) == ("set -e", "# asymmetric loss, 200 epochs") and "in place of FOLDER" in folder
    assert command == (
        "moco-eval pretrain cifar10 --dataset cifar10 --data FOLDER --precision fp32 "
        "--output runs/pretrain-cifar10-cifar10"
    )
    assert "--set symmetric=true --set schedule.epochs=800" in out
    assert "bn_permute" not in out  # no protocol of ours measures that row


# The chain behind a row


def test_the_chain_of_a_detection_row_is_pretrain_convert_detect():
    table, row = row_of("moco-v1-2b", "MoCo, IN-1M")
    places = chain.Places(Path("here"), {"imagenet": Path("in"), "voc": Path("VOCdevkit")}, processes=8)
    pretrain, convert, detect = chain.steps(table, [row], places)
    assert [step.kind for step in (pretrain, convert, detect)] == ["pretrain", "convert", "evaluate"]
    assert pretrain.after is None
    assert (convert.after.arguments, detect.after.arguments) == (pretrain.arguments, convert.arguments)
    last = "here/pretrain-moco_v1_r50-imagenet/checkpoints/last.pth"
    assert convert.command == shlex.join(
        ("moco-eval", "convert", last, "here/pretrain-moco_v1_r50-imagenet/detectron2.pkl", "--to", "detectron2")
    )
    assert detect.arguments[:6] == ("detect", last, "--dataset", "voc", "--data", "VOCdevkit")
    assert "--recipe r50_c4_24k" in detect.command and detect.command.count("--nproc 8") == 1
    assert detect.cells == tuple((row.label, name) for name in ("AP50", "AP", "AP75"))


def test_encoders_that_are_not_pretrained_need_no_step_before():
    table = tables.load_table("moco-v1-2b")
    found = chain.steps(table, table.rows, chain.Places())
    checkpoints = [step.arguments[1] for step in found if step.kind == "evaluate"]
    assert checkpoints[:2] == ["random:resnet50", "zoo:detectron2_msra_r50"]
    assert [step.kind for step in found] == ["evaluate", "evaluate", "pretrain", "convert", "evaluate"]
    assert not [step for step in found if ("MoCo, IG-1B", "AP") in step.cells]


def test_every_protocol_of_a_column_has_a_config():
    columns = [column for name in IDS for column in tables.load_table(name).columns.values() if column.protocol]
    for column in columns:
        kind, asked = chain.command(column), column.config or chain.evaluation(column.protocol)
        values, _ = configs.read_yaml(configs.folder() / kind / f"{asked}.yaml")
        assert values["protocol"] == column.protocol


def test_a_finished_pretraining_is_found_by_what_it_says(tmp_path):
    _, row = row_of("cifar10-demo", "asymmetric loss, 200 epochs")
    about = {"command": "pretrain", "dataset": {"name": "cifar10"}, "processes": 1, "bn": "split"}
    folder = tmp_path / "of another name"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(about | {"config": row.recipe.resolved().model_dump()}))
    assert chain.pretrained(row.recipe, tmp_path) is None  # not to its end
    (folder / "checkpoints/epoch_0200.pth").write_bytes(b"")
    assert chain.pretrained(row.recipe, tmp_path) is None  # nor with the file that the next command reads
    (folder / "checkpoints/last.pth").write_bytes(b"")
    assert chain.pretrained(row.recipe, tmp_path) == folder
    _, longer = row_of("cifar10-demo", "asymmetric loss, 400 epochs")
    assert chain.pretrained(longer.recipe, tmp_path) is None


# Which record belongs where


def test_a_record_goes_to_its_row_with_its_difference():
    (line,) = ours([cifar_record(82.1)])
    assert (line.row, line.column.title) == ("asymmetric loss, 200 epochs", "kNN top-1")
    assert line.difference == pytest.approx(82.1 - 82.6)
    assert line.mark is None and line.ours.n == 1


def test_the_symmetric_run_goes_to_the_symmetric_row():
    (line,) = ours([cifar_record(88.0, epochs=400, symmetric=True)])
    assert line.row == "symmetric loss, 400 epochs" and line.published == 88.5


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("protocol",), "knn/instdisc@1"),
        (("dataset", "name"), "digits"),
        (("dataset", "labels_per_class"), 10),
        (("dataset", "subset"), "ImageNet 1 % (SimCLR's list)"),
        (("protocol",), "linear/quick@1"),
        (("metrics",), {"top5": 99.0}),
        (("encoder", "arch"), "resnet18"),
        (("encoder", "pretraining"), None),
        (("encoder", "pretraining", "epochs"), 150),
        (("encoder", "pretraining", "protocol"), "pretrain/moco-v1@1"),
        (("encoder", "pretraining", "dataset", "name"), "digits"),
        (("encoder", "pretraining", "bn"), "none"),
        (("encoder", "pretraining", "bn"), "shuffle"),  # in one process: shuffles nothing
        (("encoder", "pretraining", "config", "queue_size"), 8192),
        (("encoder", "pretraining", "config", "momentum"), 0.9),
        (("encoder", "pretraining", "config", "schedule", "epochs"), 800),  # stopped a quarter of the way
    ],
)
def test_another_thing_belongs_to_no_row(path, value):
    assert ours([cifar_record()])
    assert not ours([changed(cifar_record(), path, value)])


def voc_record(encoder, **changes):
    metrics = {"AP50": 60.0, "AP": 34.0, "AP75": 33.0}
    return {
        "protocol": "detect/voc-r50-c4-24k@1",
        "dataset": {"name": "voc", "fingerprint": "ef"},
        "encoder": {"path": "x", "sha256": "1", "arch": "resnet50", "pretraining": None, **encoder},
        "metrics": metrics,
        "std": {},
        "trials": [{"seed": 0, "metrics": metrics}],
        "over": "finetune",
        "deviations": [],
        "environment": {"time": "2026-01-01T00:00:00+0000"},
        **changes,
    }


@pytest.mark.parametrize(
    ("encoder", "row"),
    [
        ({"origin": "random", "path": "random:resnet50"}, "random init"),
        ({"origin": "moco-eval/1", "pretraining": {"epochs": 0, "protocol": "p", "steps": 0}}, "random init"),
        (
            {"origin": "moco-eval/1", "path": "r/epoch_0000.pth", "pretraining": {"epochs": 0, "protocol": "p"}},
            "random init",
        ),
        ({"origin": "torchvision", "path": "torchvision:resnet50:IMAGENET1K_V1"}, None),
        ({"origin": "torchvision", "path": "torchvision:resnet50:IMAGENET1K_V2"}, None),
        ({"origin": "torchvision", "path": "runs/converted.pth"}, None),
        ({"origin": "facebookresearch/moco v1", "path": "moco_v1.pth.tar"}, None),
        ({"origin": "facebookresearch/moco v1", "path": "zoo:moco_v1_200ep"}, "MoCo, IN-1M"),
        ({"origin": "facebookresearch/moco v2", "path": "zoo:moco_v2_200ep"}, None),
        ({"origin": "torchvision", "path": "zoo:torchvision_r50_v1"}, None),
        (
            {"origin": "detectron2 MSRA", "path": "zoo:detectron2_msra_r50", "arch": "resnet50_msra"},
            "supervised, IN-1M",
        ),
        ({"origin": "x", "path": "zoo:moco_v1_200ep", "arch": "resnet50_w2"}, None),
        ({"origin": "moco-eval/1", "pretraining": {"epochs": 0, "protocol": "p", "steps": 15}}, None),
        ({"origin": "facebookresearch/moco v1", "pretraining": {"epochs": 0}}, None),
    ],
)
def test_rows_of_weights_that_were_not_pretrained_here(encoder, row):
    rows = {line.row for line in ours([voc_record(encoder)], "moco-v1-2b")}
    assert rows == ({row} if row else set())


def test_a_deviation_is_marked_bracketed_and_footnoted_and_never_joins_the_mean():
    records = [cifar_record(82.0), cifar_record(90.0, seed=1, deviations=["k 20 instead of 200"])]
    done = match.compare(tables.load_table("cifar10-demo"), records)
    clean, marked = [line for line in done.lines if line.ours]
    assert (clean.ours.mean, clean.ours.n, clean.mark) == (82.0, 1, None)
    assert (marked.ours.mean, marked.mark) == (90.0, 1)
    assert done.footnotes == ["runs/1: k 20 instead of 200"]
    text = render.render(done, "text")
    assert "(+7.40)" in text and "[1] not comparable: runs/1: k 20 instead of 200" in text


def test_a_released_checkpoint_says_its_epochs_alone():
    """As the loader reads an official file: no config, and nothing that repeats could be told apart by."""
    record = voc_record(
        {"origin": "facebookresearch/moco v1", "path": "zoo:moco_v1_200ep", "pretraining": {"epochs": 200}}
    )
    again = record | {"environment": {"time": "2026-02-01T00:00:00+0000"}, "run": "newer"}
    lines = [line for line in ours([record, again], "moco-v1-2b") if line.row == "MoCo, IN-1M"]
    assert {(line.ours.n, line.ours.over, tuple(line.ours.runs)) for line in lines} == {(1, "finetune", ("newer",))}


def test_five_trials_are_shown_before_a_newer_single_one():
    trials = [{"seed": seed, "metrics": {}} for seed in range(5)]
    full = voc_record({"origin": "random", "path": "random:resnet50"}, trials=trials)
    newer = voc_record(
        {"origin": "random", "path": "random:resnet50"}, environment={"time": "2026-03-01T00:00:00+0000"}
    )
    lines = ours([newer, full], "moco-v1-2b")
    assert {line.ours.n for line in lines if line.row == "random init"} == {5}


def test_repeats_share_their_batch_norm_and_their_data():
    first, second, third, fourth, five = (cifar_record(80.0 + seed, seed=seed) for seed in range(5))
    five["trials"] = five["trials"] * 5
    second["encoder"]["pretraining"]["processes"] = 8
    third["encoder"]["pretraining"]["dataset"]["fingerprint"] = "of other images"
    assert [line.ours.n for line in ours([first, second])] == [1]
    assert [line.ours.n for line in ours([first, third])] == [1]
    assert [line.ours.n for line in ours([first, fourth])] == [2]
    assert [line.ours.over for line in ours([first, five])] == ["head"]  # five heads and one are no two pretrainings


@pytest.mark.parametrize(
    ("key", "repeats"),
    [
        ("knn", 2),
        ("knn2", 1),
        ("workers", 2),
        ("workers_of_another_kind", 1),
        ("views.backend", 2),
        ("views.backend_x", 1),
        ("seed", 2),
        ("seeding", 1),
    ],
)
def test_a_key_is_neutral_by_its_dotted_parts_and_not_by_its_first_letters(key, repeats):
    """Another version's checkpoints may have keys that begin like ours."""
    group, _, last = key.rpartition(".")
    first, second = (cifar_record(80.0 + seed, seed=seed) for seed in range(2))
    for value, record in enumerate((first, second), 5):
        settings = record["encoder"]["pretraining"]["config"]
        (settings[group] if group else settings)[last] = value
    assert [line.ours.n for line in ours([first, second])] == [repeats]


@pytest.mark.parametrize("protocol", ["linear", "", "linear/x@10", "linear/moco-lincls@10", "lin@ear/x", "a/b/c@1"])
def test_no_protocol_of_ours_is_said_to_be_none_whatever_its_form(protocol):
    with pytest.raises(InputError, match="no protocol '"):
        chain.evaluation(protocol)


def test_pretrainings_in_folders_of_one_name_are_judged_in_places_of_their_own(tmp_path):
    table = tables.load_table("cifar10-demo")
    rows = [row for row in table.rows if row.label in ("asymmetric loss, 200 epochs", "asymmetric loss, 400 epochs")]
    for row in rows:
        settings = row.recipe.resolved().model_dump(mode="json") | {"precision": "fp32"}
        epochs, about = settings["schedule"]["epochs"], {"command": "pretrain", "dataset": {"name": "cifar10"}}
        folder = tmp_path / f"e{epochs}" / "run"
        (folder / "checkpoints").mkdir(parents=True)
        text = yaml.safe_dump(about | {"processes": 1, "bn": "split", "config": settings})
        (folder / "config.yaml").write_text(text)
        for name in ("last.pth", f"epoch_{epochs:04}.pth"):
            (folder / "checkpoints" / name).write_bytes(b"")
    steps = chain.steps(table, rows, chain.Places(tmp_path))
    found = [step.output for step in steps if step.kind == "evaluate"]
    assert [step.output.parent.name for step in steps if step.recipe] == ["e200", "e400"]
    assert len(found) == len(set(found)) == 2


def test_a_run_without_shuffling_is_not_the_row_with_it():
    assert not ours([cifar_record(78.0, epochs=800, bn_permute=False)])


def test_the_momentum_of_a_memory_bank_plays_no_part():
    _, row = row_of("moco-v1-fig3", "memory bank, K=256")
    assert "momentum" not in match._asked(row.recipe)
    assert match._asked(row_of("moco-v1-fig3", "MoCo, K=256")[1].recipe)["momentum"] == 0.999


def test_what_the_row_itself_varies_is_no_deviation():
    record = cifar_record(epochs=200, deviations=["encoder: queue_size 4096 instead of 65536"])
    assert [line.mark for line in ours([record])] == [None]


def test_repeated_pretrainings_are_averaged_and_files_of_one_run_are_not():
    seeds = [cifar_record(value, seed=seed) for seed, value in enumerate((82.0, 83.0, 84.0))]
    again = cifar_record(70.0, seed=2, time="2025-01-01T00:00:00+0000")  # an older file of the third run
    (line,) = ours([*seeds, again])
    assert (line.ours.mean, line.ours.std, line.ours.n, line.ours.over) == (83.0, 1.0, 3, "pretrain")


def test_records_over_different_things_are_not_averaged_the_newest_counts():
    old = cifar_record(80.0)
    other_data = changed(cifar_record(81.0, seed=1), ("dataset", "fingerprint"), "other")
    other_recipe = cifar_record(82.0, seed=2, temperature=0.2, time="2026-02-01T01:00:00+0100")
    (line,) = ours([old, other_data, other_recipe])
    assert (line.ours.mean, line.ours.n) == (82.0, 1)


def test_heads_keep_their_own_spread():
    record = cifar_record(82.0) | {"std": {"top1": 0.3}, "trials": [{}] * 5}
    (line,) = ours([record])
    assert (line.ours.std, line.ours.n, line.ours.over) == (0.3, 5, "head")


# How it is shown


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("form", ["text", "markdown", "csv"])
def test_every_table_in_every_format_shows_every_number(name, form):
    table = tables.load_table(name)
    shown = render.render(match.compare(table, []), form)
    for row in table.rows:
        for value in row.published.values():
            assert value is None or str(value) in shown
    assert shown == render.render(match.compare(table, []), form)


def test_csv_can_be_read_back():
    text = render.render(match.compare(tables.load_table("cifar10-demo"), [cifar_record(82.1)]), "csv")
    first, second = list(csv.DictReader(text.splitlines()))[:2]
    assert (first["published"], first["ours"], first["n"], first["comparable"]) == (
        "82.6",
        "82.1",
        "1",
        "yes",
    )
    assert second["ours"] == second["difference"] == ""


def test_the_published_spread_is_printed():
    text = render.render(match.compare(tables.load_table("moco-repo-linear"), []), "text")
    assert "60.8 ± 0.2" in text and "67.5 ± 0.1" in text


def test_text_is_not_read_as_markup():
    record = cifar_record(82.0, deviations=["[bold]x[/bold]"])
    text = render.render(match.compare(tables.load_table("cifar10-demo"), [record]), "text")
    assert "[bold]x[/bold]" in text and "[1]" in text


def test_unknown_format():
    with pytest.raises(InputError, match="Did you mean 'markdown'"):
        render.render(match.compare(tables.load_table("cifar10-demo"), []), "markdwn")


def test_no_table_file_names_this_machine():
    for path in (configs.folder() / "papers").glob("*.yaml"):
        assert "/work" not in Path(path).read_text()


def test_every_detection_column_has_its_recipe_on_its_data():
    columns = [column for name in IDS for column in tables.load_table(name).columns.values()]
    wanted = {(c.protocol, c.dataset) for c in columns if c.protocol and c.protocol.startswith("detect/")}
    ours = {(protocol, meaning.dataset) for protocol, meaning in PROTOCOLS.items()}
    assert wanted <= ours
    assert {protocol for protocol, _ in ours - wanted} == {  # of recipes whose numbers no table prints
        "detect/voc07-r50-dc5-9k@1",
        "detect/coco-r50-c4-6x@1",
        "detect/digits-r50-c4@1",
        "detect/coco-vitdet-b@1",
        "detect/lvis-v1-r50-fpn-1x@1",
        "detect/voc-own-vitdet-b-24k@1",
    }

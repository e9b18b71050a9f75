"""Small run folders, honest ones and those of a stranger."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

RIGHT = 40  # of IMAGES
IMAGES = 50


def write_run(folder: Path) -> Path:
    """A finished linear classification of 50 images of ten classes, 40 of them right."""
    folder.mkdir(parents=True)
    labels = np.arange(IMAGES) % 10
    predictions = np.where(np.arange(IMAGES) < RIGHT, labels, (labels + 1) % 10)
    record = {
        "schema": "moco-eval/result@1",
        "protocol": "linear/moco-lincls@1",
        "dataset": {"name": "digits", "split": "test", "fingerprint": "f00d", "images": IMAGES, "classes": 10},
        "encoder": {
            "path": "x.pth",
            "sha256": "a" * 64,
            "origin": "moco-eval/1",
            "arch": "resnet18",
            "pretraining": {},
        },
        "metrics": {"top1": 100 * RIGHT / IMAGES},
        "std": {},
        "interval": {"top1": [70.0, 90.0]},
        "trials": [{"seed": 0, "metrics": {"top1": 80.0}}],
        "over": "head",
        "selection": "last-epoch",
        "equivalences": [],
        "deviations": [],
        "cost": {"seconds": 1.0, "images": 100, "peak_memory_MB": 40.0, "device": "cpu"},
        "environment": {"time": "2026-01-01T00:00:00+0000"},
    }
    (folder / "result.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump({"command": "linear", "config": {"seed": 0}}))
    (folder / "environment.json").write_text(json.dumps({"time": "2026-01-01T00:00:00+0000", "versions": {}}))
    np.savez(folder / "predictions.npz", label=labels, prediction=predictions[None])
    return folder


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def link(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return make


def changed(**keys: object) -> Callable[[Path], None]:
    """A record with other values; a key with two underscores reaches one level down."""

    def change(folder: Path) -> None:
        record = json.loads((folder / "result.json").read_text())
        for key, value in keys.items():
            outer, _, inner = key.partition("__")
            record[outer] = record[outer] | {inner: value} if inner else value
        (folder / "result.json").write_text(json.dumps(record))

    return change


def bomb(count: int, kind: str = "<i8", said: int | None = None) -> Callable[[Path], None]:
    """predictions.npz with two packed arrays of zeros; `said` where the header says another length."""

    def write(folder: Path) -> None:
        header = io.BytesIO()
        about = {"descr": kind, "fortran_order": False, "shape": (said or count,)}
        np.lib.format.write_array_header_1_0(header, about)
        with zipfile.ZipFile(folder / "predictions.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("label", "prediction"):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    file.write(header.getvalue())
                    for start in range(0, count, 1 << 20):
                        file.write(bytes(8 * min(1 << 20, count - start)))

    return write


LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{n}: &a{n} {{k{n}: *a{n - 1}, l{n}: *a{n - 1}}}\n" for n in range(1, 27))
# What is wrong, and words of the refusal; every command that reads the run refuses it alike.
RECORDS = {
    "lists in lists": (put("result.json", "[" * 200_000 + "]" * 200_000), "it has more than 100 levels"),
    "just too deep": (put("result.json", '{"a":' * 150 + "1" + "}" * 150), "150 levels, and 100 are the most"),
    "endless integer": (
        put("result.json", f'{{"schema": "moco-eval/result@1", "a": {"9" * 5000}}}'),
        "an integer of 5,000 digits",
    ),
    "long integer": (changed(encoder__note=10**60), "an integer of 61 digits"),
    "nothing but the schema": (put("result.json", '{"schema": "moco-eval/result@1"}'), "it lacks protocol"),
    "another version": (changed(schema="moco-eval/result@9"), "is a moco-eval/result@9 record"),
    "wrong types": (changed(dataset=[], metrics=3), "dataset is [], no mapping"),
    "metric in words": (changed(metrics__top1="x"), "metrics.top1 is 'x', no number"),
    "immense metric": (changed(metrics__top1=1e300), "metrics.top1 is 1e+300"),
    "negative images": (changed(dataset__images=-5), "dataset.images is -5"),
    "60,000 classes": (changed(dataset__classes=60_000), "has 60,000 classes, and 50,000 are the most"),
    "too large": (put("result.json", " " * (17 << 20) + "{}"), "bytes, and 16,777,216 are the most"),
    "no UTF-8": (
        lambda folder: (folder / "result.json").write_bytes(b'{"schema": "\xff"}') and None,
        "not readable JSON",
    ),
    "record is a pipe": (pipe("result.json"), "result.json is a named pipe"),
    "record is a device": (link("result.json"), "result.json is a device"),
    "config is a pipe": (pipe("config.yaml"), "config.yaml is a named pipe"),
    "config is a device": (link("config.yaml"), "config.yaml is a device"),
    "alias of itself": (put("config.yaml", "command: linear\na: &a\n  b: *a\n"), "the alias *a contains itself"),
    "aliases of aliases": (put("config.yaml", f"command: linear\n{LAUGHS}"), "100,000 are the most that one YAML file"),
    "YAML in YAML": (
        put("config.yaml", "command: linear\na: " + "[" * 500 + "]" * 500),
        "levels, and 100 are the most",
    ),
    "YAML dashes": (put("config.yaml", "command: linear\na:\n  " + "- " * 5000 + "x"), "levels, and 100 are the most"),
    "YAML questions": (put("config.yaml", "? " * 5000 + "x"), "levels, and 100 are the most"),
    "many values": (put("config.yaml", "command: linear\na: [" + "1," * 110_000 + "]"), "100,000 are the most"),
    "YAML tag": (put("config.yaml", 'command: !!python/object/apply:os.system ["true"]'), "is not YAML: could not"),
    "YAML key": (put("config.yaml", "command: linear\n? [a, b]\n: 1\n"), "is not YAML: while constructing"),
    "YAML date": (put("config.yaml", "command: linear\nx: 2020-99-99\n"), "is not YAML: month must be"),
    "YAML integer in words": (put("config.yaml", 'command: linear\nx: !!int "x"\n'), "is not YAML: invalid literal"),
    "YAML integer": (put("config.yaml", "command: linear\nx: " + "9" * 5000), "an integer of 5,000 digits"),
    "YAML hexadecimal": (put("config.yaml", "command: linear\nx: 0x" + "9" * 5000), "an integer of 5,002 digits"),
    "YAML sixties": (put("config.yaml", "command: linear\nx: 1" + ":59" * 20_000), "an integer of 60,001 digits"),
    "environment is deep": (put("environment.json", "[" * 200_000), "it has more than 100 levels"),
    "environment is a pipe": (pipe("environment.json"), "environment.json is a named pipe"),
}
ANSWERS = {
    "answers are a pipe": (pipe("predictions.npz"), "predictions.npz is a named pipe"),
    "answers are a device": (link("predictions.npz"), "predictions.npz is a device"),
    "more answers than images": (
        bomb(1 << 17),
        "it has 131,072 answers for 50 images",
    ),
    "objects": (
        lambda folder: np.savez(
            folder / "predictions.npz", label=np.array([None] * 50), prediction=np.array([None] * 50)
        ),
        "is of type object",
    ),
    "longer than it is": (bomb(50, said=10**12), "of shape (1000000000000,) has 528 bytes"),
    "no class": (
        lambda folder: np.savez(
            folder / "predictions.npz", label=np.arange(50) * 2**40, prediction=np.zeros((1, 50), int)
        ),
        "a class is none of 10",
    ),
    "text without letters": (
        lambda folder: np.savez(
            folder / "predictions.npz", label=np.zeros(50, "U1"), prediction=np.zeros((1, 50), int)
        ),
        "labels of type <U1",
    ),
}

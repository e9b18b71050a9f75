"""Images are opened by the formats that are accepted; whatever else lies there is no image, and starts no program."""

import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from commands import in_process
from PIL import EpsImagePlugin, Image, ImageFile

import moco_eval as me
from moco_eval import limits
from moco_eval.data.augment.decode import photo
from moco_eval.data.boxes.samples import image_size, read_image
from moco_eval.data.catalogue import open_images
from moco_eval.data.image_set import decode_bytes
from moco_eval.data.index import EXTENSIONS
from moco_eval.data.pixels import FORMATS
from moco_eval.errors import InputError
from moco_eval.report import pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n"
DOS_POSTSCRIPT = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(POSTSCRIPT)) + bytes(20) + POSTSCRIPT
READERS = {
    "classification": lambda path: decode_bytes(path.read_bytes(), str(path)),
    "pretraining": lambda path: photo(open_images("flat", path.parent, "train"), 0),
    "detection": read_image,
    "a header": image_size,
    "datasets check": lambda path: image_size(path, decode=True),
    "the report": pictures.image,
}


class Opening:
    """Somebody's data set: it opens its one image, and decodes it or leaves that to us."""

    def __init__(self, path: Path, decode: bool):
        self.path, self.decode = path, decode

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.open(self.path)
        return (image.convert("RGB") if self.decode else image), 0


def encoded(form: str) -> bytes:
    held = io.BytesIO()
    Image.fromarray(PIXELS).save(held, form)
    return held.getvalue()


def written(folder: Path, data: bytes, name: str = "x.jpg") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


@pytest.fixture
def called(tmp_path, monkeypatch) -> Path:
    """Stands where one of the programs that Pillow knows was started."""
    programs, mark = tmp_path / "programs", tmp_path / "called"
    programs.mkdir()
    for name in ("gs", "djpeg", "cjpeg", "netpbm", "ppmquant", "ppmtogif", "xv", "display", "gm"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {mark}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it looks for Ghostscript once
    return mark


@pytest.mark.parametrize("data", [POSTSCRIPT, DOS_POSTSCRIPT], ids=["PostScript", "with a header of DOS"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_postscript_is_no_image_and_starts_no_program(tmp_path, called, read, data):
    path = written(tmp_path / "set", data, "x.png" if read is pictures.image else "x.jpg")
    with pytest.raises(InputError, match=r"set/x\.\w+( is|: it is) .*(Post|PostScript|image)") as error:
        read(path)
    assert "\n" not in str(error.value) and not called.exists()


def test_pillow_alone_does_start_one(tmp_path, called):
    """The control: without it, the tests above would pass for a file that does nothing."""
    with pytest.raises(OSError), Image.open(written(tmp_path / "set", POSTSCRIPT)) as image:
        image.load()
    assert called.read_text().startswith("gs")


@pytest.mark.parametrize("decode", [True, False])
def test_a_data_set_that_opens_postscript_starts_no_program(tmp_path, called, decode):
    path = written(tmp_path / "set", POSTSCRIPT)
    with pytest.raises(
        InputError, match=r"dataset\[0\] (raised OSError: PostScript is|is an image of format EPS; give JPEG)"
    ):
        me.ImageSet.from_dataset(Opening(path, decode))
    assert not called.exists()


def test_elsewhere_in_the_process_ghostscript_is_as_it_was(tmp_path, called):
    path = written(tmp_path / "set", POSTSCRIPT)
    with pytest.raises(InputError):
        me.ImageSet.from_dataset(Opening(path, decode=True))
    with pytest.raises(OSError), Image.open(path) as image:
        image.load()
    assert called.exists()


def test_datasets_check_names_postscript_and_starts_no_program(tmp_path, called, capfd, monkeypatch):
    for name in ("flat", "imagefolder"):
        for folder in ("train/a", "train/b", "val/a", "val/b"):
            (tmp_path / name / folder).mkdir(parents=True)
            written(tmp_path / name / folder, encoded("JPEG"), "1.jpg")
            written(tmp_path / name / folder, POSTSCRIPT, "2.jpg")
        out, _ = in_process(capfd, monkeypatch, "datasets", "check", name, "--data", tmp_path / name)
        assert re.search(r"2.jpg", out)
    assert not called.exists()


def test_the_formats_are_those_of_the_suffixes():
    Image.init()
    known = {Image.registered_extensions()[suffix] for suffix in (*EXTENSIONS, ".gif")}
    assert known == set(FORMATS)


@pytest.mark.parametrize("form", FORMATS)
def test_every_accepted_format_is_read_whatever_its_name(tmp_path, form):
    """ImageNet has a PNG file under .JPEG."""
    path = written(tmp_path / "set", encoded(form))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    for image in (decode_bytes(path.read_bytes(), "x"), read_image(path)):
        np.testing.assert_array_equal(np.asarray(image), expected)
    np.testing.assert_array_equal(photo(open_images("flat", path.parent, "train"), 0), expected.transpose(2, 0, 1))
    assert image_size(path) == image_size(path, decode=True) == (24, 24)


def foreign() -> list[str]:
    """What Pillow writes and reads, and we do not."""
    Image.init()
    return sorted(set(Image.SAVE) & set(Image.OPEN) - {*FORMATS, "DIB", "MPO", "PALM", "HDF5", "GRIB", "BUFR", "WMF"})


@pytest.mark.parametrize("form", foreign())
def test_other_formats_are_no_images(tmp_path, form):
    held = io.BytesIO()
    Image.fromarray(PIXELS).convert({"BLP": "P", "MSP": "1", "XBM": "1", "SPIDER": "F"}.get(form, "RGB")).save(
        held, form
    )
    path = written(tmp_path / "set", held.getvalue())
    with pytest.raises(InputError, match=r"x.jpg is (not an image that Pillow reads as JPEG, PNG|PostScript)"):
        decode_bytes(path.read_bytes(), str(path))
    for read in (read_image, image_size):
        with pytest.raises(InputError, match=r"cannot read .*x.jpg: it is (no image \(JPEG, PNG|PostScript)"):
            read(path)


ERRORS = (
    (KeyError("a\nkey"), "a.{1,2}key"),
    (struct.error("unpack requires"), "unpack requires"),
    (IndexError(), "IndexError"),
    (AssertionError(), "AssertionError"),
    (ZeroDivisionError("division by zero"), "division by zero"),
    (RecursionError("too deep"), "too deep"),
    (NotImplementedError("unsupported"), "unsupported"),
    (MemoryError(), "it needs more memory than there is"),
    (Image.DecompressionBombWarning("large"), "large"),
)


@pytest.mark.parametrize(("error", "words"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
@pytest.mark.parametrize("read", [READERS[name] for name in READERS if name != "a header"])
def test_whatever_a_decoder_raises_is_an_unreadable_image(tmp_path, monkeypatch, read, error, words):
    path = written(tmp_path / "set", encoded("PNG"), "x.png")

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", failing)
    with pytest.raises(InputError, match=words) as refused:
        read(path)
    assert "x.png" in str(refused.value) and "\n" not in str(refused.value)
    lazy = Opening(path, decode=False)
    with pytest.raises(InputError, match=words):
        me.ImageSet.from_dataset(lazy)


@pytest.mark.parametrize("read", [READERS[name] for name in READERS if name not in ("a header", "the report")])
def test_a_jpeg_of_thousands_of_scans_is_refused(tmp_path, read):
    """31 bytes for each scan, and every one goes over all pixels again."""
    held = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(held, "JPEG", progressive=True)
    whole = held.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    path = written(tmp_path / "set", whole[:-2] + 600 * scan + whole[-2:])
    with pytest.raises(InputError, match=r"x.jpg has [\d,]+ pixels in all its scans, and 8,589,934,592 are the most"):
        read(path)
    read(written(tmp_path / "other", whole))


def test_an_image_of_more_pixels_than_the_limit_says_how_to_read_it(tmp_path, monkeypatch):
    monkeypatch.setitem(limits.LIMITS, "pixels", limits.Limit(500, "pixels", "image"))
    path = written(tmp_path / "set", encoded("PNG"), "x.png")
    for read in READERS.values():
        with pytest.raises(InputError, match=r"x.png has 576 pixels, and 500 are the most.*MOCO_EVAL_LIMITS=N"):
            read(path)
    monkeypatch.setenv("MOCO_EVAL_LIMITS", "2")
    for read in READERS.values():
        read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pillows_own_limit_is_raised_with_ours(tmp_path, monkeypatch):
    monkeypatch.setitem(limits.LIMITS, "pixels", limits.Limit(500, "pixels", "image"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    data = encoded("PNG")
    with pytest.raises(InputError, match=r"x has more than the 500 pixels .*MOCO_EVAL_LIMITS=N"):
        decode_bytes(data, "x")
    monkeypatch.setenv("MOCO_EVAL_LIMITS", "2")
    assert decode_bytes(data, "x").size == (24, 24)

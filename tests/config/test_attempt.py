"""What `--try` makes of a detector's regions: C4 runs all of res5 on each, so that they cost most of a CPU's time."""

import pytest

from moco_eval.config import load
from moco_eval.config.attempt import REGIONS, shrunk
from moco_eval.config.detection import DetectConfig


@pytest.mark.parametrize(
    ("name", "smaller"), [("r50_c4_24k", True), ("coco_r50_fpn_1x", True), ("digits_r50_c4", False)]
)
def test_a_try_looks_at_few_regions_and_never_at_more(name, smaller):
    as_published = load.load(name, "detect", DetectConfig)
    tried = load.load(name, "detect", DetectConfig, shrunk("detect", load.merged(name, "detect", [])))
    for key, most in REGIONS.items():
        section, value = key.split(".")
        before, after = (getattr(getattr(config, section), value) for config in (as_published, tried))
        assert after == (most if smaller else before) and after <= most

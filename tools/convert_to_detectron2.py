#!/usr/bin/env python3
"""convert_to_detectron2.py IN OUT: the same as `moco-eval convert IN OUT --to detectron2 --force`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from moco_eval.encoders.export.convert import convert
from moco_eval.errors import InputError, RunFailed

if __name__ == "__main__":
    try:
        if len(sys.argv) != 3:
            raise InputError("usage: convert_to_detectron2.py IN.pth OUT.pkl")
        print(convert(sys.argv[1], Path(sys.argv[2]), "detectron2", force=True))
    except (InputError, RunFailed) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)

#!/usr/bin/env python3
"""convert_to_detectron2.py IN OUT: the same as `moco-eval convert IN OUT --to detectron2 --force`."""

import sys
from pathlib import Path

from moco_eval.encoders.export import convert
from moco_eval.errors import InputError

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: convert_to_detectron2.py IN.pth OUT.pkl")
    try:
        print(convert(sys.argv[1], Path(sys.argv[2]), "detectron2", force=True))
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)

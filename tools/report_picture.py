"""Draw the picture of a report that README.md shows, in headless Chromium.

python tools/report_picture.py runs/demo/report.html --output docs/report.png
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1000, 1100  # of the window in CSS pixels: the summary and the table of results
SCALE = 1.5  # sharp where README is shown at half a screen's width
MOST = 200_000  # bytes: README loads at once


def screenshot(page: Path, picture: Path) -> None:
    """The top of a page as a PNG, in the light theme. Raises SystemExit where no browser is found or it fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("Error: no Chromium here; on Debian or Ubuntu: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}"]
        command = [browser, *flags, *size, f"--screenshot={picture}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode or not picture.exists():
        raise SystemExit(f"Error: {browser} drew nothing: {done.stderr.strip().splitlines()[-1:]}")


def main() -> None:
    """Write the picture in 64 colours."""
    parser = argparse.ArgumentParser(description="Draw the picture of a report that README.md shows.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/report.png"))
    given = parser.parse_args()
    if not given.report.is_file():
        raise SystemExit(f"Error: {given.report} does not exist; make demo writes runs/demo/report.html")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        screenshot(given.report, shot)
        Image.open(shot).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(given.output, optimize=True)
    if (size := given.output.stat().st_size) > MOST:
        raise SystemExit(f"Error: {given.output} has {size:,} bytes; at most {MOST:,} are wanted")
    print(f"{given.output}: {size:,} bytes")


if __name__ == "__main__":
    main()

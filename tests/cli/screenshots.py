"""
Screenshots of the report of a run, for docs/report.md:

    python tests/cli/screenshots.py outputs/train_math

They are written to docs/images, small enough for a page. Needs a browser, see browser.py, and pillow.
"""

import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from browser import launched, opened
from PIL import Image

from exgrpo_trl.report import write_report

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DESKTOP, PHONE = {"width": 1120, "height": 1040}, {"width": 390, "height": 780}
# Of a file.
MOST_BYTES = 150_000


def save(page, name):
    """Save what is seen, in fewer colours: also those of small things."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    file = IMAGES / f"report_{name}.png"
    image.save(file, optimize=True)
    size = file.stat().st_size
    print(f"{file} {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"{file} has more than {MOST_BYTES:,} bytes.")


def main(run):
    with tempfile.TemporaryDirectory() as folder, launched() as browser:
        file = write_report(run, Path(folder) / "report.html")
        with opened(browser, file, viewport=DESKTOP, color_scheme="light") as page:
            save(page, "light")
        with opened(browser, file, viewport=DESKTOP, color_scheme="dark") as page:
            page.locator("#sort").select_option("replays")
            page.locator(".id").first.click()
            page.locator(".completion").first.wait_for()
            page.evaluate("document.getElementById('questions').scrollIntoView()")
            save(page, "dark")
        with opened(browser, file, viewport=PHONE, color_scheme="light", device_scale_factor=1.5) as page:
            save(page, "phone")
        with opened(browser, file, viewport=PHONE, color_scheme="dark", device_scale_factor=1.5) as page:
            page.evaluate("document.querySelector('.charts').scrollIntoView()")
            save(page, "phone_dark")


if __name__ == "__main__":
    main(sys.argv[1])

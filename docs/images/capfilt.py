"""Make capfilt.webp: the gallery of a CapFilt report, as a browser shows it.

    openblip demo
    python docs/images/capfilt.py [REPORT]

Needs playwright and chromium, as the tests of the server's page do.
"""

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

REPORT = "runs/demo/report.html"
WIDTH, HEIGHT = 1240, 1180
CARDS, MARGIN = 8, 14


def main() -> None:
    report = Path(sys.argv[1] if len(sys.argv) > 1 else REPORT).resolve()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(report.as_uri())
        filters = page.locator("#filters")
        filters.evaluate("form => form.scrollIntoView()")
        page.wait_for_timeout(500)  # images are lazy; those in view are drawn now
        top, last = filters.bounding_box(), page.locator("#gallery article").nth(CARDS - 1).bounding_box()
        assert top is not None
        assert last is not None
        height = last["y"] + last["height"] - top["y"]
        clip = {"x": top["x"] - MARGIN, "y": top["y"], "width": top["width"] + 2 * MARGIN, "height": height + MARGIN}
        shown = page.screenshot(clip=clip)
        browser.close()
    with Image.open(io.BytesIO(shown)) as image:
        image.convert("RGB").save(Path(__file__).with_suffix(".webp"), quality=82, method=6)


if __name__ == "__main__":
    main()

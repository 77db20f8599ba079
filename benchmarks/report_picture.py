"""A picture of a report for the documents, by headless Chromium.

python -m benchmarks.report_picture demo/report.html docs/report.png
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

HEIGHT, GAP, SCALE = 1560, 24, 0.64
# Width, theme, and the section that the picture begins with: the top of the page, what is measured, and a phone.
VIEWS = ((1180, "light", ""), (1180, "dark", "sensitivity"), (400, "light", "questions0"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    shots = [shot(given.page, *view) for view in VIEWS]
    whole = Image.new("RGB", (sum(each.width + GAP for each in shots) - GAP, HEIGHT), "#808080")
    left = 0
    for each in shots:
        whole.paste(each, (left, 0))
        left += each.width + GAP
    size = (round(whole.width * SCALE), round(whole.height * SCALE))
    few = whole.resize(size, Image.Resampling.LANCZOS).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    few.save(given.picture, optimize=True)
    print(f"{given.picture}: {given.picture.stat().st_size / 1000:.0f} kB")


def shot(page: Path, width: int, theme: str, section: str) -> Image.Image:
    """What a reader sees of the page, from ``section`` on or from its top."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        scheme = {"name": "prefers-color-scheme", "value": theme}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.absolute().as_uri())
        drawn = "return document.documentElement.dataset.drawn"
        WebDriverWait(driver, 60).until(lambda _: driver.execute_script(drawn))
        if section:
            driver.execute_script("document.getElementById(arguments[0]).scrollIntoView()", section)
        return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    finally:
        driver.quit()


if __name__ == "__main__":
    main()

"""Draw docs/images/ui.png, the page of `mixofshow ui` in use: `python docs/draw_ui.py`.

Needs the extras `ui` and `browser`, Chromium and its driver.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
PICTURE = ROOT / "docs" / "images" / "ui.png"
WIDTH, HEIGHT = 1280, 1180


def main() -> None:
    """Draw two things with the mouse, and take a picture of the page."""
    import chromium
    from diffusers_mixofshow.ui.page import build_page, get_launch_settings
    from diffusers_mixofshow.ui.session import Studio

    page = build_page(Studio("toyland", "cpu"))
    _, url, _ = page.launch(**get_launch_settings(), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    with chromium.browser(WIDTH, HEIGHT) as driver:
        chromium.open_page(driver, url)
        chromium.drag(driver, (0.02, 0.25), (0.48, 0.97))
        chromium.drag(driver, (0.52, 0.25), (0.98, 0.97))
        chromium.write(driver, "Name of region 1", "dog")
        chromium.write(driver, "Name of region 2", "vase")
        chromium.write(driver, "Prompt of region 1", "a brown dog in the snow")
        chromium.write(driver, "Prompt of region 2", "a red vase in the snow")
        chromium.one(driver, "#condition input").click()
        chromium.draw(driver, "a dog and a vase in the snow")
        driver.execute_script("scrollTo(0, 0)")
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
    shot.convert("RGB").quantize(128).save(PICTURE, optimize=True)
    page.close()


if __name__ == "__main__":
    main()

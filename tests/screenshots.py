"""Make the README's screenshot from the running app: python tests/screenshots.py"""

import io
import tempfile

from phantoms import CHROMIUM, ROOT, make_app, served, shipped
from PIL import Image
from playwright.sync_api import sync_playwright


def main():
    with tempfile.TemporaryDirectory() as uploads, sync_playwright() as playwright:
        app = make_app(uploads)
        app.classifier = shipped()  # with its gate, as a visitor meets it
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 960, "height": 600})
        with served(app) as port:
            page.goto(f"http://127.0.0.1:{port}")
            page.get_by_role("link", name="a head with a bright spot").click()
            page.wait_for_url("**/results/*")
            page.wait_for_load_state("networkidle")
            drawn = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            drawn.convert("RGB").save(ROOT / "static" / "screenshot.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()

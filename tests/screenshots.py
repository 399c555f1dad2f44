"""Make the README's screenshot from the running app: python tests/screenshots.py"""

import tempfile

from phantoms import CHROMIUM, ROOT, encode, make_app, phantom, picture, served
from playwright.sync_api import sync_playwright


def main():
    phantoms = [picture("phantom.png", encode(phantom(1, lesion=True, side=384)))]
    with (
        tempfile.TemporaryDirectory() as uploads,
        served(make_app(uploads)) as port,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 960, "height": 600})
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_label("Scans").set_input_files(phantoms)
        page.get_by_role("button", name="Analyze").click()
        page.wait_for_url("**/results/*")
        page.wait_for_load_state("networkidle")
        page.screenshot(path=ROOT / "static" / "screenshot.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()

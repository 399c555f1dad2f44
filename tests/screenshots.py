"""Make the README's screenshot from the running app with a drawn phantom: python tests/screenshots.py"""

import tempfile
import threading

from conftest import ROOT, encode, make_app, phantom
from playwright.sync_api import sync_playwright
from test_browser import CHROMIUM, picture
from werkzeug.serving import make_server


def shoot(page, path):
    """Upload a phantom through the form and keep a picture of the answer."""
    page.get_by_label("Scans").set_input_files([picture("phantom.png", encode(phantom(1, lesion=True, side=384)))])
    page.get_by_role("button", name="Read the scan").click()
    page.wait_for_url("**/results/*")
    page.screenshot(path=path, full_page=True)


def main():
    with tempfile.TemporaryDirectory() as uploads, sync_playwright() as playwright:
        server = make_server("127.0.0.1", 0, make_app(uploads), threaded=True)
        threading.Thread(target=server.serve_forever).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 960, "height": 600})
        page.goto(f"http://127.0.0.1:{server.port}")
        shoot(page, ROOT / "static" / "screenshot.png")
        browser.close()
        server.shutdown()


if __name__ == "__main__":
    main()

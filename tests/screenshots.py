"""Make the README's screenshot from the running app with a drawn phantom: python tests/screenshots.py [FOLDER]"""

import pathlib
import sys
import tempfile
import threading

from conftest import ROOT, encode, make_app, phantom
from playwright.sync_api import sync_playwright
from test_browser import CHROMIUM, picture
from werkzeug.serving import make_server


def shoot(page, folder, scan, name):
    """Upload a scan through the form and keep pictures of the form and the answer, in PNG."""
    page.screenshot(path=folder / f"form-{name}.png", full_page=True)
    page.get_by_label("Scans").set_input_files([picture(*scan)])
    page.get_by_role("button", name="Read the scan").click()
    page.wait_for_url("**/results/*")
    page.screenshot(path=folder / f"result-{name}.png", full_page=True)


def main(folder):
    scan = ("phantom.png", encode(phantom(1, lesion=True, side=384)))
    with tempfile.TemporaryDirectory() as uploads, sync_playwright() as playwright:
        server = make_server("127.0.0.1", 0, make_app(uploads), threaded=True)
        threading.Thread(target=server.serve_forever).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, width, scheme in (("wide", 1280, "light"), ("narrow", 360, "light"), ("dark", 768, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.goto(f"http://127.0.0.1:{server.port}")
            shoot(page, folder, scan, name)
            page.goto(f"http://127.0.0.1:{server.port}/model")
            page.screenshot(path=folder / f"model-{name}.png", full_page=True)
        browser.close()
        server.shutdown()


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "static"
    target.mkdir(exist_ok=True)
    main(target)

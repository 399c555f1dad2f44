"""Make the README's screenshots from the running app with drawn phantoms: python tests/screenshots.py"""

import tempfile
import threading

from conftest import ROOT, encode, make_app, phantom
from playwright.sync_api import sync_playwright
from test_browser import CHROMIUM, picture
from werkzeug.serving import make_server


def shoot(page, address, name, files):
    """Upload phantoms through the form and keep a picture of the answer as static/`name`."""
    page.goto(address)
    page.get_by_label("Scans").set_input_files(files)
    page.get_by_role("button", name="Read the scan").click()
    page.wait_for_url("**/results/*")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=ROOT / "static" / name, full_page=True)


def main():
    with tempfile.TemporaryDirectory() as uploads, sync_playwright() as playwright:
        server = make_server("127.0.0.1", 0, make_app(uploads), threaded=True)
        threading.Thread(target=server.serve_forever).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 960, "height": 600})
        address = f"http://127.0.0.1:{server.port}"
        shoot(page, address, "screenshot.png", [picture("phantom.png", encode(phantom(1, lesion=True, side=384)))])
        slices = [picture(f"slice_{n}.png", encode(phantom(n, lesion=n % 2))) for n in range(6)]
        shoot(page, address, "screenshot_many.png", slices)
        browser.close()
        server.shutdown()


if __name__ == "__main__":
    main()

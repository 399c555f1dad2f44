"""The form in a real headless Chromium, as a visitor uses it."""

import os
import shutil
import threading

import pytest
from conftest import encode, make_app, phantom
from playwright.sync_api import sync_playwright
from werkzeug.serving import make_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of the app, served on loopback."""
    server = make_server("127.0.0.1", 0, make_app(tmp_path_factory.mktemp("uploads")), threaded=True)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        if os.environ.get("CI"):
            pytest.fail("Chromium is missing, and CI insists on it: apt-get install chromium")
        pytest.skip("Chromium is missing: apt-get install chromium (Debian, Ubuntu) gives it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The form in a fresh page; any request elsewhere and any error on the console fails the test."""
    page = browser.new_page()
    complaints = []
    page.on("request", lambda r: r.url.startswith((address, "blob:", "data:")) or complaints.append(r.url))
    page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert [c for c in complaints if "415" not in c] == []


def picture(name, data):
    return {"name": name, "mimeType": "image/png", "buffer": data}


def choose(page, *files):
    page.get_by_label("Scans").set_input_files(list(files))


def widths(page):
    """Natural widths of the pictures in the answer."""
    return page.eval_on_selector_all("article img", "all => all.map(image => image.naturalWidth)")


def test_a_visitor_uploads_a_scan_and_reads_the_answer(page):
    choose(page, picture("scan.png", encode(phantom(1, lesion=True))))
    assert page.locator("#previews img").count() == 1
    page.get_by_role("button", name="Read the scan").click()
    page.wait_for_url("**/results/*")
    assert page.get_by_text("Probability of a tumor").is_visible()
    assert page.locator("meter").count() == 4
    assert widths(page) == [256, 256]
    page.get_by_role("button", name="Delete this result now").click()
    page.wait_for_url("**/")


def test_a_real_scan_gets_a_heatmap(page, real_scans):
    page.get_by_label("Scans").set_input_files(real_scans["glioma"][0])
    page.get_by_role("button", name="Read the scan").click()
    page.wait_for_url("**/results/*")
    assert widths(page) == [512, 512]


def test_a_bad_file_brings_the_form_back_with_a_sentence(page):
    choose(page, picture("notes.png", b"I am a text file"))
    page.get_by_role("button", name="Read the scan").click()
    assert "notes.png is not a JPEG" in page.get_by_role("alert").inner_text()
    assert page.get_by_role("button", name="Read the scan").is_enabled()


def test_too_many_files_are_refused_before_they_are_sent(page, address):
    choose(page, *[picture(f"{n}.png", b"x") for n in range(33)])
    page.get_by_role("button", name="Read the scan").click()
    assert "at most 32" in page.get_by_role("alert").inner_text()
    assert page.url == f"{address}/"


def test_the_form_works_without_script(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    choose(page, picture("scan.png", encode(phantom(2))))
    page.get_by_role("button", name="Read the scan").click()
    page.wait_for_url("**/results/*")
    assert page.locator("article").count() == 1
    context.close()


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_no_page_is_wider_than_the_screen(page, address, width):
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/model", "/"):
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    choose(page, picture(f"{'long' * 25}.png", encode(phantom(3))))
    page.get_by_role("button", name="Read the scan").click()
    page.wait_for_url("**/results/*")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

"""The form in a real headless Chromium, as a visitor uses it."""

import io
import json
import os
import re
import zipfile

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from phantoms import CHROMIUM, encode, make_app, phantom, picture, series, served, static, zipped
from playwright.sync_api import sync_playwright


@pytest.fixture(scope="module")
def corrections(tmp_path_factory):
    """The folder in which the app keeps what readers say."""
    return tmp_path_factory.mktemp("corrections")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder in which the app keeps results."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def address(kept, corrections):
    """The address of the app, served on loopback."""
    app = make_app(kept, CORRECTIONS=str(corrections))
    with served(app) as port:
        yield f"http://127.0.0.1:{port}"


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
    """The form in a fresh page; a request elsewhere or an error on the console fails the test."""
    page = browser.new_page()
    complaints = []
    ours = (address, "blob:", "data:")
    page.on("request", lambda r: r.url.startswith(ours) or complaints.append(r.url))
    page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert [c for c in complaints if not any(code in c for code in ("415", "404"))] == []


def choose(page, *files):
    page.get_by_label("Scans").set_input_files(list(files))


def widths(page):
    """Natural widths of the pictures in the answer."""
    return page.eval_on_selector_all("article img", "all => all.map(image => image.naturalWidth)")


def test_a_visitor_uploads_a_scan_and_reads_the_answer(page):
    choose(page, picture("scan.png", encode(phantom(1, lesion=True))))
    assert page.locator("#previews img").count() == 1
    page.get_by_role("button", name="Analyze").click()
    page.wait_for_url("**/results/*")
    assert page.get_by_text("Probability of a tumor").is_visible()
    assert page.locator("meter").count() == 4
    assert set(widths(page)) == {256}
    page.get_by_text("Delete …").click()
    page.get_by_role("button", name="Delete this result now").click()
    assert page.get_by_text("The result was deleted.").is_visible()


def test_a_real_scan_gets_a_heatmap(page, real_scans):
    page.get_by_label("Scans").set_input_files(real_scans["glioma"][0])
    page.get_by_role("button", name="Analyze").click()
    page.wait_for_url("**/results/*")
    page.wait_for_load_state("networkidle")
    assert widths(page) == [512, 512]


def test_a_bad_file_brings_a_sentence_and_loses_nothing(page):
    """The sentence has the focus, the files stay chosen, and the next try works."""
    choose(page, picture("notes.png", b"I am a text file"), picture("more.png", b"So am I"))
    page.get_by_role("button", name="Analyze").click()
    page.get_by_text("notes.png is not a DICOM").wait_for()
    assert "notes.png" in page.evaluate("document.activeElement.textContent")
    assert page.evaluate("document.getElementById('file').files.length") == 2
    assert page.get_by_role("button", name="Analyze").is_enabled()


def test_an_empty_file_is_named_as_soon_as_it_is_chosen(page):
    choose(page, picture("void.png", b""))
    assert page.get_by_role("alert").inner_text() == "void.png is empty; choose the file again."


def test_files_can_be_dropped_on_the_form(page):
    page.evaluate("""() => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(9)], "dropped.png"));
        const drop = new DragEvent("drop", { dataTransfer: files, bubbles: true });
        document.getElementById("form").dispatchEvent(drop);
    }""")
    assert page.locator("#previews li").inner_text() == "dropped.png"
    assert page.evaluate("document.getElementById('file').files.length") == 1


def test_a_folder_can_be_chosen_and_what_is_no_scan_in_it_is_named(page, tmp_path):
    for name, data in (series(3) | {"notes.txt": b"text"}).items():
        (tmp_path / name).write_bytes(data)
    page.get_by_label("Or a folder").set_input_files(tmp_path)
    assert page.locator("#previews li").count() == 4
    page.get_by_role("button", name="Analyze").click()
    page.wait_for_url("**/results/*")
    page.get_by_text("Skipped: 1").click()
    assert page.get_by_text("notes.txt is not a DICOM").is_visible()


def test_too_large_a_folder_is_told_to_be_zipped(page):
    page.evaluate("document.getElementById('file').dataset.mostBytes = 2000000")
    choose(page, *[picture(f"{n}.dcm", bytes(1_000_000)) for n in range(4)])
    sentence = ("The files are 4 MB, more than the 2 MB allowed; "
                "zip the folder: DICOM files often become about 1 MB.")
    assert page.get_by_role("alert").inner_text() == sentence


def test_while_the_scan_is_read_the_page_says_so(page):
    """The button rests and the status is told to a screen reader until the answer is there."""
    page.route("**/upload", lambda route: None)  # no answer yet
    choose(page, picture("scan.png", encode(phantom(1))))
    page.get_by_role("button", name="Analyze").click()
    page.get_by_role("status").get_by_text("…").wait_for()
    assert page.get_by_role("button", name="Analyze").is_disabled()
    assert page.get_by_role("progressbar").is_visible()


@pytest.fixture
def viewer(page):
    """The viewer over a study of eight slices, with the focus, and its first slice shown."""
    answered(page, *[picture(name, data) for name, data in series(8).items()])
    found = page.locator("#viewer")
    found.press("Home")
    return found


def state(viewer):
    """(slice, count, overlay) as the viewer tells them."""
    return tuple(viewer.get_attribute(f"data-{name}") for name in ("slice", "count", "overlay"))


def shown(viewer):
    """The number of the scan whose picture is in the viewer."""
    return re.search(r"/(\d+)/scan.png", viewer.locator("img.scan").get_attribute("src"))[1]


def test_keys_move_through_the_slices(viewer):
    assert state(viewer)[:2] == ("0", "8")
    for key, at in (("ArrowRight", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("ArrowLeft", 0),
                    ("ArrowLeft", 0), ("PageDown", 7), ("PageUp", 0), ("End", 7), ("Home", 0)):
        viewer.press(key)
        assert (state(viewer)[0], shown(viewer)) == (str(at), str(at)), key


def test_the_wheel_and_the_slider_move_through_the_slices(page, viewer):
    viewer.locator(".stack").hover()
    top = page.evaluate("scrollY")
    for down, at in ((120, 1), (120, 2), (-120, 1)):
        page.mouse.wheel(0, down)
        page.wait_for_selector(f"#viewer[data-slice='{at}']")
    assert page.evaluate("scrollY") == top
    for _ in range(8):  # a touchpad
        page.mouse.wheel(0, 10)
    page.wait_for_selector("#viewer[data-slice='3']")
    viewer.locator("[name=slice]").fill("5")
    assert (shown(viewer), viewer.locator("output").inner_text()) == ("4", "5 of 8")


def test_the_space_bar_plays_the_slices(page, viewer):
    viewer.press(" ")
    page.wait_for_selector("#viewer[data-slice='2']")
    viewer.press(" ")
    assert viewer.locator("[name=play]").get_attribute("aria-pressed") == "false"


def test_h_and_a_button_switch_the_heat_and_a_slider_sets_its_strength(viewer):
    viewer.locator("[name=asked]").check()
    heat = viewer.locator("img.heat")
    viewer.locator("[name=strength]").fill("25")
    assert heat.evaluate("heat => getComputedStyle(heat).opacity") == "0.25"
    viewer.press("h")
    assert (state(viewer)[2], heat.count()) == ("off", 0)
    viewer.locator("[name=overlay]").click()
    assert (state(viewer)[2], heat.count()) == ("on", 1)


def test_no_tumor_has_no_heat_unless_asked_for(page, viewer):
    quiet = page.locator(".strip a.no_tumor")
    if not quiet.count():
        page.evaluate("document.querySelector('.strip a').setAttribute('class', 'no_tumor')")
    quiet.first.dispatch_event("click")
    assert viewer.locator("img.heat").count() == 0
    viewer.locator("[name=asked]").check()
    assert viewer.locator("img.heat").count() == 1


PLACED = "layers => new DOMMatrix(getComputedStyle(layers).transform)"
ZOOM = f"layers => ({PLACED})(layers).a"


def test_the_picture_zooms_pans_and_goes_back(page, viewer):
    layers, stack = viewer.locator(".layers"), viewer.locator(".stack")
    viewer.press("+")
    viewer.press("+")
    viewer.press("-")
    assert layers.evaluate(ZOOM) == pytest.approx(1.25)
    stack.hover()
    page.mouse.down()
    page.mouse.move(0, 0, steps=3)
    page.mouse.up()
    assert layers.evaluate(f"layers => ({PLACED})(layers).e") < 0
    stack.dblclick()
    assert layers.evaluate(f"layers => ({PLACED})(layers).isIdentity")


def test_two_fingers_pinch_the_picture(page, viewer):
    touch = page.context.new_cdp_session(page)
    touch.send("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})
    viewer.locator(".stack").scroll_into_view_if_needed()
    box = viewer.locator(".stack").bounding_box()
    x, y = (box[start] + box[length] / 2 for start, length in (("x", "width"), ("y", "height")))
    for kind, apart in ("touchStart", 40), ("touchMove", 60), ("touchMove", 80), ("touchEnd", None):
        fingers = [{"x": x + way * apart, "y": y + way * apart, "id": way + 1} for way in (-1, 1) if apart]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
    assert viewer.locator(".layers").evaluate(ZOOM) == pytest.approx(2, rel=0.05)
    assert page.evaluate("visualViewport.scale") == 1


def test_dragging_with_the_right_button_sets_the_grey_levels(page, viewer):
    viewer.locator(".stack").hover()
    page.mouse.down(button="right")
    box = viewer.locator(".stack").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2 - 40)
    page.mouse.up(button="right")
    greys = viewer.locator("img.scan").evaluate("image => image.style.filter")
    assert greys == "brightness(120%) contrast(120%)"


def test_the_strip_is_the_map(page, viewer):
    """Each bar is a link to its slice, the current one is marked; without script all are links."""
    bars = page.locator(".strip a")
    assert bars.count() == 8
    bars.nth(3).locator("rect, path").click()
    assert state(viewer)[0] == "3"
    marked = page.locator(".strip [aria-current=true]")
    assert marked.get_attribute("href") == bars.nth(3).get_attribute("href")
    assert page.locator(".about").text_content() == bars.nth(3).locator("title").text_content()


def test_each_series_has_its_strip_and_opens_from_the_list(page):
    files = series(5) | {f"b{name}": data for name, data in series(6, "1.2.3.2").items()}
    answered(page, *[picture(name, data) for name, data in files.items()])
    assert page.locator(".strip").count() == 2
    for n, count in ((0, "5"), (1, "6")):
        page.locator(".series a").nth(n).click()
        assert state(page.locator("#viewer"))[1] == count
        assert page.locator(".series [aria-current=true]").inner_text().startswith(f"Series {n + 1}")


def test_a_study_is_read_without_script(browser, address):
    """The three slices that carry the answer, and links to all."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    answered(page, *[picture(name, data) for name, data in series(8).items()])
    assert 1 <= page.locator(".trio img").count() <= 3
    page.get_by_text("All slices as a table").click()
    page.locator("a.file").first.click()
    page.wait_for_url("**/results/*/*")
    assert page.locator("article").count() == 1
    context.close()


def test_the_page_of_363_slices_weighs_less_than_200_kb(tmp_path):
    app = make_app(tmp_path)
    client = app.test_client()
    files = [(io.BytesIO(data), name) for name, data in series(8).items()]
    result = client.post("/upload", data={"file": files}).get_json()
    result["scans"] = [result["scans"][n % 8] for n in range(363)]
    (tmp_path / result["id"] / "result.json").write_text(json.dumps(result))
    for query in ("", "?page=8", "?order=slice&page=2"):
        shown = client.get(f"/results/{result['id']}{query}").text
        assert len(shown.encode()) < 200_000
        assert shown.count('class="file"') == (13 if query == "?page=8" else 50)


def test_everything_comes_as_one_zip(page, viewer):
    """Table, JSON, and the heatmap of each slice that is not answered "no tumor"."""
    with page.expect_download() as download:
        page.get_by_text("Everything as ZIP").click()
    names = zipfile.ZipFile(download.value.path()).namelist()
    warm = page.locator(".strip .tumor, .strip .uncertain").count()
    assert sorted(names)[-2:] == ["result.csv", "result.json"] and len(names) == 2 + warm


def test_a_running_study_counts_up_without_a_reload(page):
    files = {f"{n}.png": encode(phantom(n)) for n in range(24)}
    answered(page, picture("study.zip", zipped(**files)))
    page.wait_for_selector("#viewer", timeout=120_000)
    assert page.locator(".strip a").count() == 24


def test_an_example_is_one_click_and_the_browser_remembers_it(page, address):
    """In this browser alone, until it is told to forget."""
    page.get_by_role("link", name="a head with a bright spot").click()
    page.wait_for_url("**/results/*")
    title, url = page.locator("h1").inner_text(), page.url
    page.goto(address)
    remembered = page.locator("#last a")
    assert (remembered.inner_text(), remembered.evaluate("link => link.href")) == (title, url)
    page.get_by_role("button", name="Forget the list").click()
    page.reload()
    assert page.locator("#last").is_hidden()


def test_the_reader_has_the_last_word(page, corrections, address):
    """One row per picture, without its name, with the label given last; /model counts them."""
    answered(page, picture("JaneDoe.png", encode(phantom(77, lesion=True))))
    before = len(list(corrections.glob("*.png")))
    for label in ("meningioma", "pituitary tumor"):
        page.get_by_role("button", name=label).click()
        page.get_by_text(f"Kept as {label}.").wait_for()
    rows = (corrections / "manifest.csv").read_text().splitlines()
    assert rows[0] == "path,label,source,patient"
    assert len(rows) - 1 == len(list(corrections.glob("*.png"))) == before + 1
    name, label, source, _ = rows[-1].split(",")
    assert (label, source, (corrections / name).exists()) == ("pituitary", "corrections", True)
    assert "JaneDoe" not in "".join(rows)
    page.goto(f"{address}/model")
    assert page.get_by_text("Labels kept on this server: pituitary 1.").is_visible()


def test_what_was_chosen_is_counted_before_it_is_sent(page):
    choose(page, *[picture(f"{n}.png", bytes(3000)) for n in range(3)])
    assert page.get_by_role("button", name="Analyze 3 files").is_enabled()
    assert page.locator("#chosen").inner_text() == "3 files, 9 kB"


def tab_to(page, target):
    """Press Tab until a control has the focus; fails where that never comes."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if target.evaluate("target => target === document.activeElement"):
            return
    raise AssertionError(f"no Tab leads to {target}")


def test_the_whole_path_works_from_the_keyboard(page):
    """From the start to an answer, its heat, a label, the deletion and its confirmation."""
    for name in ("a head with a bright spot", "Heat map", "no tumor", "Delete …", "Delete this result now"):
        tab_to(page, page.locator("a, button, summary").filter(has_text=name).last)
        page.keyboard.press("Enter")
        if name != "Delete …":
            page.wait_for_load_state("networkidle")
        if name == "Heat map":
            assert page.locator("#viewer[data-overlay=off]").count() == 1
    page.get_by_text("The result was deleted.").wait_for()


def test_a_study_has_one_tab_stop_per_row(page, viewer):
    """And none for the bars of its strip, which the viewer's own keys move through."""
    page.get_by_text("All slices as a table").click()
    stops = "all => all.filter((each) => each.tabIndex >= 0).length"
    assert page.locator("tbody :is(a, button)").evaluate_all(stops) == page.locator("tbody tr").count() == 8
    assert page.locator(".strip a").evaluate_all(stops) == 0


def answered(page, *files):
    """Send files through the form, a phantom unless told, and wait for the answer."""
    choose(page, *(files or [picture("scan.png", encode(phantom(1, lesion=True)))]))
    page.get_by_role("button", name="Analyze").click()
    page.wait_for_url("**/results/*")
    page.wait_for_load_state("networkidle")


@pytest.mark.parametrize("files", [{"scan.png": encode(phantom(3, lesion=True, side=512))}, series(20)],
                         ids=["scan", "study"])
def test_a_result_prints_on_one_page(page, files):
    """On A4 and on Letter, with pictures, sections and caveats, and nothing to press."""
    answered(page, *[picture(name, data) for name, data in files.items()])
    page.wait_for_selector("#viewer")
    for paper in ("A4", "Letter"):
        printed = page.pdf(format=paper, print_background=True)
        assert len(re.findall(rb"/Type /Page\b", printed)) == 1
    page.emulate_media(media="print")
    for shown in ("h1", ".stack img", ".colours", "footer", ".answered", *[".trio", ".series", ".strip"] * (len(files) > 1)):
        assert page.locator(shown).first.is_visible(), shown
    pressed = page.locator("button, input, summary, header nav, .actions, .links a")
    assert not any(each.is_visible() for each in pressed.all())


def unfolded(page, url):
    """Open a page and all that is folded away on it."""
    page.goto(url)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")


def states(page, address, kept):
    """Bring the page into every state, one after the other, all unfolded; yields their names."""
    for path in ("/", "/?deleted=1", "/model", "/nowhere"):
        unfolded(page, address + path)
        yield path
    page.goto(address)
    choose(page, picture("notes.png", b"text"))
    page.get_by_role("button", name="Analyze").click()
    page.get_by_text("notes.png is not").wait_for()
    yield "a bad file"
    noise = encode(static(np.random.default_rng(0)))
    uploads = {"scan": {"scan.png": encode(phantom(1, lesion=True))}, "rejected": {"noise.png": noise},
               "pictures": {f"{n}.png": encode(phantom(n)) for n in range(3)}, "series": series(8)}
    for name, files in uploads.items():
        page.goto(address)
        answered(page, *[picture(file, data) for file, data in files.items()])
        path = kept / page.url.split("/")[-1] / "result.json"
        found = json.loads(path.read_text())
        for change in ({}, *{"scan": [{"verdict": "uncertain"}, {"verdict": "no_tumor"}],
                             "series": [{"status": "running"}, {"status": "failed", "error": "Sent again."}]}.get(name, [])):
            changed = found | change | {"scans": [scan | change for scan in found["scans"]]}
            path.write_text(json.dumps(changed))
            unfolded(page, f"{page.url.partition('?')[0]}?kept=glioma")
            yield f"{name} {change}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_a_fault_that_axe_finds(page, address, kept, scheme):
    """WCAG A and AA, contrast included, in every state of every page."""
    page.emulate_media(color_scheme=scheme)
    for state in states(page, address, kept):
        faults = [violation["id"] for violation in Axe().run(page).response["violations"]]
        assert faults == [], state


TOUCHED = """() => [...document.querySelectorAll("a, button, input, select, summary")]
    .filter((each) => !each.closest("svg") && each.matches(":not(.skip)") && each.getClientRects().length)
    .filter((each) => ["width", "height"].some((side) => each.getBoundingClientRect()[side] < 24))
    .map((each) => each.outerHTML)"""


def test_every_target_of_a_finger_has_24_pixels_on_a_phone(page, address, kept):
    page.set_viewport_size({"width": 390, "height": 844})
    for state in states(page, address, kept):
        assert page.evaluate(TOUCHED) == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, state
    page.goto(f"{address}/model")
    assert page.evaluate("document.documentElement.scrollHeight") < 4000


def test_nothing_jumps_while_the_answer_loads(page):
    answered(page)
    shifts = page.evaluate("""() => new Promise((done) => {
        const shifts = [];
        const look = (list) => shifts.push(...list.getEntries().map((entry) => entry.value));
        new PerformanceObserver(look).observe({ type: "layout-shift", buffered: true });
        setTimeout(() => done(shifts), 300);
    })""")
    assert sum(shifts) < 0.01


def test_too_many_files_are_refused_before_they_are_sent(page, address):
    choose(page, *[picture(f"{n}.png", b"x") for n in range(1001)])
    assert "at most 1000" in page.get_by_role("alert").inner_text()
    assert page.url == f"{address}/"


def test_the_form_works_without_script(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    choose(page, picture("scan.png", encode(phantom(2))))
    page.get_by_role("button", name="Analyze").click()
    page.wait_for_url("**/results/*")
    assert page.locator("article").count() == 1
    context.close()


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_no_page_is_wider_than_the_screen(page, address, width):
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/model", "/"):
        unfolded(page, address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    choose(page, picture(f"{'long' * 25}.png", encode(phantom(3))))
    page.get_by_role("button", name="Analyze").click()
    page.wait_for_url("**/results/*")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

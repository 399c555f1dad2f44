"""What the pages and the API promise, to people, programs and strangers."""

import csv
import errno
import html
import io
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.error
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import benchmark
import load
import numpy as np
import phantoms
import pytest
from flask import abort
from phantoms import NOT_READ, ROOT, encode, make_app, phantom, post, until, zipped
from PIL import Image

import app as web

SCAN = encode(phantom(1, lesion=True), "JPEG")
@pytest.fixture
def result(send):
    """The JSON of one scan sent to the API."""
    return send((SCAN, "scan.jpg")).get_json()


@pytest.fixture
def folder(app, result):
    """Where the result of one scan is kept."""
    return app.uploads / result["id"]


def picture_at(client, url):
    """The picture at a URL, its file closed again."""
    with client.get(url) as response:
        return Image.open(io.BytesIO(response.data))


# Answers


def test_upload_answers_what_the_readme_shows(result):
    """Its JSON has the keys of a real answer, in their order, and the numbers agree."""
    example = re.search(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    example, (scan,) = json.loads(example), result["scans"]
    assert list(example) == list(result) and list(example["model"]) == list(result["model"])
    assert list(example["scans"][0]) == list(scan)
    assert list(example["scans"][0]["checks"][0]) == list(scan["checks"][0])
    assert (result["status"], result["progress"], len(result["id"])) == ("done", 1.0, 22)
    assert (scan["file"], scan["slice"], scan["warnings"]) == ("scan.jpg", 0, [])
    p = scan["probabilities"]
    assert sum(p.values()) == pytest.approx(1, abs=1e-3)
    assert scan["tumor_probability"] == pytest.approx(1 - p["no_tumor"], abs=1e-3)
    assert result["model"]["labels"] == list(p)
    assert (result["model"]["engine"], len(result["model"]["sha256"])) == ("litert-int8", 64)


def test_the_result_stays_at_its_urls(client, app, folder, result):
    url = f"/results/{result['id']}"
    assert client.get(f"{url}.json").get_json() == result
    assert json.loads((folder / "result.json").read_text()) == result
    (row,) = csv.DictReader(io.StringIO(client.get(f"{url}.csv").text))
    assert row["verdict"] == result["scans"][0]["verdict"]
    assert float(row["no_tumor"]) == result["scans"][0]["probabilities"]["no_tumor"]


def test_the_pictures_are_the_scan_grey_for_grey_and_the_heat_over_it(client, send, monkeypatch):
    pixels = phantom(5, lesion=True)
    (scan,) = send((encode(pixels), "scan.png")).get_json()["scans"]
    monkeypatch.setattr("app.head_box", lambda pixels: 1 / 0)  # kept with the answer
    plain, hot = (picture_at(client, scan[key]) for key in ("scan", "heatmap"))
    assert (np.asarray(plain.convert("RGB")) == pixels[..., None]).all()
    assert (hot.size, hot.mode) == ((256, 256), "RGB")
    assert np.ptp(np.asarray(hot).astype(int), axis=2).max() > 50


def test_heat_lies_over_the_spot_that_was_hot():
    """A lesion's place in the prepared picture and in the scan are the same place of the head."""
    pixels = np.zeros((300, 400), np.uint8)
    pixels[100:220, 80:180] = 90
    pixels[120:136, 150:166] = 255
    prepared = web.prepare(pixels)[..., 0]
    heat = prepared.reshape(14, 16, 14, 16).mean((1, 3)).astype(np.float32) - 130
    y, x = np.unravel_index(web.heat_levels(pixels, heat).argmax(), pixels.shape)
    assert abs(y - 128) < 12 and abs(x - 158) < 12


def test_the_form_leads_to_a_page_with_the_answer(client, send, card):
    response = send((SCAN, "scan.jpg"), to="/")
    assert response.status_code == 303
    page = client.get(response.location).text
    for text in ("Probability of a tumor", "risk <strong>", "heatmap.png", "scan.jpg",
                 "256 x 256 pixels", "none seen beside the head", "The head: columns",
                 'class="marker"', *(label.replace("_", " ") for label in card["labels"])):
        assert text in page


def test_the_page_says_what_an_answer_is_worth_where_tumors_are_rare(app, client, send, result):
    """Of 1,000 people 10 have a tumor; figures of the right group, of enough persons, or none."""
    study = send(*[(data, name) for name, data in phantoms.series(16).items()]).get_json()
    wrong = {"tumors answered “no tumor”": {"value": 0.04},
             "normals answered “tumor”": {"value": 0.1}, "healthy answered “tumor”": {"value": 0}}
    few, many = ({"Whole volumes": wrong | {"persons": persons}} for persons in (7, 70))
    for sent, verdict, measured, sentence in (
        (result, "tumor", {"Other hospitals": wrong}, "more than 9 found, 99 false alarms"),
        (result, "no_tumor", {"Other hospitals": wrong}, "said of fewer than 1 of the 10. Measured in"),
        (result, "tumor", {}, None), (study, "tumor", {"Other hospitals": wrong}, None),
        (study, "tumor", few, "Measured on whole volumes of 7 persons only, too few to say"),
        (study, "tumor", many, "more than 9 found, fewer than 1 false alarms"),
    ):
        (sent["study"] or sent["scans"][0])["verdict"] = verdict
        (app.uploads / sent["id"] / "result.json").write_text(json.dumps(sent))
        app.classifier.card = app.classifier.card | {"figures": measured}
        page = client.get(f"/results/{sent['id']}").text
        assert sentence in page if sentence else "Measured" not in page


def test_many_scans_are_a_table_with_the_most_suspicious_first(client, send):
    """Each of them has its page and its thumbnail."""
    files = [(encode(phantom(n, lesion=n == 2)), f"slice_{n}.png") for n in range(4)]
    files.append((encode(np.zeros((64, 64), np.uint8)), "blank.png"))
    result = send(*files).get_json()
    url = f"/results/{result['id']}"
    page, last = client.get(url).text, client.get(f"{url}/4").text
    shown = re.findall(r'class="file"[^>]*>([^<]+)<', page)
    p = {scan["file"]: scan["tumor_probability"] for scan in result["scans"]}
    assert list(p) == [name for _, name in files] and page.count("<rect") == 4
    assert sorted(shown) == sorted(p) and shown[-1] == "blank.png"
    assert [p[name] for name in shown[:-1]] == sorted(filter(None, p.values()), reverse=True)
    warned = Counter(warning for scan in result["scans"] for warning in scan["warnings"])
    assert warned and all(f"{text} ({count} of 5 scans)" in page for text, count in warned.items())
    assert "blank.png" in last and 'rel="prev"' in last and 'rel="next"' not in last
    assert picture_at(client, f"{url}/1/thumbnail.png").size == (96, 96)
    assert client.get(f"{url}/5").status_code == 404


def test_what_is_no_scan_is_skipped_and_named_everywhere(client, send):
    """On the page of one scan as on that of many, in JSON and in CSV."""
    for others in ([], [(encode(phantom(2)), "b.png")]):
        result = send((SCAN, "a.jpg"), (b"text", "=notes.txt"), *others).get_json()
        sentence = f"=notes.txt {NOT_READ}"
        place = {"series": None, "slice": None}
        assert result["skipped"] == [{"file": "=notes.txt", "reason": sentence} | place]
        url = f"/results/{result['id']}"
        assert f"Skipped: 1</summary>\n  <ul><li>=notes.txt: {sentence}" in client.get(url).text
        row = list(csv.DictReader(io.StringIO(client.get(f"{url}.csv").text)))[-1]
        assert (row["file"], row["verdict"], row["reason"]) == (
            "'=notes.txt", "skipped", f"'{sentence}")


@pytest.mark.parametrize("p, place", [(0, 0), (0.1, 1 / 3), (0.5, 0.5), (0.9, 2 / 3), (1, 1)])
def test_the_risk_scale_has_three_equal_parts(app, p, place):
    scale = app.jinja_env.get_template("macros.html").module.scale
    assert f"translate({4 + 292 * place:.1f} 12)" in scale(p, "low", {"low": 0.1, "high": 0.9})


def test_a_rejected_picture_shows_a_reason_and_no_number(client, send):
    photo = np.zeros((256, 256, 3), np.uint8)
    photo[..., 0] = np.arange(256)
    result = send((encode(photo), "cat.png")).get_json()
    (scan,) = result["scans"]
    assert scan["verdict"] == "rejected" and scan["reason"]
    numbers = ("label", "risk", "tumor_probability", "probabilities", "heatmap")
    assert [scan[key] for key in numbers] == [None] * 5
    page = client.get(f"/results/{result['id']}").text
    assert "Not classified" in page and "Probability of a tumor" not in page


FIRST = {"Other hospitals": (
    "AUROC, tumor against none", "tumors answered “no tumor”", "normals answered “tumor”",
    "answered “uncertain”"), "Known collections": ("balanced accuracy",)}


def test_the_model_page_begins_with_what_matters(client, card):
    """Five figures with their intervals, then the limits; all else is folded away."""
    first = html.unescape(client.get("/model").text).partition("<details>")[0]
    for title, names in FIRST.items():
        for name in names:
            shown = rf"{name}</td><td>{{value:.3f}}.*{{interval[1]:.3f}}\)"
            assert re.search(shown.format(**card["figures"][title][name]), first)
    assert all(limit in first for limit in card["limits"])


def test_the_model_page_has_every_figure_of_the_card(client, card):
    page = client.get("/model").text
    for figure in (figure for table in card["figures"].values() for figure in table.values()):
        value = figure["value"] if isinstance(figure, dict) else figure
        assert f">{value}</td>" in page or f">{value:.3f}" in page


def test_every_plot_has_numbers_on_both_axes(client):
    plots = re.findall(r'<svg class="plot.*?</svg>', client.get("/model").text, re.S)
    assert len(plots) == 4
    for plot in plots:
        ticks = re.findall(r'<text (class="up")?[^>]*>[\d.]+</text>', plot)
        assert ticks.count("") >= 2 and ticks.count('class="up"') >= 2


def test_a_model_that_has_seen_every_collection_says_so(app, client):
    figures = app.classifier.card["figures"]
    known = {title: table for title, table in figures.items() if "hospital" not in title}
    app.classifier.card = app.classifier.card | {"figures": known}
    page = client.get("/model").text
    assert "nothing is known about how the model does at another hospital" in page


def test_the_parts_of_a_figure_and_the_families_left_out_are_its_rows():
    own, part = {"refused": 0.1}, {"refused": 0.3, "new": 0.2}
    families = "One family left out, head"
    left_out = {"brats, AUROC": 0.9, "oasis, AUROC": 0.8}
    assert web.figure_groups({"Gate": own, families: left_out, "Gate, CT": part}) == [
        ("Gate", own, {"CT": part}, ["refused", "new"]),
        (families, {}, {"brats": {"AUROC": 0.9}, "oasis": {"AUROC": 0.8}}, ["AUROC"])]


@pytest.mark.parametrize("name, verdict", [("phantom", "no_tumor"), ("phantom_with_spot", "tumor")])
def test_the_examples_are_drawn_and_get_the_answers_that_they_promise(classifier, name, verdict):
    """They are what this repository draws, but for the JPEG, and the shipped gate lets them in."""
    (scan,) = web.read_scans((ROOT / "static" / f"{name}.jpg").read_bytes(), name)
    difference = scan.pixels.astype(int) - phantoms.drawn_head(15, verdict == "tumor")
    assert np.abs(difference).mean() < 2
    (finding,) = classifier.classify([scan])
    assert (finding.verdict, finding.warnings) == (verdict, ())


def test_a_page_without_pictures_weighs_less_than_60_kb(client, result):
    names = ("style.css", "app.js", "icon.svg")
    shared = sum((ROOT / "static" / name).stat().st_size for name in names)
    for path in ("/", "/model", f"/results/{result['id']}"):
        assert shared + len(client.get(path).data) < 60_000


# Errors, as pages and as JSON; their sentences are in test_sentences.py


@pytest.mark.parametrize("code", [400, 404, 413, 415, 500, 503])
def test_every_error_is_a_page_with_one_sentence_and_a_way_on(app, code):
    app.testing = False
    app.add_url_rule("/fails", view_func=lambda: abort(code, "One sentence."))
    page = app.test_client().get("/fails").text
    assert f"Error {code}" in page and "Read another scan" in page and page.count("<h1>") == 1


@pytest.mark.parametrize("path", [
    "/nowhere", "/results/short", f"/results/{'x' * 22}", f"/results/{'x' * 22}.csv",
    f"/results/{'x' * 22}/0/scan.png", f"/results/{'x' * 22}/0/other.png",
    "/results/..%2f..%2fapp.py", "/results/../app.py", "/results/%2e%2e/app.py",
    "/static/..%2fapp.py", "/results/.hiddenhiddenhiddenhid", f"/results/{'a' * 22}/../../x",
    f"/results/{'a' * 22}/-1/scan.png", f"/results/{'a' * 22}/99999999999999999999/scan.png",
    "/results/%00" + "a" * 21,
])
def test_what_is_not_there_is_a_404_page(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert "Read another scan" in response.text and "Traceback" not in response.text


def test_errors_for_programs_are_json_and_name_the_right_method(client):
    missing, wrong = client.get(f"/results/{'x' * 22}.json"), client.get("/upload")
    sentence = "This result does not exist or has been removed."
    assert (missing.status_code, missing.get_json()) == (404, {"error": sentence})
    assert (wrong.status_code, list(wrong.get_json())) == (405, ["error"])
    assert "POST" in wrong.headers["Allow"]


# Settings and health


def test_health_names_the_model_while_uploads_can_be_kept(client, app):
    assert client.get("/healthz").get_json() == {"status": "ok", "model": app.classifier.sha256}
    app.uploads.rmdir()
    assert client.get("/healthz").status_code == 503


def test_settings_come_from_the_environment_and_have_a_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASK_MAX_FILES", "3")
    monkeypatch.setenv("FLASK_UPLOADS", str(tmp_path / "here"))
    config = web.create_app().config
    assert (config["MAX_FILES"], config["UPLOADS"]) == (3, str(tmp_path / "here"))


# Names


@pytest.mark.parametrize("name, kept", [
    ("../../etc/passwd", "passwd"), ("..\\..\\boot.ini", "boot.ini"), ("/etc/passwd", "passwd"),
    (r"C:\patients\Doe.png", "Doe.png"), ("a/../b.png", "b.png"), ("con\x00.png", "con.png"),
    ("line\r\nSet-Cookie: a=b.png", "lineSet-Cookie: a=b.png"), ("\u202egnp.exe", "gnp.exe"),
    ("<img src=x onerror=alert(1)>.png", "<img src=x onerror=alert(1)>.png"),
    ("=HYPERLINK(1).png", "=HYPERLINK(1).png"), ("a" * 5000, "a" * 100), ("", "The file"),
    (" ", " "), ("\ud800.png", ".png"), ("d\xe9.png", "d\xe9.png"),
    ("слайд.png", "слайд.png"), ("caf\udce9.png", "caf.png"), ("\udcff\udcfe.dcm", ".dcm"),
])
def test_a_name_is_never_a_path_nor_markup_nor_a_header_nor_a_formula(send, client, name, kept):
    assert web.read_scans(SCAN, name)[0].file == kept and kept.encode()
    assert all(unicodedata.category(c)[0] != "C" for c in kept)
    response = send((SCAN, name.encode("utf-8", "replace").decode().strip() or "scan"))
    if response.status_code == 200:  # a line break in it ends the header, and so the upload
        url = f"/results/{response.get_json()['id']}"
        assert "<img src=x" not in client.get(url).text
        table = client.get(f"{url}.csv")
        assert "Set-Cookie" not in table.headers
        (row,) = csv.DictReader(io.StringIO(table.text))
        assert not row["file"].startswith("=")


def test_a_name_that_is_not_utf_8_is_read_all_the_same(client):
    body = (b'--x\r\nContent-Disposition: form-data; name="file"; filename="d\xe9j\xe0.jpg"\r\n'
            b"Content-Type: image/jpeg\r\n\r\n" + SCAN + b"\r\n--x--\r\n")
    response = client.post("/upload", data=body, content_type="multipart/form-data; boundary=x")
    assert response.get_json()["scans"][0]["file"] == "d\ufffdj\ufffd.jpg"


@pytest.mark.parametrize("text, written", [
    ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("\t=1", "'\t=1"),
    ("a=b", "a=b"), (-1.5, "-1.5"), (None, ""),
])
def test_no_text_in_any_csv_is_a_formula(text, written):
    file = io.StringIO()
    web.write_csv(file, ["anything"], [{"anything": text}])
    assert list(csv.reader(io.StringIO(file.getvalue())))[1:] == [[written]]


def test_names_can_be_left_out(tmp_path, client):
    """Of scans, of what was skipped and of the sentence about it; the start page says which."""
    assert "The file names are kept with the result" in client.get("/").text
    app = make_app(tmp_path, KEEP_NAMES=0)
    files = {"Doe_Jane.png": SCAN, "Doe_Jane_notes.nii.gz": b"text", "Doe/Doe.Jane": SCAN}
    result = post(app, (zipped(**files), "Doe.zip")).get_json()
    assert {scan["file"] for scan in result["scans"]} == {"scan 1.png", "scan 2"}
    assert [item["file"] for item in result["skipped"]] == ["scan 3.nii.gz"]
    assert "Doe" not in json.dumps(result)
    assert "Doe" not in "".join(path.read_text() for path in tmp_path.rglob("result.json"))
    assert "File names are replaced by numbers" in app.test_client().get("/").text


def test_the_log_holds_no_name_of_a_file(app, send, caplog, monkeypatch):
    caplog.set_level(0)
    monkeypatch.setattr("app.AUDIT.propagate", True)
    send((SCAN, "doe_jane.png"))
    send((b"junk", "doe_jane.txt"))
    send((zipped(**phantoms.series(3)), "doe_jane.zip"))
    assert "doe_jane" not in caplog.text


# Headers and other sites


@pytest.mark.parametrize("host, allowed", [("a", True), ("b", True), ("evil", None)])
def test_cors_is_open_for_the_origins_set(tmp_path, host, allowed):
    origin = f"https://{host}.example"
    app = make_app(tmp_path, CORS_ORIGINS="https://a.example, https://b.example")
    response = post(app, SCAN, headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})
    assert response.headers.get("Access-Control-Allow-Origin") == (allowed and origin)
    assert response.status_code == (200 if allowed else 403)


def test_every_answer_carries_the_headers_of_a_careful_server(client, result):
    for path in ("/", "/model", f"/results/{result['id']}", "/nowhere", "/static/app.js"):
        with client.get(path) as response:
            headers = response.headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'") and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
        assert path.startswith("/static") or headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("headers, status", [
    ({}, 303), ({"Sec-Fetch-Site": "same-origin"}, 303), ({"Origin": "http://localhost"}, 303),
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
])
def test_forms_of_other_sites_are_refused(client, send, result, headers, status):
    assert send(SCAN, to="/", headers=headers).status_code == status
    deleted = client.post(f"/results/{result['id']}/delete", headers=headers)
    assert deleted.status_code == status


# What is kept, and how long


def test_nothing_of_the_file_itself_is_kept(app, send):
    """No metadata, no name on disk but inside the answer, and the name without its path."""
    exif = Image.Exif()
    exif[0x010E] = "DOE^JOHN 1950-01-01"
    data = encode(phantom(), "JPEG", exif=exif)
    result = send((data, "/home/doe/scan.jpg")).get_json()
    inside = app.uploads.rglob("*")
    stored = [path for path in inside if path.is_file()]
    assert sorted(path.name for path in stored) == ["heat.f32", "result.json", "scan.png"]
    assert not any(b"DOE^JOHN" in path.read_bytes() for path in stored)
    assert result["scans"][0]["file"] == "scan.jpg"


def test_ids_cannot_be_guessed(send):
    ids = {send(SCAN).get_json()["id"] for _ in range(5)}
    assert len(ids) == 5 and all(web.ID.fullmatch(each) for each in ids)


def test_delete_removes_the_upload_at_once(client, result, uploads):
    response = client.post(f"/results/{result['id']}/delete")
    assert (response.status_code, response.location, uploads()) == (303, "/?deleted=1", [])
    assert client.get(f"/results/{result['id']}").status_code == 404


@pytest.mark.parametrize("hours", [-25, 25])
def test_what_is_old_is_neither_served_nor_kept(client, folder, hours):
    """Nor what a clock that jumps has dated into the future; a folder of others stays."""
    (folder.parent / "thesis").mkdir()
    os.utime(folder.parent / "thesis", (0, 0))
    os.utime(folder, (time.time() - hours * 3600,) * 2)
    assert client.get(f"/results/{folder.name}").status_code == 404
    make_app(folder.parent)  # sweeps at its start
    assert [path.name for path in folder.parent.iterdir()] == ["thesis"]


def test_results_are_removed_without_a_visitor(tmp_path):
    """In a few seconds where the retention is short."""
    app = make_app(tmp_path / "uploads", RETENTION_HOURS=1 / 3600)
    post(app, SCAN)
    folder = app.uploads
    assert list(folder.iterdir())
    until(lambda: not list(folder.iterdir()))


def test_two_servers_on_one_folder_see_each_others_results(tmp_path):
    first, second = (make_app(tmp_path) for _ in range(2))
    result = post(first, SCAN).get_json()
    assert second.test_client().get(f"/results/{result['id']}.json").get_json() == result
    sweeping = [threading.Thread(target=web.sweep, args=(tmp_path, 0)) for _ in range(4)]
    for thread in sweeping:
        thread.start()
    for thread in sweeping:
        thread.join()
    assert not list(tmp_path.iterdir())


# Faults


@pytest.mark.parametrize("at, number", [
    ("png_of", errno.ENOSPC), ("write_result", errno.ENOSPC), ("pathlib.Path.mkdir", errno.EROFS),
])
def test_a_failed_write_leaves_nothing_and_the_next_upload_works(
    app, send, uploads, monkeypatch, at, number
):
    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(f"app.{at}", full)
        response = send((SCAN, "scan.jpg"))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "60")
    sentence = "The server cannot keep results at the moment; try again later."
    assert response.get_json() == {"error": sentence}
    assert uploads() == []
    shutil.rmtree(app.config["UPLOADS"])  # it is made again
    assert send((SCAN, "scan.jpg")).status_code == 200


@pytest.mark.parametrize("at", ["keep_scan", "write_result"])
def test_an_upload_that_was_killed_midway_is_never_served(app, client, send, monkeypatch, at):
    """As if the power went: nothing tidies up, and no half result answers."""
    monkeypatch.setattr(f"app.{at}", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("app.shutil.rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        send((SCAN, "a.png"))
    (half,) = app.uploads.iterdir()
    assert client.get(f"/results/{half.name}").status_code == 404
    monkeypatch.undo()
    os.utime(half, (0, 0))
    web.sweep(app.uploads, 24)
    assert not half.exists()


def test_a_scan_is_there_only_once_it_is_whole(app, send, monkeypatch):
    """Who asks for a picture that is being kept meets no half of it, which would be damage."""
    seen, write = [], web.pathlib.Path.write_bytes
    look = lambda path, data: seen.append(path.parent.name) or write(path, data)  # noqa: E731
    monkeypatch.setattr("app.pathlib.Path.write_bytes", look)
    send(SCAN)
    assert seen == [".0", ".0"] and len([*app.uploads.glob("*/0/*")]) == 2


# Many at once


@pytest.mark.parametrize("uploads_of", [[1, 1], [3]])
def test_scans_are_counted_not_uploads_and_a_full_server_refuses_at_once(
    app, monkeypatch, uploads_of
):
    """An upload of three scans is taken while there is a place; the next one is not."""
    go, infer = threading.Event(), app.classifier.infer
    monkeypatch.setattr(app.classifier, "infer", lambda scans: go.wait(30) and infer(scans))
    app.jobs.most = 2
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, app, *[SCAN] * count) for count in uploads_of]
        until(lambda: app.jobs.count == sum(uploads_of))
        start = time.monotonic()
        refused = post(app, SCAN)
        assert time.monotonic() - start < 1
        go.set()
        assert {answer.result().status_code for answer in waiting} == {200}
    assert (refused.status_code, int(refused.headers["Retry-After"]) >= 1) == (503, True)
    sentence = "The server is busy with other scans; try again in a few seconds."
    assert refused.get_json()["error"] == sentence
    assert (post(app, SCAN).status_code, app.jobs.count) == (200, 0)
    assert (post(app, b"I am a text file").status_code, app.jobs.count) == (415, 0)


def test_a_slow_client_holds_nobody_up(tmp_path):
    """With a single place, a scan is answered while another visitor's upload drips in."""
    app = make_app(tmp_path, MAX_WAITING=1)
    with phantoms.served(app) as port, socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n"
                     b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
        time.sleep(0.3)
        assert post(app, SCAN).status_code == 200


COUNTED = """
import os, sys
sys.path.insert(0, {root!r})
import app
class Counted(app.Classifier):
    def __init__(self, *args):
        print(os.getpid(), file=open({log!r}, "a"))
        super().__init__(*args)
app.Classifier = Counted
application = app.create_app({{"UPLOADS": {uploads!r}}})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="gunicorn runs on Unix")
def test_under_gunicorn_each_worker_loads_once_and_never_tensorflow(tmp_path):
    log, port = tmp_path / "loads", phantoms.free_port()
    paths = {"root": str(ROOT), "log": str(log), "uploads": str(tmp_path / "uploads")}
    (tmp_path / "counted.py").write_text(COUNTED.format(**paths))
    command = f"-m gunicorn --workers 2 --threads 8 --bind 127.0.0.1:{port} counted".split()
    process = subprocess.Popen([sys.executable, *command], cwd=tmp_path, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        send = phantoms.sender(f"http://127.0.0.1:{port}/upload", SCAN)
        until(lambda: log.exists() and len(log.read_text().split()) == 2, 60)
        until(lambda: answered(send), 60)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: send(), range(24)))
        loads = log.read_text().split()
        assert len(answers) == 24 and len(loads) == len(set(loads)) == 2
        maps = pathlib.Path(f"/proc/{loads[0]}/maps")
        assert not maps.exists() or "tensorflow" not in maps.read_text()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def answered(send):
    """Whether a server is there and answers."""
    try:
        return bool(send())
    except urllib.error.URLError:
        return False


def test_the_benchmark_prints_every_figure(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASK_MAX_AT_ONCE", "1")  # of the server it starts: two scans are a study
    small = {"--rounds": 1, "--scans": 2, "--slices": 2, "--seconds": 1, "--idle": 20}
    settings = [str(part) for pair in small.items() for part in pair]
    benchmark.main(["--only", "parts", "load", "archive", *settings])
    printed = capsys.readouterr().out
    lines = ("start to first answer, one upload, x the bare interpreter, read and check, "
             "prepare, network and verdict, store, heatmap, memory, a study of   2, 8 clients, "
             "32 clients, 99 % within, 20 idle and 2 slow, spoilt, kill -9, a disk of 4 MB, "
             "1 workers of, 2 workers of")
    for line in lines.split(", "):
        assert line in printed
    tried = re.findall(r"^\| \d+ clients.* \| (\d+) \|$", printed, re.M)
    assert " times 200" in printed and tried == ["0"] * 6  # nothing that was answered is gone
    command = load.GUNICORN.removeprefix("-m ").partition(" --bind")[0]
    assert f"{command} 'app:create_app()'" in (ROOT / "README.md").read_text()

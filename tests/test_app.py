"""What the pages and the API promise, through Flask's test client."""

import csv
import html
import io
import json
import os
import pathlib
import re
import time

import numpy as np
import pytest
from conftest import ROOT, encode, make_app, phantom
from flask import abort
from PIL import Image

from app import create_app, on_scale

SCAN = encode(phantom(1, lesion=True), "JPEG")


@pytest.fixture
def result(send):
    """The JSON of one scan sent to the API."""
    return send((SCAN, "scan.jpg")).get_json()


def test_upload_answers_with_the_keys_that_programs_rely_on(result):
    assert set(result) >= {"id", "created", "status", "progress", "scans", "model"}
    assert (result["status"], result["progress"], len(result["id"])) == ("done", 1.0, 22)
    (scan,) = result["scans"]
    assert set(scan) >= {"file", "slice", "verdict", "label", "risk", "tumor_probability", "probabilities",
                         "warnings", "scan", "heatmap"}  # fmt: skip
    assert (scan["file"], scan["slice"], scan["warnings"]) == ("scan.jpg", 0, [])
    assert sum(scan["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert scan["tumor_probability"] == pytest.approx(1 - scan["probabilities"]["no_tumor"], abs=1e-3)
    assert result["model"]["labels"] == list(scan["probabilities"])
    assert (result["model"]["engine"], len(result["model"]["sha256"])) == ("litert-int8", 64)


def test_the_result_stays_at_its_addresses(client, result):
    address = f"/results/{result['id']}"
    assert client.get(f"{address}.json").get_json() == result
    assert client.get(address).status_code == 200
    (row,) = csv.DictReader(io.StringIO(client.get(f"{address}.csv").text))
    assert row["verdict"] == result["scans"][0]["verdict"]
    assert float(row["no_tumor"]) == result["scans"][0]["probabilities"]["no_tumor"]


def picture_at(client, address):
    """The picture at an address, its file closed again."""
    with client.get(address) as response:
        return Image.open(io.BytesIO(response.data))


def test_the_pictures_are_the_scan_and_the_heat_over_it(client, result):
    (scan,) = result["scans"]
    plain, hot = (picture_at(client, scan[key]) for key in ("scan", "heatmap"))
    assert (plain.size, hot.size, hot.mode) == ((256, 256), (256, 256), "RGB")
    assert not np.ptp(np.asarray(plain.convert("RGB")), axis=2).any()
    assert np.ptp(np.asarray(hot).astype(int), axis=2).max() > 50


def test_the_form_leads_to_a_page_with_the_answer(client, send):
    response = send((SCAN, "scan.jpg"), to="/")
    assert response.status_code == 303
    page = client.get(response.location).text
    for text in ("Probability of a tumor", "risk <strong>", "heatmap.png", "scan.jpg", "meningioma",
                 "256 x 256 pixels", "none seen beside the head", "The head: columns", "class=\"marker\""):
        assert text in page


def test_the_page_says_what_an_answer_is_worth_where_tumors_are_rare(client, result, card):
    """Worked out by hand: of 1,000 people 10 have a tumor; 5 % of the other 990 are alarmed for nothing."""
    found = 10 * card["figures"]["Tumor against none"]["sensitivity at 95 % specificity"]["value"]
    page = client.get(f"/results/{result['id']}").text
    assert f"would find {found:.1f} and alarm 50 for nothing" in page
    assert f"{100 * found / (found + 49.5):.1f} % of its alarms would be right" in page


def test_many_scans_are_a_table_with_the_most_suspicious_first(client, send):
    files = [(encode(phantom(seed, lesion=seed == 2)), f"slice_{seed}.png") for seed in range(4)]
    result = send(*files, (encode(np.zeros((64, 64), np.uint8)), "blank.png")).get_json()
    page = client.get(f"/results/{result['id']}").text
    shown = re.findall(r'class="file"[^>]*>([^<]+)<', page)
    probabilities = {scan["file"]: scan["tumor_probability"] for scan in result["scans"]}
    assert sorted(shown) == sorted(probabilities) and shown[-1] == "blank.png"
    assert [probabilities[name] for name in shown[:-1]] == sorted(filter(None, probabilities.values()), reverse=True)
    assert page.count("<rect") == 4


def test_each_of_many_scans_has_its_page_and_thumbnail(client, send):
    result = send((SCAN, "a.jpg"), (encode(phantom(2)), "b.png")).get_json()
    page = client.get(f"/results/{result['id']}/1").text
    assert "b.png" in page and 'rel="prev"' in page and 'rel="next"' not in page
    assert picture_at(client, f"/results/{result['id']}/1/thumbnail.png").size == (96, 96)
    assert client.get(f"/results/{result['id']}/2").status_code == 404


@pytest.mark.parametrize("p, place", [(0, 0), (0.1, 1 / 3), (0.5, 0.5), (0.9, 2 / 3), (1, 1)])
def test_the_risk_scale_has_three_equal_parts(p, place):
    assert on_scale(p, 0.1, 0.9) == pytest.approx(place)


@pytest.mark.parametrize("code", [400, 404, 413, 415, 500, 503])
def test_every_error_is_a_page_with_one_sentence_and_a_way_on(app, code):
    app.testing = False
    app.add_url_rule("/fails", view_func=lambda: abort(code, "One sentence."))
    page = app.test_client().get("/fails").text
    assert f"Error {code}" in page and "Read another scan" in page and page.count("<h1>") == 1


def test_a_page_without_pictures_weighs_less_than_60_kb(client, result):
    shared = sum((ROOT / "static" / name).stat().st_size for name in ("style.css", "app.js", "icon.svg"))
    for path in ("/", "/model", f"/results/{result['id']}"):
        assert shared + len(client.get(path).data) < 60_000


def test_several_files_are_one_result_in_order(send):
    scans = send((SCAN, "a.jpg"), (encode(phantom(2)), "b.png")).get_json()["scans"]
    assert [scan["file"] for scan in scans] == ["a.jpg", "b.png"]


def test_the_scans_in_all_files_together_are_limited(tmp_path):
    pages = [Image.fromarray(phantom(seed, side=64)) for seed in range(3)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    client = make_app(tmp_path, MAX_SCANS=5).test_client()
    files = [(io.BytesIO(file.getvalue()), f"{n}.tif") for n in range(2)]
    response = client.post("/upload", data={"file": files})
    assert response.status_code == 413
    assert response.get_json()["error"] == "1.tif has 3 pages, but only 2 more scans are allowed; send fewer."


@pytest.mark.parametrize("path", ["/", "/upload"])
@pytest.mark.parametrize("files, status, sentence", [
    ([], 400, "No file was chosen; choose a scan and send it again."),
    ([(b"", "")], 400, "No file was chosen; choose a scan and send it again."),
    ([(b"", "void.png")], 400, "void.png is empty; choose the file again."),
    ([(b"I am a text file", "scan.png")], 415,
     "scan.png is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them; "
     "export the scan as one of these."),
    ([(SCAN[:2000], "cut.jpg")], 415, "cut.jpg is damaged or cut off; export it again."),
    ([(encode(np.zeros((20_000, 20_000), bool)), "huge.png")], 413,
     "huge.png has 20000 x 20000 pixels, more than the 50,000,000 allowed; send it smaller."),
    ([(b"x", "scan.jpg")] * 1001, 400, "1001 files were sent, but at most 1000 are read at once."),
    ([(SCAN, "good.jpg"), (b"bad", "bad.jpg")], 415,
     "bad.jpg is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them; "
     "export the scan as one of these."),
])  # fmt: skip
def test_bad_input_gets_its_sentence_and_leaves_nothing(send, uploads, path, files, status, sentence):
    response = send(*files, to=path)
    assert response.status_code == status
    if path == "/upload":
        assert response.get_json() == {"error": sentence}
    else:
        assert sentence in response.text and "<form" in response.text
    assert uploads() == []


@pytest.mark.parametrize("path", ["/", "/upload"])
def test_a_file_of_100_megabytes_is_refused_before_it_is_read(client, uploads, path):
    size = {"CONTENT_LENGTH": "100000000"}
    response = client.post(path, content_type="multipart/form-data; boundary=x", environ_overrides=size)
    assert response.status_code == 413
    assert "The upload is larger than the 64 MB allowed; send fewer or smaller files." in response.text
    assert uploads() == []


def test_a_busy_server_says_so_at_once(tmp_path):
    app = make_app(tmp_path, MAX_WAITING=0)
    response = app.test_client().post("/upload", data={"file": (io.BytesIO(SCAN), "scan.jpg")})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.get_json()["error"] == "The server is busy with other scans; try again in a few seconds."


def test_a_rejected_picture_shows_a_reason_and_no_number(client, send):
    photo = np.dstack([np.tile(np.arange(256, dtype=np.uint8), (256, 1))] + [np.zeros((256, 256), np.uint8)] * 2)
    response = send((encode(photo), "cat.png"))
    (scan,) = response.get_json()["scans"]
    assert scan["verdict"] == "rejected" and scan["reason"]
    assert [scan[key] for key in ("label", "risk", "tumor_probability", "probabilities", "heatmap")] == [None] * 5
    page = client.get(f"/results/{response.get_json()['id']}").text
    assert "Not classified" in page and "Probability of a tumor" not in page


def test_delete_removes_the_upload_at_once(client, result, uploads):
    response = client.post(f"/results/{result['id']}/delete")
    assert (response.status_code, response.location, uploads()) == (303, "/", [])
    assert client.get(f"/results/{result['id']}").status_code == 404


@pytest.fixture
def old(app, result):
    """The folder of an upload that was made 25 hours ago."""
    folder = pathlib.Path(app.config["UPLOADS"]) / result["id"]
    long_ago = time.time() - 25 * 3600
    os.utime(folder, (long_ago, long_ago))
    return folder


def test_what_is_old_is_removed_at_the_next_start(old):
    make_app(old.parent)
    assert not old.exists()


def test_what_is_old_is_not_served_any_more(old, client):
    assert client.get(f"/results/{old.name}").status_code == 404


def test_only_uploads_are_removed(old):
    """A folder that somebody keeps beside the uploads stays, however old."""
    (old.parent / "thesis").mkdir()
    os.utime(old.parent / "thesis", (0, 0))
    make_app(old.parent)
    assert (old.parent / "thesis").exists()


def test_the_scan_is_kept_grey_for_grey(client, send):
    """What the page shows as the scan has every value that was sent."""
    pixels = phantom(5, lesion=True)
    (scan,) = send((encode(pixels), "scan.png")).get_json()["scans"]
    assert (np.asarray(picture_at(client, scan["scan"]).convert("L")) == pixels).all()


def test_nothing_of_the_file_itself_is_kept(app, send):
    """No metadata, no name on disk but inside the answer, and the name without its path."""
    exif = Image.Exif()
    exif[0x010E] = "DOE^JOHN 1950-01-01"
    data = encode(phantom(), "JPEG", exif=exif)
    result = send((data, "/home/doe/scan.jpg")).get_json()
    stored = [path for path in pathlib.Path(app.config["UPLOADS"]).rglob("*") if path.is_file()]
    assert sorted(path.name for path in stored) == ["heat.f32", "result.json", "scan.png"]
    assert not any(b"DOE^JOHN" in path.read_bytes() for path in stored)
    assert result["scans"][0]["file"] == "scan.jpg"


@pytest.mark.parametrize("at", ["png_of", "write_result"])
def test_a_failed_write_leaves_nothing_and_the_next_upload_works(send, uploads, monkeypatch, app, at):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"app.{at}", full)
        response = send((SCAN, "scan.jpg"))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "60")
    assert response.get_json() == {"error": "The server cannot keep results at the moment; try again later."}
    assert uploads() == []
    assert send((SCAN, "scan.jpg")).status_code == 200


def test_a_name_with_markup_is_shown_as_text(client, send):
    response = send((SCAN, "<script>alert(1)</script>.jpg"), to="/")
    assert "<script>alert" not in client.get(response.location).text


@pytest.mark.parametrize("address", [
    "/nowhere", "/results/short", "/results/..%2f..%2fapp", f"/results/{'x' * 22}", f"/results/{'x' * 22}.csv",
    f"/results/{'x' * 22}/0/scan.png", f"/results/{'x' * 22}/0/other.png",
])  # fmt: skip
def test_what_is_not_there_is_a_404_page(client, address):
    response = client.get(address)
    assert response.status_code == 404
    assert "Read another scan" in response.text and "Traceback" not in response.text


def test_the_wrong_method_says_which_is_right(client):
    response = client.get("/upload")
    assert response.status_code == 405
    assert "POST" in response.headers["Allow"]


def test_a_missing_result_is_json_for_programs(client):
    response = client.get(f"/results/{'x' * 22}.json")
    assert (response.status_code, list(response.get_json())) == (404, ["error"])


def test_health_names_the_model(client, app):
    assert client.get("/healthz").get_json() == {"status": "ok", "model": app.classifier.sha256}


def test_health_fails_where_uploads_cannot_be_kept(app, client):
    pathlib.Path(app.config["UPLOADS"]).rmdir()
    assert client.get("/healthz").status_code == 503


def test_the_model_page_prints_the_card(client, card):
    page = html.unescape(client.get("/model").text)
    assert f"{card['figures']['Tumor against none']['AUROC']['value']:.3f}" in page
    assert all(limit in page for limit in card["limits"])


@pytest.mark.parametrize("origin, allowed", [
    ("https://pacs.example", "https://pacs.example"), ("https://evil.example", None),
])  # fmt: skip
def test_cors_is_open_for_the_origins_set(tmp_path, origin, allowed):
    client = make_app(tmp_path, CORS_ORIGINS="https://pacs.example, https://lab.example").test_client()
    response = client.post("/upload", headers={"Origin": origin})
    assert response.headers.get("Access-Control-Allow-Origin") == allowed


def test_pages_ask_no_other_host_and_stay_out_of_caches(client):
    headers = client.get("/").headers
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")


def test_settings_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASK_MAX_FILES", "3")
    monkeypatch.setenv("FLASK_UPLOADS", str(tmp_path / "here"))
    app = create_app()
    assert (app.config["MAX_FILES"], app.config["UPLOADS"]) == (3, str(tmp_path / "here"))


def test_a_setting_of_the_wrong_kind_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASK_MAX_FILES", "many")
    with pytest.raises(Exception, match="FLASK_MAX_FILES is 'many', but it has to be a number, such as 1000."):
        make_app(tmp_path)


def test_the_classify_command_prints_csv(app, tmp_path):
    (tmp_path / "scan.jpg").write_bytes(SCAN)
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    run = app.test_cli_runner().invoke
    (row,) = csv.DictReader(io.StringIO(run(args=["classify", str(tmp_path / "scan.jpg")]).stdout))
    assert row["path"].endswith("scan.jpg") and row["verdict"]
    (row,) = csv.DictReader(io.StringIO(run(args=["classify", str(tmp_path / "bad.jpg")]).stdout))
    assert row["error"].startswith("bad.jpg is not a DICOM") and not row["verdict"]


def test_a_result_is_json_that_any_program_reads(app, result):
    stored = pathlib.Path(app.config["UPLOADS"]) / result["id"] / "result.json"
    assert json.loads(stored.read_text()) == result

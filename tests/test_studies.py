"""What the app promises for whole studies: their order, their answer, their life and privacy."""

import logging
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from phantoms import ROOT, deep, dicom, encode, make_app, phantom, post, series, until, zipped
from pydicom.data import get_testdata_file

import app as web
from app import prepare, read_scans, read_upload, study_answer, study_answers

RULE = {"head": 0.5, "stretch": 1.0, "low": 0.3, "high": 0.75}
CARD = {"thresholds": {"low": 0.2, "high": 0.8}, "study": RULE}


# Order and answer


def test_a_study_is_read_series_by_series_in_order():
    """From nested folders without extensions, with a DICOMDIR and junk beside."""
    plan = pathlib.Path(get_testdata_file("rtplan.dcm")).read_bytes()
    junk = {"DICOMDIR": plan, "README.TXT": b"Read me", "__MACOSX/x": b"x", ".DS_Store": b"x"}
    files = {f"A/{name}": data for name, data in series(6).items()}
    files |= {f"B/C/{name}": data for name, data in series(5, "1.2.3.2").items()}
    scans, skipped = read_upload([("study.zip", zipped(**files, **junk))])
    assert [scan.series for scan in scans] == ["1"] * 6 + ["2"] * 5
    assert [scan.slice for scan in scans] == [*range(6), *range(5)]
    assert {scan.study for scan in scans} == {"1"}
    for n in "12":
        positions = [scan.position for scan in scans if scan.series == n]
        assert np.all(np.diff(positions) > 0)
    assert sorted(item.file for item in skipped) == ["DICOMDIR", "README.TXT"]


def test_several_files_of_a_study_are_arranged_and_junk_is_skipped(send):
    files = [(data, name) for name, data in series(4).items()] + [(b"junk", "notes.txt")]
    result = send(*files).get_json()
    assert [scan["file"] for scan in result["scans"]] == ["IM0000", "IM0003", "IM0002", "IM0001"]
    assert [item["file"] for item in result["skipped"]] == ["notes.txt"]
    assert result["study"]["verdict"] and len(result["study"]["highest"]) >= 1


def test_a_slice_gets_the_same_pixels_alone_and_in_its_study():
    files = series(8, WindowCenter=1000, WindowWidth=1500)
    for scan in read_scans(zipped(**files), "study.zip"):
        (alone,) = read_scans(files[scan.file], scan.file)
        assert np.array_equal(prepare(alone.pixels), prepare(scan.pixels))


@pytest.mark.parametrize("slices, probability, verdict, highest, counted", [
    ([(0.1, 100), (0.2, 100), (None, 100), (0.8, 100), (0.9, 100), (1.0, 30)],
     0.85, "tumor", [4, 3], 4),  # of the largest stretch; the small head at the end is no brain
    ([(0.1, 100), (1.0, 100), (0.1, 100), (0.1, 100)], 0.55, "uncertain", [1, 0], 4),  # a lone peak
    ([(0.1, 100), (0.1, 100), (0.9, 100), (0.9, 100), (0.1, 400)], 0.9, "tumor", [2, 3], 5),  # noise
])
def test_the_rule_for_a_series_is_the_highest_mean_of_consecutive_slices(
        slices, probability, verdict, highest, counted):
    entries = [{"tumor_probability": p, "crop": [0, 0, side, side]} for p, side in slices]
    found = study_answer(entries, CARD | {"study": RULE | {"stretch": 0.5}})
    assert (found["tumor_probability"], found["verdict"]) == (probability, verdict)
    assert (found["highest"], found["counted"]) == (highest, counted)
    assert found["rejected"] == sum(p is None for p, _ in slices)


def entries_of(*rows):
    """Entries of a result, (study, series, tumor probability) each."""
    names = ("study", "series", "tumor_probability")
    return [dict(zip(names, row)) | {"crop": [0, 0, 9, 9]} for row in rows]


def test_each_series_has_its_answer_and_the_most_suspicious_comes_first():
    """Loose scans have none, and two studies none in common."""
    rows = [("1", "1", 0.1), ("1", "1", 0.2), (None, None, 0.9), ("1", "2", 0.7), ("1", "2", 0.9)]
    answers = study_answers(entries_of(*rows), CARD)
    first, second = answers["studies"]
    assert (first["series"], first["highest"]) == ("2", [4, 3])
    assert (second["series"], second["highest"]) == ("1", [1, 0])
    assert answers["study"] == first
    loose = entries_of(*[(None, None, 0.9)] * 3)
    assert study_answers(loose, CARD) == {"study": None, "studies": []}
    both = study_answers(entries_of(*[("1", "1", 0.1)] * 2, *[("2", "2", 0.9)] * 2), CARD)
    verdicts = [(each["study"], each["verdict"]) for each in both["studies"]]
    assert both["study"] is None and verdicts == [("2", "tumor"), ("1", "no_tumor")]


def test_a_result_of_two_studies_says_so_on_top(app, monkeypatch):
    """In JSON, and on the page, with the answer for each."""
    scans = [
        web.replace(scan, study=n, series=n)
        for n in "12" for scan in read_scans(zipped(**series(3)), "study.zip")
    ]
    monkeypatch.setattr("app.read_upload", lambda *_: (scans, []))
    result = post(app, b"x").get_json()
    sentence = "These scans belong to 2 patients or studies; each is answered on its own."
    assert (result["warnings"], result["study"], len(result["studies"])) == ([sentence], None, 2)
    page = app.test_client().get(f"/results/{result['id']}").text
    assert sentence in page and "Study 1, series 1" in page and "3 slices" in page and "Study 2" in page


# Life


@pytest.fixture
def study_app(tmp_path):
    """An app that answers more than two scans in the background."""
    return make_app(tmp_path / "uploads", MAX_AT_ONCE=2)


def begin(app, count=8):
    """The result so far of a study sent to the API."""
    response = post(app, zipped(**series(count)))
    assert response.status_code == 202
    return response.get_json()


def folder_of(app, result):
    return app.uploads / result["id"]


def wait_for(app, result, status):
    """The result once it has this status, a number for that of the response."""

    def answer():
        response = app.test_client().get(f"/results/{result['id']}.json")
        now = response.get_json()
        return status in (response.status_code, now.get("status")) and now

    return until(answer, 60)


def slow_down(app, monkeypatch, seconds=0.2):
    """Make every slice take at least so long."""
    infer = app.classifier.infer
    monkeypatch.setattr(app.classifier, "infer", lambda x: time.sleep(seconds) or infer(x))


def test_a_large_study_is_answered_at_once_and_fills(study_app, monkeypatch):
    slow_down(study_app, monkeypatch)
    client, result = study_app.test_client(), begin(study_app)
    assert (result["status"], result["scans"], result["total"]) == ("running", [], 8)
    page = client.get(f"/results/{result['id']}").text
    assert "Reading 8 scans" in page and 'http-equiv="refresh"' in page
    done = wait_for(study_app, result, "done")
    assert [scan["file"] for scan in done["scans"]] == [f"IM{7 * n % 8:04}" for n in range(8)]
    assert done["progress"] == 1.0 and done["study"]["risk"] in ("low", "medium", "high")
    page = client.get(f"/results/{result['id']}").text
    assert "http-equiv" not in page and "highest mean tumor probability" in page


def test_every_upload_has_one_and_the_same_form(study_app):
    """Small or large, answered within its request or in the background."""
    large = wait_for(study_app, begin(study_app, 3), "done")
    small = post(study_app, zipped(**series(2))).get_json()
    assert list(small) == list(large) and list(small["study"]) == list(large["study"])
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for folder in (folder_of(study_app, result) for result in (small, large))
    ]
    assert names[0] == [name for name in names[1] if not name.startswith("2/")]


def test_a_study_does_not_take_the_places_of_scans(study_app, monkeypatch):
    """More files than are answered at once take one place: no network waits for them."""
    asked, reserve = [], study_app.jobs.reserve
    note = lambda count, force=False: asked.append(count) or reserve(count, force)  # noqa: E731
    monkeypatch.setattr(study_app.jobs, "reserve", note)
    response = post(study_app, *[encode(phantom(n)) for n in range(3)])
    assert (response.status_code, asked) == (202, [1])


def test_another_server_sees_a_running_study_and_can_cancel_it(study_app, monkeypatch):
    """They share the folder and nothing else, as two containers do."""
    slow_down(study_app, monkeypatch, 0.5)
    other = make_app(study_app.config["UPLOADS"], MAX_AT_ONCE=2)
    result, queued = begin(study_app, 12), begin(study_app, 3)
    for each in (result, queued):
        now = other.test_client().get(f"/results/{each['id']}.json").get_json()
        assert now["status"] == "running"
        assert other.test_client().post(f"/results/{each['id']}/cancel").status_code == 303
    assert wait_for(study_app, result, "cancelled")["scans"] == []
    assert wait_for(other, queued, "cancelled")["scans"] == []
    names = [path.name for path in folder_of(study_app, result).iterdir()]
    assert names == ["result.json"]
    assert "Cancelled" in other.test_client().get(f"/results/{result['id']}").text


def test_a_study_whose_server_was_stopped_has_failed(study_app, monkeypatch):
    """It shows no sign of life for half a minute; queued studies show theirs as well."""
    slow_down(study_app, monkeypatch)
    results = [begin(study_app), begin(study_app)]
    study_app.jobs.unfinished, unfinished = set(), study_app.jobs.unfinished
    monkeypatch.setattr("app.write_result", lambda *_: None)
    client = study_app.test_client()

    def status(result):
        now = client.get(f"/results/{result['id']}.json").get_json()
        return now["status"], now.get("error")

    for result in results:
        os.utime(folder_of(study_app, result) / "result.json", (time.time() - 40,) * 2)
        sentence = "The server stopped while reading this study; send it again."
        assert status(result) == ("failed", sentence)
    study_app.jobs.unfinished = unfinished
    study_app.jobs.touch()
    assert [status(result) for result in results] == [("running", None)] * 2


STOPPED = """
import atexit, time, app, phantoms
load = app.litert
app.litert = lambda *given: (lambda engine: lambda scans: time.sleep(0.1) or engine(scans))(load(*given))
server = phantoms.make_app({uploads!r}, MAX_AT_ONCE=2)
assert phantoms.post(server, phantoms.zipped(**phantoms.series(20))).status_code == 202
time.sleep(0.5)
atexit.register(time.sleep, 1)
"""


def test_a_server_that_ends_breaks_no_study_on_its_way_out(tmp_path):
    """Who starts it again, or sees no sign of life, finds the study as it was."""
    command = [sys.executable, "-c", STOPPED.format(uploads=str(tmp_path))]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=60, check=True)
    assert "a study failed" not in run.stderr
    (folder,) = tmp_path.iterdir()
    result = web.read_result(folder)
    assert result["status"] == "running"
    assert all((folder / str(n) / "scan.png").exists() for n in range(len(result["scans"])))


def test_signs_of_life_come_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("app.HEARTBEAT", 0.05)
    app = make_app(tmp_path, MAX_AT_ONCE=2)
    slow_down(app, monkeypatch, 0.5)
    path = folder_of(app, begin(app)) / "result.json"
    os.utime(path, (0, 0))
    until(lambda: path.stat().st_mtime > 0)


def test_a_study_deleted_twice_at_once_is_not_found(study_app, monkeypatch):
    result = wait_for(study_app, begin(study_app, 3), "done")
    monkeypatch.setattr("app.result_folder", lambda _: folder_of(study_app, {"id": "gone"}))
    response = study_app.test_client().post(f"/results/{result['id']}/delete")
    assert response.status_code == 404
    assert "This result does not exist or has been removed." in response.text


def test_a_study_deleted_while_it_is_read_is_gone(study_app, monkeypatch):
    slow_down(study_app, monkeypatch)
    result = begin(study_app, 12)
    study_app.test_client().post(f"/results/{result['id']}/delete")
    wait_for(study_app, begin(study_app, 3), "done")  # the next one runs once this one has ended
    assert len(list(study_app.uploads.iterdir())) == 1


def test_a_study_that_breaks_says_so_and_the_next_one_works(study_app, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(study_app.classifier, "finding", lambda *_: 1 / 0)
        failed = wait_for(study_app, begin(study_app), "failed")
    assert failed["error"] == "Something went wrong on the server; send the study again."
    assert "a study failed" in caplog.text
    wait_for(study_app, begin(study_app), "done")


def test_a_study_that_cannot_even_be_ended_does_not_stop_the_next_one(study_app, monkeypatch):
    """The disk is full all through the first study."""

    def full(*_):
        raise OSError(28, "No space left on device")

    slow_down(study_app, monkeypatch)
    result = begin(study_app, 4)
    with monkeypatch.context() as patch:
        patch.setattr("app.write_result", full)
        wait_for(study_app, result, 404)
    wait_for(study_app, begin(study_app, 3), "done")


def test_too_many_studies_are_told_to_come_back(tmp_path, monkeypatch):
    app = make_app(tmp_path, MAX_AT_ONCE=2, MAX_STUDIES=1)
    slow_down(app, monkeypatch)
    for _ in range(2):
        begin(app)
        time.sleep(0.1)
    response = post(app, zipped(**series(4)))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "60")
    sentence = "The server is busy with other studies; try again in a minute."
    assert response.get_json()["error"] == sentence
    assert len(list(tmp_path.iterdir())) == 2


# Privacy


UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
TEXTS = """PatientName PatientID PatientAddress OtherPatientNames PatientComments InstitutionName
    InstitutionAddress ReferringPhysicianName AccessionNumber StudyID StudyDescription
    SeriesDescription ProtocolName OperatorsName StationName DeviceSerialNumber
    RequestedProcedureDescription PerformingPhysicianName ImageComments"""
SECRETS = {
    **{name: f"Secret-{n:02}" for n, name in enumerate(TEXTS.split())},
    **{name: f"1.2.840.99.{n}" for n, name in enumerate(UIDS, 11)},
    "PatientBirthDate": "19500102", "StudyDate": "20200304", "SeriesDate": "20200305",
    "StudyTime": "112233.44",
}


def test_no_value_of_a_patient_is_stored_logged_or_shown(app, client, send, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("app.AUDIT.propagate", True)
    result = send(*[(dicom(deep(n), **SECRETS), f"IM{n}") for n in range(2)]).get_json()
    stored = [path.read_bytes() for path in app.uploads.rglob("*") if path.is_file()]
    paths = ("", ".json", ".csv", "/0", "/0/heatmap.png", ".zip")
    shown = []
    for path in paths:
        with client.get(f"/results/{result['id']}{path}") as response:
            shown.append(response.data)
    said = b"".join(stored + shown) + caplog.text.encode()
    assert not [key for key, value in SECRETS.items() if value.encode() in said]

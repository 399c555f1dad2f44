"""What whoever runs the server may rely on: what it logs, and that it stays up."""

import json

import pytest
from phantoms import encode, make_app, phantom, post, series, until, zipped

import app as web

SCAN = encode(phantom(1, lesion=True), "JPEG")


@pytest.mark.parametrize("settings, address", [({}, None), ({"AUDIT_ADDRESSES": 1}, "127.0.0.1")])
def test_the_audit_has_a_line_for_each_thing_done(tmp_path, settings, address):
    """Also across a rotation; without names, and without addresses unless they are asked for."""
    log, kept = tmp_path / "audit.jsonl", {"CORRECTIONS": str(tmp_path / "corrections")}
    app = make_app(tmp_path / "uploads", AUDIT=str(log), MAX_AT_ONCE=2, **kept, **settings)
    url = f"/results/{post(app, (SCAN, 'doe_jane.jpg'), (b'', 'doe.txt')).get_json()['id']}"
    first = log.rename(tmp_path / "audit.jsonl.1").read_text()
    client, study = app.test_client(), post(app, (zipped(**series(3)), "doe.zip")).get_json()
    until(lambda: client.get(f"/results/{study['id']}.json").get_json()["status"] == "done")
    assert post(app, (b"junk", "doe_jane.txt"), to="/").status_code == 415
    client.post(f"{url}/0/label", data={"label": "glioma"})
    client.post(f"{url}/delete")
    web.sweep(app.uploads, 0)
    until(lambda: log.read_text().count("\n") == 6)
    lines = [json.loads(line) for line in (first + log.read_text()).splitlines()]
    assert "doe" not in first + log.read_text()
    kinds = [line["kind"] for line in lines]
    assert sorted(kinds[2:4]) == ["answer", "upload"]  # of the study; either may be first
    assert kinds[:2] + kinds[4:] == ["upload", "answer", "upload", "correction", *["deletion"] * 2]
    ids = [line["id"] for line in lines]
    assert ids == [url[9:]] * 2 + [study["id"]] * 2 + [None] + [url[9:]] * 2 + [study["id"]]
    assert [line.get("address") for line in lines if line["kind"] == "upload"] == [address] * 3
    upload, answer = lines[:2]
    assert (upload["files"], upload["scans"], upload["skipped"], upload["status"]) == (2, 1, 1, 200)
    assert sum(answer["verdicts"].values()) == 1 and answer["status"] == "done"
    assert answer["model"] == app.classifier.sha256 and 0 < answer["seconds"] < 10
    (study_line,) = (line for line in lines[2:4] if line["kind"] == "answer")
    assert study_line["verdict"] and study_line["scans"] == 3

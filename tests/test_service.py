"""What whoever runs the server may rely on: what it logs, and that it stays up."""

import base64
import copy
import io
import itertools
import json
import os
import re
import subprocess
import sys
import zipfile

import openapi_spec_validator
import phantoms
import pytest
from openapi_schema_validator import OAS31Validator
from phantoms import ROOT, deep, dicom, encode, make_app, phantom, post, series, until, zipped

import app as web

SCAN = encode(phantom(1, lesion=True), "JPEG")


def lines_of(text, ids):
    """The lines of an audit about these uploads."""
    return [line for line in map(json.loads, text.splitlines()) if line["id"] in ids]


@pytest.mark.parametrize("settings, address", [({}, None), ({"AUDIT_ADDRESSES": 1}, "127.0.0.1")])
def test_the_audit_has_a_line_for_each_thing_done(tmp_path, monkeypatch, settings, address):
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
    monkeypatch.setattr("app.keep_scan", lambda *_: (_ for _ in ()).throw(OSError("full")))
    assert post(app, SCAN).status_code == 503  # and nothing says 200 of it
    ours = (url[9:], study["id"], None)  # apps of other tests may still be at work
    lines = until(lambda: len(found := lines_of(first + log.read_text(), ours)) == 9 and found)
    assert "doe" not in first + log.read_text()
    kinds = [line["kind"] for line in lines]
    assert sorted(kinds[2:4]) == ["answer", "upload"]  # of the study; either may be first
    deleted = ["correction", "deletion", "deletion"]
    assert kinds[:2] + kinds[4:] == ["answer", "upload", "upload", *deleted, "upload"]
    ids = [line["id"] for line in lines]
    assert ids == [url[9:]] * 2 + [study["id"]] * 2 + [None] + [url[9:]] * 2 + [study["id"], None]
    uploads = [line for line in map(json.loads, (first + log.read_text()).splitlines())
               if line["kind"] == "upload"]
    assert [line["status"] for line in uploads] == [200, 202, 415, 503]
    assert [line.get("address") for line in uploads] == [address] * 4
    answer, upload = lines[:2]
    assert (upload["files"], upload["scans"], upload["skipped"], upload["status"]) == (2, 1, 1, 200)
    assert sum(answer["verdicts"].values()) == 1 and answer["status"] == "done"
    assert answer["model"] == app.classifier.sha256 and 0 < answer["seconds"] < 10
    (study_line,) = (line for line in lines[2:4] if line["kind"] == "answer")
    assert study_line["verdict"] and study_line["scans"] == 3


OPENAPI = json.loads((ROOT / "static" / "openapi.json").read_text())
OPERATIONS = sorted(  # what is deleted comes last
    ((path, method) for path, of in OPENAPI["paths"].items() for method in of),
    key=lambda operation: operation[0].endswith("delete"))


def strict(schema):
    """A schema that allows no property which it does not name."""
    if isinstance(schema, dict):
        closed = {"additionalProperties": False} if "properties" in schema else {}
        return closed | {key: strict(value) for key, value in schema.items()}
    return schema


def check_documented(response, path, method):
    """Fail unless an answer has a status, a kind and a shape that openapi.json names."""
    answers = OPENAPI["paths"][path][method]["responses"]
    documented = answers[str(response.status_code)]
    if "$ref" in documented:
        documented = OPENAPI["components"]["responses"][documented["$ref"].split("/")[-1]]
    if response.status_code != 303:
        schema = documented["content"][response.mimetype].get("schema")
        if response.is_json:
            whole = strict(schema) | {"components": strict(OPENAPI["components"])}
            OAS31Validator(whole).validate(response.get_json())


def test_openapi_names_every_address_and_method(app):
    """It is valid, and served with the address of this server."""
    openapi_spec_validator.validate(copy.deepcopy(OPENAPI))
    assert app.test_client().get("/openapi.json").get_json() == OPENAPI | {"servers": [{"url": "/"}]}
    served = {
        (re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules() if rule.endpoint != "static"
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert served == set(OPERATIONS)


@pytest.mark.parametrize("files", [[SCAN], [zipped(**series(3)), b"text"], []])
def test_answers_are_those_of_openapi(tmp_path, files):
    """Of every address: for a result, for one that does not exist, and of an empty request."""
    app = make_app(tmp_path / "uploads", CORRECTIONS=str(tmp_path / "kept"), MAX_AT_ONCE=2)
    sent = post(app, *files)
    check_documented(sent, "/upload", "post")
    client, ids = app.test_client(), ["x" * 22]
    if files:
        ids.insert(0, sent.get_json()["id"])
        until(lambda: client.get(f"/results/{ids[0]}.json").get_json()["status"] == "done")
    data, accept = {"label": "glioma"}, {"Accept": "application/json"}
    for upload_id, (path, method) in itertools.product(ids, OPERATIONS):
        url = path.format(upload_id=upload_id, n=0, name="heat", study="1.2.3")
        with client.open(url, method=method, data=data, headers=accept) as response:
            check_documented(response, path, method)
            fine = response.status_code < 400 or upload_id == "x" * 22 or path in ("/", "/upload")
            fine |= path.startswith("/dicomweb")  # which has a multipart of its own
            assert fine
            assert response.status_code < 400 or response.is_json


@pytest.mark.parametrize("accept, kind", [
    ("application/json", "application/json"), ("text/html, application/json;q=0.9", "text/html"),
    ("*/*", "text/html"), ("", "text/html"), ("application/json, text/html;q=0.5", "application/json"),
])
def test_whoever_prefers_json_gets_errors_as_json(client, accept, kind):
    for method, path, status in (("GET", "/nowhere", 404), ("POST", "/", 400), ("PUT", "/model", 405)):
        response = client.open(path, method=method, headers={"Accept": accept})
        assert (response.status_code, response.mimetype) == (status, kind)
        assert kind == "text/html" or list(response.get_json()) == ["error"]


NUMBER = "but it has to be a number from"
UNWRITABLE = "/proc/nowhere", "which cannot be written: No such file or directory."


@pytest.mark.parametrize("key, value, sentence", [
    *(("THREADS", value, f"{NUMBER} 1 to 512, such as") for value in ("0", "-1", "many", "1e999", "9999")),
    *(("RETENTION_HOURS", value, f"{NUMBER} 0.0001 to 1,000,000,000, such as 24.0.")
      for value in ("nan", "inf", "Infinity", "0", "-24", "1e999", "a day", "")),
    *(("MAX_FILES", value, f"{NUMBER} 1 to 1,000,000,000,000, such as 1000.")
      for value in ("0", "-5", "2.5", "[1]", "null", "many")),
    *((f"MAX_{name}", "-1", f"{NUMBER} 1 to") for name in (
        "CONTENT_LENGTH", "SCANS", "PIXELS", "UNPACKED", "AT_ONCE", "STUDIES", "WAITING")),
    ("KEEP_NAMES", "2", f"{NUMBER} 0 to 1, such as 1."),
    ("UPLOADS", *UNWRITABLE), ("CORRECTIONS", *UNWRITABLE), ("AUDIT", *UNWRITABLE),
    ("UPLOADS", __file__, "which cannot be written: File exists."), ("UPLOADS", "", UNWRITABLE[1]),
])
def test_a_setting_that_cannot_be_ends_the_start_with_a_sentence(
    tmp_path, monkeypatch, key, value, sentence
):
    monkeypatch.setenv("FLASK_UPLOADS", str(tmp_path))
    monkeypatch.setenv(f"FLASK_{key}", value)
    with pytest.raises(web.click.ClickException) as caught:
        web.create_app()
    assert caught.value.message.startswith(f"FLASK_{key} is ") and sentence in caught.value.message


def test_that_sentence_is_all_that_is_printed():
    command = [sys.executable, "-m", "flask", "run", "--port", str(phantoms.free_port())]
    settings = os.environ | {"FLASK_MAX_STUDIES": "0"}
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == (
        f"Error: FLASK_MAX_STUDIES is 0, {NUMBER} 1 to 1,000,000,000,000, such as 4.\n")


@pytest.mark.parametrize("password", ["correct horse", "12.50", "true", "pässwörd:x"])
def test_a_password_is_asked_for_everywhere_but_of_the_health_check(
    tmp_path, monkeypatch, password
):
    """As it was written, by people and programs; a browser may look ahead without it."""
    monkeypatch.setenv("FLASK_PASSWORD", password)
    app = make_app(tmp_path, CORS_ORIGINS="https://a.example")
    client, origin = app.test_client(), {"Origin": "https://a.example"}
    known = {"upload_id": "x" * 22, "n": 0, "name": "heat", "study": "1.2.3"}
    paths = [path.format(**known) for path in OPENAPI["paths"]]
    for path in (*paths, "/nowhere", "/static/app.js"):
        for given in (None, ("", ""), ("doe", password + "x"), (password, "doe")):
            with client.get(path, auth=given) as refused, client.get(path, auth=("doe", password)) as seen:
                assert (refused.status_code == 401) == (path != "/healthz")
                assert seen.status_code != 401
                assert path == "/healthz" or refused.headers["WWW-Authenticate"].startswith("Basic ")
    assert client.post("/upload", headers={"Authorization": "Bearer x"}).status_code == 401
    ahead = client.options("/upload", headers=origin)
    assert ahead.status_code == 200 and ahead.headers["Access-Control-Allow-Headers"] == "Authorization"
    basic = base64.b64encode(f"doe:{password}".encode()).decode()
    for given, status in ((origin, 401), (origin | {"Authorization": f"Basic {basic}"}, 200)):
        response = post(app, SCAN, headers=given)
        assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (
            status, "https://a.example")


@pytest.mark.parametrize("settings, way", [
    ({"TRUSTED_PROXIES": 1}, {"headers": {"X-Forwarded-Prefix": "/mri"}}),
    ({}, {"environ_overrides": {"SCRIPT_NAME": "/mri"}}),
])
def test_behind_a_path_every_address_carries_it(tmp_path, settings, way):
    """On pages, in JSON, in redirects and in the ZIP, for a result of one scan and of many."""
    app = make_app(tmp_path / "uploads", CORRECTIONS=str(tmp_path / "kept"), **settings)
    client, addresses = app.test_client(), []
    for files in ([SCAN], [zipped(**series(3))]):
        form = {"file": [(io.BytesIO(data), "scan") for data in files]}
        result = client.post("/upload", data=form, **way).get_json()
        url = f"/results/{result['id']}"
        addresses += re.findall(r"/[^\"]*\.png", json.dumps([result, client.get(f"{url}.json", **way).json]))
        with client.get(f"{url}.zip", **way) as response:
            archive = zipfile.ZipFile(io.BytesIO(response.data))
        addresses += re.findall(r"/[^\"]*\.png", archive.read("result.json").decode())
        for path in ("/", "/model", "/nowhere", url, f"{url}/0"):
            text = client.get(path, **way).text
            addresses += re.findall(r"\s(?:href|src|action|data-[a-z]+)=\"(/[^\"]*)\"", text)
        changes = (f"{url}/0/label", f"{url}/cancel", f"{url}/delete")
        addresses += [client.post(path, data={"label": "glioma"}, **way).location for path in changes]
    addresses += [server["url"] for server in client.get("/openapi.json", **way).json["servers"]]
    assert len(addresses) > 100 and not [each for each in addresses if not each.startswith("/mri")]
    assert 'href="/model"' in make_app(tmp_path).test_client().get(
        "/", headers={"X-Forwarded-Prefix": "/mri"}).text  # of a proxy that nobody trusts


@pytest.mark.parametrize("origin, forwarded, status", [
    ("https://mri.example", "mri.example", 303), ("http://mri.example:8080", "mri.example:8080", 303),
    ("https://mri.example", "mri.example, inner.example", 303), ("https://mri.example", None, 403),
    ("https://evil.example", "mri.example", 403), ("null", "mri.example", 403),
])
@pytest.mark.parametrize("proxies", [0, 1])
def test_a_proxy_that_rewrites_the_host_turns_no_upload_away(
    tmp_path, origin, forwarded, status, proxies
):
    app = make_app(tmp_path, TRUSTED_PROXIES=proxies)
    headers = {"Host": "127.0.0.1:5000", "Origin": origin, "X-Forwarded-Host": forwarded}
    headers = {name: value for name, value in headers.items() if value}
    response = post(app, SCAN, to="/", headers=headers)
    assert response.status_code == status
    assert status == 303 or "a proxy has to pass X-Forwarded-Host on" in response.text


def changed(**values):
    """A change of a result.json: these values are put in, those of a scan in its first scan."""
    def change(data):
        result = json.loads(data)
        inner = {key: values[key] for key in values if key in result["scans"][0]}
        result["scans"][0].update(inner)
        return json.dumps(result | {key: values[key] for key in values if key not in inner}).encode()
    return change


def half(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize("file, change, removed", [
    *(("result.json", change, "at once") for change in (half, lambda _: b"", lambda _: b"\0" * 99)),
    *(("result.json", change, "with age") for change in (
        lambda _: b"[]", lambda _: b"{}", lambda _: b"null",
        changed(scans=[{}]), changed(scans=[1]), changed(studies={}), changed(tumor_probability="x"),
        changed(crop=[1, 2]), changed(probabilities=[]), changed(warnings=None), changed(checks=[3]),
        changed(kept="512"), changed(model={}), changed(status="lost"), changed(skipped=[None]))),
    *(("0/scan.png", change, "at once") for change in (half, lambda _: b"")),
    ("0/scan.png", lambda data: data[:-200], "once read"),
    ("0/scan.png", lambda data: data[:100] + bytes(99) + data[199:], "once read"),
    *(("0/heat.f32", change, "at once") for change in (half, lambda _: b"")),
    *(("0/identifiers.json", change, "once read") for change in (half, lambda _: b"[1]", lambda _: b"")),
])
def test_damage_on_the_disk_is_said_and_swept(tmp_path, file, change, removed, read_first):
    """Each address answers as ever or 410, with one sentence; another version's result stays."""
    app = make_app(tmp_path, CORRECTIONS="")
    client = app.test_client()
    sent = post(app, (dicom(deep(1)), "a.dcm"), (SCAN, "b.jpg"), identifiers="keep").get_json()
    url, path = f"/results/{sent['id']}", tmp_path / sent["id"] / file
    path.write_bytes(change(path.read_bytes()))
    said, names = set(), ("scan", "thumbnail", "heat", "heatmap")
    for (address, method), name in itertools.product(OPERATIONS, names if read_first else ()):
        if method == "get" and "upload_id" in address:
            at = address.format(upload_id=sent["id"], n=0, name=name) + "?evidence"
            with client.get(at, headers={"Accept": "application/json"}) as response:
                whole = file[0] == "0" or at.endswith(("scan.png?evidence", "thumbnail.png?evidence"))
                assert response.status_code == 410 or response.status_code == 200 and whole
                said |= {response.get_json()["error"]} if response.status_code == 410 else set()
    sentence = ("What is kept of this result is damaged, or was written by another version; "
                "send the scans again.")
    assert said == ({sentence} if read_first else set())
    web.sweep(tmp_path, 24)
    assert path.exists() == (removed == "with age" or removed == "once read" and not read_first)
    served = 410 if removed == "with age" else 200
    assert client.get(url).status_code == (served if path.exists() else 404)


def test_a_disk_that_fails_is_never_taken_for_a_full_one(app, client, monkeypatch):
    """What cannot be read is neither damaged nor removed, nor what the memory is too small for."""
    app.testing = False
    result = post(app, SCAN).get_json()
    path = app.uploads / result["id"] / "0" / "scan.png"
    with monkeypatch.context() as patch:
        for name in ("Image.open", "json.loads"):
            patch.setattr(f"app.{name}", lambda _: (_ for _ in ()).throw(MemoryError))
        assert client.get(result["scans"][0]["scan"]).status_code == 500
        web.sweep(app.uploads, 24)
    assert not web.is_damaged(app.uploads / result["id"])
    path.unlink()
    path.mkdir()
    response = client.get(result["scans"][0]["scan"], headers={"Accept": "application/json"})
    assert (response.status_code, response.get_json()["error"]) == (
        500, "The server's disk fails at the moment; try again later.")
    assert client.get(f"/results/{result['id']}").status_code == 200

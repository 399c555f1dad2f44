"""What the app promises to strangers: any file gets an answer or a sentence, and leaves no trace where it may not."""

import csv
import errno
import io
import json
import os
import pathlib
import shutil
import threading
import time
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
from conftest import encode, make_app, phantom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import uid
from test_studies import dataset_of, deep, dicom, series, volume, written, zipped

import app as web
from app import Limits, UnreadableScan, plain_name, read_scans, read_upload

SCAN = encode(phantom(1, lesion=True, side=64))


def deflated():
    """A DICOM file of the deflated syntax."""
    dataset = dataset_of(deep(side=48))
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    return written(dataset)


def run_length_encoded():
    dataset = dataset_of(deep(side=48))
    dataset.compress(uid.RLELossless)
    return written(dataset)


SEEDS = {
    "JPEG": encode(phantom(side=64), "JPEG"), "PNG": encode(phantom(side=64)), "TIFF": encode(phantom(side=64), "TIFF"),
    "WEBP": encode(phantom(side=64), "WEBP"), "BMP": encode(phantom(side=64), "BMP"),
    "deep PNG": encode(deep(side=64)), "DICOM": dicom(deep(side=48)), "RLE": run_length_encoded(),
    "deflated": deflated(), "NIfTI": volume((33, 34, 35)), "ZIP": zipped(a=SCAN, b=dicom(deep(side=48))),
}  # fmt: skip


# Bytes


@st.composite
def spoilt(draw, data):
    """A file with bytes changed, put in, taken out, or its end cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(("change", "insert", "remove", "cut", "large")))
        if kind == "change":
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "large":
            data[at : at + 4] = b"\xff\xff\xff\x7f"
        else:
            del data[max(at, 1) :]
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.parametrize("kind", SEEDS)
def test_a_spoilt_file_gives_scans_or_a_sentence(kind):
    @settings(max_examples=80, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(spoilt(SEEDS[kind]))
    def check(data):
        try:
            scans = read_scans(data, "scan", Limits(pixels=4_000_000, unpacked=2**22))
        except UnreadableScan as error:
            assert str(error).endswith(".") and error.status in (400, 413, 415)
        else:
            assert all(seen(scan).shape == (224, 224, 3) for scan in scans)

    check()


@pytest.mark.parametrize("syntax", [b"1.2.840.10008.1.2.9", b"1.2.3.4.5.6.7.8.9.1", b"not a syntax at all"])
def test_an_unknown_transfer_syntax_is_a_sentence(syntax):
    """Found by fuzz_reading.py."""
    data = dicom(deep(side=48)).replace(b"1.2.840.10008.1.2.1\0", syntax + b"\0")
    assert syntax in data
    with pytest.raises(UnreadableScan, match="damaged or cut off"):
        read_scans(data, "scan")


@settings(max_examples=300, deadline=5000)
@given(st.binary(max_size=400))
def test_any_bytes_give_scans_or_a_sentence(data):
    try:
        for scan in read_scans(data, "scan"):
            seen(scan)
    except UnreadableScan as error:
        assert str(error).endswith(".")


def seen(scan):
    """What the network sees of a scan, and all that is found out about it."""
    assert scan.pixels.dtype == np.uint8 and isinstance(scan.warnings, tuple)
    return web.prepare(scan.pixels, scan.box)


def bomb_of(kind, size=80 * 2**20):
    """A small file that unpacks to a large one."""
    if kind == "deflated DICOM":
        dataset = dataset_of(deep(side=48))
        dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
        data = written(dataset)
        start = 144 + int.from_bytes(data[140:144], "little")
        inner = zlib.decompressobj(-15).decompress(data[start:])
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return data[:start] + packer.compress(inner + bytes(size)) + packer.flush()
    if kind == "ZIP":
        return zipped(**{f"{n}": bytes(size // 4) for n in range(4)})
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(bytes(size)) + packer.flush()


@pytest.mark.parametrize("kind", ["deflated DICOM", "ZIP", "gzip"])
def test_a_bomb_is_refused_before_it_is_in_memory(kind):
    """What is unpacked on the way stays near the limit, measured by the process' own allocations."""
    import tracemalloc

    bomb = bomb_of(kind)
    assert len(bomb) < 2**20
    tracemalloc.start()
    with pytest.raises(UnreadableScan, match="larger than 4 MB when unpacked"):
        read_scans(bomb, "bomb", Limits(unpacked=4 * 2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20


def test_a_png_bomb_is_refused_by_its_header():
    data = encode(np.zeros((20_000, 20_000), bool))
    start = time.monotonic()
    with pytest.raises(UnreadableScan, match="20000 x 20000 pixels"):
        read_scans(data, "bomb.png")
    assert time.monotonic() - start < 1


def test_many_large_pictures_together_are_refused():
    """A thousand of 1024 x 1024 would fill the memory that a study may take."""
    page = encode(np.tile(phantom(side=256), (4, 4)))
    with pytest.raises(UnreadableScan, match="when unpacked; send it in parts"):
        read_upload([(f"{n}.png", page) for n in range(6)], Limits(unpacked=4 * 2**20))


def test_a_zip_with_a_password_is_a_sentence():
    data = bytearray(zipped(a=SCAN))
    for at in (6, data.index(b"PK\x01\x02") + 8):
        data[at] |= 1  # the flag of an encrypted member
    with pytest.raises(UnreadableScan, match="damaged or cut off"):
        read_scans(bytes(data), "secret.zip")


# Names and addresses


@pytest.mark.parametrize("name", [
    "../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "a/../b.png", "con\x00.png", "line\r\nSet-Cookie: a=b.png",
    "\u202egnp.exe", "<img src=x onerror=alert(1)>.png", "=HYPERLINK(1).png", "a" * 5000, "", " ", "\ud800.png",
])  # fmt: skip
def test_a_name_is_never_a_path_nor_markup_nor_a_header(app, send, client, name):
    kept = plain_name(name)
    assert not set(kept) & set("/\\") and len(kept) <= 100
    assert all(unicodedata.category(c)[0] != "C" for c in kept)
    response = send((SCAN, name.encode("utf-8", "replace").decode() or "scan"))
    if response.status_code == 200:
        address = f"/results/{response.get_json()['id']}"
        assert "<img src=x" not in client.get(address).text
        assert "Set-Cookie" not in client.get(f"{address}.csv").headers
        (row,) = csv.DictReader(io.StringIO(client.get(f"{address}.csv").text))
        assert not row["file"].startswith("=")


def test_names_in_a_zip_are_not_paths(tmp_path):
    scans = read_scans(zipped(**{"../../evil.png": SCAN, "/abs.png": SCAN}), "scans.zip")
    assert [scan.file for scan in scans] == ["evil.png", "abs.png"]


def test_ids_cannot_be_guessed(send):
    ids = {send((SCAN, "a.png")).get_json()["id"] for _ in range(5)}
    assert len(ids) == 5 and all(len(i) == 22 for i in ids)


@pytest.mark.parametrize("path", [
    "/results/..%2f..%2fapp.py", "/results/../app.py", "/results/%2e%2e/app.py", "/static/..%2fapp.py",
    "/results/.hiddenhiddenhiddenhid", "/results/" + "a" * 22 + "/../../x", "/results/" + "a" * 22 + "/-1/scan.png",
    "/results/" + "a" * 22 + "/99999999999999999999/scan.png", "/results/%00" + "a" * 21,
])  # fmt: skip
def test_no_address_leads_out_of_the_results(client, path):
    assert client.get(path).status_code == 404


# Headers and other sites


def test_every_answer_carries_the_headers_of_a_careful_server(client, send):
    result = send((SCAN, "a.png")).get_json()
    for path in ("/", "/model", f"/results/{result['id']}", "/nowhere", "/static/app.js"):
        with client.get(path) as response:
            headers = response.headers
        policy = headers["Content-Security-Policy"]
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
        assert headers["Referrer-Policy"] == "same-origin"
        assert path.startswith("/static") or headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("headers, status", [
    ({}, 303), ({"Sec-Fetch-Site": "same-origin"}, 303), ({"Origin": "http://localhost"}, 303),
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
])  # fmt: skip
def test_forms_of_other_sites_are_refused(client, send, headers, status):
    result = send((SCAN, "a.png")).get_json()
    data = {"file": (io.BytesIO(SCAN), "a.png")}
    assert client.post("/", data=data, headers=headers).status_code == status
    assert client.post(f"/results/{result['id']}/delete", headers=headers).status_code == status


def test_only_the_origins_set_may_upload_from_a_page_of_theirs(tmp_path):
    client = make_app(tmp_path, CORS_ORIGINS="https://pacs.example").test_client()
    for origin, status in (("https://pacs.example", 200), ("https://evil.example", 403)):
        data = {"file": (io.BytesIO(SCAN), "a.png")}
        headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        assert client.post("/upload", data=data, headers=headers).status_code == status


# Faults


def test_where_uploads_are_read_only_the_sentence_says_so(app, send, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "mkdir", read_only)
        response = send((SCAN, "a.png"))
    assert (response.status_code, response.get_json()["error"]) == (
        503, "The server cannot keep results at the moment; try again later.")
    assert send((SCAN, "a.png")).status_code == 200


def test_a_folder_of_uploads_that_vanished_is_made_again(app, send):
    shutil.rmtree(app.config["UPLOADS"])
    assert send((SCAN, "a.png")).status_code == 200


@pytest.mark.parametrize("at", ["keep_scan", "write_result"])
def test_an_upload_that_was_killed_midway_is_never_served(app, client, send, monkeypatch, at):
    """As if the power went: nothing tidies up, and no half result answers."""
    monkeypatch.setattr(f"app.{at}", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("app.shutil.rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        send((SCAN, "a.png"))
    (half,) = pathlib.Path(app.config["UPLOADS"]).iterdir()
    assert half.name.startswith(".")
    assert client.get(f"/results/{half.name[1:]}").status_code == 404
    monkeypatch.undo()
    os.utime(half, (0, 0))
    web.sweep(pathlib.Path(app.config["UPLOADS"]), 24)
    assert not half.exists()


def test_two_workers_on_one_folder_see_each_others_results(tmp_path):
    first, second = (make_app(tmp_path) for _ in range(2))
    data = {"file": (io.BytesIO(SCAN), "a.png")}
    result = first.test_client().post("/upload", data=data).get_json()
    assert second.test_client().get(f"/results/{result['id']}.json").get_json() == result
    sweeping = [threading.Thread(target=web.sweep, args=(tmp_path, 0)) for _ in range(4)]
    for thread in sweeping:
        thread.start()
    for thread in sweeping:
        thread.join()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hours", [-25, 25])
def test_a_clock_that_jumps_keeps_nothing_for_ever(app, client, send, hours):
    result = send((SCAN, "a.png")).get_json()
    folder = pathlib.Path(app.config["UPLOADS"]) / result["id"]
    os.utime(folder, (time.time() + hours * 3600,) * 2)
    assert client.get(f"/results/{result['id']}").status_code == 404
    web.sweep(folder.parent, 24)
    assert not folder.exists()


def test_the_log_holds_no_name_of_a_file(app, send, caplog):
    caplog.set_level(0)
    send((SCAN, "doe_jane.png"))
    send((b"junk", "doe_jane.txt"))
    send((zipped(**series(3)), "doe_jane.zip"))
    assert "doe_jane" not in caplog.text


# The model file is data


def test_an_old_keras_does_not_load_a_model(monkeypatch):
    monkeypatch.setattr("keras.__version__", "3.10.0")
    with pytest.raises(web.ModelError, match="Keras 3.10.0 can be made to run code by a model file"):
        web.keras_model("model.keras")


def test_a_model_with_code_in_it_is_refused(tmp_path):
    """Keras' safe mode: a lambda layer in the archive's configuration is not run."""
    config = {"module": "keras.layers", "class_name": "Lambda", "registered_name": None, "config": {
        "name": "l", "function": {"class_name": "__lambda__", "config": {"code": "4wAA", "defaults": None,
                                                                          "closure": None}}}}  # fmt: skip
    with zipfile.ZipFile(tmp_path / "evil.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.0"}))
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(web.ModelError, match="is not a Keras model"):
        web.keras_model(tmp_path / "evil.keras")

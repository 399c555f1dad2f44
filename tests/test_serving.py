"""What the app promises under load: one load a worker, bounded waiting, slow clients that hold nobody up."""

import contextlib
import io
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, encode, make_app, phantom
from werkzeug.serving import make_server

import app as web

SCAN = encode(phantom(1, lesion=True), "JPEG")


@contextlib.contextmanager
def served(app):
    """The port of an app that is served on loopback, a thread a request."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def held(app, monkeypatch):
    """An app for two waiting scans whose network waits until the event is set."""
    go, classify = threading.Event(), app.classifier.classify
    monkeypatch.setattr(app.classifier, "classify", lambda scans: go.wait(30) and classify(scans))
    app.queue.most = 2
    return app, go


def post(app, *files):
    """The response to files sent to the API."""
    return app.test_client().post("/upload", data={"file": [(io.BytesIO(data), "scan.jpg") for data in files]})


def until(condition, seconds=20):
    """Wait for a condition; fails if it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_who_finds_the_queue_full_is_told_at_once_when_to_come_back(held):
    app, go = held
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, app, SCAN) for _ in range(2)]
        until(lambda: app.queue.waiting == 2)
        start = time.monotonic()
        refused = post(app, SCAN)
        assert time.monotonic() - start < 1
        go.set()
        assert [answer.result().status_code for answer in waiting] == [200, 200]
    assert (refused.status_code, int(refused.headers["Retry-After"]) >= 1) == (503, True)
    assert post(app, SCAN).status_code == 200


def test_scans_are_counted_not_uploads(held):
    """An upload of three scans is taken while there is a place; the next one is not."""
    app, go = held
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, app, SCAN, SCAN, SCAN)
        until(lambda: app.queue.waiting == 3)
        assert post(app, SCAN).status_code == 503
        go.set()
        assert waiting.result().status_code == 200
    assert app.queue.waiting == 0


def test_a_study_shuts_nobody_out_while_it_is_read(app, monkeypatch):
    """More files than are answered at once take one place: no network waits for them."""
    asked = []
    places = app.queue.places
    monkeypatch.setattr(app.queue, "places", lambda scans, sure=False: asked.append(scans) or places(scans, sure))
    assert post(app, *[SCAN] * (app.config["MAX_AT_ONCE"] + 1)).status_code == 202
    assert asked == [1]


def test_a_file_that_fails_gives_its_place_back(app):
    assert post(app, b"I am a text file").status_code == 415
    assert app.queue.waiting == 0


def test_a_slow_client_holds_nobody_up(tmp_path):
    """With a single place, a scan is answered while another visitor's upload drips in."""
    app = make_app(tmp_path, MAX_WAITING=1)
    with served(app) as port, socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n"
                     b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
        time.sleep(0.3)
        assert post(app, SCAN).status_code == 200


def test_many_scans_get_the_answers_that_each_gets_alone(classifier, monkeypatch):
    monkeypatch.setattr(classifier, "gate", None)  # a phantom is no brain MRI
    scans = [web.read_scans(encode(phantom(seed, lesion=seed % 2)), "scan.png")[0] for seed in range(6)]
    for together, (alone,) in zip(classifier.classify(scans), (classifier.classify([scan]) for scan in scans)):
        assert together.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        assert np.allclose(together.heat, alone.heat, atol=1e-3)


def test_results_are_removed_without_a_visitor(tmp_path):
    """What is older than the retention goes by itself, in a few seconds where that is short."""
    app = make_app(tmp_path / "uploads", RETENTION_HOURS=1 / 3600)
    post(app, SCAN)
    folder = pathlib.Path(app.config["UPLOADS"])
    assert list(folder.iterdir())
    until(lambda: not list(folder.iterdir()))


COUNTED = """
import os, sys
sys.path.insert(0, {root!r})
import app
load = app.Classifier.__init__
def counted(self, *args):
    with open({log!r}, "a") as log:
        log.write(f"{{os.getpid()}}\\n")
    load(self, *args)
app.Classifier.__init__ = counted
application = app.create_app({{"UPLOADS": {uploads!r}}})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="gunicorn runs on Unix")
def test_under_gunicorn_each_worker_loads_once_and_never_tensorflow(tmp_path):
    log = tmp_path / "loads"
    (tmp_path / "counted.py").write_text(
        COUNTED.format(root=str(ROOT), log=str(log), uploads=str(tmp_path / "uploads")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--threads", "8", "--bind", f"127.0.0.1:{port}",
               "counted"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        send = web.sender(f"http://127.0.0.1:{port}/upload", SCAN)
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


def test_benchmark_prints_every_line(app, tmp_path):
    (tmp_path / "scan.jpg").write_bytes(SCAN)
    app.config["MAX_AT_ONCE"] = 1  # of the server that it starts as well: two scans are a study
    run = app.test_cli_runner().invoke(args=["benchmark", str(tmp_path / "scan.jpg"), "--rounds", "1", "--scans", "2"])
    assert run.exit_code == 0, run.output
    for line in ("start to first answer", "one upload, end to end", "decode", "prepare", "checks",
                 "network and verdict", "store", "heatmap, when asked for", "bare interpreter", "64 scans at once",
                 "memory, after 2 more", "a study of   2, as a ZIP"):  # fmt: skip
        assert line in run.output


def test_benchmark_measures_a_drawn_head_where_no_scan_is_given():
    (scan,) = web.read_scans(web.drawn_head(), "drawn")
    assert scan.pixels.shape == (512, 512) and web.contrast(scan.pixels) > 100


def test_the_crew_is_hired_once_however_many_ask(monkeypatch):
    classifier, hired = web.Classifier(ROOT / "model.keras", threads=2), []
    monkeypatch.setattr("app.litert", lambda *_: time.sleep(0.05) or hired.append(1))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: classifier.crew(), range(8)))
    assert len(hired) == 2

"""Measure the app: python tests/benchmark.py [SCAN…] [--load | --only parts naive load archive]"""

import argparse
import contextlib
import json
import os
import pathlib
import tempfile
import time
import urllib.request
from itertools import count, cycle

import numpy as np
from load import MODEL, crowd, load, memory, server
from phantoms import encode, phantom, sender, zipped

import app as web

NAIVE = """
import os, flask, keras, numpy
from PIL import Image
app, model = flask.Flask(__name__), keras.models.load_model(os.environ["FLASK_MODEL"])
@app.post("/upload")
def upload():
    picture = Image.open(flask.request.files["file"]).convert("RGB").resize((224, 224))
    scan = numpy.asarray(picture, "float32")[None]
    return {"probabilities": model.predict(scan, verbose=0)[0].tolist()}
"""


def timed(functions, rounds):
    """{name: ms (rounds,)} of functions called in turn; a first round does not count."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def parts_of_an_upload(data, folder):
    """{name: function} of the parts of an upload, in order, and the bare network."""
    classifier, folders = web.Classifier(MODEL, os.cpu_count()), map(str, count())
    (scan, *_) = web.read_scans(data, "scan")
    prepared, classifier.gate = web.prepare(scan.pixels)[None], None
    (finding,) = classifier.classify([scan])
    entry = web.scan_entry("", 0, scan, finding)

    def store():
        web.keep_scan(folder / next(folders), scan, finding)
        web.write_result(folder, {"scans": [entry]})
    store()
    return {
        "  read and check": lambda: web.read_scans(data, "scan")[0].checks,
        "  prepare": lambda: web.prepare(scan.pixels, scan.box),
        "  network and verdict": lambda: classifier.classify([scan]),
        "  store": store,
        "heatmap, when asked for": lambda: web.png_of(web.drawn_heatmap(folder / "0", entry, True)),
        "bare interpreter": lambda: classifier.infer(prepared),
    }


def parts(files, given, folder):
    """One upload and its parts, memory over many, a study."""
    with server(folder, files[0]) as (process, url, seconds):
        send = sender(url, files[0])
        print(f"start to first answer {seconds:20.2f} s")
        functions = {"one upload, end to end": send} | parts_of_an_upload(files[0], folder)
        times = timed(functions, given.rounds)
        floor = np.median(times["bare interpreter"])
        for name, values in times.items():
            p50, p95 = np.quantile(values, (0.5, 0.95))
            ratio = f"   {p50 / floor:.2f} x the bare interpreter" if name[:3] == "one" else ""
            print(f"{name:24} p50 {p50:6.1f}   p95 {p95:6.1f} ms{ratio}")
        before = memory(process)
        for _ in range(given.scans):
            send()
        print(f"memory, after {given.scans} more {before:12.1f}, {memory(process):.1f} MiB")
        archive = zipped(**dict(zip(map(str, range(given.slices)), cycle(files))))
        start, result = time.monotonic(), json.loads(sender(url, archive)())
        while result["status"] == "running":
            time.sleep(0.1)
            page = url.replace("upload", f"results/{result['id']}.json")
            result = json.load(urllib.request.urlopen(page))
        rate = len(result["scans"]) / (time.monotonic() - start)
        print(f"a study of {given.slices:3}, as a ZIP {rate:17.1f} scans a second")


def naive(files, given, folder):
    """Answers a second beside a plain app, asked in turn, and the memory of both."""
    (folder / "naive.py").write_text(NAIVE)
    with contextlib.ExitStack() as stack:
        urls = []
        for name in ("app.py", str(folder / "naive.py")):
            process, url, seconds = stack.enter_context(server(folder, files[0], app=name))
            print(f"{name}: first answer after {seconds:.2f} s, {memory(process):.0f} MiB")
            urls.append(url)
        for clients in (1, 8):
            asked = [len(crowd(files, url, clients, given.seconds / 6)) for url in urls * 3]
            ours, theirs = np.median(np.reshape(asked, (3, 2)), axis=0)
            print(f"{clients} at a time: {ours / theirs:.1f} times as many answers")


def archive(files, given, folder):
    """`flask classify` with one and with two workers."""
    paths = [folder / f"{n}.jpg" for n in range(given.slices)]
    for path, data in zip(paths, cycle(files)):
        path.write_bytes(data)
    for workers in (1, 2):
        with web.cluster(None, workers) as client:
            client.run(lambda: web.worker_classifier(MODEL).sha256)  # loaded before the clock runs
            start = time.perf_counter()
            web.fill(folder / f"{workers}.csv", paths, ["path"], client, MODEL, web.LIMITS)
            seconds = time.perf_counter() - start
        print(f"{workers} workers of `flask classify`: {len(paths) / seconds:.1f} slices a second")


def main(arguments=None):
    measures = {"parts": parts, "naive": naive, "load": load, "archive": archive}
    parser = argparse.ArgumentParser(description="Measure the app on this machine.")
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="pictures; phantoms without")
    parser.add_argument("--only", nargs="+", choices=measures, default=measures)
    parser.add_argument("--load", action="store_const", dest="only", const=["load"])
    defaults = {"rounds": 50, "scans": 1000, "slices": 150, "seconds": 60, "idle": 500}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(arguments)
    drawn = (encode(phantom(n, n % 2, 512), "JPEG", quality=90) for n in range(8))
    files = [path.read_bytes() for path in given.files] or list(drawn)
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            measures[name](files, given, pathlib.Path(folder))


if __name__ == "__main__":
    main()

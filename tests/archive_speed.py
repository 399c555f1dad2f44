"""Measure `flask classify` on this machine: python tests/archive_speed.py [SCAN…] --slices 5000

Prints slices a second of the same files with one and with two workers and sent one by one to POST /upload, each asked
in turn, twice; then the memory of one worker while it classifies so many slices.
"""

import argparse
import contextlib
import pathlib
import tempfile
import threading
import time
from itertools import cycle, islice

import numpy as np
import psutil
from conftest import ROOT, encode, make_app, phantom

import app as web


@contextlib.contextmanager
def workers(count):
    """A Dask client of so many workers that have the model loaded."""
    with web.cluster(None, count) as client:
        client.run(lambda model: web.worker_classifier(model).sha256, str(ROOT / "model.keras"))
        yield client


def classified(files, client, folder):
    """Slices a second of `flask classify` on a running cluster."""
    journal = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "results.csv"
    columns = web.columns_of(web.worker_classifier(str(ROOT / "model.keras")).labels)
    start = time.perf_counter()
    web.fill(journal, files, columns, client, str(ROOT / "model.keras"), web.LIMITS)
    return len(files) / (time.perf_counter() - start)


def uploaded(files, address):
    """Slices a second of the files sent one by one to the server."""
    start = time.perf_counter()
    for file in files:
        web.sender(address, file.read_bytes())()
    return len(files) / (time.perf_counter() - start)


@contextlib.contextmanager
def watched(pid, seconds=1):
    """The resident memory of a process in MiB, a value a second, in a list that fills."""
    memory, over = [], threading.Event()

    def watch():
        while not over.wait(seconds):
            memory.append(psutil.Process(pid).memory_info().rss / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("scans", nargs="*", type=pathlib.Path, help="pictures of one slice each; drawn ones without")
    parser.add_argument("--slices", type=int, default=5000, help="while the memory of a worker is watched")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, make_app(folder).app_context():
        files = given.scans or drawn(pathlib.Path(folder), 160)
        rates = {"POST /upload": [], "one worker": [], "two workers": []}
        for _ in range(2):
            with web.own_server(folder, ROOT / "app.py") as (_, address):
                web.wait_for(web.sender(address, files[0].read_bytes()))
                rates["POST /upload"].append(uploaded(files, address))
            for count, name in enumerate(("one worker", "two workers"), 1):
                with workers(count) as client:
                    rates[name].append(classified(files, client, folder))
        for name, values in rates.items():
            print(f"{name}: {np.mean(values):.2f} slices a second ({', '.join(f'{v:.2f}' for v in values)})")
        print(f"two workers against one: {np.mean(rates['two workers']) / np.mean(rates['one worker']):.2f} times")
        with workers(1) as client:
            (pid,) = client.run(lambda: psutil.Process().pid).values()
            with watched(pid) as memory:
                classified(list(islice(cycle(files), given.slices)), client, folder)
        tenth = max(1, len(memory) // 10)
        print(f"a worker over {given.slices} slices: median of the first tenth of the time "
              f"{np.median(memory[:tenth]):.0f} MiB, of the last {np.median(memory[-tenth:]):.0f}, "
              f"most {max(memory):.0f}")  # fmt: skip


def drawn(folder, count):
    """The paths of so many drawn scans of 512 x 512."""
    paths = [folder / f"{n}.jpg" for n in range(count)]
    for n, path in enumerate(paths):
        path.write_bytes(encode(phantom(n, n % 2, 512), "JPEG"))
    return paths


if __name__ == "__main__":
    main()

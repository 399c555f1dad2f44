"""Load the app under gunicorn on loopback and print how it bore it: python tests/load.py [SCAN…] --seconds 60

Clients send scans mixed with broken files without a pause, first 8 of them, then 32. Prints answers a second, the
99th percentile of their times, how often each status was given, and the memory before and after.
"""

import argparse
import contextlib
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections import Counter

import numpy as np
import psutil
from conftest import ROOT, encode, phantom

import app as web


@contextlib.contextmanager
def gunicorn(folder, workers, threads):
    """The app under gunicorn, as (process, address of the API)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--workers", str(workers), "--threads", str(threads),
               "--bind", f"127.0.0.1:{port}", "app:create_app()"]  # fmt: skip
    settings = os.environ | {"FLASK_UPLOADS": folder}
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stderr=subprocess.DEVNULL)
    try:
        yield process, f"http://127.0.0.1:{port}/upload"
    finally:
        process.terminate()
        process.wait()


def memory_of(process):
    """Resident memory of a process and its children in MiB."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 2**20


def client(files, address, end, times, statuses):
    """Send files one after the other until the end; what was answered, and after how long."""
    while time.monotonic() < end:
        start = time.monotonic()
        try:
            web.sender(address, random.choice(files))()
            status = 200
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError as error:
            status = type(error).__name__
        times.append(time.monotonic() - start)
        statuses[status] += 1
        if status == 503:
            time.sleep(1)  # as Retry-After asks


def loaded(files, address, clients, seconds):
    """(times, statuses) of so many clients for so many seconds."""
    times, statuses, end = [], Counter(), time.monotonic() + seconds
    crowd = [threading.Thread(target=client, args=(files, address, end, times, statuses)) for _ in range(clients)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    return np.array(times), statuses


def main():
    parser = argparse.ArgumentParser(description="Load the app on loopback.")
    parser.add_argument("scans", nargs="*", type=pathlib.Path, help="pictures; drawn ones without")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=40)
    given = parser.parse_args()
    good = [path.read_bytes() for path in given.scans] or [encode(phantom(n, n % 2, 512), "JPEG") for n in range(8)]
    broken = [data[: len(data) // 2] for data in good[:2]] + [b"I am a text file", os.urandom(20_000)]
    files = good * max(1, 3 * len(broken) // len(good)) + broken  # about one in four is broken
    with tempfile.TemporaryDirectory() as folder, gunicorn(folder, given.workers, given.threads) as (process, address):
        web.wait_for(web.sender(address, good[0]))
        for clients in (8, 32):
            before = memory_of(process)
            times, statuses = loaded(files, address, clients, given.seconds)
            p50, p99 = np.quantile(times, (0.5, 0.99))
            print(f"{clients} clients: {len(times) / given.seconds:.1f} answers a second, p50 {1000 * p50:.0f} ms, "
                  f"p99 {1000 * p99:.0f} ms, statuses {dict(statuses)}, "
                  f"memory {before:.0f} to {memory_of(process):.0f} MiB")


if __name__ == "__main__":
    main()

"""A server under load, faults and bad input: what it answers, and what it loses."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import cycle, islice

import numpy as np
import psutil
from phantoms import ROOT, deep, dicom, encode, free_port, phantom, sender, series, volume, zipped

MODEL = str(ROOT / "model.keras")
FLASK = "-m flask --app {app} run --port {port}"
GUNICORN = "-m gunicorn --workers 1 --threads 640 --bind 127.0.0.1:{port} app:create_app()"
SMALL_DISK = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=4m none "$0" && exec "$@"')
ROW = "| {} | {} | {} | {} |"


@contextlib.contextmanager
def server(folder, data, command=FLASK, app="app.py", around=()):
    """(process, URL of the API, seconds to its first answer) of a server, results in `folder`."""
    port, start = free_port(), time.monotonic()
    command = [*around, sys.executable, *command.format(app=app, port=port).split()]
    settings = os.environ | {"FLASK_UPLOADS": str(folder), "FLASK_MODEL": MODEL}
    url, quiet = f"http://127.0.0.1:{port}/upload", subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=quiet, stderr=quiet)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                sender(url, data)()
                break
            time.sleep(0.01)
        yield process, url, time.monotonic() - start
    finally:
        process.terminate()
        process.wait()


def memory(process):
    """Resident memory of a process and its children, MiB."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    return sum(member.memory_info().rss for member in family) / 2**20


def fetch(url):
    """The body of an answer."""
    with urllib.request.urlopen(url) as response:
        return response.read()


def ask(send):
    """(seconds, status, id) of an upload; the status of a connection that broke is "none"."""
    start, status, name = time.monotonic(), 200, None
    try:
        name = json.loads(send()).get("id")
    except (OSError, HTTPException) as error:
        status = getattr(error, "code", "none")
    return time.monotonic() - start, status, name


def crowd(files, url, clients, seconds):
    """What ask() gives for so many clients, who send one file after the other."""
    answers, end = [], time.monotonic() + seconds

    def client(_):
        while time.monotonic() < end:
            answers.append(ask(sender(url, random.choice(files))))
            time.sleep(answers[-1][1] in (503, "none"))  # as Retry-After asks

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return answers


def load(files, given, folder):
    """Load, faults and bad input, and whether what was answered is there afterwards, as a table."""
    good, seconds, idle = [*islice(cycle(files), 9)], given.seconds, []
    mixed = [*good, files[0][:5000], b"I am a text file", os.urandom(20_000)]
    kinds = [*files, dicom(deep()), volume((40, 40, 12)), zipped(**series(3)), encode(phantom())]
    spoilt = [spoil(random.choice(kinds)) for _ in range(300)]
    print(ROW.format("tried", "answers", "99 % within", "answered, but gone afterwards"))
    print(ROW.format(*["---"] * 4))

    def tried(what, files, clients, more=()):
        answers = crowd(files, url, clients, seconds)
        within = np.quantile([answer[0] for answer in answers], 0.99)
        _, statuses, ids = zip(*answers, *(each.result() for each in more))
        counts = ", ".join(f"{n} times {status}" for status, n in Counter(statuses).most_common())
        pages = (url.replace("upload", f"results/{name}.json") for name in filter(None, ids))
        gone = sum(ask(lambda: fetch(page))[1] != 200 for page in pages)  # noqa: B023  at once
        print(ROW.format(what, counts, f"{within:.2f} s", gone), flush=True)

    slow = given.idle // 10
    with (
        server(folder / "a", files[0], GUNICORN) as (process, url, _),
        ThreadPoolExecutor(slow + 1) as pool,
    ):
        tried("8 clients, every fourth file broken", mixed, 8)
        tried("32 clients, every fourth file broken", mixed, 32)
        address = "127.0.0.1", int(url.split(":")[2].split("/")[0])
        for n in range(given.idle):  # every other one has begun a request
            idle.append(socket.create_connection(address))
            idle[-1].sendall(b"POST /upload HTTP/1.1\r\n" * (n % 2))
        ends = np.linspace(seconds / 2, seconds, slow)
        drips = [pool.submit(ask, sender(url, files[0], end)) for end in ends]
        tried(f"8 clients, {given.idle} idle and {slow} slow ones", files, 8, drips)
        for each in idle:
            each.close()
        tried("8 clients, spoilt files of every kind", spoilt, 8)
        most = memory(process)
        (worker,) = psutil.Process(process.pid).children()
        killing = pool.submit(lambda: time.sleep(seconds / 3) or worker.kill())
        tried("8 clients, the worker killed meanwhile (`kill -9`)", files, 8)
        killing.result()
    (folder / "b").mkdir()
    with server(folder / "b", files[0], around=(*SMALL_DISK, folder / "b")) as (process, url, _):
        if process.poll() is None:
            tried("2 clients, a disk of 4 MB", files, 2)
    print(f"memory of the first server, before it was killed: {most:.0f} MiB")


def spoil(data):
    """A file cut off, or with some bytes changed."""
    spoilt = bytearray(data)
    for at in random.choices(range(len(data)), k=random.choice((1, 10, 100))):
        spoilt[at] = random.randrange(256)
    return bytes(spoilt[: random.choice((len(data), random.randrange(len(data))))])

"""Pit the app against a plain Flask + `model.predict` app with the same weights: python tests/versus_naive.py [SCAN]

Both run under `flask run` on this machine and are asked in turn, by one client and by eight.
"""

import argparse
import contextlib
import pathlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
from conftest import ROOT, make_app

import app as web


def requests_a_second(send, clients, requests):
    """How many requests a second a server answers to so many clients."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda _: send(), range(requests)))
    return requests / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("scan", nargs="?", type=pathlib.Path, help="a picture; a drawn one without")
    parser.add_argument("--requests", type=int, default=40, help="to each server in each of three rounds")
    given = parser.parse_args()
    data = given.scan.read_bytes() if given.scan else web.drawn_head()
    with tempfile.TemporaryDirectory() as folder, make_app(folder, MAX_WAITING=64).app_context():
        servers = {"this app": ROOT / "app.py", "Flask + model.predict": ROOT / "tests" / "naive_app.py"}
        compare(servers, data, folder, given.requests)


def compare(servers, data, folder, requests):
    """Start the servers, ask them in turn and print what each needs, and the ratios."""
    with contextlib.ExitStack() as stack:
        send, process = {}, {}
        for name, source in servers.items():
            process[name], address = stack.enter_context(web.own_server(folder, source))
            send[name] = web.sender(address, data)
            print(f"{name}: start to first answer {web.wait_for(send[name]):.2f} s")
        for clients in (1, 8):
            rates = {name: [] for name in servers}
            for _ in range(3):
                for name in servers:
                    rates[name].append(requests_a_second(send[name], clients, requests))
            ours, naive = (np.median(values) for values in rates.values())
            print(f"{clients} at a time: {ours:.1f} and {naive:.1f} answers a second, {ours / naive:.1f} times as many")
        for name in servers:
            print(f"{name}: memory {psutil.Process(process[name].pid).memory_info().rss / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

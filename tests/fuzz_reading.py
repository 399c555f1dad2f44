"""A coverage-guided fuzz run over read_scans(): python tests/fuzz_reading.py --seconds 600 [FOLDER of findings]

Not part of the test command; it needs `pip install atheris` (Google, Apache 2.0, Linux). Starts from the files of
test_hostile.py. What raises anything but UnreadableScan is left in the folder as crash-…
"""

import argparse
import pathlib
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["app", "PIL", "pydicom", "nibabel", "zipfile"]):
    from conftest import ROOT  # noqa: F401  (puts the app on the path)
    from test_hostile import SEEDS, seen

    from app import Limits, UnreadableScan, read_scans

LIMITS = Limits(pixels=1_000_000, scans=64, files=64, unpacked=2**23)


def read(data):
    """One input of the fuzzer; a sentence is as good as a scan."""
    try:
        for scan in read_scans(data, "scan", LIMITS):
            seen(scan)
    except UnreadableScan as error:
        assert str(error).endswith("."), error


def main():
    parser = argparse.ArgumentParser(description="Fuzz read_scans().")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("folder", nargs="?", default=".", help="where findings are left")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as corpus:
        for name, data in SEEDS.items():
            (pathlib.Path(corpus) / name.replace(" ", "_")).write_bytes(data)
        options = [f"-max_total_time={given.seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=60000",
                   f"-artifact_prefix={given.folder}/"]  # fmt: skip
        atheris.Setup([sys.argv[0], *options, corpus], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

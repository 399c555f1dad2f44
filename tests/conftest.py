"""Fixtures that several test modules share."""

import csv
import functools
import json
import os
import pathlib

import pytest
from phantoms import ROOT, make_app, post, shipped

import app as web

DATA = pathlib.Path(os.environ.get("DATA", ROOT.parent / "shared" / "data" / "brain-mri"))


@pytest.fixture
def app(tmp_path):
    return make_app(tmp_path / "uploads")


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def uploads(app):
    """The names in the folder of uploads, as a function."""
    return lambda: [path.name for path in app.uploads.iterdir()]


@pytest.fixture
def send(app):
    """POST files, (bytes, name) each, to a URL of the app; to the API unless told."""
    return functools.partial(post, app)


@pytest.fixture(scope="session")
def real_scans(card):
    """Real scans, ten of each label: {label: paths}; skips, and says so, without the data."""
    if not (DATA / "manifest.csv").exists():
        pytest.skip(f"no manifest.csv in {DATA}: set DATA to the folder of the brain MRI pictures")
    with open(DATA / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    by_label = {
        label: [DATA / row["path"] for row in rows if row["label"] == label]
        for label in card["labels"]
    }
    return {label: paths[:: len(paths) // 10][:10] for label, paths in by_label.items()}


@pytest.fixture(scope="session")
def card():
    """The shipped model's card."""
    return json.loads(web.read_archive(ROOT / "model.keras")["card.json"])


@pytest.fixture(scope="session")
def classifier():
    """The shipped model, for tests that only read."""
    return shipped()

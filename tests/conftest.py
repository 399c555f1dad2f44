"""Fixtures, and the phantoms that stand in for scans: no patient's picture is in the tests."""

import csv
import io
import json
import os
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get("DATA", ROOT.parent / "shared" / "data" / "brain-mri"))
sys.path.insert(0, str(ROOT))

import app as web  # noqa: E402


def phantom(seed=0, lesion=False, side=256):
    """A drawn axial head, uint8 (side, side): skull, uneven tissue, with or without a bright lesion."""
    random = np.random.default_rng(seed)
    centre, radii = side * random.uniform(0.46, 0.54, 2), side * random.uniform((0.28, 0.36), (0.36, 0.44))

    def ellipse(scale, level, at=(0, 0)):
        middle, reach = centre + np.array(at) * radii, radii * scale
        draw.ellipse([*(middle - reach), *(middle + reach)], fill=level)

    coarse = Image.fromarray(random.integers(20, 200, (9, 9), dtype=np.uint8))
    tissue = coarse.resize((side, side), Image.Resampling.BICUBIC)
    head, brain = (Image.new("L", (side, side)) for _ in range(2))
    draw = ImageDraw.Draw(head)
    ellipse(1, 200)
    ellipse(0.93, 30)
    draw = ImageDraw.Draw(brain)
    ellipse(0.86, 255)
    head.paste(tissue, mask=brain)
    if lesion:
        draw = ImageDraw.Draw(head)
        ellipse(random.uniform(0.2, 0.32), 250, random.uniform(-0.4, 0.4, 2))
    noise = random.normal(0, 4, (side, side))
    soft = np.asarray(head.filter(ImageFilter.GaussianBlur(1)), np.float32)
    return (soft + noise * (soft > 10)).clip(0, 255).astype(np.uint8)


def encode(pixels, kind="PNG", **options):
    """A picture file of this kind as bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def make_app(folder, **overrides):
    """The app over the shipped model, its gate open so that a phantom gets an answer."""
    app = web.create_app({"UPLOADS": str(folder), "TESTING": True, **overrides})
    app.classifier.gate = None
    return app


@pytest.fixture
def app(tmp_path):
    return make_app(tmp_path / "uploads")


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def uploads(app):
    """The names in the folder of uploads, as a function."""
    return lambda: [path.name for path in pathlib.Path(app.config["UPLOADS"]).iterdir()]


@pytest.fixture
def send(client):
    """POST files, (bytes, name) each, to an address of the app; to the API unless told."""

    def post(*files, to="/upload"):
        return client.post(to, data={"file": [(io.BytesIO(data), name) for data, name in files]})

    return post


@pytest.fixture(scope="session")
def real_scans(card):
    """Real scans, ten of each label: {label: paths}; skips, and says so, where the data is not at hand."""
    if not (DATA / "manifest.csv").exists():
        pytest.skip(f"no manifest.csv in {DATA}: set DATA to the folder of the brain MRI pictures")
    with open(DATA / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    by_label = {label: [DATA / row["path"] for row in rows if row["label"] == label] for label in card["labels"]}
    return {label: paths[:: len(paths) // 10][:10] for label, paths in by_label.items()}


@pytest.fixture(scope="session")
def card():
    """The shipped model's card."""
    return json.loads(web.read_archive(ROOT / "model.keras")["card.json"])


@pytest.fixture(scope="session")
def classifier():
    """The shipped model, loaded once for all tests that only read."""
    return web.Classifier(ROOT / "model.keras", threads=2)

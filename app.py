"""Reads a brain MRI and says whether it shows a tumor, of which kind, how sure it is and where it looked.

`flask run` serves a form for people and `POST /upload` for programs. The file reads in the order
in which data flows: settings, reading, classifier, store, pages, commands. Not a medical device.
"""

import contextlib
import csv
import datetime
import hashlib
import io
import json
import os
import pathlib
import queue
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import click
import numpy as np
from flask import (
    Flask,
    Response,
    abort,
    current_app,
    jsonify,
    redirect,
    render_template,
    request,
    send_file,
    url_for,
)
from flask.cli import with_appcontext
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from scipy import ndimage
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import HTTPException, InternalServerError, RequestEntityTooLarge
from werkzeug.test import encode_multipart

HERE = pathlib.Path(__file__).parent

# ------------------------------------------------------------------------------ settings

DEFAULTS = {
    "MODEL": str(HERE / "model.keras"),
    "UPLOADS": str(HERE / "uploads"),
    "MAX_CONTENT_LENGTH": 32 * 1024 * 1024,  # bytes of one request
    "MAX_FILES": 32,  # of one request
    "MAX_SCANS": 256,  # in the files of one request
    "MAX_PIXELS": 50_000_000,  # pixels of one picture, before it is decoded
    "MAX_WAITING": 16,  # scans at work or waiting for the network; once it is reached: 503
    "RETENTION_HOURS": 24.0,
    "THREADS": os.cpu_count() or 1,
    "CORS_ORIGINS": "",  # separated by commas
}


def configure(app, overrides):
    """Fill app.config from DEFAULTS, then from FLASK_... in the environment, then from `overrides`.

    Raises click.BadParameter if a value has not the type of its default.
    """
    app.config.from_mapping(DEFAULTS)
    app.config.from_prefixed_env()
    app.config.from_mapping(overrides)
    for key, default in DEFAULTS.items():
        try:
            app.config[key] = type(default)(app.config[key])
        except (TypeError, ValueError):
            kind = "a text" if isinstance(default, str) else "a number"
            raise click.BadParameter(
                f"FLASK_{key} is {app.config[key]!r}, but it has to be {kind}, such as {default!r}."
            ) from None


# ------------------------------------------------------------------------------- reading

SIDE = 224  # pixels the network sees, across and down
KEPT_SIDE = 1024  # a larger picture is reduced to this; the network sees less anyway
SMALLEST_SIDE = 32
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
ACCEPTED = "a JPEG, PNG, WEBP, BMP or TIFF picture"
Image.MAX_IMAGE_PIXELS = None  # read_scans() looks at the size itself, before it decodes


class UnreadableScan(ValueError):
    """A file that gives no scan; the message is for the person who sent it, `status` for HTTP."""

    def __init__(self, message, status=415):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Scan:
    """One greyscale picture: pixels uint8 (H, W), where it came from, warnings in plain words."""

    pixels: np.ndarray
    file: str
    slice: int = 0
    plane: str | None = None
    size: tuple[int, int] | None = None  # width and height as sent
    window: tuple[float, float] | None = None  # the stored values shown as black and as white
    colour: float = 0.0  # mean distance between the largest and smallest of R, G, B; 0 to 255
    checks: tuple["Check", ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def box(self):
        """Where the head is: head_box() of the pixels."""
        return head_box(self.pixels)


class Check(NamedTuple):
    """Something that the picture was looked at for, whether it is well, and what was found."""

    name: str
    passed: bool
    says: str


def read_scans(
    data: bytes, name: str, max_pixels: int = DEFAULTS["MAX_PIXELS"], max_scans: int = DEFAULTS["MAX_SCANS"]
) -> list[Scan]:
    """The scans in one file: one for a still picture, one a page for a TIFF.

    The kind is told from the content, never from the name, of which only the last part is kept.
    Raises UnreadableScan, with a sentence for the sender, for anything else.
    """
    name = plain_name(name)
    if not data:
        raise UnreadableScan(f"{name} is empty; choose the file again.", 400)
    try:
        image = Image.open(io.BytesIO(data), formats=KINDS)
        pages = image.n_frames if image.format == "TIFF" else 1
    except UnidentifiedImageError:
        raise UnreadableScan(f"{name} is not {ACCEPTED}; export the scan as one of these.") from None
    except Exception:  # Pillow's parsers raise nearly anything on damaged headers
        raise damaged(name) from None
    if pages > max_scans:
        raise UnreadableScan(f"{name} has {pages} pages, but only {max_scans} more scans are allowed; send fewer.", 413)
    return [read_page(image, page, name, max_pixels) for page in range(pages)]


def plain_name(name):
    """The last part of a visitor's file name, without control characters, at most 100 long."""
    last = re.split(r"[/\\]", name or "")[-1]
    return "".join(c for c in last if c.isprintable())[:100] or "The file"


def damaged(name):
    return UnreadableScan(f"{name} is damaged or cut off; export it again.")


def read_page(image, page, name, max_pixels):
    """Page `page` of an open picture as a Scan; raises UnreadableScan if it cannot be one."""
    try:
        image.seek(page)
    except Exception:  # as above: truncated, lying and mutated files
        raise damaged(name) from None
    check_size(image.size, name, max_pixels)
    try:
        pixels, window, colour = grey(ImageOps.exif_transpose(image))
    except Exception:  # decoding happens here
        raise damaged(name) from None
    return checked(Scan(shrink(pixels), name, page, size=image.size, window=window, colour=colour))


def check_size(size, name, max_pixels):
    """Raise UnreadableScan for a picture (width, height) that is too large to decode or too small."""
    shape = f"{name} has {size[0]} x {size[1]} pixels"
    if size[0] * size[1] > max_pixels:
        raise UnreadableScan(f"{shape}, more than the {max_pixels:,} allowed; send it smaller.", 413)
    if min(size) < SMALLEST_SIDE:
        raise UnreadableScan(f"{shape}, but a scan needs at least {SMALLEST_SIDE} x {SMALLEST_SIDE}.")


def grey(frame):
    """A Pillow picture as (pixels uint8 (H, W), window or None, colour 0 to 255).

    More than 8 bits are scaled linearly from the 0.1th to the 99.9th percentile, so that one
    hot pixel does not turn the head black. What is transparent becomes black.
    """
    if frame.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(frame, np.float32))
        low, high = np.percentile(values, (0.1, 99.9))
        scaled = (values - low) / max(high - low, 1e-6) * 255
        return scaled.clip(0, 255).astype(np.uint8), (float(low), float(high)), 0.0
    if frame.mode in ("1", "L"):
        return np.asarray(frame.convert("L")), None, 0.0
    opaque = Image.new("RGBA", frame.size, "black")
    opaque.alpha_composite(frame.convert("RGBA"))
    sample = np.asarray(opaque.convert("RGB").reduce(max(1, min(frame.size) // 128)), np.int16)
    return np.asarray(opaque.convert("L")), None, float(np.ptp(sample, axis=2).mean())


def shrink(pixels):
    """Pixels with no side above KEPT_SIDE, the aspect ratio kept."""
    if max(pixels.shape) <= KEPT_SIDE:
        return pixels
    picture = Image.fromarray(pixels)
    picture.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def checked(scan):
    """The scan with its quality checks, and a warning for each that it failed."""
    checks = tuple(quality_checks(scan))
    return replace(scan, checks=checks, warnings=scan.warnings + tuple(c.says for c in checks if not c.passed))


def quality_checks(scan):
    """Yield a Check for each thing that a reader of the answer should know about the picture."""
    width, height = scan.size
    small, flat = min(scan.size) < 128, contrast(scan.pixels) < 40
    coloured, marked = scan.colour > 4, marks_beside(scan.pixels) >= 3
    yield Check("Size", not small, f"The picture is small ({min(scan.size)} pixels); details may be lost."
                if small else f"{width} x {height} pixels")  # fmt: skip
    yield Check("Contrast", not flat, "The contrast is low; the answer may be unreliable."
                if flat else f"{contrast(scan.pixels)} of 255 levels of grey")  # fmt: skip
    yield Check("Colour", not coloured, "The picture is in colour; it was turned to grey."
                if coloured else "greyscale")  # fmt: skip
    yield Check("Text", not marked, "There is text or a scale beside the head; see that it names nobody."
                if marked else "none seen beside the head")  # fmt: skip


def marks_beside(pixels):
    """How many bright marks of a letter's height stand in the background beside the head.

    The head is the largest connected piece that differs from the margin, filled up to its outline.
    """
    step = max(1, -(-max(pixels.shape) // 320))
    h, w = (n // step for n in pixels.shape)
    small = pixels[: h * step, : w * step].reshape(h, step, w, step).max((1, 3)).astype(np.int16)
    margin = np.concatenate([small[:3].ravel(), small[-3:].ravel(), small[:, :3].ravel(), small[:, -3:].ravel()])
    difference = np.abs(small - np.median(margin))
    pieces, count = ndimage.label(difference > max(25, 0.15 * np.percentile(difference, 99)), np.ones((3, 3)))
    if count < 2:
        return 0
    head = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    outside = ~ndimage.binary_dilation(spans(head) | spans(head.T).T, iterations=4)
    letters = 0
    for number, place in enumerate(ndimage.find_objects(pieces), 1):
        piece, (rows, columns) = pieces[place] == number, (p.stop - p.start for p in place)
        of_size = 0.01 * max(h, w) <= rows <= 0.1 * max(h, w) and columns <= 0.25 * w
        letters += bool(of_size and outside[place][piece].all() and difference[place][piece].max() > 90)
    return letters


def spans(mask):
    """A mask (H, W) with every row filled from its first to its last pixel."""
    return np.maximum.accumulate(mask, 1) & np.maximum.accumulate(mask[:, ::-1], 1)[:, ::-1]


def contrast(pixels):
    """Levels of grey between the 1st and the 99th percentile of uint8 pixels, 0 to 255."""
    below = np.cumsum(Image.fromarray(pixels).histogram())
    low, high = np.searchsorted(below, (0.01 * below[-1], 0.99 * below[-1]))
    return int(high - low)


def head_box(pixels):
    """Box (x0, y0, x1, y1), in pixels, around what differs from the background.

    The background is the level of the four corners, so that a white one works as well, and its
    noise that of the quietest corner. Rows and columns count where at least 2 % of their pixels
    stand out. The whole picture, if that leaves next to nothing.
    """
    step = max(1, min(pixels.shape) // 256)
    sample = pixels[::step, ::step].astype(np.int16)
    h, w = (max(1, n // 16) for n in sample.shape)
    corners = [sample[:h, :w], sample[:h, -w:], sample[-h:, :w], sample[-h:, -w:]]
    difference = np.abs(sample - np.median([np.median(c) for c in corners]))
    noise = np.min([np.percentile(np.abs(c - np.median(c)), 95) for c in corners])
    stands_out = difference > max(0.12 * np.percentile(difference, 99), 2 * noise)
    ys = np.flatnonzero(stands_out.mean(1) > 0.02) * step
    xs = np.flatnonzero(stands_out.mean(0) > 0.02) * step
    if not len(xs) or not len(ys) or min(np.ptp(xs), np.ptp(ys)) < 0.25 * min(pixels.shape):
        return 0, 0, pixels.shape[1], pixels.shape[0]
    y1, x1 = min(ys[-1] + step, pixels.shape[0]), min(xs[-1] + step, pixels.shape[1])
    return int(xs[0]), int(ys[0]), int(x1), int(y1)


def prepare(pixels: np.ndarray, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """What the network sees of a scan: uint8 (224, 224, 3), three equal channels.

    Cropped to the head, stretched to the full range of grey but for 1 % at each end, resized
    with its aspect ratio kept and padded with black. Training and serving both call this. `box`
    is head_box() of the pixels, where it is known. Raises ValueError unless `pixels` is uint8 (H, W).
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise ValueError(f"expected uint8 pixels (H, W), got {pixels.dtype} {pixels.shape}")
    x0, y0, x1, y1 = box or head_box(pixels)
    head = ImageOps.autocontrast(Image.fromarray(pixels[y0:y1, x0:x1]), cutoff=1)
    square = ImageOps.pad(head, (SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(square)[..., None], 3, axis=2)


# ---------------------------------------------------------------------------- classifier

NO_TUMOR = "no_tumor"
CREW = 4  # engines at most for many scans; each takes about 40 MB
PLAIN_CARD = {"thresholds": {"low": 0.5, "high": 0.5}, "plain": True}  # a model without card.json
PLAIN_LABELS = {2: [NO_TUMOR, "tumor"], 4: ["glioma", "meningioma", NO_TUMOR, "pituitary"]}


class ModelError(click.ClickException):
    """The model file cannot serve; one sentence says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class Finding:
    """The answer for one scan; a rejected one has a reason and nothing else."""

    verdict: str  # "tumor", "no_tumor", "uncertain" or "rejected"
    label: str | None = None
    risk: str | None = None  # "low", "medium" or "high"
    tumor_probability: float | None = None
    probabilities: dict[str, float] | None = None
    heat: np.ndarray | None = None  # float32 (14, 14), class activation map of `label`
    reason: str | None = None


class Classifier:
    """VGG19 over a brain MRI slice, read from a `model.keras` that Brainmodel.ipynb wrote.

    Task: tumor or not, and which type. Input: what prepare() returns. `card` is the archive's
    card.json: labels in output order, thresholds, figures. Serves the archive's int8 network
    through LiteRT or, if it has none, the float network through Keras, slower.

    >>> classifier = Classifier("model.keras")
    >>> classifier.classify(read_scans(open("scan.png", "rb").read(), "scan.png"))[0].verdict
    """

    def __init__(self, path, threads=1):
        """Load the archive and answer once; raises ModelError if that cannot be done."""
        self.path = pathlib.Path(path)
        members = read_archive(self.path)
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.card = read_card(members.get("card.json"), self.path)
        self.threads, self.network = threads, members.get("serving.tflite")
        self.lock = threading.Lock()  # engines are not shared between threads
        if self.network:
            self.engine = f"litert-{self.card.get('serving', 'int8')}"
            self.run = litert(self.network, threads, self.path)
        else:
            self.engine, self.run = "keras-float32", keras_model(self.path)
        start = time.monotonic()
        outputs = self.infer(np.zeros((1, SIDE, SIDE, 3), np.uint8))
        self.seconds = time.monotonic() - start  # of one scan, rather more: it was the first
        width = outputs["probabilities"].shape[1]
        self.labels = self.card.get("labels") or PLAIN_LABELS.get(width, [])
        if width != len(self.labels) or NO_TUMOR not in self.labels:
            labels = ", ".join(self.labels) or "unknown"
            raise wrong_model(self.path, f"gives {width} numbers a scan, but its labels are {labels}")
        gate, embedding = self.card.get("gate"), outputs.get("embedding")
        if gate and embedding is not None and len(gate["weights"]) != embedding.shape[1]:
            what = f"has a gate of {len(gate['weights'])} weights for an embedding of {embedding.shape[1]}"
            raise wrong_model(self.path, what)

    def infer(self, prepared):
        """Outputs by name for uint8 (N, 224, 224, 3), with all threads, for one caller at a time."""
        with self.lock:
            return self.run(prepared)

    @cached_property
    def crew(self):
        """Engines for many scans, each with its share of the threads, in a queue of those that are free.

        For many scans an engine a core beats one engine on all cores: no core waits for another,
        and each prepares its own next scan. Made when first needed; a single scan needs none.
        """
        engines = queue.SimpleQueue()
        if self.network is None:
            engines.put(self.infer)
            return engines
        for _ in range(min(self.threads, CREW)):
            engines.put(litert(self.network, max(1, self.threads // CREW), self.path))
        return engines

    def infer_beside(self, prepared):
        """As infer(), with one of the crew, while the others work on other scans."""
        engine = self.crew.get()
        try:
            return engine(prepared)
        finally:
            self.crew.put(engine)

    def classify(self, scans: list[Scan]) -> list[Finding]:
        """A Finding for each scan, in order; one scan alone has all threads."""
        if len(scans) == 1:
            return [self.classify_one(scans[0], self.infer)]
        with ThreadPoolExecutor(CREW) as pool:
            return list(pool.map(lambda scan: self.classify_one(scan, self.infer_beside), scans))

    def classify_one(self, scan, infer):
        """The Finding for a scan, through infer(), or infer_beside() for one of many."""
        prepared = prepare(scan.pixels, scan.box)
        outputs = {name: values[0] for name, values in infer(prepared[None]).items()}
        reason = self.why_rejected(scan, prepared, outputs.get("embedding"))
        return self.finding(reason, outputs["probabilities"], outputs.get("heat"))

    def finding(self, reason, probabilities, heat):
        if reason:
            return Finding("rejected", reason=reason)
        by_label = {label: float(p) for label, p in zip(self.labels, probabilities)}
        tumor_probability = 1 - by_label[NO_TUMOR]
        verdict, risk = judge(tumor_probability, **self.card["thresholds"])
        label = most_probable(by_label, verdict)
        if heat is not None:
            heat = np.asarray(heat[..., self.labels.index(label)], np.float32)
        return Finding(verdict, label, risk, tumor_probability, by_label, heat)

    def why_rejected(self, scan, prepared, embedding):
        """A sentence if the picture is no brain MRI, else None.

        Blankness, colour and noise (neighbouring pixels that hardly agree) are seen in the
        picture. For the rest the card holds a line through the network's embedding, drawn
        between brain MRI and other pictures (outlier exposure, Hendrycks et al. 2019).
        """
        if contrast(scan.pixels) < 10 or not np.ptp(prepared):
            return "The picture is blank or nearly so."
        if scan.colour > 40:
            return "The picture is in strong colours, which no MRI is."
        if np.corrcoef(prepared[:, 1:, 0].ravel(), prepared[:, :-1, 0].ravel())[0, 1] < 0.5:
            return "The picture is noise rather than a scan."
        gate = self.card.get("gate")
        if gate is None or embedding is None:
            return None
        score = float(np.dot(embedding, gate["weights"])) + gate["bias"]
        return None if score >= gate["threshold"] else "This does not look like a slice of a brain MRI."


def read_archive(path):
    """{name: bytes} of the members that Keras ignores; raises ModelError for a file that is none."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; run Brainmodel.ipynb or fetch it with the repository.")
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ModelError(f"{path} is a git-LFS pointer, not the model; run `git lfs pull`.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist()) & {"card.json", "serving.tflite"}
            return {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        raise ModelError(f"{path} is cut off or damaged; fetch it again or run Brainmodel.ipynb.") from None


def wrong_model(path, what):
    return ModelError(f"{path} {what}; run Brainmodel.ipynb to write one that fits.")


def read_card(data, path):
    """The card from the bytes of card.json, checked for what serving needs; PLAIN_CARD for None."""
    if data is None:
        return PLAIN_CARD
    try:
        card = json.loads(data)
        judge(0.5, **card["thresholds"])
        card["labels"].index(NO_TUMOR)
        {**card["figures"], **card["data"]["counts"], **card["confusion"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise wrong_model(path, "has a card.json that cannot be read") from None
    return card


def litert(network, threads, path="model.keras"):
    """The serving network (bytes) as a function from uint8 (N, 224, 224, 3) to outputs by name."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        runner = Interpreter(model_content=network, num_threads=threads).get_signature_runner()
        shape = tuple(runner.get_input_details()["scan"]["shape_signature"])
        runner.get_output_details()["probabilities"]
    except (ValueError, KeyError, RuntimeError):
        raise wrong_model(path, "holds a network that cannot be read") from None
    if shape != (-1, SIDE, SIDE, 3):
        raise wrong_model(path, f"takes scans {shape}, not (-1, {SIDE}, {SIDE}, 3)")
    return lambda prepared: runner(scan=prepared.astype(np.float32))


def keras_model(path):
    """The float network of an archive as a function, as litert(); imports TensorFlow."""
    import keras

    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises nearly anything on an archive it does not know
        raise ModelError(f"{path} is not a Keras model; run Brainmodel.ipynb to write one.") from error
    if model.input_shape != (None, SIDE, SIDE, 3):
        raise wrong_model(path, f"takes scans {model.input_shape}, not (None, {SIDE}, {SIDE}, 3)")
    serving = with_heat(model)
    return lambda prepared: {k: np.asarray(v) for k, v in serving(prepared.astype("float32")).items()}


def with_heat(model):
    """A Keras model as one with the outputs `probabilities`, `heat` and `embedding`.

    The heat of a label is its class activation map: what the dense layer weighs after the global
    average pooling, weighed before it (Zhou et al. 2016), so its mean is the label's logit less
    the bias. A model without that ending keeps `probabilities` alone.
    """
    import keras

    *_, pool, head = [layer for layer in model.layers if not isinstance(layer, keras.layers.Dropout)]
    if not isinstance(pool, keras.layers.GlobalAveragePooling2D) or not isinstance(head, keras.layers.Dense):
        return keras.Model(model.input, {"probabilities": model.output})
    weigh = keras.layers.Conv2D(head.units, 1, use_bias=False, name="heat", dtype="float32")
    heat = weigh(pool.input)
    weigh.set_weights([head.get_weights()[0][None, None]])
    outputs = {"probabilities": model.output, "heat": heat, "embedding": pool.output}
    return keras.Model(model.input, outputs)


def judge(tumor_probability, low, high):
    """(verdict, risk) of a tumor probability between the card's two thresholds."""
    if tumor_probability < low:
        return NO_TUMOR, "low"
    if tumor_probability >= high:
        return "tumor", "high"
    return "uncertain", "medium"


def most_probable(probabilities, verdict):
    """The label to name: of the tumors alone if the verdict is `tumor`, so that both agree."""
    if verdict == NO_TUMOR:
        return NO_TUMOR
    named = [label for label in probabilities if verdict != "tumor" or label != NO_TUMOR]
    return max(named, key=probabilities.get)


# --------------------------------------------------------------------------------- store

ID = re.compile(r"[A-Za-z0-9_-]{22}")  # secrets.token_urlsafe(16)
FAST_PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}  # smaller than level 1 alone, and faster

# Black, purple, orange, pale yellow: matplotlib's `inferno` at nine even steps, even to the eye.
HEAT_COLOURS = np.array(
    [
        (0, 0, 4), (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84),
        (228, 90, 49), (249, 142, 9), (249, 203, 53), (252, 255, 164),
    ]
)  # fmt: skip


def save(uploads, scans, findings, model):
    """Write one upload to `uploads`/<id>/ and return its result, the dict of `result.json`.

    Holds the pictures re-encoded, the heats, of which heatmaps are drawn when they are asked for,
    and the answer; nothing of the files sent but the last part of their names. Written under a
    temporary name, so it is whole or absent.
    """
    upload_id = secrets.token_urlsafe(16)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {
        "id": upload_id,
        "created": now.replace("+00:00", "Z"),
        "status": "done",
        "progress": 1.0,
        "scans": [scan_entry(upload_id, n, scan, finding) for n, (scan, finding) in enumerate(zip(scans, findings))],
        "model": model,
    }
    partial = uploads / f".{upload_id}"
    try:
        for n, (scan, finding) in enumerate(zip(scans, findings)):
            keep_scan(partial / str(n), scan, finding)
        (partial / "result.json").write_text(json.dumps(result))
        partial.rename(uploads / upload_id)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


def scan_entry(upload_id, n, scan, finding):
    """Scan n of an upload as the JSON of a result has it."""
    address = f"/results/{upload_id}/{n}"
    probabilities = finding.probabilities and {k: round(p, 4) for k, p in finding.probabilities.items()}
    p = finding.tumor_probability
    return {
        "file": scan.file,
        "slice": scan.slice,
        "verdict": finding.verdict,
        "label": finding.label,
        "risk": finding.risk,
        "tumor_probability": None if p is None else round(p, 4),
        "probabilities": probabilities,
        "reason": finding.reason,
        "warnings": list(scan.warnings),
        "checks": [check._asdict() for check in scan.checks],
        "size": scan.size,
        "kept": scan.pixels.shape[::-1],
        "crop": scan.box,
        "window": scan.window,
        "scan": f"{address}/scan.png",
        "heatmap": None if finding.heat is None else f"{address}/heatmap.png",
    }


def keep_scan(folder, scan, finding):
    """scan.png, fast rather than small, and, where there is a heat, heat.npy."""
    folder.mkdir(parents=True)
    Image.fromarray(scan.pixels).save(folder / "scan.png", **FAST_PNG)
    if finding.heat is not None:
        np.save(folder / "heat.npy", finding.heat)


def heatmap_of(folder):
    """The heatmap of a scan that keep_scan() kept, as the bytes of a PNG."""
    with Image.open(folder / "scan.png") as picture:
        heatmap = draw_heat(np.asarray(picture), np.load(folder / "heat.npy"))
    png = io.BytesIO()
    heatmap.save(png, "PNG", **FAST_PNG)
    return png.getvalue()


def heat_levels(pixels, heat):
    """The heat of a label, float (14, 14), over the scan it came from: float32 (H, W), 0 to 1.

    The map lies over the square that prepare() made; padding and crop are undone.
    """
    x0, y0, x1, y1 = head_box(pixels)
    width, height = x1 - x0, y1 - y0
    side = max(width, height)
    warm = np.maximum(heat, 0).astype(np.float32) / max(float(heat.max()), 1e-6)
    square = Image.fromarray(warm).resize((side, side), Image.Resampling.BICUBIC)
    left, top = (side - width) // 2, (side - height) // 2
    levels = np.zeros(pixels.shape, np.float32)
    levels[y0:y1, x0:x1] = np.asarray(square)[top : top + height, left : left + width]
    return levels.clip(0, 1)


def draw_heat(pixels, heat):
    """The scan as an RGB picture with the heat over it, opaque where it is hottest."""
    levels = (heat_levels(pixels, heat) * 255).astype(np.uint8)
    colours = Image.fromarray(levels)
    colours.putpalette(heat_palette().tobytes())
    opacity = Image.fromarray((levels * 0.7).astype(np.uint8))
    grey = Image.fromarray(pixels).convert("RGB")
    return Image.composite(colours.convert("RGB"), grey, opacity)


def heat_palette():
    """uint8 (256, 3): HEAT_COLOURS with the steps between them filled in."""
    steps = np.linspace(0, 255, len(HEAT_COLOURS))
    channels = [np.interp(np.arange(256), steps, c) for c in HEAT_COLOURS.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def find_upload(uploads, upload_id, hours):
    """The folder of an upload; 404 if there is none, or it is older than `hours` and to be removed."""
    folder = uploads / upload_id
    if not ID.fullmatch(upload_id) or not (folder / "result.json").is_file() or is_old(folder, hours):
        abort(404, "There is no such result (any more); results are removed after a time.")
    return folder


def is_old(folder, hours):
    return folder.stat().st_mtime < time.time() - hours * 3600


def sweep(uploads, hours):
    """Remove the uploads older than `hours`, half-written ones included, and nothing else."""
    for folder in uploads.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            if ID.fullmatch(folder.name.removeprefix(".")) and is_old(folder, hours):
                shutil.rmtree(folder)


def keep_sweeping(uploads, hours):
    """Sweep every minute, or sooner where results are kept for minutes only, in a thread of its own.

    No upload then pays for looking at all the others.
    """

    def loop():
        while True:
            time.sleep(min(60, max(1, hours * 360)))  # a tenth of the retention
            with contextlib.suppress(OSError):  # the folder is away for a while: /healthz says so
                sweep(uploads, hours)

    threading.Thread(target=loop, name="sweep", daemon=True).start()


def as_csv(result):
    """The CSV of a result: a line a scan, a column a label."""
    labels = result["model"]["labels"]
    columns = ["file", "slice", "verdict", "label", "risk", "tumor_probability", *labels]
    text = io.StringIO()
    table = csv.DictWriter(text, [*columns, "reason", "warnings"], extrasaction="ignore")
    table.writeheader()
    for scan in result["scans"]:
        probabilities = scan["probabilities"] or {}
        table.writerow(scan | probabilities | {"warnings": " ".join(scan["warnings"])})
    return text.getvalue()


# ------------------------------------------------------------------------- pages and API


class Queue:
    """Counts the scans at work or waiting for the network."""

    def __init__(self, most):
        self.most, self.waiting, self.lock = most, 0, threading.Lock()

    @contextlib.contextmanager
    def places(self, scans, sure=False):
        """Hold places for some scans; aborts with 503 if `most` are taken, unless they are `sure` of one."""
        with self.lock:
            if self.waiting >= self.most and not sure:
                seconds = 1 + int(self.waiting * current_app.classifier.seconds)
                abort(503, "The server is busy with other scans; try again in a few seconds.", retry_after=seconds)
            self.waiting += scans
        try:
            yield
        finally:
            with self.lock:
                self.waiting -= scans


def create_app(overrides=None):
    """The Flask app, its model loaded once; raises ModelError if that cannot serve."""
    app = Flask(__name__)
    app.json.sort_keys = False  # a result reads from its id to its model
    configure(app, overrides or {})
    uploads = pathlib.Path(app.config["UPLOADS"])
    uploads.mkdir(parents=True, exist_ok=True)
    sweep(uploads, app.config["RETENTION_HOURS"])
    keep_sweeping(uploads, app.config["RETENTION_HOURS"])
    app.classifier = Classifier(app.config["MODEL"], app.config["THREADS"])
    app.queue = Queue(app.config["MAX_WAITING"])
    app.add_url_rule("/", "index", index)
    app.add_url_rule("/", "upload_form", upload_form, methods=["POST"])
    app.add_url_rule("/upload", "upload", upload, methods=["POST"])
    app.add_url_rule("/results/<upload_id>", "result_page", result_page)
    app.add_url_rule("/results/<upload_id>/<int:n>", "scan_page", scan_page)
    app.add_url_rule("/results/<upload_id>.json", "result_json", result_json)
    app.add_url_rule("/results/<upload_id>.csv", "result_csv", result_csv)
    app.add_url_rule("/results/<upload_id>/<int:n>/scan.png", "scan_picture", scan_picture)
    app.add_url_rule("/results/<upload_id>/<int:n>/thumbnail.png", "thumbnail", thumbnail)
    app.add_url_rule("/results/<upload_id>/<int:n>/heatmap.png", "heatmap", heatmap)
    app.add_url_rule("/results/<upload_id>/delete", "delete", delete, methods=["POST"])
    app.add_url_rule("/model", "model_page", model_page)
    app.add_url_rule("/healthz", "healthz", healthz)
    app.register_error_handler(HTTPException, show_error)
    app.register_error_handler(UnreadableScan, show_unreadable)
    app.after_request(add_headers)
    app.cli.add_command(classify_command)
    app.cli.add_command(benchmark_command)
    return app


def uploads_folder():
    return pathlib.Path(current_app.config["UPLOADS"])


def model_summary():
    """What a result says of the model that answered."""
    classifier = current_app.classifier
    return {"sha256": classifier.sha256, "engine": classifier.engine, "labels": classifier.labels}


def receive():
    """Read, classify and store the files of this request; returns the result.

    Aborts with 400 (no file, too many), 413, 503; raises UnreadableScan for a bad file.
    """
    files = [file for file in request.files.getlist("file") if file.filename]
    if not files:
        abort(400, "No file was chosen; choose a scan and send it again.")
    most = current_app.config["MAX_FILES"]
    if len(files) > most:
        abort(400, f"{len(files)} files were sent, but at most {most} are read at once.")
    waiting = current_app.queue
    with waiting.places(len(files)):
        scans = []
        for file in files:
            left = current_app.config["MAX_SCANS"] - len(scans)
            scans += read_scans(file.read(), file.filename, current_app.config["MAX_PIXELS"], left)
        with waiting.places(len(scans) - len(files), sure=True):  # the further pages of a TIFF
            findings = current_app.classifier.classify(scans)
            return save(uploads_folder(), scans, findings, model_summary())


def index():
    """GET /: the form."""
    return render_template("index.html")


def upload_form():
    """POST /: classify what the form sent and go on to its page."""
    return redirect(url_for("result_page", upload_id=receive()["id"]), 303)


def upload():
    """POST /upload: the same for programs."""
    return jsonify(receive())


def found(upload_id):
    """The folder of an upload, or 404."""
    return find_upload(uploads_folder(), upload_id, current_app.config["RETENTION_HOURS"])


def load_result(upload_id):
    return json.loads((found(upload_id) / "result.json").read_text())


def result_page(upload_id):
    """GET /results/<id>: the answer for people; of several scans a table, the most suspicious first."""
    result = load_result(upload_id)
    if len(result["scans"]) == 1:
        return render_scan(result, 0)
    ranked = sorted(enumerate(result["scans"]), key=lambda entry: -(entry[1]["tumor_probability"] or 0))
    return render_template("results.html", result=result, ranked=ranked, card=current_app.classifier.card)


def scan_page(upload_id, n):
    """GET /results/<id>/<n>: the answer for scan n of several."""
    result = load_result(upload_id)
    if n >= len(result["scans"]):
        abort(404, "There is no such scan in this result.")
    return render_scan(result, n)


def render_scan(result, n):
    """The page of scan n of a result."""
    card, scan = current_app.classifier.card, result["scans"][n]
    p = scan["tumor_probability"]
    place = None if p is None else on_scale(p, **card["thresholds"])
    return render_template("result.html", result=result, scan=scan, n=n, place=place, card=card, meaning=meaning(card))


def on_scale(p, low, high):
    """Where a probability lies on a scale of three equal parts that meet at the thresholds, 0 to 1."""
    return float(np.interp(p, (0, low, high, 1), (0, 1 / 3, 2 / 3, 1)))


def meaning(card, people=1000, ill=10):
    """What an answer means where few have a tumor, worked out from the card; None if it has no figures."""
    figure = card.get("figures", {}).get("Tumor against none", {}).get("sensitivity at 95 % specificity")
    if figure is None:
        return None
    found, alarmed = ill * figure["value"], 0.05 * (people - ill)
    return {"people": people, "ill": ill, "found": found, "alarmed": alarmed,
            "right": found / (found + alarmed), "missed": (ill - found) / (people - found - alarmed)}  # fmt: skip


def result_json(upload_id):
    """GET /results/<id>.json"""
    return jsonify(load_result(upload_id))


def result_csv(upload_id):
    """GET /results/<id>.csv"""
    headers = {"Content-Disposition": f"attachment; filename={upload_id}.csv"}
    return Response(as_csv(load_result(upload_id)), mimetype="text/csv", headers=headers)


def scan_picture(upload_id, n):
    """GET /results/<id>/<n>/scan.png"""
    return send_file(found_picture(upload_id, n, "scan.png") / "scan.png")


def thumbnail(upload_id, n):
    """GET /results/<id>/<n>/thumbnail.png: the scan, at most 96 pixels a side."""
    with Image.open(found_picture(upload_id, n, "scan.png") / "scan.png") as picture:
        picture.thumbnail((96, 96), Image.Resampling.BILINEAR)
        png = io.BytesIO()
        picture.save(png, "PNG", **FAST_PNG)
    return Response(png.getvalue(), mimetype="image/png")


def heatmap(upload_id, n):
    """GET /results/<id>/<n>/heatmap.png"""
    return Response(heatmap_of(found_picture(upload_id, n, "heat.npy")), mimetype="image/png")


def found_picture(upload_id, n, name):
    """The folder of scan n of an upload if it holds a file `name`, or 404."""
    folder = found(upload_id) / str(n)
    if not (folder / name).is_file():
        abort(404, "There is no such picture in this result.")
    return folder


def delete(upload_id):
    """POST /results/<id>/delete: remove the upload at once."""
    shutil.rmtree(found(upload_id))
    return redirect(url_for("index"), 303)


def model_page():
    """GET /model: what the model was trained on and how well it did."""
    card = current_app.classifier.card
    return render_template("model.html", card=card, model=model_summary(), mistakes=mistakes(card))


def mistakes(card, most=3):
    """The commonest mistakes on the test part: (truth, answer, scans, share of the truth's scans)."""
    counted = [
        (truth, answer, count, count / sum(row))
        for truth, row in card.get("confusion", {}).items()
        for answer, count in zip(card["labels"], row)
        if count and answer != truth
    ]
    return sorted(counted, key=lambda mistake: -mistake[3])[:most]


def healthz():
    """GET /healthz: 200 once an upload can be answered and kept, else 503."""
    if not os.access(uploads_folder(), os.W_OK):
        abort(503, "The uploads folder cannot be written.")
    return jsonify(status="ok", model=current_app.classifier.sha256)


def wants_json():
    return request.path in ("/upload", "/healthz") or request.path.endswith(".json")


def answer_error(status, sentence, headers=()):
    """One sentence with its status: JSON for programs, the form again or a page for people."""
    if wants_json():
        response = jsonify(error=sentence)
    elif request.path == "/":
        response = current_app.make_response(render_template("index.html", error=sentence))
    else:
        response = current_app.make_response(render_template("error.html", error=sentence, status=status))
    response.status_code = status
    response.headers.extend(headers)
    return response


def show_error(error):
    """Any HTTP error, the unforeseen ones included, in this app's clothes."""
    headers = [header for header in error.get_headers() if header[0] in ("Allow", "Retry-After")]
    sentence = error.description
    if isinstance(error, RequestEntityTooLarge):
        most = current_app.config["MAX_CONTENT_LENGTH"] // 2**20
        sentence = f"The upload is larger than the {most} MB allowed; send fewer or smaller files."
    if isinstance(error, InternalServerError):
        sentence = "Something went wrong on the server; the log has it."
    return answer_error(error.code, sentence, headers)


def show_unreadable(error):
    """A file that gives no scan."""
    return answer_error(error.status, str(error))


def add_headers(response):
    """Nothing from other hosts, nothing guessed, no patient's picture in a cache; CORS as set."""
    response.headers["Content-Security-Policy"] = "default-src 'self'; img-src 'self' blob: data:"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    if request.endpoint != "static":
        response.headers["Cache-Control"] = "no-store"
    origins = {origin.strip() for origin in current_app.config["CORS_ORIGINS"].split(",")} - {""}
    if origins and request.path == "/upload":
        response.headers["Vary"] = "Origin"
        if request.origin in origins:
            response.headers["Access-Control-Allow-Origin"] = request.origin
    return response


# ------------------------------------------------------------------------------ commands


@click.command("classify")
@click.argument("paths", nargs=-1, required=True, type=click.Path(True, dir_okay=False, path_type=pathlib.Path))
@with_appcontext
def classify_command(paths):
    """Print the answers for the scans in PATHS as CSV, without keeping anything."""
    scans = []
    for path in paths:
        try:
            scans += read_scans(path.read_bytes(), path.name, current_app.config["MAX_PIXELS"])
        except UnreadableScan as error:
            raise click.ClickException(str(error)) from None
    findings = current_app.classifier.classify(scans)
    entries = [scan_entry("", n, *each) for n, each in enumerate(zip(scans, findings))]
    click.echo(as_csv({"scans": entries, "model": model_summary()}), nl=False)


@click.command("benchmark")
@click.argument("path", metavar="[SCAN]", required=False, type=click.Path(True, dir_okay=False, path_type=pathlib.Path))
@click.option("--rounds", default=50, show_default=True, help="Times that each part is timed.")
@click.option("--scans", default=1000, show_default=True, help="Sent one by one, to see whether memory grows.")
@with_appcontext
def benchmark_command(path, rounds, scans):
    """Time this machine with SCAN, or with a drawn one of 512 x 512 pixels.

    Starts a server of its own, on loopback, with this app's model and settings.
    """
    import psutil

    data, classifier = path.read_bytes() if path else drawn_head(), current_app.classifier
    click.echo(f"{classifier.engine}, {current_app.config['THREADS']} threads, model {classifier.sha256[:12]}")
    with tempfile.TemporaryDirectory() as folder:
        parts = parts_of_an_upload(classifier, data, pathlib.Path(folder))
        with own_server(folder) as (process, address):
            send = sender(address, data)
            click.echo(f"start to first answer {wait_for(send):20.2f} s")
            times = timed({"one upload, end to end": send} | parts, rounds)
            floor = np.median(times["bare interpreter"])
            for name, seconds in times.items():
                p50, p95 = np.quantile(seconds, (0.5, 0.95))
                ratio = f"   {p50 / floor:.2f} x the bare interpreter" if name.startswith("one") else ""
                click.echo(f"{name:24} p50 {1000 * p50:6.1f}   p95 {1000 * p95:6.1f} ms{ratio}")
            batch = read_scans(data, "scan") * 64
            seconds = timed({"batch": lambda: classifier.classify(batch)}, min(rounds, 3))["batch"]
            click.echo(f"64 scans at once {64 / np.median(seconds):25.1f} scans a second")
            memory = psutil.Process(process.pid).memory_info
            before = memory().rss / 2**20
            for _ in range(scans):
                send()
            click.echo(f"memory, after {scans} more {before:12.1f}, {memory().rss / 2**20:.1f} MiB")


def drawn_head(side=512):
    """A JPEG of an oval with soft spots: no scan, but as much work as one."""
    spots = np.random.default_rng(1).integers(20, 200, (9, 9), dtype=np.uint8)
    head, oval = Image.new("L", (side, side)), Image.new("L", (side, side))
    ImageDraw.Draw(oval).ellipse((side // 6, side // 10, side - side // 6, side - side // 10), fill=255)
    head.paste(Image.fromarray(spots).resize((side, side), Image.Resampling.BICUBIC), mask=oval)
    file = io.BytesIO()
    head.save(file, "JPEG", quality=90)
    return file.getvalue()


def parts_of_an_upload(classifier, data, folder):
    """{name: function} of the parts of an upload, in order, the heatmap's drawing and the bare network."""
    (scan, *_) = read_scans(data, "scan")
    prepared = prepare(scan.pixels)[None]
    outputs = classifier.infer(prepared)
    finding = classifier.finding(None, outputs["probabilities"][0], outputs["heat"][0])  # whether or not it is rejected
    kept = folder / save(folder, [scan], [finding], {})["id"] / "0"
    return {
        "  decode": lambda: read_scans(data, "scan"),
        "  prepare": lambda: prepare(scan.pixels),
        "  network and verdict": lambda: classifier.classify([scan]),
        "  store": lambda: save(folder, [scan], [finding], {}),
        "heatmap, when asked for": lambda: heatmap_of(kept),
        "bare interpreter": lambda: classifier.infer(prepared),
    }


@contextlib.contextmanager
def own_server(folder, source=__file__):
    """`flask run` of an app as a process, results in `folder`, and its address; ended on leaving."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {f"FLASK_{name}": str(current_app.config[name]) for name in DEFAULTS} | {"FLASK_UPLOADS": folder}
    command = [sys.executable, "-m", "flask", "--app", str(source), "run", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process, f"http://127.0.0.1:{port}/upload"
    finally:
        process.terminate()
        process.wait()


def sender(address, data):
    """A function that sends a scan to `address` and waits for the answer."""
    boundary, body = encode_multipart({"file": FileStorage(io.BytesIO(data), "scan")})
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return lambda: urllib.request.urlopen(urllib.request.Request(address, body, kind)).read()


def wait_for(send, patience=60):
    """Seconds until send() was answered; raises ClickException after `patience` seconds."""
    start = time.monotonic()
    while time.monotonic() < start + patience:
        try:
            send()
            return time.monotonic() - start
        except urllib.error.HTTPError as error:
            raise click.ClickException(f"The server answered {error.code} {error.reason}.") from None
        except urllib.error.URLError:  # it does not listen yet
            time.sleep(0.01)
    raise click.ClickException(f"The server gave no answer within {patience} seconds; does `flask run` start?")


def timed(functions, rounds):
    """{name: seconds (rounds,)} of functions that are called in turn, so that all meet the same machine."""
    seconds = {name: [] for name in functions}
    for n in range(rounds + 1):  # the first round does not count
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if n:
                seconds[name].append(time.perf_counter() - start)
    return seconds

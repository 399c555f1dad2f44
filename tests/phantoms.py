"""Phantoms that stand in for scans, as pictures, DICOM and NIfTI, and the app that answers them."""

import contextlib
import copy
import csv
import functools
import io
import pathlib
import shutil
import socket
import sys
import threading
import time
import urllib.request
import zipfile
from unittest import mock

import nibabel
import numpy as np
import pydicom
import tifffile
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pydicom import uid
from scipy import ndimage
from werkzeug.datastructures import FileStorage
from werkzeug.serving import make_server
from werkzeug.test import encode_multipart

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import app as web  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
AXIAL = [1, 0, 0, 0, 1, 0]  # the orientation of a slice
NOT_READ = (
    "is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them; "
    "export the scan as one of these."
)


def phantom(seed=0, lesion=False, side=256):
    """A drawn axial head, uint8 (side, side): skull, uneven tissue, a bright lesion if asked."""
    random = np.random.default_rng(seed)
    centre = side * random.uniform(0.46, 0.54, 2)
    radii = side * random.uniform((0.28, 0.36), (0.36, 0.44))

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


def drawn_head(seed=0, lesion=False, side=384):
    """A drawn axial head with folds and ventricles, uint8 (side, side), so soft that the gate lets it in."""
    random = np.random.default_rng(seed)

    def uneven(size):
        rough = ndimage.gaussian_filter(random.normal(size=(side, side)), size * side / 384)
        return rough / rough.std()

    folds, wobble, noise = map(uneven, (6, 40, 0.7))
    y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
    radius, across = np.hypot(x / 0.72, y / 0.88) + 0.012 * wobble, abs(x + 0.01 * wobble)
    brain = radius < 0.8
    levels = np.select([brain, radius < 0.84, radius < 0.91, radius < 1], [100, 5, 25, 250], 0)
    levels[brain & (radius > 0.71 - 0.06 * folds)] = 90
    levels[brain & (radius > 0.6) & (abs(folds) < 0.3)] = 20
    levels[brain & (across < 0.008) & (abs(y) > 0.3)] = 20
    for right, down, wide, high in (0.1, -0.2, 0.045, 0.2), (0.13, 0.22, 0.05, 0.17):
        turned = (across - right + 1j * (y - down)) * np.exp(0.25j if down < 0 else -0.5j)
        levels[np.hypot(turned.real / wide, turned.imag / high) + 0.06 * folds < 1] = 20
    if lesion:
        reach = np.hypot(x - 0.32, y + 0.25) / 0.2 + 0.07 * folds
        for within, level in (1.4, 0.7 * levels), (1, 230), (0.5, 60):
            levels = np.where(brain & (reach < within), level, levels)
    soft = ndimage.gaussian_filter(levels, 4 * side / 384)
    return (soft + 5 * abs(noise)).clip(0, 255).astype(np.uint8)


def encode(pixels, kind="PNG", **options):
    """A picture file of this kind as bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def shipped():
    """The shipped model, loaded once for every app of the tests."""
    return web.Classifier(ROOT / "model.keras", threads=2)


def make_app(folder, **overrides):
    """The app over the shipped model, its gate open so that a phantom gets an answer."""
    classifier = copy.copy(shipped())
    with mock.patch.object(web, "Classifier", lambda *_: classifier):
        app = web.create_app({"UPLOADS": str(folder), "TESTING": True, **overrides})
    classifier.gate = None
    return app


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


def until(condition, seconds=20):
    """What a condition gives once it is true; fails if it does not become so."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def free_port():
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def sender(url, data, seconds=0):
    """A function that sends a file to a URL, in so many seconds, and returns the answer's body."""
    boundary, body = encode_multipart({"file": FileStorage(io.BytesIO(data), "scan")})
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    kind["Content-Length"] = str(len(body))

    def pieces():
        for start in range(0, len(body), len(body) // 10):
            time.sleep(seconds / 10)
            yield body[start : start + len(body) // 10]

    def send():
        sent = pieces() if seconds else body
        with urllib.request.urlopen(urllib.request.Request(url, sent, kind)) as response:
            return response.read()

    return send


def picture(name, data):
    return {"name": name, "mimeType": "image/png", "buffer": data}


def post(app, *files, to="/upload", headers=None, **form):
    """The response of an app to files, (bytes, name) each, or bytes alone, called scan."""
    named = [file if isinstance(file, tuple) else (file, "scan") for file in files]
    data = {"file": [(io.BytesIO(data), name) for data, name in named]} | form
    return app.test_client().post(to, data=data, headers=headers)


def zipped(**files):
    """A ZIP of files {path: bytes}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def tiff(*pages, byteorder="<", bigtiff=False, **options):
    """A TIFF of pages: values, or (values, options of its own)."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=byteorder, bigtiff=bigtiff) as writer:
        for page in pages:
            values, own = page if isinstance(page, tuple) else (page, {})
            writer.write(values, **{"photometric": "minisblack"} | options | own)
    return file.getvalue()


# DICOM


def dataset_of(pixels, **tags):
    """An MR image as a pydicom dataset: grey (H, W), frames (N, H, W) or RGB (H, W, 3).

    It has the bits of `pixels` where DICOM allows them, else 16; tags given beat those here.
    """
    values = pixels if pixels.dtype.str[1:] in ("u1", "i1", "u2", "i2", "u4") else pixels.astype("u2")
    colour, bits = pixels.shape[-1] == 3, 8 * values.itemsize
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.MRImageStorage, uid.generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.1"
    dataset.Modality, dataset.PixelRepresentation = "MR", int(values.dtype.kind == "i")
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = 1 + 2 * colour, 0
    dataset.Rows, dataset.Columns = values.shape[:2] if colour else values.shape[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    by_plane = np.moveaxis(values, -1, 0) if tags.get("PlanarConfiguration") else values
    dataset.PixelData = by_plane.tobytes()
    for key, value in tags.items():
        setattr(dataset, key, value)
    dataset.ensure_file_meta()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return dataset


def written(dataset, **options):
    """The bytes of a dataset as a file."""
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=not options.pop("bare", False), **options)
    return file.getvalue()


def dicom(pixels, syntax=uid.ExplicitVRLittleEndian, **tags):
    """A DICOM file; PixelData among the tags is taken as packed already."""
    dataset = dataset_of(pixels, **tags)
    if syntax.is_encapsulated and "PixelData" not in tags:
        dataset.compress(syntax)
    if not syntax.is_little_endian:
        dataset.PixelData = pixels.byteswap().tobytes()
        dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = syntax
    return written(dataset)


def items(**tags):
    """A sequence of as many items as the values given have, for each tag a sequence of one."""
    sequence = []
    for values in zip(*tags.values()):
        sequence.append(pydicom.Dataset())
        for key, inner in zip(tags, values):
            item = pydicom.Dataset()
            item.update(inner)
            setattr(sequence[-1], key, [item])
    return sequence


def table(entries, bits, first=0):
    """A lookup table as a sequence, which claims so many bits."""
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "OW", entries.tobytes())
    return [item]


def deep(seed=0, side=96, **options):
    """A phantom with 12 bits, uint16."""
    return phantom(seed, side=side, **options).astype(np.uint16) * 16


def slices(pictures, **tags):
    """Files (name, bytes) of one series, a picture each, with their places."""
    tags = {"ImageOrientationPatient": AXIAL} | tags
    return [
        (f"IM{n}", dicom(pixels, ImagePositionPatient=[0, 0, 5 * n], **tags))
        for n, pixels in enumerate(pictures)
    ]


def series(count=8, uid="1.2.3.1", **tags):
    """{name: bytes} of a series, its file names in an order that is not that of its positions."""
    files = slices(map(deep, range(count)), SeriesInstanceUID=uid, **tags)
    return {f"IM{(7 * n) % count:04}": data for n, (_, data) in enumerate(files)}


def close(a, b):
    """Whether two pictures differ by a level of rounding at most."""
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


# NIfTI


def nifti(values, spacing=(1, 1, 5), kind=nibabel.Nifti1Image, order="<", **fields):
    """A .nii of values (x, y[, z[, t]]), its header's fields as given."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    header.set_zooms((*spacing, 1, 1)[: values.ndim])
    header["magic"] = b"n+1" if kind is nibabel.Nifti1Image else b"n+2"
    header["vox_offset"] = start = header["sizeof_hdr"] + 12 - header["sizeof_hdr"] % 8
    for field, value in fields.items():
        header[field] = value
    data = values.astype(header.get_data_dtype()).tobytes(order="F")
    return header.binaryblock.ljust(int(start), b"\0") + data


def volume(shape=(40, 50, 60), zooms=(1, 1, 1), flip=False):
    """A .nii of an ellipsoid head with one bright corner: towards right, front and top."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius, corner = x**2 + y**2 + z**2, (x > 0.2) & (y > 0.2) & (z > 0.2)
    values = 500.0 * (radius < 0.8) + 400 * (corner & (radius < 0.7))
    affine = np.diag([*zooms, 1.0])
    if flip:
        values = values[::-1].transpose(1, 0, 2)
        affine = affine[:, [1, 0, 2, 3]] * [[-1], [1], [1], [1]]
    return nibabel.Nifti1Image(values.astype(np.float32), affine).to_bytes()


# What is no scan: functions from a random generator to pixels, uint8 (H, W)


def document(random):
    """A page of text."""
    page = Image.new("L", (400, 520), 255)
    for y in range(30, 490, 24):
        words = " ".join(random.choice(["patient", "of", "report", "the", "figure", "left"], 6))
        ImageDraw.Draw(page).text((30, y), words, fill=0, font=ImageFont.load_default(16))
    return np.asarray(page)


def chart(random):
    """Bars over an axis."""
    picture = Image.new("L", (480, 320), 255)
    draw = ImageDraw.Draw(picture)
    for x, height in zip(range(40, 440, 40), random.integers(20, 260, 10)):
        draw.rectangle((x, 290 - height, x + 26, 290), fill=60)
    draw.line((30, 20, 30, 290, 460, 290), fill=0, width=2)
    return np.asarray(picture)


def gradient(random):
    """Grey that grows from one side to the other."""
    return np.rot90(np.tile(np.arange(256, dtype=np.uint8), (256, 1)), random.integers(4))


def static(random):
    """Nothing but noise."""
    return random.integers(0, 255, (256, 256), dtype=np.uint8)


DRAWINGS = (document, chart, gradient, static)


# Folders of scans, as the notebook reads them


def put(path, data):
    """Write a file, its folders first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_manifest(folder, rows):
    """A manifest.csv of dicts, "" where one lacks a column."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.csv", "w", newline="") as file:
        table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        table.writeheader()
        table.writerows(rows)


def ball(seed=0, lesion=False, side=32):
    """A .nii of a ball of uneven tissue, about 10 slices wide, with or without a bright lesion."""
    x, y, z = np.mgrid[-1:1:side * 1j, -1:1:side * 1j, -1:1:side * 1j]
    voxels = (x**2 + y**2 + z**2 < 0.12) * np.random.default_rng(seed).uniform(90, 150, x.shape)
    voxels[(x - 0.12) ** 2 + y**2 + z**2 < 0.015 * lesion] = 250
    return nibabel.Nifti1Image(voxels.astype(np.uint8), np.eye(4)).to_bytes()


def fill_with_two(folder):
    """48 phantoms as Kaggle's first set of brain MRI has them, in folders `yes` and `no`, and a broken file."""
    for n in range(48):
        put(folder / "data" / ("yes" if n % 2 else "no") / f"{n}.png", encode(phantom(n, lesion=bool(n % 2))))
    put(folder / "data/no/broken.jpg", b"not a picture")


def fill_with_four(folder):
    """Typed tumors with boxes and folds, web pictures, outside sources, volumes in three planes, and other scans."""
    rows = [{"source": "cheng", "label": ["glioma", "meningioma", "pituitary"][n % 3], "patient_fold": n % 5 + 1,
             "box": "0.3 0.3 0.7 0.7"} for n in range(30)]  # fmt: skip
    rows += [{"source": "br35h", "label": ["tumor", "no_tumor"][n % 2]} for n in range(20)]
    rows += [{"source": source, "label": label, "family": source[:5]} for source, label in (
        ("utsw_glioma", "glioma"), ("neuro_healthy", "no_tumor"), ("brats_peds", "glioma"),
        ("hippo_healthy_mr", "no_tumor")) for _ in range(4)]  # fmt: skip
    for n, row in enumerate(rows):
        row["path"] = f"{row['source']}/{2 * n}.png"
        put(folder / "data" / row["path"], encode(phantom(n, row["label"] != "no_tumor")))
    for n, part in enumerate(["validation", "test"] * 2):
        rows.append({"source": "volumes", "patient": n, "part": part, "label": "glioma" if n < 2 else "no_tumor"})
        rows[-1]["path"] = put(folder / "data" / f"{n}.nii", ball(n, n < 2)).name
    write_manifest(folder / "data", rows)
    others = [{"path": f"{n}.png", "kind": ["chart", "brain_mri"][n % 2], "source": f"s{n % 3}"} for n in range(12)]
    for n, row in enumerate(others):
        drawn = phantom(100 + n) if n % 2 else chart(np.random.default_rng(n))
        put(folder / "others" / row["path"], encode(drawn))
    write_manifest(folder / "others", others)

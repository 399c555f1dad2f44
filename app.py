"""Reads a brain MRI and says whether it shows a tumor, of which kind, how sure it is and where it looked.

`flask run` serves a form for people and `POST /upload` for programs. The file reads in the order
in which data flows: settings, reading, classifier, store, pages, commands. Not a medical device.
"""

import contextlib
import copy
import csv
import datetime
import hashlib
import io
import json
import logging
import math
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
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property, reduce
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import click
import numpy as np
import psutil
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
from tqdm import tqdm
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import HTTPException, InternalServerError, RequestEntityTooLarge
from werkzeug.test import encode_multipart

HERE = pathlib.Path(__file__).parent

# ------------------------------------------------------------------------------ settings

DEFAULTS = {
    "MODEL": str(HERE / "model.keras"),
    "UPLOADS": str(HERE / "uploads"),
    "MAX_CONTENT_LENGTH": 64 * 1024 * 1024,  # bytes of one request
    "MAX_FILES": 1000,  # of one request, and in one ZIP
    "MAX_SCANS": 1000,  # in the files of one request
    "MAX_PIXELS": 50_000_000,  # pixels of one picture, before it is decoded
    "MAX_UNPACKED": 512 * 1024 * 1024,  # bytes of a ZIP or a .nii.gz, unpacked
    "MAX_AT_ONCE": 16,  # scans of an upload that is answered at once; a larger one is answered while one watches
    "MAX_STUDIES": 4,  # of these larger ones that wait
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
LONGEST = 16  # times as long as wide, at most
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
ACCEPTED = "a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them"
PLANES = ("sagittal", "coronal", "axial")  # across the patient's x, y and z
Image.MAX_IMAGE_PIXELS = None  # check_size() looks at the size, before anything is decoded


class UnreadableScan(ValueError):
    """A file that gives no scan; the message is for the person who sent it, `status` for HTTP."""

    def __init__(self, message, status=415):
        super().__init__(message)
        self.status = status


class Limits(NamedTuple):
    """How much may be read: pixels of a picture, scans and files in all, bytes and pixels unpacked."""

    pixels: int = DEFAULTS["MAX_PIXELS"]
    scans: int = DEFAULTS["MAX_SCANS"]
    files: int = DEFAULTS["MAX_FILES"]
    unpacked: int = DEFAULTS["MAX_UNPACKED"]
    used: int = 0  # pixels unpacked already


LIMITS = Limits()


class Check(NamedTuple):
    """Something that the picture was looked at for, whether it is well, and what was found."""

    name: str
    passed: bool
    says: str


@dataclass(frozen=True)
class Scan:
    """One greyscale picture: pixels uint8 (H, W), where it came from, and what its file says against it.

    What takes time to find out is found out when it is first asked for: in a study, by the crew.
    """

    pixels: np.ndarray
    file: str
    slice: int = 0  # its place in the series, or its page, from 0
    series: str | None = None  # of a study, "1", "2", …; until arranged() a hash of the series' identifier
    plane: str | None = None
    size: tuple[int, int] | None = None  # width and height as sent
    window: tuple[float, float] | None = None  # the stored values shown as black and as white
    colour: float = 0.0  # mean distance between the largest and smallest of R, G, B; 0 to 255
    position: float = 0.0  # along the series, in mm where the file says so
    signal: float = 0.0  # range of the stored values, to be compared within a series
    identifiers: dict[str, str] | None = None  # of the study; kept only if the sender asks for it
    remarks: tuple[str, ...] = ()  # of the file itself, in plain words

    @cached_property
    def box(self):
        """Where the head is: head_box() of the pixels."""
        return head_box(self.pixels)

    @cached_property
    def contrast(self):
        """Levels of grey: contrast() of the pixels."""
        return contrast(self.pixels)

    @cached_property
    def checks(self):
        """A Check for each thing that a reader of the answer should know about the picture."""
        return tuple(quality_checks(self))

    @property
    def warnings(self):
        """The remarks, and a sentence for each check that failed."""
        return self.remarks + tuple(check.says for check in self.checks if not check.passed)


def read_scans(data: bytes, name: str, limits: Limits = LIMITS, plane: str | None = None) -> list[Scan]:
    """The scans in one file: one for a still picture, one a page, frame or slice for the rest.

    The kind is told from the content, never from the name, of which only the last part is kept.
    `plane` is that of the slices of a NIfTI volume: one of PLANES, "all", or None for the one in
    which it was acquired. Raises UnreadableScan, with a sentence for the sender.
    """
    return read_upload([(name, data)], limits, plane)[0]


def read_upload(files, limits=LIMITS, plane=None):
    """The scans in files (name, bytes), series by series in order, and {what: how many} were skipped.

    What is no scan is skipped in a ZIP and among the files of a study; else it raises UnreadableScan.
    """
    scans, excuses, skipped, used = [], [], Counter(), 0
    for name, data in unpacked(files, limits):
        left = limits._replace(scans=limits.scans - len(scans), used=used)
        try:
            with quiet():
                found = read_file(data, plain_name(name), left, plane)
            used += sum(max(math.prod(scan.size), scan.pixels.nbytes) for scan in found)
            scans += found
        except UnreadableScan as excuse:
            if excuse.status == 413:
                raise
            excuses.append(excuse)
    if excuses and (not scans or not any(scan.series for scan in scans) and not any(is_zip(data) for _, data in files)):
        raise excuses[0]
    if excuses:
        skipped["files that are no scans"] = len(excuses)
    return arranged(scans, skipped), dict(skipped)


def unpacked(files, limits):
    """Yield (name, bytes) of files, those in a ZIP one by one; raises UnreadableScan at the limits."""
    for name, data in files:
        if not is_zip(data):
            yield name, data
            continue
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                yield from members(archive, plain_name(name), limits)
        except UnreadableScan:
            raise
        except Exception:  # zipfile raises nearly anything on an archive that lies, and for a password
            raise damaged(plain_name(name)) from None


def members(archive, name, limits):
    """Yield (name, bytes) of what a ZIP holds, folders and what Macs leave there left out."""
    inside = [member for member in archive.infolist() if not member.is_dir() and not is_litter(member.filename)]
    if len(inside) > limits.files:
        raise UnreadableScan(f"{name} holds {len(inside)} files, but at most {limits.files} are read.", 413)
    if not inside:
        raise UnreadableScan(f"{name} is an empty ZIP; pack the scans into it.")
    left = limits.unpacked
    for member in inside:
        with archive.open(member) as file:
            data = file.read(left + 1)
        left -= len(data)
        if left < 0:
            raise too_much(name, limits)
        yield member.filename, data


def is_zip(data):
    return data[:4] in (b"PK\x03\x04", b"PK\x05\x06")  # the second one holds nothing


def is_litter(path):
    """Whether a path in a ZIP is a system's own: hidden, or of __MACOSX."""
    return any(part.strip(".") and (part[0] == "." or part == "__MACOSX") for part in path.split("/"))


def too_much(name, limits):
    most = limits.unpacked // 2**20
    return UnreadableScan(f"{name} is larger than {most} MB when unpacked; send it in parts.", 413)


def plain_name(name):
    """The last part of a visitor's file name, without control characters, at most 100 long."""
    last = re.split(r"[/\\]", name or "")[-1]
    return "".join(c for c in last if c.isprintable())[:100] or "The file"


def damaged(name):
    return UnreadableScan(f"{name} is damaged or cut off; export it again.")


@contextlib.contextmanager
def quiet():
    """Without what libraries say about files that are not quite to their standard: it may quote the patient."""
    for name in ("pydicom", "nibabel"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_file(data, name, limits, plane):
    """The scans of one file that is no ZIP."""
    if not data:
        raise UnreadableScan(f"{name} is empty; choose the file again.", 400)
    data = gunzipped(data, name, limits)
    if data[128:132] == b"DICM" or data[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08") and b"\x00" in data[2:4]:
        return read_dicom(data, name, limits)
    if data[344:347] == b"n+1" or data[4:7] == b"n+2":
        return read_nifti(data, name, limits, plane)
    return read_picture(data, name, limits)


def gunzipped(data, name, limits):
    """What a gzip file holds, and any other file as it is."""
    return inflated(data, name, limits, wbits=31) if data[:2] == b"\x1f\x8b" else data


def inflated(data, name, limits, wbits):
    """Deflated bytes unpacked; raises UnreadableScan at the limit, before there is more of it in memory."""
    unzip = zlib.decompressobj(wbits)
    try:
        inside = unzip.decompress(data, limits.unpacked + 1)
    except zlib.error:
        raise damaged(name) from None
    if len(inside) > limits.unpacked:
        raise too_much(name, limits)
    if not unzip.eof:
        raise damaged(name)
    return inside


def check_count(count, what, name, limits):
    """Raise UnreadableScan for more pages, frames or slices than may be read."""
    if count > limits.scans:
        raise UnreadableScan(
            f"{name} has {count} {what}, but only {limits.scans} more scans are allowed; send fewer.", 413)


def check_size(size, name, limits, pictures=1):
    """Raise UnreadableScan for pictures (width, height) that are too large to decode, in all as well, or too small."""
    shape = f"{name} has {size[0]} x {size[1]} pixels"
    if size[0] * size[1] > limits.pixels:
        raise UnreadableScan(f"{shape}, more than the {limits.pixels:,} allowed; send it smaller.", 413)
    if limits.used + pictures * math.prod(size) > limits.unpacked:
        raise too_much(name, limits)
    if min(size) < SMALLEST_SIDE:
        raise UnreadableScan(f"{shape}, but a scan needs at least {SMALLEST_SIDE} x {SMALLEST_SIDE}.")
    if max(size) > LONGEST * min(size):
        raise UnreadableScan(f"{shape}, longer and narrower than any scan; cut it out and send it again.")


# Pictures


def read_picture(data, name, limits):
    """The pages of a still picture as scans."""
    try:
        image = Image.open(io.BytesIO(data), formats=KINDS)
        pages = image.n_frames if image.format == "TIFF" else 1
    except UnidentifiedImageError:
        raise UnreadableScan(f"{name} is not {ACCEPTED}; export the scan as one of these.") from None
    except Exception:  # Pillow's parsers raise nearly anything on damaged headers
        raise damaged(name) from None
    check_count(pages, "pages", name, limits)
    scans = []
    for page in range(pages):
        scans.append(read_page(image, page, name, limits))
        limits = limits._replace(used=limits.used + math.prod(scans[-1].size))
    return scans


def read_page(image, page, name, limits):
    """Page `page` of an open picture as a Scan; raises UnreadableScan if it cannot be one."""
    try:
        image.seek(page)
    except Exception:  # as above: truncated, lying and mutated files
        raise damaged(name) from None
    check_size(image.size, name, limits)
    try:
        upright = ImageOps.exif_transpose(image)
        pixels, window, colour = grey(upright)
    except Exception:  # decoding happens here
        raise damaged(name) from None
    return Scan(shrink(pixels), name, page, size=upright.size, window=window, colour=colour)


def grey(frame):
    """A Pillow picture as (pixels uint8 (H, W), window or None, colour 0 to 255).

    More than 8 bits are stretched; what is transparent becomes black.
    """
    if frame.mode.startswith(("I", "F")):
        return *stretched(np.asarray(frame, np.float32)), 0.0
    if frame.mode in ("1", "L"):
        return np.asarray(frame.convert("L")), None, 0.0
    if frame.has_transparency_data:
        seen = frame.convert("RGBA")
        frame = Image.new("RGBA", frame.size, "black")
        frame.alpha_composite(seen)
    opaque = frame.convert("RGB")
    sample = np.asarray(opaque.reduce(max(1, min(frame.size) // 128)), np.int16)
    return np.asarray(opaque.convert("L")), None, float(np.ptp(sample, axis=2).mean())


def stretched(values):
    """(pixels uint8, window) of values float (H, W), scaled linearly between two percentiles.

    From the 0.1th to the 99.9th, so that one hot pixel does not turn the head black; of a large
    picture every few pixels tell them.
    """
    values = np.nan_to_num(values)
    low, high = np.percentile(sampled(values)[1], (0.1, 99.9))
    return as_pixels(values, low, high), (float(low), float(high))


def sampled(pixels):
    """(step, every `step`-th of the pixels down and across): of a large picture few tell the levels of grey as well."""
    step = max(1, min(pixels.shape) // 256)
    return step, pixels[::step, ::step]


def as_pixels(values, black, white):
    """Values (H, W) as uint8, `black` and below as 0, `white` and above as 255."""
    return ((values - black) / max(white - black, 1e-6) * 255).clip(0, 255).astype(np.uint8)


def shrink(pixels):
    """Pixels with no side above KEPT_SIDE, the aspect ratio kept."""
    if max(pixels.shape) <= KEPT_SIDE:
        return pixels
    picture = Image.fromarray(pixels)
    picture.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def square(pixels, down, across):
    """Pixels whose spacing is `down` and `across` (mm) resized so that both are the finer one, within reason."""
    finer = min(down, across)
    if not finer > 0 or not 1.02 < max(down, across) / finer < 10:
        return pixels
    size = (round(pixels.shape[1] * across / finer), round(pixels.shape[0] * down / finer))
    if max(size) > LONGEST * min(size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


# DICOM

IDENTIFIERS = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID",
               "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
HEADS = ("HEAD", "BRAIN", "SKULL", "PITUITARY", "ORBIT", "FACE", "IAC")


def read_dicom(data, name, limits):
    """The frames of a DICOM file as scans; of its header only what they look like, and no name or number."""
    from pydicom.pixels import pixel_array

    dataset, frames = open_dicom(data, name, limits)
    try:
        return [dicom_scan(pixel_array(dataset, index=n), dataset, n, name) for n in range(frames)]
    except Exception:  # decoding happens here
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_encapsulated:
            raise damaged(name) from None
        raise UnreadableScan(f"{name} is compressed as {syntax.name} and cannot be decoded; "
                             "export it uncompressed (Explicit VR Little Endian).") from None  # fmt: skip


def open_dicom(data, name, limits):
    """(dataset, frames) of a DICOM file with a picture that is no larger than allowed."""
    import gdcm
    from pydicom import dcmread

    gdcm.Trace.WarningOff()  # as quiet()
    gdcm.Trace.ErrorOff()
    if b"1.2.840.10008.1.2.1.99" in data[:1000]:  # deflated: pydicom would unpack it whole
        size = int.from_bytes(data[140:144], "little")  # of the header before it, which gives its own length
        inflated(data[144 + size :], name, limits, wbits=-15)
    try:
        dataset = dcmread(io.BytesIO(data), force=True)
        if "PixelData" not in dataset:
            raise UnreadableScan(f"{name} is a DICOM file without a picture; send the images of the study.")
        frames = int(dataset.get("NumberOfFrames") or 1)
        size = int(dataset.Columns), int(dataset.Rows)
        name_syntax(dataset)
    except UnreadableScan:
        raise
    except Exception:  # pydicom raises nearly anything on a file that lies
        raise damaged(name) from None
    check_count(frames, "frames", name, limits)
    check_size(size, name, limits, frames)
    return dataset, frames


def name_syntax(dataset):
    """Give a dataset without a file header the transfer syntax in which it was read; ValueError for an unknown one."""
    from pydicom import uid

    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    if not dataset.file_meta.TransferSyntaxUID.is_transfer_syntax:
        raise ValueError("no transfer syntax")


def dicom_scan(frame, dataset, n, name):
    """Frame n of a dataset, values (H, W) or (H, W, 3), as a Scan."""
    header = frame_header(dataset, n)
    pixels, window, colour = dicom_grey(frame, header)
    plane, position = place_of(header, n)
    uid = str(dataset.get("SeriesInstanceUID", ""))
    down, across = (float(spacing) for spacing in header.get("PixelSpacing") or (1, 1))
    return Scan(
        shrink(square(shrink(pixels), down, across)),
        name,
        n,
        series=hashlib.sha256(uid.encode()).hexdigest(),
        plane=plane,
        size=frame.shape[1::-1],
        window=window,
        colour=colour,
        position=position,
        signal=float(np.ptp(np.percentile(frame[::4, ::4], (1, 99)))),
        identifiers={key: str(dataset.get(key, "")) for key in IDENTIFIERS},
        remarks=tuple(dicom_remarks(dataset)),
    )


def frame_header(dataset, n):
    """The dataset with what its functional groups say of frame n, those of all frames first."""
    header = copy.copy(dataset)
    for groups in (dataset.get("SharedFunctionalGroupsSequence"), dataset.get("PerFrameFunctionalGroupsSequence")):
        if not groups:
            continue
        for element in groups[min(n, len(groups) - 1)]:
            if element.VR == "SQ" and element.value:
                header.update(element.value[0])
    return header


def dicom_grey(frame, header):
    """(pixels uint8, window or None, colour) of a frame: palette, rescale, window and polarity applied."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    if header.PhotometricInterpretation == "PALETTE COLOR":
        frame = apply_color_lut(frame, header)
    if frame.ndim == 3:
        bits = 8 * frame.dtype.itemsize
        return grey(Image.fromarray((frame >> (bits - 8)).astype(np.uint8)))
    values = apply_modality_lut(frame, header)
    try:
        shown = windowed(values, header)
    except Exception:  # a window that makes no sense is as good as none
        shown = None
    pixels, window = shown or stretched(values.astype(np.float32))
    if header.PhotometricInterpretation == "MONOCHROME1":
        pixels = 255 - pixels
    return pixels, window, 0.0


def windowed(values, header):
    """(pixels uint8, window or None) through the VOI LUT or window of the file.

    None where there is none, or where it would hide what the values show.
    """
    from pydicom.pixels import apply_voi_lut

    if header.get("VOILUTSequence"):
        white = 2 ** header.VOILUTSequence[0].LUTDescriptor[2] - 1
        pixels, window = as_pixels(apply_voi_lut(values.astype(np.int64), header), 0, white), None
    elif header.get("WindowWidth"):
        centre, width = (
            float(value[0] if isinstance(value, Sequence) else value)
            for value in (header.WindowCenter, header.WindowWidth)
        )
        black, white = apply_voi_lut(np.array([centre - 50 * width, centre + 50 * width]), header)
        pixels = as_pixels(apply_voi_lut(values, header), black, white)
        window = centre - width / 2, centre + width / 2
    else:
        return None
    return None if contrast(pixels) < 16 else (pixels, window)


def place_of(header, n):
    """(plane or None, position in mm or the number) of a frame."""
    try:
        across, down = np.reshape([float(v) for v in header.ImageOrientationPatient], (2, 3))
        normal = np.cross(across, down)
        plane = PLANES[int(np.abs(normal).argmax())]
        return plane, float(normal @ [float(v) for v in header.ImagePositionPatient])
    except (AttributeError, ValueError, TypeError):
        place = header.get("SliceLocation", header.get("InstanceNumber"))
        return None, float(n if place is None else place)


def dicom_remarks(dataset):
    """Yield what the header says against reading the file as a brain MRI."""
    modality, part = (str(dataset.get(key) or "").upper() for key in ("Modality", "BodyPartExamined"))
    if modality and modality != "MR":
        yield f"The file says that it is no MRI (modality {plain_name(modality)[:16]})."
    if part and not any(head in part for head in HEADS):
        yield f"The file says that it shows no head (body part {plain_name(part)[:16]})."
    if str(dataset.get("BurnedInAnnotation")).upper() == "YES":
        yield "The file says that text is burned into the picture; see that it names nobody."


# NIfTI


def read_nifti(data, name, limits, plane):
    """The slices of a volume in its closest canonical orientation as scans, seen as radiologists see them."""
    try:
        volume, several = open_nifti(data, name, limits)
        shape, spacing = volume.shape, [float(zoom) for zoom in volume.header.get_zooms()]
        planes = PLANES if plane == "all" else [plane or PLANES[int(np.argmax(spacing))]]
        check_count(sum(shape[PLANES.index(p)] for p in planes), "slices", name, limits)
        for p in planes:
            check_size([n for axis, n in enumerate(shape) if axis != PLANES.index(p)], name, limits)
        values = np.nan_to_num(np.asarray(volume.dataobj, np.float32))
    except UnreadableScan:
        raise
    except Exception:  # nibabel's parsers as Pillow's: sizes that lie, cut-off data
        raise damaged(name) from None
    remarks = (f"The file holds {several} volumes; the first was read.",) if several > 1 else ()
    series = secrets.token_hex()
    return [
        replace(scan, series=f"{series} {p}", remarks=remarks)
        for p in planes
        for scan in slices_across(values, spacing, p, name)
    ]


def open_nifti(data, name, limits):
    """(the first volume of a NIfTI file, its axes towards right, front and top, how many it holds)."""
    import nibabel

    kind = nibabel.Nifti1Image if data[344:347] == b"n+1" else nibabel.Nifti2Image
    volume = kind.from_bytes(data)
    several = math.prod(volume.shape[3:])
    volume = volume.slicer[(..., *[0] * (len(volume.shape) - 3))]
    x, y, z = volume.shape
    if limits.used + 8 * x * y * z > limits.unpacked:  # as the library holds it, 8 bytes a voxel
        raise too_much(name, limits)
    return nibabel.as_closest_canonical(volume), several


def slices_across(volume, spacing, plane, name):
    """Yield the slices of a volume (x, y, z) towards right, front and top as scans of one plane.

    Rows run from the top or front down; the patient's right is on the left, the face on the left.
    """
    axis = PLANES.index(plane)
    across, down = (spacing[n] for n in range(3) if n != axis)
    for n in range(volume.shape[axis]):
        values = volume.take(n, axis)[::-1, ::-1].T
        pixels, window = stretched(values)
        yield Scan(
            shrink(square(shrink(pixels), down, across)),
            name,
            n,
            plane=plane,
            size=values.shape[::-1],
            window=window,
            position=n * spacing[axis],
            signal=float(np.ptp(np.percentile(values[::4, ::4], (1, 99)))),
        )


# What all kinds share

SMALLEST_SERIES = 5  # slices from which on its empty slices are told from the others


def arranged(scans, skipped):
    """The scans, each series numbered and in the order of its positions, its empty slices counted as skipped."""
    number = {}
    for scan in scans:
        if scan.series:
            number.setdefault(scan.series, str(len(number) + 1))
    in_order = []
    for series, n in number.items():
        slices = sorted((s for s in scans if s.series == series), key=lambda s: (s.position, natural(s.file), s.slice))
        slices = [replace(scan, series=n, slice=place) for place, scan in enumerate(slices)]
        kept = slices if len(slices) < SMALLEST_SERIES else without_empty(slices)
        skipped["empty or edge slices"] += len(slices) - len(kept)
        in_order += kept
    skipped += Counter()  # drops the zeros
    return in_order + [scan for scan in scans if not scan.series]


def natural(name):
    """A name's key for sorting: numbers in it by their value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def without_empty(series):
    """The slices of a series that show something of the head: not much fainter than the others, not its rim."""
    most = max(scan.signal for scan in series)
    kept = [scan for scan in series if scan.signal >= 0.2 * most and standing_out(scan.pixels)[1].mean() >= 0.05]
    return kept or series


def quality_checks(scan):
    """Yield a Check for each thing that a reader of the answer should know about the picture."""
    width, height = scan.size
    small, flat = min(scan.size) < 128, scan.contrast < 40
    coloured, marked = scan.colour > 4, marks_beside(scan.pixels) >= 3
    bright = np.median(np.median(corners(scan.pixels[::2, ::2]), axis=1)) > 128
    yield Check("Size", not small, f"The picture is small ({min(scan.size)} pixels); details may be lost."
                if small else f"{width} x {height} pixels")  # fmt: skip
    yield Check("Contrast", not flat, "The contrast is low; the answer may be unreliable."
                if flat else f"{scan.contrast} of 255 levels of grey")  # fmt: skip
    yield Check("Colour", not coloured, "The picture is in colour; it was turned to grey."
                if coloured else "greyscale")  # fmt: skip
    yield Check("Background", not bright, "The background is bright; the answer for an inverted picture is unreliable."
                if bright else "dark")  # fmt: skip
    yield Check("Text", not marked, "There is text or a scale beside the head; see that it names nobody."
                if marked else "none seen beside the head")  # fmt: skip


def marks_beside(pixels):
    """How many bright marks of a letter's height stand in the background beside the head.

    The head is the largest connected piece that differs from the margin, filled up to its outline.
    """
    step = max(1, -(-max(pixels.shape) // 320))
    h, w = (n // step for n in pixels.shape)
    lines = reduce(np.maximum, [pixels[i : h * step : step] for i in range(step)])
    small = reduce(np.maximum, [lines[:, j : w * step : step] for j in range(step)])
    margin = np.concatenate([small[:3].ravel(), small[-3:].ravel(), small[:, :3].ravel(), small[:, -3:].ravel()])
    difference, most = differences(small, small[::2, ::2], np.median(margin))
    threshold = max(25, 0.15 * most)
    pieces, _ = ndimage.label(difference > threshold, np.ones((3, 3)))
    letters = []
    for number, place in enumerate(ndimage.find_objects(pieces), 1):
        rows, columns = (p.stop - p.start for p in place)
        if 0.01 * max(h, w) <= rows <= 0.1 * max(h, w) and columns <= 0.25 * w:
            piece = pieces[place] == number
            if difference[place][piece].max() > 90:
                letters.append((place, piece))
    if not letters:
        return 0
    head = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    near = ndimage.binary_dilation(spans(head) | spans(head.T).T, iterations=4)
    return sum(not near[place][piece].any() for place, piece in letters)


def spans(mask):
    """A mask (H, W) with every row filled from its first to its last pixel."""
    first, last = mask.argmax(1)[:, None], mask.shape[1] - 1 - mask[:, ::-1].argmax(1)[:, None]
    column = np.arange(mask.shape[1])
    return mask.any(1)[:, None] & (first <= column) & (column <= last)


def contrast(pixels):
    """Levels of grey between the 1st and the 99th percentile of uint8 pixels, 0 to 255, as every few of them tell."""
    below = np.cumsum(Image.fromarray(sampled(pixels)[1]).histogram())
    low, high = np.searchsorted(below, (0.01 * below[-1], 0.99 * below[-1]))
    return int(high - low)


def differences(pixels, sample, background):
    """How far uint8 pixels (H, W) are from a level of grey, float32 (H, W), and the 99th percentile of that.

    The percentile is that of `sample`, some of the pixels, counted level by level, which is faster than sorting them.
    """
    of_level = np.abs(np.arange(256, dtype=np.float32) - np.float32(background))
    order = of_level.argsort(kind="stable")
    below = np.array(Image.fromarray(sample).histogram())[order].cumsum()
    place = 0.99 * (below[-1] - 1)
    low, high = of_level[order][np.searchsorted(below, (math.floor(place), math.ceil(place)), side="right")]
    return np.abs(pixels.astype(np.float32) - np.float32(background)), low + (high - low) * (place % 1)


def head_box(pixels):
    """Box (x0, y0, x1, y1), in pixels, around what differs from the background.

    Rows and columns count where at least 2 % of their pixels stand out. The whole picture, if
    that leaves next to nothing.
    """
    step, stands_out = standing_out(pixels)
    ys = np.flatnonzero(stands_out.mean(1) > 0.02) * step
    xs = np.flatnonzero(stands_out.mean(0) > 0.02) * step
    if not len(xs) or not len(ys) or min(np.ptp(xs), np.ptp(ys)) < 0.25 * min(pixels.shape):
        return 0, 0, pixels.shape[1], pixels.shape[0]
    y1, x1 = min(ys[-1] + step, pixels.shape[0]), min(xs[-1] + step, pixels.shape[1])
    return int(xs[0]), int(ys[0]), int(x1), int(y1)


def standing_out(pixels):
    """(step, mask): which of every `step`-th pixel differs from the background.

    The background is the level of the four corners, so that a white one works as well, and its
    noise that of the quietest corner.
    """
    step, sample = sampled(pixels)
    background = np.sort(corners(sample).astype(np.float32))
    levels = quantile(background, 0.5)
    difference, most = differences(sample, sample, quantile(np.sort(levels), 0.5))
    noise = quantile(np.sort(np.abs(background - levels[:, None])), 0.95).min()
    return step, difference > max(0.12 * most, 2 * noise)


def quantile(ordered, share):
    """A quantile of values (..., n) in ascending order; NumPy's own takes many times as long for so few."""
    place = share * (ordered.shape[-1] - 1)
    low, high = ordered[..., math.floor(place)], ordered[..., math.ceil(place)]
    return low + (high - low) * (place % 1)


def corners(pixels):
    """The pixels (4, n) of the four corners, a sixteenth of either side."""
    h, w = (max(1, n // 16) for n in pixels.shape)
    return np.stack([pixels[:h, :w], pixels[:h, -w:], pixels[-h:, :w], pixels[-h:, -w:]]).reshape(4, -1)


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
    return np.asarray(square.convert("RGB"))


# ---------------------------------------------------------------------------- classifier

NO_TUMOR = "no_tumor"
CREW = 4  # engines at most for many scans; each takes about 40 MB
PLAIN_CARD = {"thresholds": {"low": 0.5, "high": 0.5}, "plain": True}  # a model without card.json
GATE = ("scale", "hidden", "hidden_bias", "weights", "bias", "threshold")
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
    warnings: tuple[str, ...] = ()


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
        self.sha256 = sha256(self.path.read_bytes())
        self.card = read_card(members.get("card.json"), self.path)
        self.threads, self.network = threads, members.get("serving.tflite")
        written_for = self.card.get("serving_sha256")  # which an older card lacks
        if self.network and written_for and written_for != sha256(self.network):
            raise wrong_model(self.path, "holds another network than the one its card was written for")
        self.lock = threading.Lock()  # engines are not shared between threads
        self.hiring, self.engines = threading.Lock(), None  # of crew()
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
        self.gate = read_gate(self.card.get("gate"), outputs.get("embedding"), self.path)

    def infer(self, prepared):
        """Outputs by name for uint8 (N, 224, 224, 3), with all threads, for one caller at a time."""
        with self.lock:
            return self.run(prepared)

    def crew(self):
        """Engines for many scans, each with its share of the threads, in a queue of those that are free.

        For many scans an engine a core beats one engine on all cores: no core waits for another,
        and each prepares its own next scan. Made when first needed; a single scan needs none.
        """
        with self.hiring:
            if self.engines is None:
                self.engines = queue.SimpleQueue()
                for _ in range(1 if self.network is None else max(1, min(self.threads, CREW))):
                    share = max(1, self.threads // CREW)
                    self.engines.put(litert(self.network, share, self.path) if self.network else self.infer)
            return self.engines

    def infer_beside(self, prepared):
        """As infer(), with one of the crew, while the others work on other scans."""
        crew = self.crew()
        engine = crew.get()
        try:
            return engine(prepared)
        finally:
            crew.put(engine)

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
        reason = self.why_rejected(scan, prepared[..., 0], outputs.get("embedding"))
        finding = self.finding(reason, outputs["probabilities"], outputs.get("heat"))
        if finding.heat is not None and finding.label != NO_TUMOR and outside_head(prepared, finding.heat) > 0.5:
            return replace(finding, warnings=("The network looked outside the head; the answer may be unreliable.",))
        return finding

    def finding(self, reason, probabilities, heat):
        """The Finding for the network's outputs for one scan, or for a reason to reject it."""
        if reason:
            return Finding("rejected", reason=reason)
        by_label = {label: float(p) for label, p in zip(self.labels, probabilities)}
        tumor_probability = 1 - by_label[NO_TUMOR]
        verdict, risk = judge(tumor_probability, **self.card["thresholds"])
        label = most_probable(by_label, verdict)
        if heat is not None:
            heat = np.asarray(heat[..., self.labels.index(label)], np.float32)
        return Finding(verdict, label, risk, tumor_probability, by_label, heat)

    def why_rejected(self, scan, grey, embedding):
        """A sentence if the picture is no brain MRI, else None; grey (224, 224) is what the network saw.

        Blankness, colour and noise (neighbouring pixels that hardly agree) are seen in the
        picture. For the rest the card holds a small network on the embedding and a thumbnail, fitted
        between brain MRI and other pictures (outlier exposure, Hendrycks et al. 2019).
        """
        if scan.contrast < 10 or not np.ptp(grey):
            return "The picture is blank or nearly so."
        if scan.colour > 40:
            return "The picture is in strong colours, which no MRI is."
        rows = grey[::2] - grey.mean(dtype=np.float32)
        if np.vdot(rows[:, 1:], rows[:, :-1]) < 0.5 * np.vdot(rows, rows):  # their autocorrelation
            return "The picture is noise rather than a scan."
        if self.gate:
            features = gate_features(self.gate["scale"], embedding, grey)
            if gate_score(self.gate, features) < self.gate["threshold"]:
                return "This does not look like a slice of a brain MRI."
        return None


def read_gate(gate, embedding, path):
    """The gate of a card as arrays, tried on embeddings (N, D); None where there is none."""
    if not gate or embedding is None:
        return None
    try:
        gate = {name: np.asarray(gate[name], np.float32) for name in GATE}
        nothing = np.zeros((len(embedding), SIDE, SIDE))
        if gate_score(gate, gate_features(gate["scale"], embedding, nothing)).shape != embedding.shape[:1]:
            raise ValueError("no score for each embedding")
    except (ValueError, KeyError, TypeError):
        raise wrong_model(path, f"has a gate that does not fit an embedding of {embedding.shape[1]}") from None
    return gate


def gate_features(scale, embedding, grey):
    """What the gate looks at, (..., D + 196): the embedding (..., D) of grey (..., 224, 224), and a thumbnail of it.

    The logarithm takes out how loud the embedding is; the thumbnail says where things are, which its pooling has lost.
    """
    thumbnail = grey.reshape(*grey.shape[:-2], 14, SIDE // 14, 14, SIDE // 14).mean((-3, -1)) / 255
    return np.concatenate([np.log1p(scale * embedding), thumbnail.reshape(*grey.shape[:-2], -1)], axis=-1)


def gate_score(gate, features):
    """How much gate_features() (..., F) look like brain MRI, (...,): from gate["threshold"] on they pass."""
    hidden = np.maximum(features @ gate["hidden"] + gate["hidden_bias"], 0)
    return hidden @ gate["weights"] + gate["bias"]


def outside_head(prepared, heat):
    """The share of the positive heat (14, 14) that lies outside the head in what the network saw, 0 to 1."""
    _, mask = standing_out(prepared[::2, ::2, 0])
    head = spans(mask) & spans(mask.T).T
    cells = head.reshape(14, SIDE // 28, 14, SIDE // 28).mean((1, 3))
    warm = np.maximum(heat, 0)
    return 1 - float((warm * cells).sum() / max(warm.sum(), 1e-6))


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


def sha256(data):
    """The SHA-256 of bytes in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


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

    if tuple(int(part) for part in keras.__version__.split(".")[:2]) < (3, 11):  # CVE-2025-9906, CVE-2025-1550
        raise ModelError(f"Keras {keras.__version__} can be made to run code by a model file; install 3.11 or newer.")
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
GREYS = bytes(np.arange(256, dtype=np.uint8).repeat(3))  # a palette: Pillow tries no filters on it, which take longest

# Black, purple, orange, pale yellow: matplotlib's `inferno` at nine even steps, even to the eye.
HEAT_COLOURS = np.array(
    [
        (0, 0, 4), (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84),
        (228, 90, 49), (249, 142, 9), (249, 203, 53), (252, 255, 164),
    ]
)  # fmt: skip


def save(uploads, scans, findings, model, card, **more):
    """Write one upload to `uploads`/<id>/ and return its result, the dict of `result.json`.

    Holds the pictures re-encoded, the heats, of which heatmaps are drawn when they are asked for,
    and the answer; nothing of the files sent but the last part of their names. Written under a
    temporary name, so it is whole or absent.
    """
    result = new_result(model, **more)
    entries = [scan_entry(result["id"], n, *each) for n, each in enumerate(zip(scans, findings))]
    result |= {"status": "done", "progress": 1.0, "scans": entries, "study": study_answer(entries, card)}
    partial = uploads / f".{result['id']}"
    try:
        partial.mkdir(parents=True)  # the folder of uploads may have vanished
        for n, (scan, finding) in enumerate(zip(scans, findings)):
            keep_scan(partial / str(n), scan, finding)
        write_result(partial, result)
        partial.rename(uploads / result["id"])
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


def new_result(model, **more):
    """The result of an upload before anything of it is answered."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "id": secrets.token_urlsafe(16),
        "created": now.replace("+00:00", "Z"),
        "status": "running",
        "progress": 0.0,
        "scans": [],
        "model": model,
    } | more


def write_result(folder, result):
    """Write result.json into a folder in one move; raises FileNotFoundError if the folder is gone."""
    partial = folder / ".result.json"
    partial.write_bytes(json.dumps(result).encode())
    partial.replace(folder / "result.json")


def scan_entry(upload_id, n, scan, finding):
    """Scan n of an upload as the JSON of a result has it."""
    address = f"/results/{upload_id}/{n}"
    probabilities = finding.probabilities and {k: round(p, 4) for k, p in finding.probabilities.items()}
    p = finding.tumor_probability
    return {
        "file": scan.file,
        "slice": scan.slice,
        "series": scan.series,
        "plane": scan.plane,
        "verdict": finding.verdict,
        "label": finding.label,
        "risk": finding.risk,
        "tumor_probability": None if p is None else round(p, 4),
        "probabilities": probabilities,
        "reason": finding.reason,
        "warnings": [*scan.warnings, *finding.warnings],
        "checks": [check._asdict() for check in scan.checks],
        "size": scan.size,
        "kept": scan.pixels.shape[::-1],
        "crop": scan.box,
        "window": scan.window,
        "scan": f"{address}/scan.png",
        "heatmap": None if finding.heat is None else f"{address}/heatmap.png",
    }


def keep_scan(folder, scan, finding):
    """Write scan.png, heat.f32 where there is a heat, and the study's identifiers where they were asked for."""
    folder.mkdir()
    picture = Image.fromarray(scan.pixels)
    picture.putpalette(GREYS)
    (folder / "scan.png").write_bytes(png_of(picture, compress_level=0))  # half the size would take seven times as long
    if finding.heat is not None:
        (folder / "heat.f32").write_bytes(finding.heat.tobytes())  # float32 (14, 14)
    if scan.identifiers:
        (folder / "identifiers.json").write_text(json.dumps(scan.identifiers))


def heatmap_of(folder):
    """The heatmap of a scan that keep_scan() kept, as a picture."""
    with Image.open(folder / "scan.png") as picture:
        return draw_heat(np.asarray(picture.convert("L")), np.fromfile(folder / "heat.f32", np.float32).reshape(14, 14))


def png_of(picture, **how):
    """The bytes of a picture as a PNG file, compressed fast or as Pillow's options `how` say."""
    file = io.BytesIO()
    picture.save(file, "PNG", **(how or FAST_PNG))
    return file.getvalue()


def secondary_capture(picture, identifiers, n):
    """An RGB picture as the bytes of a DICOM Secondary Capture, of the study that `identifiers` name if any."""
    from pydicom import Dataset, dcmwrite, uid

    now = datetime.datetime.now()
    dataset = Dataset()
    dataset.update({key: identifiers.get(key, "") for key in IDENTIFIERS})
    dataset.StudyInstanceUID = identifiers.get("StudyInstanceUID") or uid.generate_uid()
    dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid.generate_uid(), uid.generate_uid()
    dataset.SOPClassUID = uid.SecondaryCaptureImageStorage
    dataset.Modality, dataset.ConversionType, dataset.SeriesDescription = "OT", "WSD", "Heatmap, not for diagnosis"
    dataset.SeriesNumber, dataset.InstanceNumber = "1", str(n + 1)
    dataset.ContentDate, dataset.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.PlanarConfiguration = "RGB", 3, 0
    dataset.Columns, dataset.Rows = picture.size
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    pixels = picture.tobytes()
    dataset.PixelData = pixels + bytes(len(pixels) % 2)
    dataset.ensure_file_meta()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    file = io.BytesIO()
    dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


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


GONE = "There is no such result (any more); results are removed after a time."


def find_upload(uploads, upload_id, hours):
    """The folder of an upload; 404 if there is none, or it is older than `hours` and to be removed."""
    folder = uploads / upload_id
    if not ID.fullmatch(upload_id) or not (folder / "result.json").is_file() or is_old(folder, hours):
        abort(404, GONE)
    return folder


def is_old(folder, hours):
    """Whether a folder is older than `hours`, or comes from a future that a wrong clock had shown."""
    return abs(time.time() - folder.stat().st_mtime) > hours * 3600


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
    columns = ["file", "series", "slice", "plane", "verdict", "label", "risk", "tumor_probability", *labels]
    text = io.StringIO()
    table = csv.DictWriter(text, [*columns, "reason", "warnings"], extrasaction="ignore")
    table.writeheader()
    for scan in result["scans"]:
        probabilities = scan["probabilities"] or {}
        name = re.sub(r"^([=+@-])", r"'\1", scan["file"])  # a spreadsheet would take it for a formula
        table.writerow(scan | probabilities | {"file": name, "warnings": " ".join(scan["warnings"])})
    return text.getvalue()


# ------------------------------------------------------------------------------- studies


class Studies:
    """Uploads too large to be answered at once: done one after the other, in a thread of their own."""

    def __init__(self, classifier, most):
        self.classifier, self.waiting = classifier, queue.Queue(most)
        threading.Thread(target=self.work, name="studies", daemon=True).start()

    def start(self, uploads, scans, model, **more):
        """Begin a study; returns its result so far. Raises queue.Full if too many wait."""
        result = new_result(model, total=len(scans), worker=this_process(), **more)
        folder = uploads / result["id"]
        folder.mkdir(parents=True)  # as in save()
        write_result(folder, result)
        try:
            self.waiting.put_nowait((folder, result, scans))
        except queue.Full:
            shutil.rmtree(folder)
            raise
        return result

    def work(self):
        """Do what waits, for ever."""
        while True:
            folder, result, scans = self.waiting.get()
            try:
                run_study(self.classifier, folder, result, scans)
            except Exception:  # not even its end could be written; the next study has to run
                logging.exception("a study could not be ended")
                shutil.rmtree(folder, ignore_errors=True)


def run_study(classifier, folder, result, scans):
    """Answer a study, whatever happens to it meanwhile; one that failed says so."""
    try:
        answer_study(classifier, folder, result, scans)
    except FileNotFoundError:  # deleted meanwhile
        shutil.rmtree(folder, ignore_errors=True)
    except Exception:
        logging.exception("a study failed")
        end_study(folder, result, "failed", error="Something went wrong on the server; send the study again.")


def answer_study(classifier, folder, result, scans):
    """Classify the scans of a study, writing what is there every half second, until done or cancelled."""

    def answer(numbered):
        n, scan = numbered
        finding = classifier.classify_one(scan, classifier.infer_beside)
        keep_scan(folder / str(n), scan, finding)
        return scan_entry(result["id"], n, scan, finding)

    with crew_of_threads() as pool:
        written = time.monotonic()
        for entry in pool.imap(answer, enumerate(scans)):
            result["scans"].append(entry)
            result["progress"] = round(len(result["scans"]) / len(scans), 3)
            if (folder / "cancel").exists():
                break
            if time.monotonic() > written + 0.5:
                write_result(folder, result)
                written = time.monotonic()
    if (folder / "cancel").exists():
        end_study(folder, result, "cancelled")
    else:
        study = study_answer(result["scans"], classifier.card)
        write_result(folder, result | {"status": "done", "progress": 1.0, "study": study})


@contextlib.contextmanager
def crew_of_threads():
    """A pool of CREW daemon threads; on leaving, those at work end first and nothing else is begun."""
    pool = ThreadPool(CREW)
    try:
        yield pool
    finally:
        pool.terminate()
        pool.join()


def end_study(folder, result, status, **more):
    """Leave of a study nothing but that it ended, and how."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    (folder / "cancel").unlink(missing_ok=True)
    write_result(folder, result | {"status": status, "scans": [], **more})


def study_answer(entries, card):
    """One answer for the slices of a study, by the card's rule; None where there are no such slices."""
    rule = {"k": 3, **card["thresholds"]} | (card.get("study") or {})
    ranked = sorted(
        (n for n, entry in enumerate(entries) if entry["series"] and entry["tumor_probability"] is not None),
        key=lambda n: -entries[n]["tumor_probability"],
    )
    if len(ranked) < 2:
        return None
    highest = ranked[: rule["k"]]
    p = sum(entries[n]["tumor_probability"] for n in highest) / len(highest)
    verdict, risk = judge(p, rule["low"], rule["high"])
    return {"verdict": verdict, "risk": risk, "tumor_probability": round(p, 4), "highest": highest,
            "rejected": sum(entry["tumor_probability"] is None for entry in entries),
            "measured": bool(card.get("study"))}  # fmt: skip


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
    app.config["MAX_FORM_PARTS"] = app.config["MAX_FILES"] + 100  # receive() has the sentence for more files
    uploads = pathlib.Path(app.config["UPLOADS"])
    uploads.mkdir(parents=True, exist_ok=True)
    sweep(uploads, app.config["RETENTION_HOURS"])
    keep_sweeping(uploads, app.config["RETENTION_HOURS"])
    app.classifier = Classifier(app.config["MODEL"], app.config["THREADS"])
    app.queue = Queue(app.config["MAX_WAITING"])
    app.reading = threading.BoundedSemaphore(os.cpu_count() or 1)  # large pictures take memory to decode
    app.studies = Studies(app.classifier, app.config["MAX_STUDIES"])
    add_addresses(app)
    app.register_error_handler(HTTPException, show_error)
    app.register_error_handler(UnreadableScan, show_unreadable)
    app.register_error_handler(OSError, show_full)
    app.before_request(refuse_other_sites)
    app.after_request(add_headers)
    app.cli.add_command(classify_command)
    app.cli.add_command(benchmark_command)
    return app


def add_addresses(app):
    """Every page and every answer of the API."""
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
    app.add_url_rule("/results/<upload_id>/<int:n>/heatmap.dcm", "heatmap_dicom", heatmap_dicom)
    app.add_url_rule("/results/<upload_id>/cancel", "cancel", cancel, methods=["POST"])
    app.add_url_rule("/results/<upload_id>/delete", "delete", delete, methods=["POST"])
    app.add_url_rule("/model", "model_page", model_page)
    app.add_url_rule("/healthz", "healthz", healthz)


def uploads_folder():
    return pathlib.Path(current_app.config["UPLOADS"])


def limits():
    """The limits of reading that the settings give."""
    config = current_app.config
    return Limits(config["MAX_PIXELS"], config["MAX_SCANS"], config["MAX_FILES"], config["MAX_UNPACKED"])


def model_summary():
    """What a result says of the model that answered."""
    classifier = current_app.classifier
    return {"sha256": classifier.sha256, "engine": classifier.engine, "labels": classifier.labels}


def receive():
    """Read, classify and store the files of this request; returns the result.

    Aborts as sent(), and with 413 and 503; raises UnreadableScan for a bad file.
    """
    files, plane = sent()
    waiting, most = current_app.queue, current_app.config["MAX_AT_ONCE"]
    asked = len(files) if len(files) <= most else 1  # a study has a queue of its own
    with waiting.places(asked):
        named = [(file.filename, file.read()) for file in files]
        with current_app.reading:
            scans, skipped = read_upload(named, limits(), plane)
        if not request.form.get("identifiers"):
            scans = [replace(scan, identifiers=None) for scan in scans]
        if len(scans) > most:
            return begin_study(scans, skipped)
        with waiting.places(len(scans) - asked, sure=True):  # pages, frames, slices
            findings = current_app.classifier.classify(scans)
            card = current_app.classifier.card
            return save(uploads_folder(), scans, findings, model_summary(), card, skipped=skipped)


def sent():
    """(files, plane or None) of this request; aborts with 400 without a file, with too many, or for another plane."""
    files = [file for file in request.files.getlist("file") if file.filename]
    if not files:
        abort(400, "No file was chosen; choose a scan and send it again.")
    most = current_app.config["MAX_FILES"]
    if len(files) > most:
        abort(400, f"{len(files)} files were sent, but at most {most} are read at once.")
    plane = request.form.get("plane") or None
    if plane not in (None, "all", *PLANES):
        abort(400, f"The plane has to be {', '.join(PLANES)} or all.")
    return files, plane


def begin_study(scans, skipped):
    """Have the scans classified by and by; returns the result so far."""
    try:
        result = current_app.studies.start(uploads_folder(), scans, model_summary(), skipped=skipped)
    except queue.Full:
        abort(503, "The server is busy with other studies; try again in a minute.", retry_after=60)
    return {key: value for key, value in result.items() if key != "worker"}


def index():
    """GET /: the form."""
    return render_template("index.html")


def upload_form():
    """POST /: classify what the form sent and go on to its page."""
    return redirect(url_for("result_page", upload_id=receive()["id"]), 303)


def upload():
    """POST /upload: the same for programs."""
    result = receive()
    return jsonify(result), 202 if result["status"] == "running" else 200


def found(upload_id):
    """The folder of an upload, or 404."""
    return find_upload(uploads_folder(), upload_id, current_app.config["RETENTION_HOURS"])


def load_result(upload_id):
    """The result of an upload; a study whose worker has died has failed."""
    result = json.loads((found(upload_id) / "result.json").read_text())
    if result["status"] == "running" and not is_alive(result["worker"]):
        result |= {"status": "failed", "error": "The server was stopped while it read; send the study again."}
    result.pop("worker", None)
    return result


def this_process():
    """The number of this process and when it began: after a restart the number alone may be another's."""
    return [os.getpid(), psutil.Process().create_time()]


def is_alive(process):
    """Whether a process as this_process() names it still runs."""
    number, began = process
    try:
        return psutil.Process(number).create_time() == began
    except psutil.Error:
        return False


def result_page(upload_id):
    """GET /results/<id>: the answer for people; of several scans a table, the most suspicious first."""
    result = load_result(upload_id)
    if result["status"] == "done" and len(result["scans"]) == 1:
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
        small = picture.convert("L")
        small.thumbnail((96, 96), Image.Resampling.BILINEAR)
        return Response(png_of(small), mimetype="image/png")


def heatmap(upload_id, n):
    """GET /results/<id>/<n>/heatmap.png"""
    return Response(png_of(heatmap_of(found_picture(upload_id, n, "heat.f32"))), mimetype="image/png")


def heatmap_dicom(upload_id, n):
    """GET /results/<id>/<n>/heatmap.dcm: the heatmap as a DICOM Secondary Capture."""
    folder = found_picture(upload_id, n, "heat.f32")
    kept = folder / "identifiers.json"
    identifiers = json.loads(kept.read_text()) if kept.exists() else {}
    headers = {"Content-Disposition": f"attachment; filename=heatmap_{n}.dcm"}
    data = secondary_capture(heatmap_of(folder), identifiers, n)
    return Response(data, mimetype="application/dicom", headers=headers)


def found_picture(upload_id, n, name):
    """The folder of scan n of an upload if it holds a file `name`, or 404."""
    folder = found(upload_id) / str(n)
    if not (folder / name).is_file():
        abort(404, "There is no such picture in this result.")
    return folder


def cancel(upload_id):
    """POST /results/<id>/cancel: stop a study that is being read; nothing of it is kept."""
    if load_result(upload_id)["status"] == "running":
        (found(upload_id) / "cancel").touch()
    return redirect(url_for("result_page", upload_id=upload_id), 303)


def delete(upload_id):
    """POST /results/<id>/delete: remove the upload at once, also while it is being read."""
    gone = found(upload_id).rename(uploads_folder() / f".{upload_id}")
    shutil.rmtree(gone)
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


def show_full(error):
    """The disk is full, read-only or away; or what was asked for has been removed since it was found."""
    if isinstance(error, FileNotFoundError) and "upload_id" in (request.view_args or {}):
        return answer_error(404, GONE)
    current_app.logger.error("a result could not be kept: %s", error.strerror)
    return answer_error(503, "The server cannot keep results at the moment; try again later.", [("Retry-After", "60")])


def add_headers(response):
    """Nothing from other hosts, nothing guessed, no patient's picture in a cache; CORS as set."""
    response.headers["Content-Security-Policy"] = (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "same-origin"  # with none, the app's own forms would have no origin
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    if request.endpoint != "static":
        response.headers["Cache-Control"] = "no-store"
    if request.path == "/upload":
        response.headers["Vary"] = "Origin"
        if request.origin in allowed_origins():
            response.headers["Access-Control-Allow-Origin"] = request.origin
            response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    return response


def allowed_origins():
    """The origins that may call /upload from a page of theirs."""
    return {origin.strip() for origin in current_app.config["CORS_ORIGINS"].split(",")} - {""}


def refuse_other_sites():
    """403 for what a page of another site makes a visitor's browser send, by Fetch Metadata, else by the origin."""
    allowed = request.path == "/upload" and request.origin in allowed_origins()
    if allowed or request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site = request.headers.get("Sec-Fetch-Site")
    same_host = request.origin is None or request.origin.partition("://")[2] == request.host
    if site not in (None, "same-origin", "none") or site is None and not same_host:
        abort(403, "The request came from a page of another site; open the form here and send it again.")


# ------------------------------------------------------------------------------ commands


@click.command("classify")
@click.argument("paths", nargs=-1, required=True, type=click.Path(True, path_type=pathlib.Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="A .csv or .parquet to fill.")
@click.option("--scheduler", help="tcp://host:port of a Dask cluster; one on this machine's cores without.")
@with_appcontext
def classify_command(paths, out, scheduler):
    """Classify the scans in PATHS: files, folders, ZIPs, of every format that the app reads.

    Prints CSV, or fills OUT, a row a slice, and goes on where it was interrupted; beside it stands
    a .studies.csv with a row a study. Nothing else is kept.
    """
    config, files = current_app.config, [file for path in paths for file in files_under(path)]
    labels, card = current_app.classifier.labels, current_app.classifier.card
    if out is None:
        table = csv.DictWriter(sys.stdout, columns_of(labels))
        table.writeheader()
        for file in files:
            table.writerows(rows_for([file], current_app.classifier, limits()))
        return
    if out.suffix not in (".csv", ".parquet"):
        raise click.BadParameter(f"{out} has to end in .csv or .parquet.")
    journal = out.with_suffix(".journal.csv") if out.suffix == ".parquet" else out
    with cluster(scheduler) as client:
        fill(journal, files, columns_of(labels), client, config["MODEL"], limits())
    write_studies(journal, out.with_suffix(".studies.csv"), card)
    if out.suffix == ".parquet":
        turn_to_parquet(journal, out)


def turn_to_parquet(journal, out):
    """Write the rows of `journal` as Parquet in its stead."""
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    parquet.write_table(arrow_csv.read_csv(journal), out)
    journal.unlink()


def files_under(path):
    """The files of a folder and the folders in it, hidden ones left out, in order; a file itself."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and not is_litter(p.relative_to(path).as_posix()))


def columns_of(labels):
    """The columns of a row: where the slice came from, the answer, or why there is none."""
    return ["path", "slices", "study", "series", "slice", "plane", "verdict", "label", "risk", "tumor_probability",
            *labels, "reason", "warnings", "error"]  # fmt: skip


@cache
def worker_classifier(model):
    """The classifier of this process, loaded once; on one thread, since there is a process a core."""
    return Classifier(model, threads=1)


def answer_files(paths, model, limits):
    """The rows of some files, in a worker of a cluster."""
    return rows_for(paths, worker_classifier(model), limits)


def rows_for(paths, classifier, limits):
    """The rows of some files; a thread reads the next files while the network sees the last."""
    with ThreadPoolExecutor(1) as reader:
        readings = [(path, reader.submit(lambda p: read_scans(p.read_bytes(), p.name, limits), path)) for path in paths]
        return [row for path, reading in readings for row in rows_of(path, reading, classifier)]


def rows_of(path, reading, classifier):
    """A row for each slice of a file, or one that says why there is none: no file ends the work."""
    try:
        return rows_of_scans(path, reading.result(), classifier)
    except (UnreadableScan, OSError) as error:
        sentence = str(error)
    except Exception as error:
        sentence = f"{path.name} cannot be classified ({type(error).__name__}); please report it."
    return [{"path": path.as_posix(), "slices": 1, "error": sentence}]


def rows_of_scans(path, scans, classifier):
    """A row for each scan of a file."""
    rows = []
    for n, scan in enumerate(scans):
        entry = scan_entry("", n, scan, classifier.classify([scan])[0])
        rows.append(
            {"path": path.as_posix(), "slices": len(scans), "study": study_of(scan, path)}
            | {key: entry[key] for key in ("series", "slice", "plane", "verdict", "label", "risk", "tumor_probability")}
            | (entry["probabilities"] or {})
            | {"reason": entry["reason"], "warnings": " ".join(entry["warnings"])}
        )
    return rows


def study_of(scan, path):
    """A name for the study of a scan that is no name: a hash for DICOM, the path for a volume, else nothing."""
    if scan.identifiers and scan.identifiers["StudyInstanceUID"]:
        return hashlib.sha256(scan.identifiers["StudyInstanceUID"].encode()).hexdigest()[:16]
    return path.as_posix() if scan.series else ""


@contextlib.contextmanager
def cluster(scheduler, workers=None):
    """A Dask client of the scheduler at an address, or of a cluster of its own, with a process a core or so many."""
    import dask
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        if scheduler is None:
            # Dask's profiler would look at every worker a hundred times a second, for a dashboard that is off.
            stack.enter_context(dask.config.set({"distributed.worker.profile.enabled": False}))
            processes = {"n_workers": workers or os.cpu_count(), "threads_per_worker": 1}
            own = LocalCluster(**processes, dashboard_address=None, silence_logs=logging.ERROR)
            scheduler = stack.enter_context(own)
        yield stack.enter_context(Client(scheduler))


FILES_A_TASK = 8
TASKS_A_WORKER = 3  # sent ahead, so that none waits for the next; more would only take memory


def fill(journal, files, columns, client, model, limits):
    """Append the rows of the files that `journal` has not yet, whole files at a time, in any order."""
    done = finished(journal, columns)
    files = [file for file in files if file.as_posix() not in done]
    with open(journal, "a", newline="") as file, tqdm(total=len(files), unit="file", mininterval=1) as bar:
        table = csv.DictWriter(file, columns)
        for chunk, rows in answered(files, client, model, limits):
            table.writerows(rows)
            file.flush()
            bar.update(len(chunk))


def answered(files, client, model, limits):
    """Yield (files, their rows) as a cluster has them ready, a few files at a time.

    Dask does the files of a worker that was killed again elsewhere. A task that kills every worker
    is taken apart, until a single file is left to say so.
    """
    from distributed import as_completed

    chunks = iter([files[n : n + FILES_A_TASK] for n in range(0, len(files), FILES_A_TASK)])
    of_future = {}

    def submit(chunk):
        future = client.submit(answer_files, chunk, model, limits, pure=False)
        of_future[future] = chunk
        return future

    ahead = TASKS_A_WORKER * max(1, len(client.scheduler_info()["workers"]))
    running = as_completed([submit(chunk) for chunk in islice(chunks, ahead)])
    for future in running:
        chunk = of_future.pop(future)
        rows = rows_of_task(future, chunk)
        if rows is None:
            running.update([submit([path]) for path in chunk])
        else:
            yield chunk, rows
            running.update([submit(chunk) for chunk in islice(chunks, 1)])


def rows_of_task(future, chunk):
    """The rows of a task's files; None if it killed its workers and its files are to be tried one by one."""
    from distributed import KilledWorker

    if future.status == "finished":
        return future.result()
    if not isinstance(future.exception(), KilledWorker):
        raise click.ClickException(
            f"The cluster cannot do the work ({type(future.exception()).__name__}); its scheduler and workers "
            "have to run this version, with the repository on PYTHONPATH.")  # fmt: skip
    if len(chunk) > 1:
        return None
    return [{"path": chunk[0].as_posix(), "slices": 1, "error": f"{chunk[0].name} stops what reads it."}]


def finished(journal, columns):
    """The paths of which `journal` has every row; rows of others, and half a row at the end, are taken out of it."""
    if not journal.exists():
        with open(journal, "w", newline="") as file:
            csv.DictWriter(file, columns).writeheader()
        return set()
    with open(journal, newline="") as file:
        table = csv.DictReader(file)
        ours = table.fieldnames in (None, columns)
        rows = [row for row in table if row["error"] is not None] if ours else []  # the last column: else cut off
    if not ours:
        raise click.ClickException(f"{journal} has other columns; move it away, or name another file.")
    count = Counter(row["path"] for row in rows)
    whole = [row for row in rows if count[row["path"]] == int(row["slices"])]
    partial = journal.with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(whole)
    partial.replace(journal)
    return {row["path"] for row in whole}


def write_studies(journal, path, card):
    """A row for each study of the rows in `journal`, by the card's rule."""
    studies = {}
    with open(journal, newline="") as file:
        for row in csv.DictReader(file):
            if row["study"]:
                p = float(row["tumor_probability"]) if row["tumor_probability"] else None
                studies.setdefault(row["study"], []).append({"series": row["series"], "tumor_probability": p})
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["study", "slices", "rejected", "verdict", "risk", "tumor_probability"])
        for study, entries in studies.items():
            answer = study_answer(entries, card) or {}
            rejected = sum(entry["tumor_probability"] is None for entry in entries)
            table.writerow([study, len(entries), rejected, *map(answer.get, ("verdict", "risk", "tumor_probability"))])


@click.command("benchmark")
@click.argument("path", metavar="[SCAN]", required=False, type=click.Path(True, dir_okay=False, path_type=pathlib.Path))
@click.option("--rounds", default=50, show_default=True, help="Times that each part is timed.")
@click.option("--scans", default=1000, show_default=True, help="Sent one by one, to see whether memory grows.")
@with_appcontext
def benchmark_command(path, rounds, scans):
    """Time this machine with SCAN, or with a drawn one of 512 x 512 pixels.

    Starts a server of its own, on loopback, with this app's model and settings.
    """
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
            batch = read_scans(data, "scan")[:1] * 64
            seconds = timed({"batch": lambda: classifier.classify(list(map(replace, batch)))}, min(rounds, 3))["batch"]
            click.echo(f"64 scans at once {64 / np.median(seconds):25.1f} scans a second")
            memory = psutil.Process(process.pid).memory_info
            before = memory().rss / 2**20
            for _ in range(scans):
                send()
            click.echo(f"memory, after {scans} more {before:12.1f}, {memory().rss / 2**20:.1f} MiB")
            if many := min(150, scans):
                seconds = timed({"study": study(address, data, many)}, min(rounds, 3))["study"]
                click.echo(f"a study of {many:3}, as a ZIP {many / np.median(seconds):17.1f} scans a second")


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
    heat = outputs["heat"][0] if "heat" in outputs else None
    finding = classifier.finding(None, outputs["probabilities"][0], heat)  # whether or not it is rejected
    kept = folder / save(folder, [scan], [finding], {}, classifier.card)["id"] / "0"
    drawn = {} if heat is None else {"heatmap, when asked for": lambda: png_of(heatmap_of(kept))}
    return {
        "  decode": lambda: read_scans(data, "scan"),
        "  prepare": lambda: prepare(scan.pixels),
        "  checks": lambda: replace(scan).checks,  # a new scan, of which nothing is known yet
        "  network and verdict": lambda: classifier.classify([replace(scan)]),
        "  store": lambda: save(folder, [scan], [finding], {}, classifier.card),
        **drawn,
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


def study(address, data, count):
    """A function that sends a ZIP of so many copies of a scan to `address` and waits for the end of their study."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for n in range(count):
            archive.writestr(f"{n}", data)
    send = sender(address, file.getvalue())

    def run():
        try:
            result = json.loads(send())
        except urllib.error.HTTPError as error:
            raise answered_with(error) from None
        while result["status"] == "running":
            time.sleep(0.5 if result["progress"] < 0.9 else 0.05)  # each question takes time from the answers
            result = json.load(urllib.request.urlopen(f"{address.removesuffix('upload')}results/{result['id']}.json"))
        if result["status"] != "done":
            raise click.ClickException(f"The study ended as {result['status']}.")

    return run


def answered_with(error):
    return click.ClickException(f"The server answered {error.code} {error.reason}.")


def wait_for(send, patience=60):
    """Seconds until send() was answered; raises ClickException after `patience` seconds."""
    start = time.monotonic()
    while time.monotonic() < start + patience:
        try:
            send()
            return time.monotonic() - start
        except urllib.error.HTTPError as error:
            raise answered_with(error) from None
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

"""Reads a brain MRI and says whether it shows a tumor, of which kind, and where it looked.

`flask run` serves a form for people and `POST /upload` for programs. The file reads in the order
in which data flows: settings, reading, classifier, store, jobs, PACS, network, pages, errors,
commands, and the app that joins them. Not a medical device.
"""

import base64
import contextlib
import csv
import fcntl
import gzip
import hashlib
import hmac
import importlib.util
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
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import chain, islice
from logging.handlers import WatchedFileHandler
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import click
import fastjsonschema
import numpy as np
from fastjsonschema import JsonSchemaException
from flask import Blueprint, Flask, Response, abort, current_app, redirect, render_template, request
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from scipy import ndimage
from tqdm import tqdm
from werkzeug import exceptions, formparser, utils
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.middleware.proxy_fix import ProxyFix

HERE = pathlib.Path(__file__).parent
LOG, AUDIT = logging.getLogger(__name__), logging.getLogger("audit")
UTC = "%Y-%m-%dT%H:%M:%SZ"

# ------------------------------------------------------------------------------ settings

DEFAULTS = {
    "MODEL": str(HERE / "model.keras"),
    "UPLOADS": str(HERE / "uploads"),
    "MAX_CONTENT_LENGTH": 64 * 1024 * 1024,  # bytes of one request
    "MAX_FILES": 1000,  # in one request, and in one ZIP
    "MAX_SCANS": 1000,  # in the files of one request
    "MAX_PIXELS": 50_000_000,  # of one picture, looked at before it is decoded
    "MAX_UNPACKED": 512 * 1024 * 1024,  # bytes that one request may unpack to
    "MAX_AT_ONCE": 16,  # scans answered within the request; larger uploads run in the background
    "MAX_STUDIES": 4,  # background uploads that may queue
    "MAX_WAITING": 16,  # scans being answered within requests; once it is reached: 503
    "RETENTION_HOURS": 24.0,
    "KEEP_NAMES": 1,  # 0: results call the files "scan 1.jpg", "scan 2.jpg", …
    "THREADS": min(os.cpu_count() or 1, 512),
    "TRUSTED_PROXIES": 0,  # whose X-Forwarded-For, -Proto, -Host and -Prefix are believed
    "PASSWORD": "",  # which everybody is asked for, if there is one
    "CORS_ORIGINS": "",  # separated by commas
    "CORRECTIONS": "",  # a folder for scans that readers label; the notebook trains on it
    "STUDY_PAUSE": 5.0,  # seconds without a new object after which a study has come whole
    "PEERS": "",  # titles that may send to `flask listen`, separated by commas; else any
    "DICOMWEB": "",  # the URL of a PACS that results are sent to by STOW-RS
    "AUDIT": "-",  # a file for a line of each thing done, "-" for standard error, "" for none
    "AUDIT_ADDRESSES": 0,  # 1: with the addresses they were done from
}
# From least to most; other numbers are from 1 on.
RANGES = {"KEEP_NAMES": (0, 1), "AUDIT_ADDRESSES": (0, 1), "TRUSTED_PROXIES": (0, 9)}
RANGES |= {"THREADS": (1, 512), "RETENTION_HOURS": (0.0001, 1e9), "STUDY_PAUSE": (0.1, 3600)}


def configure(app: Flask, overrides: dict) -> None:
    """Fill app.config from DEFAULTS, then from FLASK_... in the environment, then `overrides`."""
    app.config.from_mapping(DEFAULTS)
    app.config.from_prefixed_env()
    app.config.from_mapping(overrides)
    for key, default in DEFAULTS.items():
        if isinstance(default, str):  # as it was written, though it may look like a number
            app.config[key] = str(overrides.get(key, os.environ.get(f"FLASK_{key}", default)))
            continue
        value, (least, most) = app.config[key], RANGES.get(key, (1, 10**12))
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            app.config[key] = type(default)(value)
            if least <= app.config[key] == float(value) <= most:
                continue
        wanted = f"a number from {least} to {most:,.0f}, such as {default!r}"
        raise click.ClickException(f"FLASK_{key} is {value!r}, but it has to be {wanted}.")


def open_for_writing(config: dict) -> None:
    """Open the audit, and make the folders that settings name; what fails ends the start."""
    handlers = {"": logging.NullHandler, "-": logging.StreamHandler}
    for key in ("UPLOADS", "CORRECTIONS", "AUDIT"):
        path = config[key]
        try:
            if key == "AUDIT":  # a file may be rotated
                handler = handlers[path]() if path in handlers else WatchedFileHandler(path)
            elif path or key == "UPLOADS":
                os.makedirs(path, exist_ok=True)
                tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            sentence = f"FLASK_{key} is {path!r}, which cannot be written: {error.strerror}."
            raise click.ClickException(sentence) from None
    for old in AUDIT.handlers:
        old.close()
    AUDIT.handlers, AUDIT.propagate = [handler], False
    AUDIT.setLevel(logging.INFO)


def audit(kind: str, start: float | None = None, **facts) -> None:
    """Log what was done since `start` as a line of JSON; `facts` name no files and no people."""
    if start:
        facts["seconds"] = round(time.monotonic() - start, 3)
    if request and current_app.config["AUDIT_ADDRESSES"]:
        facts["address"] = request.remote_addr
    line = json.dumps({"time": time.strftime(UTC, time.gmtime()), "kind": kind} | facts)
    try:
        AUDIT.info(line)
    except OSError:  # the file was rotated, and no new one can be made
        LOG.exception("not in the audit: %s", line)


# --------------------------------------------------------------------------------- scans

SIDE = 224  # pixels the network sees, across and down
KEPT_SIDE = 1024  # a larger picture is reduced to this; the network sees less anyway
PLANES = ("sagittal", "coronal", "axial")  # across the patient's x, y and z


class UnreadableScan(ValueError):
    """A file no scan can be read from; the message is for its sender, `status` for HTTP."""

    def __init__(self, message: str, status: int = 415):
        super().__init__(message)
        self.status = status


class TooMuch(UnreadableScan):
    """A limit of the whole upload is reached, so none of it is read."""


class Limits(NamedTuple):
    """The most that one request may hold: pixels of one picture, scans, files, bytes unpacked."""

    pixels: int = DEFAULTS["MAX_PIXELS"]
    scans: int = DEFAULTS["MAX_SCANS"]
    files: int = DEFAULTS["MAX_FILES"]
    unpacked: int = DEFAULTS["MAX_UNPACKED"]


LIMITS = Limits()


class Skipped(NamedTuple):
    """A file or a slice that is not answered, and why; slices are counted from 0."""

    file: str
    reason: str
    series: str | None = None
    slice: int | None = None


class Check(NamedTuple):
    """One quality check of a picture: what was checked, and what the reader should know."""

    name: str
    passed: bool
    message: str


@dataclass(frozen=True)
class Scan:
    """One greyscale picture, uint8 (H, W), where it came from, and what was found in it."""

    pixels: np.ndarray
    file: str
    slice: int = 0  # its place in the series, or its page, from 0
    study: str | None = None  # "1", "2", …: one for each patient and study
    series: str | None = None  # "1", "2", …; None for a loose picture
    plane: str | None = None
    size: tuple[int, int] | None = None  # width and height as sent
    window: tuple[float, float] | None = None  # the stored values shown as black and as white
    colour: float = 0.0  # mean distance between the largest and smallest of R, G, B; 0 to 255
    position: float | None = None  # along the series in mm, as far as the file says so
    order: tuple = ()  # numbers for the order of slices that have no place, or the same one
    instance: tuple | None = None  # the same in two slices of a series only if they are one
    study_key: str | None = None  # a hash that is the same for all files of a patient's study
    series_key: str | None = None  # and one for all files of the series
    identifiers: dict[str, str] | None = None  # of the study; only if the sender asks for them
    remarks: tuple[str, ...] = ()  # about the file itself, in plain words
    box: tuple[int, int, int, int] | None = None  # where the head is; this and the rest: look_at()
    contrast: int = 255  # levels of grey
    checks: tuple[Check, ...] = ()
    emptiness: str | None = None  # why a slice of a series shows no head

    @property
    def warnings(self) -> tuple[str, ...]:
        """The remarks, and a sentence for each check that failed."""
        return self.remarks + tuple(check.message for check in self.checks if not check.passed)


# ------------------------------------------------------------------------------- uploads

SMALLEST_SIDE, LONGEST = 32, 16  # pixels; times as long as wide, at most
EXPANSION = 20  # times as large as sent may an upload be when unpacked,
ALWAYS_UNPACKED = 96 * 2**20  # but always this many bytes
SECONDS, SECONDS_PER_MB = 3.5, 0.8  # of one core, for reading one upload
LOOKERS = min(4, os.cpu_count() or 1)  # threads that look at scans while the next ones are read
TOO_MUCH = {
    "scans": "{name} has {count} {what}, but only {left} more scans are allowed; send fewer.",
    "files": "{name} holds {count} files, but at most {left} are read.",
}
MORE_HELD = "{} holds more pixels than its header says; export it again."
TOO_LARGE = "{name} is larger than {most} MB when unpacked; send it in parts."


def read_scans(
    data: bytes, name: str, limits: Limits = LIMITS, plane: str | None = None
) -> list[Scan]:
    """The scans in one file: one for a still picture, otherwise one per page, frame or slice.

    The kind is told from the content, never from the name, of which only the last part is kept.
    `plane` is that of the slices of a NIfTI volume: one of PLANES, "all", or None for the one in
    which it was acquired. Raises UnreadableScan, with a sentence for the sender.
    """
    return read_upload([(name, data)], limits, plane)[0]


def read_upload(
    files: Iterable[tuple[str, bytes]],
    limits: Limits = LIMITS,
    plane: str | None = None,
    identifiers: bool = False,
    sent: int | None = None,
) -> tuple[list[Scan], list[Skipped]]:
    """The scans in files (name, bytes), series by series in order, and what was left out.

    A file that is no scan is left out; it raises UnreadableScan if there is no other. The
    identifiers of a study are read only if they are asked for. `sent` is how many bytes there are,
    if the files can be gone through only once.
    """
    sent = sum(len(data) for _, data in files) if sent is None else sent
    reading = Reading(sent, limits, plane, identifiers)
    named = ((plain_name(name), data) for name, data in files)
    with quiet(), ThreadPoolExecutor(LOOKERS) as pool:
        scans = list(pool.map(look_at, read_files(named, reading)))
    if reading.excuses and not scans:
        raise UnreadableScan(*reading.excuses[0][1:])
    scans, left_out = sort_series(scans)
    return scans, [Skipped(name, why) for name, why, _ in reading.excuses] + left_out


def read_files(files, reading, depth=0):
    """Yield the scans in files, in the ZIPs among them, and in the ZIPs within these."""
    for name, data in files:
        with reading.file(name):
            if data[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):  # the second one holds nothing
                yield from read_file(data, name, reading)
            elif depth == 2:
                raise UnreadableScan(f"{name} lies too deep, in a ZIP within a ZIP; unpack it.")
            else:
                yield from read_files(members(data, name, reading), reading, depth + 1)


def read_file(data, name, reading):
    """The scans of one file that is no ZIP."""
    reading.check_time(name)
    if not data:
        raise UnreadableScan(f"{name} is empty; choose the file again.", 400)
    if data[:2] == b"\x1f\x8b":
        data = gunzip(data, name, reading)
    unmarked = data[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08") and b"\x00" in data[2:4]
    if data[128:132] == b"DICM" or unmarked:
        return read_dicom(data, name, reading)
    if data[344:347] == b"n+1" or data[4:7] == b"n+2":
        return read_nifti(data, name, reading)
    if data[344:347] == b"ni1" or len(data) == 348 and data[:4] in (b"\\\1\0\0", b"\0\0\1\\"):
        raise UnreadableScan(f"{name} is half of a volume; save both files as one .nii file.")
    if re.match(rb"II[*+]\0|MM\0[*+]", data):
        return read_tiff(data, name, reading)
    return [read_picture(data, name, reading)]


class Reading:
    """An upload of `sent` bytes while it is read: what is asked for, may cost and is left out.

    Costs are told from headers and counts, before the work is done. A small upload gets less than
    the limits, so that no small file can cost much.
    """

    def __init__(self, sent, limits, plane, identifiers):
        self.limits, self.plane, self.identifiers, self.excuses = limits, plane, identifiers, []
        self.most = min(limits.unpacked, max(ALWAYS_UNPACKED, EXPANSION * sent))
        self.left = limits._asdict() | {"unpacked": self.most, "decoded": self.most}
        self.until = time.thread_time() + max(SECONDS, SECONDS_PER_MB * sent / 1e6)

    @contextlib.contextmanager
    def file(self, name):
        """Leave a file out that gives no scan: it is damaged if a library raises what it likes."""
        left = self.left["scans"]
        try:
            yield
        except TooMuch:
            raise
        except Exception as error:
            self.left["scans"] = left
            if not isinstance(error, UnreadableScan):
                error = UnreadableScan(f"{name} is damaged or cut off; export it again.")
            self.excuses.append((name, str(error), error.status))  # `error` keeps all frames

    def check_time(self, name):
        """Raise TooMuch once this thread has worked too long for the upload."""
        if time.thread_time() > self.until:
            message = f"{name} takes too long to read; export it uncompressed, or send less."
            raise TooMuch(message, 413)

    def take(self, kind, count, name, what=""):
        """Account for scans (pages, frames: `what`), files, or bytes "unpacked" or "decoded"."""
        left, self.left[kind] = self.left[kind], self.left[kind] - count
        if count > left:
            most = self.most // 2**20
            of = {"name": name, "count": count, "what": what, "left": left, "most": most}
            raise TooMuch(TOO_MUCH.get(kind, TOO_LARGE).format(**of), 413)

    def take_pictures(self, size, name, bytes_each=1, count=1):
        """Account for pictures (width, height) of so many bytes each pixel; refuse odd sizes."""
        shape, area = f"{name} has {size[0]} x {size[1]} pixels", math.prod(size)
        most = self.limits.pixels * 3 // max(3, bytes_each)
        if area > most:
            raise UnreadableScan(f"{shape}, more than the {most:,} allowed; send it smaller.", 413)
        if min(size) < SMALLEST_SIDE:
            least = f"{SMALLEST_SIDE} x {SMALLEST_SIDE}"
            raise UnreadableScan(f"{shape}, but a scan needs at least {least}.")
        if max(size) > LONGEST * min(size):
            shape += ", longer and narrower than any scan"
            raise UnreadableScan(f"{shape}; crop it and send it again.")
        self.take("decoded", count * area, name)
        self.check_time(name)


def members(data, name, reading):
    """Yield (name, bytes) of what a ZIP holds, without folders and what a system leaves there."""
    archive = open_zip(data)
    inside = [m for m in archive.infolist() if not m.is_dir() and not is_litter(m.filename)]
    if not inside:
        raise UnreadableScan(f"{name} is an empty ZIP; pack the scans into it.")
    reading.take("files", len(inside), name)
    for member in inside:
        inner = plain_name(member.filename)
        with reading.file(inner):
            if member.flag_bits & 1:
                raise UnreadableScan(f"{inner} is locked with a password; send it unlocked.")
            with archive.open(member) as file:
                content = file.read(reading.left["unpacked"] + 1)
            reading.take("unpacked", len(content), name)
            yield inner, content


def open_zip(data):
    """A ZIP that is open, even if its names are not in the UTF-8 that it promises."""
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except UnicodeDecodeError:  # clear the flag of UTF-8 in the two headers of each member
        flags = re.compile(rb"(PK(?:\x01\x02.{5}|\x03\x04.{3}))(.)", re.DOTALL)
        cleared = flags.sub(lambda found: found[1] + bytes([found[2][0] & ~8]), data)
        return zipfile.ZipFile(io.BytesIO(cleared))


def is_litter(path):
    """Whether a path in a ZIP is a system's own: hidden, or of __MACOSX."""
    parts = path.split("/")
    return any(part.strip(".") and (part[0] == "." or part == "__MACOSX") for part in parts)


def gunzip(data, name, reading):
    """What a gzip file holds, in one member or several."""
    pieces = []
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while piece := file.read1(2**20):
                reading.take("unpacked", len(piece), name)
                reading.check_time(name)
                pieces.append(piece)
    except gzip.BadGzipFile as error:
        if not pieces or "Not a gzipped file" not in str(error):  # bytes behind the last member
            raise
    return b"".join(pieces)


def plain_name(name: str | None) -> str:
    """The last part of a visitor's file name, without control characters, at most 100 long."""
    last = re.split(r"[/\\]", name or "")[-1]
    return "".join(c for c in last if c.isprintable())[:100] or "The file"


@contextlib.contextmanager
def quiet():
    """Silence libraries about files that bend their standard: they may quote the patient."""
    for name in ("pydicom", "nibabel", "tifffile"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore"):
        yield


# ------------------------------------------------------------------------------ pictures

LARGE_SIDE = 3 * KEPT_SIDE  # of a picture beyond it only every few rows and columns are used
JPEG_PASSES = 8  # times that a JPEG of the largest size may be gone through
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"IDAT", b"IEND")
Image.MAX_IMAGE_PIXELS = None  # Reading.take_pictures() looks at the size


class Grey(NamedTuple):
    """A picture turned to grey: uint8 (H, W), the values shown black and white, its colour."""

    pixels: np.ndarray
    window: tuple[float, float] | None = None
    colour: float = 0.0


def scan_of(grey, name, n=0, spacing=(1, 1), turn=1, **more):
    """A Scan of a grey picture, its pixels made square, turned as an EXIF orientation asks."""
    pixels = shrink(square(shrink(grey.pixels), *spacing))
    if turn in range(2, 9):
        picture = Image.fromarray(pixels)
        picture.getexif()[0x0112] = turn
        pixels = np.asarray(ImageOps.exif_transpose(picture))
        more["size"] = more["size"][::-1] if turn >= 5 else more["size"]
    return Scan(pixels, name, n, window=grey.window, colour=grey.colour, **more)


def read_picture(data, name, reading):
    """The scan of a JPEG, PNG, WEBP or BMP file."""
    is_png = data[:4] == b"\x89PNG"
    deep = is_png and data[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06")  # bits, kind
    data = png_essentials(data) if is_png else data
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "BMP"))
    except UnidentifiedImageError:
        kinds = "a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them"
        raise UnreadableScan(f"{name} is not {kinds}; export the scan as one of these.") from None
    size, jpeg, webp = image.size, image.format == "JPEG", image.format == "WEBP"
    flat = jpeg or image.mode in ("1", "L", "P", "I;16")
    reading.take("scans", 1, name, "pictures")
    reading.take_pictures(size, name, 16 if deep else 8 if webp else 1 if flat else 4)
    if jpeg and data.count(b"\xff\xda") * math.prod(size) > JPEG_PASSES * reading.limits.pixels:
        message = f"{name} is a progressive JPEG of too many passes; save it as an ordinary one."
        raise UnreadableScan(message, 413)
    if jpeg and max(size) > LARGE_SIDE:
        image.draft(None, (LARGE_SIDE // 2, LARGE_SIDE // 2))
    grey = grey_values(deep_channels(data)) if deep else grey_picture(thinned_picture(image))
    more = {"size": size}
    with contextlib.suppress(Exception):  # what Pillow raises on a damaged EXIF block
        more["turn"] = image.getexif().get(0x0112)
    if getattr(image, "n_frames", 1) > 1:
        more["remarks"] = ("The file holds several pictures; the first was read.",)
    return scan_of(grey, name, **more)


def png_essentials(data):
    """A PNG file without the texts, profiles and times in it, which may be of any length."""
    kept, at = bytearray(data[:8]), 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kept += data[at:end] if data[at + 4 : at + 8] in PNG_CHUNKS else b""
        at = end
    return bytes(kept)


def deep_channels(data):
    """The values uint16 (H, W, C) of a deep PNG in colour or with alpha; Pillow gives 8 bits."""
    mode, parts = "RGB" if data[25] == 2 else "RGBA", []
    for raw in ("RGBA",) if data[25] == 4 else (f"{mode};16B", f"{mode};16L"):  # high, low bytes
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        image.tile, image._mode = [image.tile[0]._replace(args=raw)], mode
        parts.append(np.asarray(image).astype(np.uint16))
    if data[25] == 4:  # grey and alpha, their four bytes as four channels
        parts = [parts[0][..., ::2], parts[0][..., 1::2]]
    return parts[0] << 8 | parts[1]


def read_tiff(data, name, reading):
    """The pages of a TIFF file as scans, without the smaller copies that some programs add."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = list(islice(file.pages, reading.left["scans"] + 2))
        more = " or more" * (len(pages) > reading.left["scans"] + 1)
        reading.take("scans", len(pages), name, f"pages{more}")
        images = (file.imagej_metadata or {}).get("images", 1)
        behind = len(data) - pages[0].dataoffsets[0]  # where old versions put those without pages
        if images > len(pages) and images * pages[0].nbytes <= behind:
            raise UnreadableScan(MORE_HELD.format(name))
        inner = [p for page in pages for p in islice(page.pages or (), 8)]
        whole = ([p for p in found if not p.subfiletype & 5 and p.tags.valueof(255) != 2]
                 for found in (pages, inner))  # without those that say to be a copy or a mask
        whole = next(filter(None, whole), pages)
        areas = [page.imagewidth * page.imagelength for page in whole]
        kept = [page for page, area in zip(whole, areas) if 4 * area > max(areas)]
        copies = ("The file also holds a smaller copy, which was left out.",)
        pillow = cache(lambda: Image.open(io.BytesIO(data), formats=("TIFF",)))
        scans = []
        for n, page in enumerate(kept):
            more = {"size": (page.imagewidth, page.imagelength), "turn": page.tags.valueof(274)}
            bytes_each = max(1, page.bitspersample // 8) * page.samplesperpixel
            reading.take_pictures(more["size"], name, bytes_each)
            values = tiff_values(page, data, pillow, name)
            others = 0 if any(page.extrasamples) else len(page.extrasamples)  # nor are they alpha
            if others and values.ndim == 3 and values.shape[2] == page.samplesperpixel:
                values = values[..., :-others]
            channels = ("The page holds several channels; the first was read.",)
            more["remarks"] = copies * (len(kept) < len(pages))
            more["remarks"] += channels * (page.samplesperpixel == 1 + others > 1)
            scans.append(scan_of(grey_values(values), name, n, **more))
        return scans


def tiff_values(page, data, pillow, name):
    """The values of a page, (H, W) or (H, W, C), black at zero, RGB for a palette.

    tifffile reads every kind of number, but does not unpack all; Pillow does, but takes signed
    bytes for unsigned ones, drops half of deep colours and mixes up the bytes of others.
    """
    bits, kind, unsaid = page.bitspersample, page.sampleformat, 262 not in page.tags
    white_is_zero = page.photometric == 0 and not unsaid
    kinds = (0, 1, 2, 3) if page.samplesperpixel > 2 else (0, 1, 3)
    known = bits % 8 == 0 and page.dtype and page.photometric in kinds
    if known and page.compression in (1, 8, 32946) and page.predictor in (1, 2):
        check_deflated(page, data)
        values = page.asarray(maxworkers=1)
        values = np.moveaxis(values, 0, -1) if page.axes == "SYX" else values
        if page.photometric == 3:
            colours = (page.colormap >> 8 * (page.colormap.max() > 255)).astype(np.uint8)
            values = np.moveaxis(colours[:, values], 0, -1)
    else:
        big_endian = page.parent.byteorder == ">"
        try:
            image = pillow()
            image.seek(page.index)
            another = unsaid or image.size != (page.imagewidth, page.imagelength)
            image = thinned_picture(image)
            exact = image.mode in ("L", "LA", "RGB", "RGBA", "F") or image.mode[0] == "I"
            values = np.asarray(image if exact else image.convert("RGB"))
            mixed = (bits, kind) == (32, 1) or big_endian and (bits, kind) != (16, 1)
            if another or bits > 8 and (mixed or values.dtype == np.uint8):
                raise ValueError("another page, or other values")
        except Exception:  # Pillow raises nearly anything on what it does not read
            number = {1: "unsigned", 2: "signed", 3: "floating-point"}.get(kind, "other")
            what = f"a TIFF of packed {bits}-bit {number} values, which is not read"
            raise UnreadableScan(f"{name} is {what}; save it uncompressed.") from None
        white_is_zero &= bits > 8  # else Pillow has turned it
        values = values.view(np.int8) if bits == 8 and kind == 2 else values
    if white_is_zero:
        values = ~values if values.dtype.kind in "iu" else -values
    return values


def check_deflated(page, data):
    """Raise ValueError if a strip or tile of a TIFF page unpacks to more than its share."""
    most = math.prod(page.chunks) * page.dtype.itemsize
    for start, size in zip(page.dataoffsets, page.databytecounts):
        packed = data[start : start + size] if page.compression != 1 else b""
        unpacked = zlib.decompressobj().decompress(packed, most + 1)
        if len(unpacked) > most or most > 4 * max(2**20, page.nbytes):
            raise ValueError("a strip or tile larger than its share")


def grey_picture(image):
    """A Pillow picture as Grey: more than 8 bits stretched, black where it is transparent."""
    if image.mode.startswith(("I", "F")):
        return stretched(np.asarray(image))
    if image.mode in ("1", "L"):
        return Grey(np.asarray(image.convert("L")))
    if image.has_transparency_data:
        seen = image = image.convert("RGBA")
        if seen.getextrema()[3][1]:  # an alpha channel of zeros says nothing
            image = Image.new("RGBA", seen.size, "black")
            image.alpha_composite(seen)
    opaque = image.convert("RGB")
    sample = np.asarray(opaque.reduce(max(1, min(opaque.size) // 128)), np.int16)
    return Grey(np.asarray(opaque.convert("L")), None, float(np.ptp(sample, axis=2).mean()))


def grey_values(values):
    """Values (H, W), or (H, W, C) with RGB and alpha, as Grey; all but bytes are stretched."""
    values = thinned(values)
    values = np.abs(values) if values.dtype.kind == "c" else values
    if values.dtype != np.uint8:
        if values.ndim == 2:
            return stretched(values)
        colours = values.shape[2] - (values.shape[2] in (2, 4))
        shown, alpha = stretched(values[..., :colours]).pixels, values[..., colours:]
        values = np.dstack([shown, to_uint8(alpha, 0, alpha.max(initial=0))])
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    return grey_picture(Image.fromarray(np.ascontiguousarray(values)))


def stretched(values):
    """Values float or int as Grey, scaled so that one hot pixel does not turn the head black.

    What is no finite number takes no part and is black, and so is one level far from all others,
    with which some programs pad.
    """
    values = np.asarray(values, np.result_type(values, np.float32))
    some = (values[np.isfinite(values)] for values in (subsample(values)[1], values, np.zeros(1)))
    sample = next(filter(np.size, some))
    for end in (0, -1):
        coarse = np.sort(sample[::5])
        level, others = coarse[end], coarse[coarse != coarse[end]]
        few = len(others) // 1000
        black, white = others[[few, -1 - few]] if len(others) else (level, level)
        if black < white and max(black - level, level - white) > 2 * (white - black):
            sample = sample[sample != level]
            if (coarse == level).mean() > 0.05:  # else it is text, say, and is not made black
                values = np.where(values == level, np.nan, values)
    black, white = np.percentile(sample, (0.1, 99.9))
    return Grey(to_uint8(values, black, white), (float(black), float(white)))


def roughness(values):
    """How far values (H, W) lie from those below them, on average."""
    return np.abs(np.diff(values.astype(np.float32), axis=0)).mean()


def to_uint8(values, black, white):
    """Values as uint8, `black` and below as 0, `white` and above as 255, no number as 0."""
    scaled = (values - black) / ((white - black) or 1e-6) * 255
    return np.where(np.isfinite(values), scaled, 0).clip(0, 255).astype(np.uint8)


def subsample(pixels):
    """(step, every `step`-th pixel down and across): enough to tell the levels of grey."""
    step = max(1, min(pixels.shape[:2]) // 256)
    return step, pixels[::step, ::step]


def thinned(values):
    """Values (H, W) or (H, W, C), beyond LARGE_SIDE only every few rows and columns of them."""
    step = -(-math.isqrt(values.size) // LARGE_SIDE)
    return values[::step, ::step]


def thinned_picture(image):
    """The same of a Pillow picture."""
    step = -(-max(image.size) // LARGE_SIDE)
    return image if step == 1 else image.resize([n // step for n in image.size], 0)


def shrink(pixels):
    """Pixels with no side above KEPT_SIDE, the aspect ratio kept."""
    if max(pixels.shape) <= KEPT_SIDE:
        return pixels
    picture = Image.fromarray(pixels)
    picture.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def square(pixels, down, across):
    """Pixels spaced `down` and `across` (mm), resized to the finer one if it can be believed."""
    finer = min(down, across)
    if not finer > 0 or not 1.02 < max(down, across) / finer < 10:
        return pixels
    size = (round(pixels.shape[1] * across / finer), round(pixels.shape[0] * down / finer))
    if max(size) > LONGEST * min(size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


# --------------------------------------------------------------------------------- DICOM

PERSON = ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID")  # kept as a hash
STUDY = ("PatientSex", "StudyID", "StudyDate", "StudyTime", "AccessionNumber")
IDENTIFIERS = (*PERSON, *STUDY, "ReferringPhysicianName")
SOURCE = ("SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID")
UPRIGHT = ((0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), (1, 0, 0, 0, 1, 0))  # of PLANES
PARTS = [f"{part}Sequence" for part in ("PlanePosition", "PlaneOrientation", "FrameContent",
         "PixelMeasures", "FrameVOILUT", "PixelValueTransformation")]  # of a frame
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
COUNTS = dict(NumberOfFrames=1, SamplesPerPixel=1, PixelRepresentation=0, PlanarConfiguration=0)
OVERLAY_BITS, MOSAIC_CREATOR, MOSAIC_SLICES = 0x60000100, 0x00190010, 0x0019100A
# An item that begins with a JPEG's first marker, or with the table of an RLE frame
FRAME_STARTS = rb"\xfe\xff\0\xe0.{4}(?:\xff[\xd8\x4f]\xff|[\1-\x0f]\0{3}\x40\0{3})"
DEFLATED = b"1.2.840.10008.1.2.1.99"
MOST_READS = 450_000  # of a header: two or three each element
COMPUTED = re.compile(r"\b(ADC|FA|P|PHASE|MIP|MINIP|LOCALIZER|PROJECTION|\w+ (MAP|CAPTURE))\b")


def read_dicom(data, name, reading):
    """The frames of a DICOM file as scans; of the patient only what is asked for."""
    import gdcm
    from pydicom.pixels import iter_pixels

    gdcm.Trace.WarningOff()  # as quiet()
    gdcm.Trace.ErrorOff()
    plain = inflated(data, reading.left["unpacked"] + 1)
    reading.take("unpacked", 0 if plain is data else len(plain), name)
    header = Header(plain)
    check_picture(header, name, reading)
    dataset, scans = header.dataset, []
    known = header.identifiers() if reading.identifiers else None
    try:
        for n, frame in enumerate(iter_pixels(dataset, indices=range(dataset.NumberOfFrames))):
            reading.check_time(name)
            own = known and known | {"frame": n + 1 if dataset.NumberOfFrames > 1 else None}
            scans.append(dicom_scan(frame, header.of_frame(n), name, n, identifiers=own))
    except Exception as error:  # decoding happens here
        syntax = dataset.file_meta.TransferSyntaxUID
        if isinstance(error, UnreadableScan) or not syntax.is_encapsulated:
            raise
        why = f"compressed as {syntax.name} and cannot be decoded; export it uncompressed"
        raise UnreadableScan(f"{name} is {why} (Explicit VR Little Endian).") from None
    return scans


def inflated(data, most):
    """A DICOM file, of a deflated one the first `most` bytes; pydicom would unpack it whole."""
    if DEFLATED not in data[:1000]:
        return data
    start = 144 + int.from_bytes(data[140:144], "little")
    inside = zlib.decompressobj(-15).decompress(data[start:], most)
    return data[:start].replace(DEFLATED, DEFLATED[:-3] + b"\0\0\0") + inside


def check_picture(header, name, reading):
    """Raise UnreadableScan for a DICOM file without a picture, of a mosaic, or of a large cost."""
    dataset = header.dataset
    if header.text("Modality") in ("SEG", "RTDOSE") or not any(key in dataset for key in PIXELS):
        raise UnreadableScan(f"{name} is a DICOM file without a scan; send images of the study.")
    header.complete()
    size, frames = (int(dataset.Columns), int(dataset.Rows)), dataset.NumberOfFrames
    counted = MOSAIC_SLICES in dataset and header.text(MOSAIC_CREATOR).startswith("SIEMENS")
    if frames == 1 and (counted or re.search("MOSAIC|VFRAME", header.text("ImageType").upper())):
        raise UnreadableScan(f"{name} is a Siemens or UIH mosaic; export one picture per slice.")
    samples, bits = dataset.SamplesPerPixel, dataset.BitsAllocated
    reading.take("scans", frames, name, "frames")
    reading.take_pictures(size, name, 3 * max(1, bits // 8) * samples, frames)  # copied twice
    data = next(dataset[key].value for key in PIXELS if key in dataset)
    held = 8 * len(data) // (bits * samples * math.prod(size))
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        held = len(re.findall(FRAME_STARTS, data, re.DOTALL))
    if held > frames:
        raise UnreadableScan(MORE_HELD.format(name))
    if "JPEG" in dataset.file_meta.TransferSyntaxUID.name:
        check_jpeg(data, math.prod(size), frames, samples, reading)


def check_jpeg(data, area, frames, samples, reading):
    """Raise ValueError for JPEG frames that the header belies, or of too many passes."""
    jpeg = rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7]\0.[\2-\x10](..)(..)([\1-\4])"
    for start in (jpeg, rb"\xff\x4f\xff\x51.{4}(.{4})(.{4}).{24}(..)"):
        for found in re.finditer(start, data, re.DOTALL):
            *size, colours = (int.from_bytes(number, "big") for number in found.groups())
            if math.prod(size) > area or colours != samples:
                raise ValueError("frames larger than the header says, or of other colours")
    if data.count(b"\xff\xda") > JPEG_PASSES * reading.limits.pixels // area * frames:
        raise ValueError("too many passes")


class CountedReads(io.BytesIO):
    """Bytes whose reads are counted, since a small file may hold millions of elements."""

    reads = 0

    def read(self, *size):
        self.reads += 1
        self.check()
        return super().read(*size)

    def check(self):
        """Raise UnreadableScan after too many reads; pydicom makes other errors of it in places."""
        if self.reads > MOST_READS:
            raise UnreadableScan("A header has too many elements; export the scan again.", 413)

    def __exit__(self, *error):
        self.check()


class Header:
    """What a DICOM file says of one of its frames, the most particular of it first.

    An optional element that makes no sense is as if absent; `odd` has a sentence about each.
    """

    def __init__(self, data):
        from pydicom import dcmread

        with CountedReads(data) as file:
            self.dataset, self.always_odd = dcmread(file, force=True), set()
        self.person = [self.text(key).upper().rstrip("^ ") for key in PERSON]  # as some write them
        self.of_frame(0)

    def of_frame(self, n):
        """The header of frame n."""
        self.sources, self.odd, found = [self.dataset], set(self.always_odd), []
        for kind in ("PerFrame", "Shared"):
            groups = self.items(f"{kind}FunctionalGroupsSequence", self.dataset)
            for group in groups[: n + 1][-1:]:  # the last one, if there are too few
                found += [item for part in PARTS for item in self.items(part, group)[:1]]
        self.sources = [*found, self.dataset]
        return self

    def items(self, key, dataset):
        """The items of a sequence, whose elements are counted as those of a file."""
        from pydicom.filereader import read_sequence

        element = dataset.get_item(key)
        if element is None or not element.value:
            return []
        try:
            if isinstance(element.value, bytes):
                how = element.is_implicit_VR, element.is_little_endian, len(element.value)
                with CountedReads(element.value) as file:
                    setattr(dataset, key, read_sequence(file, *how, "iso8859"))
            return list(dataset[key].value)
        except UnreadableScan:
            raise
        except Exception:  # pydicom raises nearly anything on what is no sequence
            return self.ignore(key) or []

    def text(self, key, dataset=None):
        """The start of an element as text, whatever is wrong with it."""
        element = (self.dataset if dataset is None else dataset).get_item(key)
        value = b"" if element is None or element.value is None else element.value
        start = value[:200].decode("latin-1") if isinstance(value, bytes) else str(value)[:200]
        return start.strip(" \0")

    def numbers(self, key, count):
        """The first `count` numbers of an element, which have to be finite; commas are points."""
        from pydicom.datadict import dictionary_VR

        filled = (source for source in self.sources
                  if key in source and source.get_item(key).value not in (None, "", b""))
        if (source := next(filled, None)) is None:
            return None
        element = source.get_item(key)
        kind = dictionary_VR(key) if element.VR in (None, "UN") else element.VR
        try:
            if isinstance(element.value, bytes) and kind in ("DS", "IS", "LO", "SH", "ST", "CS"):
                parts = self.text(key, source).split("\\")
            else:
                parts = np.ravel(source[key].value)
            parts = [str(part) for part in parts[:count]]
            found = [float(part.replace(",", ".")) for part in parts]
            if len(found) < count or not np.isfinite(found).all():
                raise ValueError("too few numbers, or none")
        except Exception:  # as above
            return self.ignore(key)
        if any("," in part for part in parts):
            self.odd.add(f"{key} in the file has decimal commas; they were read as points.")
        return found

    def number(self, key, default=None):
        """The first number of an element."""
        return (self.numbers(key, 1) or [default])[0]

    def ignore(self, key):
        """Say that an element is as if absent."""
        self.odd.add(f"{key} in the file makes no sense and was ignored.")

    def identifiers(self):
        """What tells patient, study and object, as text; None if nothing can refer to it."""
        from pydicom.uid import UID

        known = dict.fromkeys((*IDENTIFIERS, *SOURCE), "")
        for key in known:
            with contextlib.suppress(Exception):  # as above
                known[key] = str(self.dataset.get(key) or "")
        told = known["SOPInstanceUID"] and known["StudyInstanceUID"]
        return known if told and UID(known["SOPClassUID"]).name.endswith("Image Storage") else None

    def complete(self):
        """Fill in what pydicom needs to decode the pixels; find the bits that hold a value."""
        from pydicom import uid

        dataset, meta = self.dataset, self.dataset.file_meta
        if not meta.get("TransferSyntaxUID"):
            implicit, little = dataset.original_encoding
            explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
        if not meta.TransferSyntaxUID.is_transfer_syntax:
            raise ValueError("no transfer syntax")
        kind = self.text("PhotometricInterpretation").upper()
        dataset.setdefault("SamplesPerPixel", 3 if kind.startswith(("RGB", "YBR")) else 1)
        for key, least in COUNTS.items():
            setattr(dataset, key, max(least, int(self.number(key, least))))
        if not re.fullmatch("|RGB|YBR.*|MONOCHROME[12]|PALETTE COLOR", kind):
            kind = self.ignore("PhotometricInterpretation")
        default = "RGB" if dataset.SamplesPerPixel > 1 else "MONOCHROME2"
        dataset.PhotometricInterpretation = kind or default
        dataset.BitsAllocated = allocated = int(dataset.BitsAllocated)
        stored = int(self.number("BitsStored", allocated))
        self.stored = stored if 0 < stored <= allocated else allocated
        self.shift = int(self.number("HighBit", self.stored - 1)) + 1 - self.stored
        if not 0 <= self.shift <= allocated - self.stored:
            self.shift = self.ignore("HighBit") or 0
        if self.shift or not meta.TransferSyntaxUID.is_encapsulated:
            dataset.BitsStored = allocated  # of which pydicom would take the lowest
        self.always_odd = self.odd


def dicom_scan(frame, header, name, n, **more):
    """Frame n of a file, values (H, W) or (H, W, C), as a Scan."""
    axes = header.numbers("ImageOrientationPatient", 6)
    corner = header.numbers("ImagePositionPatient", 3)
    normal = np.cross(axes[:3], axes[3:]) if axes else np.zeros(3)
    plane = PLANES[int(np.abs(normal).argmax())] if normal.any() else None
    place = float(normal @ corner) if plane and corner else header.number("SliceLocation")
    if place is None:  # without an orientation the corners of a stack still tell its order
        place = sum(corner) if corner else header.number("InStackPositionNumber")
    unnamed = header.text("SeriesNumber"), plane, frame.shape  # tells series without UID apart
    parts = [header.person], [header.person, header.text("SeriesInstanceUID") or unnamed]
    study, series = (hashlib.sha256(repr(part).encode()).hexdigest() for part in parts)
    numbers = header.number("InstanceNumber", 0), header.number("InConcatenationNumber", 0)
    keys = {"study_key": study, "series_key": series} if any(header.person) else {}
    if (instance := header.text("SOPInstanceUID")) and (numbers[0] or place is not None):
        more["instance"] = place, instance, n, numbers
    more |= {"size": frame.shape[1::-1], "plane": plane, "study": study} | keys
    more |= {"series": f"{series} {plane}", "position": place, "order": numbers}
    spacing = header.numbers("PixelSpacing", 2) or header.numbers("PixelAspectRatio", 2) or (1, 1)
    scan = scan_of(dicom_grey(frame, header), name, n, spacing, **more)
    if plane and np.multiply(axes, UPRIGHT[PLANES.index(plane)]).reshape(2, 3).sum(1).min() < 0.5:
        header.odd.add("The picture is stored turned or mirrored, and is shown as it is stored.")
    return replace(scan, remarks=(*dicom_remarks(header), *sorted(header.odd)))


def dicom_grey(frame, header):
    """A frame as Grey: its bits, palette, padding, rescaling, window and polarity applied."""
    from pydicom.pixels import apply_color_lut

    dataset, kind = header.dataset, header.text("PhotometricInterpretation")
    frame = whole = thinned(frame)
    packed = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    unused = (dataset.BitsAllocated - header.stored) * (frame.dtype.kind in "iu")
    if unused and not (packed and (not header.shift or frame.max() < 2**header.stored)):
        within = frame << unused - header.shift >> unused  # else shifted by its codec
        if not header.shift and is_cut(frame, within, OVERLAY_BITS in dataset, header.stored):
            header.ignore("BitsStored")
        else:
            frame = within
    if kind == "PALETTE COLOR":
        frame = apply_color_lut(frame, dataset)
    if frame.ndim == 3:
        return grey_values(frame)
    values = frame * np.float32(header.number("RescaleSlope") or 1)
    values = values + np.float32(header.number("RescaleIntercept", 0))
    values = through_table(values, header, "ModalityLUTSequence", frame)
    kind_of = {"f4": "Float", "f8": "DoubleFloat"}.get(frame.dtype.str[1:], "")
    if (first := header.number(f"{kind_of}PixelPaddingValue")) is not None:
        ends = np.array([first, header.number(f"{kind_of}PixelPaddingRangeLimit", first)])
        if frame.dtype.kind in "iu":  # either may be written signed or not
            ends = ends.astype(np.int64).astype(frame.dtype)
        for found in (frame,) if header.shift or frame is whole else (frame, whole):  # other bits
            values = np.where((found >= ends.min()) & (found <= ends.max()), np.nan, values)
    grey = windowed(values, header) or stretched(values)
    if kind == "MONOCHROME1":
        grey = grey._replace(pixels=np.where(np.isfinite(values), 255 - grey.pixels, 0))
    return grey


def is_cut(frame, within, overlaid, bits):
    """Whether the low `bits` of a frame lack bits of its values, and not of overlays."""
    if np.array_equal(frame, within):
        return False
    others = np.unique(frame >> bits).astype(int)
    gradual = 2 < len(others) > np.ptp(others) / 2 and not overlaid
    return gradual or roughness(frame) < roughness(within)


def through_table(values, header, key, found):
    """Values, or what a lookup table of the file has for those `found`, whatever bits it claims."""
    tables = [table for source in header.sources for table in header.items(key, source)]
    if not tables:
        return values
    try:
        count, first, _ = (int(n) for n in np.ravel(tables[0].LUTDescriptor))
        entries, little = tables[0].LUTData, header.dataset.original_encoding[1]
        if isinstance(entries, bytes):
            words = len(entries) >= 2 * (count or 2**16)
            entries = np.frombuffer(entries, ("<u2" if little else ">u2") if words else "u1")
        first -= 2**16 * (first >= 2**15 and (found < 0).any())  # written unsigned
        places = (np.nan_to_num(found).astype(np.int64) - first).clip(0, len(entries) - 1)
        return np.where(np.isfinite(values), np.asarray(entries, np.float32)[places], np.nan)
    except Exception:  # as above
        return header.ignore(key) or values


def windowed(values, header):
    """Values through the VOI LUT or window of the file as Grey; None where it would hide them."""
    centre, width = header.number("WindowCenter"), header.number("WindowWidth", 0)
    window = None if centre is None or width <= 0 else (centre - width / 2, centre + width / 2)
    function = header.text("VOILUTFunction").upper()
    if (shown := through_table(values, header, "VOILUTSequence", values)) is not values:
        pixels, window = stretched(shown).pixels, None
    elif not window:
        return None
    elif function == "SIGMOID":
        pixels = to_uint8(1 / (1 + np.exp(-4 * (values - centre) / width)), 0, 1)
    else:
        exact = width <= 1 or function == "LINEAR_EXACT"
        pixels = to_uint8(values, window[0], window[1] - (not exact))
    return None if contrast(pixels) < 16 else Grey(pixels, window)


def dicom_remarks(header):
    """Yield what the header says against reading the file as a brain MRI."""
    from pydicom.uid import UID

    modality, part = (header.text(key).upper() for key in ("Modality", "BodyPartExamined"))
    if modality and modality != "MR":
        yield f"The file says that it is no MRI (modality {plain_name(modality)[:16]})."
    if part and not re.search("HEAD|BRAIN|SKULL|PITUITARY|ORBIT|FACE|IAC", part):
        yield f"The file says that it shows no head (body part {plain_name(part)[:16]})."
    kinds = f"{header.text('ImageType')} {UID(header.text('SOPClassUID')).name}"
    if kind := COMPUTED.search(kinds.upper().replace("_", " ")):
        yield f"The file says that it is no plain slice ({kind[0]}); the answer may be unreliable."
    if header.text("BurnedInAnnotation").upper() == "YES":
        yield "The file says that text is burned in; check that it identifies nobody."


# --------------------------------------------------------------------------------- NIfTI


def read_nifti(data, name, reading):
    """The slices of a volume as radiologists see them, in one plane or in all.

    Rows run from the top or front down; the patient's right is on the left, the face on the left.
    """
    volume, spacing, scale, remarks = open_nifti(data, name)
    cuts = [np.moveaxis(volume, n, 0)[:, ::-1, ::-1].swapaxes(1, 2) for n in range(3)]
    if reading.plane == "all":
        axes = [n for n in range(3) if min(cuts[n].shape[1:3]) >= SMALLEST_SIDE] or range(3)
    elif reading.plane:
        axes = [PLANES.index(reading.plane)]
    else:
        axes = [thickest_axis(volume.shape, spacing, remarks)]
    reading.take("scans", sum(len(cuts[n]) for n in axes), name, "slices")
    for n in axes:
        reading.take_pictures(cuts[n].shape[:0:-1], name, volume.itemsize, len(cuts[n]))
    study, scans = hashlib.sha256(data).hexdigest(), []
    for axis in axes:
        across, down = (mm for n, mm in enumerate(spacing) if n != axis)
        more = {"study": study, "series": study + PLANES[axis], "plane": PLANES[axis]}
        for n, voxels in enumerate(cuts[axis]):
            reading.check_time(name)
            if voxels.dtype.names:  # RGB, with or without alpha
                values = np.stack([voxels[colour] for colour in voxels.dtype.names], axis=-1)
            else:
                values = voxels if scale[0] is None else voxels * scale[0] + scale[1]
            grey = grey_values(values)
            more |= {"size": values.shape[1::-1], "position": n * spacing[axis]}
            scans.append(scan_of(grey, name, n, (down, across), remarks=tuple(remarks), **more))
    return scans


def open_nifti(data, name):
    """(first volume, its axes to right, front and top, spacing, (slope, intercept), remarks)."""
    import nibabel

    kind = nibabel.Nifti1Header if data[344:347] == b"n+1" else nibabel.Nifti2Header
    header, remarks = kind.from_fileobj(io.BytesIO(data)), []
    shape, start = header.get_data_shape(), max(header.get_data_offset(), header.single_vox_offset)
    volume = np.frombuffer(data, header.get_data_dtype(), math.prod(shape), start)
    if len(data) - start - volume.nbytes >= volume.itemsize * math.prod(shape[:2]):
        raise UnreadableScan(MORE_HELD.format(name))
    volume = volume.reshape((*shape, 1)[: max(3, len(shape))], order="F")
    if math.prod(shape[3:]) > 1:
        remarks.append(f"The file holds {math.prod(shape[3:])} volumes; the first was read.")
    volume = volume[(..., *[0] * len(shape[3:]))]
    step = max(1, round((volume.size / 100_000) ** (1 / 3)))
    levels = np.unique(volume[::step, ::step, ::step])
    few = 1 < len(levels) <= 16 and volume.dtype.kind in "iuf" and np.isin(levels, range(256)).all()
    if few or int(header["intent_code"]) in (*range(2, 25), *range(1002, 1010)):  # or statistics
        raise UnreadableScan(f"{name} holds labels or a map; send the scan that they belong to.")
    cut = volume[..., volume.shape[2] // 2]
    if volume.dtype.kind in "iu":
        other = cut.byteswap()
        if roughness(cut) * other.std() > 1.5 * roughness(other) * cut.std():
            why = "has its bytes in another order than its header says; export it again."
            raise UnreadableScan(f"{name} {why}")
    try:
        scale = [part and np.float32(part) for part in header.get_slope_inter()]
    except Exception:  # nibabel's, for an infinite one, say
        scale = None, None
        remarks.append("The scaling in the file makes no sense and was ignored.")
    axes = axes_of(header, remarks)
    spacing = [zoom if 0 < zoom < math.inf else 1.0 for zoom in map(float, header.get_zooms()[:3])]
    spacing += [1.0] * (3 - len(spacing))
    in_order = [spacing[n] for n in axes[:, 0].argsort()]
    return nibabel.apply_orientation(volume, axes), in_order, scale, remarks


def axes_of(header, remarks):
    """Where the axes of a volume point, (3, 2), as nibabel has it."""
    import nibabel

    sure = [header.get_sform] * bool(header["sform_code"] > 0)
    sure += [header.get_qform] * bool(header["qform_code"] > 0)
    for affine in (*sure, header.get_base_affine, np.eye(4).copy):
        with contextlib.suppress(Exception):  # one that is singular, or a quaternion that is none
            axes = nibabel.io_orientation(affine())
            unknown = np.isnan(axes[:, 0])
            if unknown.sum() == 1:  # the one that is left
                axes[unknown] = 3 - np.nansum(axes[:, 0]), 1
            if np.isfinite(axes).all():
                break
    if affine not in sure:
        remarks.append("The file does not say how the head lies; the slices may be turned.")
    return axes


def thickest_axis(shape, spacing, remarks):
    """The axis across its only slice or its thickest ones; of several the shortest, as is said."""
    if 1 in shape:
        return shape.index(1)
    thickest = [axis for axis in range(3) if spacing[axis] > 0.98 * max(spacing)]
    axis = min(thickest, key=lambda axis: (shape[axis], -axis))
    if len(thickest) > 1:
        plane = PLANES[axis]
        remarks.append(f"The file does not say in which plane it was acquired; {plane} was taken.")
    return axis


# -------------------------------------------------------------------------------- series

SMALLEST_SERIES = 5  # slices from which on those without a head are left out
BLANK = "The slice is blank."


def sort_series(scans):
    """(scans, skipped): each study and series numbered, its slices in the order of their places.

    Of a slice that is there twice one is left out, and so are those that show no head.
    """
    series, studies, kept, skipped = {}, {}, [], []
    for scan in scans:
        series.setdefault(scan.series, []).append(scan)
    loose = series.pop(None, [])
    for number, found in enumerate(series.values(), 1):
        study = studies.setdefault(found[0].study, str(len(studies) + 1))
        placed = all(scan.position is not None for scan in found)
        found.sort(key=lambda s: (placed and s.position, s.order, natural(s.file), s.slice))
        slices = without_copies(found, study, str(number), skipped)
        empty = empty_slices(slices)
        kept += [scan for scan in slices if scan.slice not in empty]
        left_out = [scan for scan in slices if scan.slice in empty]
        skipped += [Skipped(s.file, s.emptiness, s.series, s.slice) for s in left_out]
    return kept + loose, skipped


def natural(name):
    """A name's key for sorting: numbers in it by their value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def without_copies(found, study, series, skipped):
    """The slices of a series, each of them once, with their places and its number."""
    first, slices = {}, []
    for scan in found:
        place = (scan.order, scan.slice) if scan.position is None else scan.position
        keys = {(place, hash(scan.pixels.tobytes())), scan.instance} - {None}
        twins = (first[key] for key in keys & first.keys())
        if twin := next((twin for twin in twins if much_alike(twin.pixels, scan.pixels)), None):
            reason = f"It is the same slice as {twin.file} and counts once."
            skipped.append(Skipped(scan.file, reason, series))
        else:
            first |= dict.fromkeys(keys, scan)
            slices.append(replace(scan, study=study, series=series, slice=len(slices)))
    return slices


def much_alike(one, other):
    """Whether two pictures differ by no more than lossy compression makes them."""
    return one.shape == other.shape and np.abs(one.astype(np.int16) - other).mean() < 4


def empty_slices(slices):
    """The places of the slices that show no head; if that is most of a series, of blank ones."""
    empty = {scan.slice for scan in slices if scan.emptiness}
    if len(empty) > len(slices) / 2:
        empty = {scan.slice for scan in slices if scan.emptiness == BLANK}
    return empty if SMALLEST_SERIES <= len(slices) > len(empty) else set()


def emptiness(pixels):
    """Why a slice shows no head, or None, told from nothing but its own levels of grey.

    Noise evens out in the means of small squares, and a head does not; in doubt it is a head.
    """
    if not np.ptp(pixels):
        return BLANK
    side = max(8, min(pixels.shape) // 32)
    h, w = (n // side for n in pixels.shape)
    squares = pixels[: h * side, : w * side].reshape(h, side, w, side)
    means = squares.mean((1, 3), dtype=np.float32)
    if means.var() < 0.12 * pixels.var(dtype=np.float32):
        return "The slice shows nothing but noise."
    if (means > means.min() + 0.15 * np.ptp(means)).mean() < 0.02:
        return "The slice shows hardly any of the head."
    return None


# ------------------------------------------------------------------------------- looking


class Rule(NamedTuple):
    """What is measured in every scan, where it is well, and where it can be answered at all."""

    name: str
    measure: Callable[[Scan], float]
    limits: tuple[float, float, float, float]  # usable from, well from, well to, usable to
    passed: str  # sentences about a `scan` and its `value`
    warning: str
    rejection: str = ""


RULES = (
    Rule("Size", lambda scan: min(scan.size), (0, 128, math.inf, math.inf),
         "{scan.size[0]} x {scan.size[1]} pixels",
         "The picture is small ({value} pixels); details may be lost."),
    Rule("Contrast", lambda scan: scan.contrast, (10, 40, 255, 255),
         "{value} of 255 levels of grey",
         "The contrast is low; the answer may be unreliable.",
         "The picture is blank or nearly so."),
    Rule("Colour", lambda scan: scan.colour, (0, 0, 4, 40),
         "greyscale",
         "The picture is in colour; it was turned to grey.",
         "The picture is in strong colours, which no MRI is."),
    Rule("Background", lambda scan: np.median(np.median(corners(scan.pixels[::2, ::2]), axis=1)),
         (0, 0, 128, 255),
         "dark",
         "The background is bright; the answer for an inverted picture is unreliable."),
    Rule("Text", lambda scan: count_text_marks(scan.pixels), (0, 0, 2, math.inf),
         "none seen beside the head",
         "There is text or a scale beside the head; check that it identifies nobody."),
)


def look_at(scan: Scan) -> Scan:
    """The scan with all that is found out by looking at it."""
    box, levels = head_box(scan.pixels), contrast(scan.pixels)
    empty = emptiness(scan.pixels) if scan.series else None
    scan, checks = replace(scan, box=box, contrast=levels, emptiness=empty), []
    for rule in RULES:
        value = rule.measure(scan)
        passed = bool(rule.limits[1] <= value <= rule.limits[2])
        sentence = rule.passed if passed else rule.warning
        checks.append(Check(rule.name, passed, sentence.format(scan=scan, value=value)))
    return replace(scan, checks=tuple(checks))


def rejection(scan: Scan) -> str | None:
    """Why a scan cannot be answered, as one of the RULES has it; None if it can."""
    for rule in RULES:
        if rule.rejection and not rule.limits[0] <= rule.measure(scan) <= rule.limits[3]:
            return rule.rejection
    return None


def count_text_marks(pixels):
    """How many bright marks of a letter's height stand in the background beside the head.

    The head is the largest connected piece that differs from the margin, filled up to its outline.
    """
    step = max(1, -(-max(pixels.shape) // 320))
    h, w = (n // step for n in pixels.shape)
    lines = reduce(np.maximum, [pixels[i : h * step : step] for i in range(step)])
    small = reduce(np.maximum, [lines[:, j : w * step : step] for j in range(step)])
    sides = (small[:3], small[-3:], small[:, :3], small[:, -3:])
    margin = np.median(np.concatenate([side.ravel() for side in sides]))
    difference, most = distance_from(margin, small, small[::2, ::2])
    pieces, _ = ndimage.label(difference > max(25, 0.15 * most), np.ones((3, 3)))
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
    near = ndimage.binary_dilation(fill_rows(head) | fill_rows(head.T).T, iterations=4)
    return sum(not near[place][piece].any() for place, piece in letters)


def fill_rows(mask):
    """A mask (H, W) with every row filled from its first to its last pixel."""
    return np.maximum.accumulate(mask, 1) & np.maximum.accumulate(mask[:, ::-1], 1)[:, ::-1]


def contrast(pixels):
    """Levels of grey, 0 to 255, between the 1st and 99th percentile of uint8 pixels (H, W)."""
    low, high = level_quantile(np.arange(256), (0.01, 0.99), subsample(pixels)[1])
    return int(high - low)


def level_quantile(of_level, shares, sample):
    """Quantiles of what each of 256 levels stands for, over the uint8 pixels of a sample."""
    order = of_level.argsort(kind="stable")
    below = np.array(Image.fromarray(sample).histogram())[order].cumsum()
    return of_level[order][np.searchsorted(below, np.multiply(shares, below[-1]))]


def distance_from(background, pixels, sample):
    """(how far uint8 pixels are from a level, float32, the 99th percentile of it in a sample)."""
    of_level = np.abs(np.arange(256, dtype=np.float32) - np.float32(background))
    distance = np.abs(pixels.astype(np.float32) - np.float32(background))
    return distance, level_quantile(of_level, 0.99, sample)


def head_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Box (x0, y0, x1, y1), in pixels, around what differs from the background.

    Rows and columns count where at least 2 % of their pixels stand out. The whole picture, if
    that leaves next to nothing.
    """
    step, mask = foreground(pixels)
    ys = np.flatnonzero(mask.mean(1) > 0.02) * step
    xs = np.flatnonzero(mask.mean(0) > 0.02) * step
    if not len(xs) or not len(ys) or min(np.ptp(xs), np.ptp(ys)) < 0.25 * min(pixels.shape):
        return 0, 0, pixels.shape[1], pixels.shape[0]
    y1, x1 = min(ys[-1] + step, pixels.shape[0]), min(xs[-1] + step, pixels.shape[1])
    return int(xs[0]), int(ys[0]), int(x1), int(y1)


def foreground(pixels):
    """(step, mask): which of every `step`-th pixel differs from the background.

    The background is the level of the four corners, so that a white one works as well, and its
    noise that of the quietest corner.
    """
    step, sample = subsample(pixels)
    background = np.sort(corners(sample).astype(np.float32))
    count = background.shape[1]
    levels = background[:, count // 2]
    difference, most = distance_from(np.sort(levels)[1:3].mean(), sample, sample)
    noise = np.sort(np.abs(background - levels[:, None]))[:, 95 * count // 100].min()
    return step, difference > max(0.12 * most, 2 * noise)


def corners(pixels):
    """The pixels (4, n) of the four corners, a sixteenth of either side."""
    h, w = (max(1, n // 16) for n in pixels.shape)
    four = pixels[:h, :w], pixels[:h, -w:], pixels[-h:, :w], pixels[-h:, -w:]
    return np.stack(four).reshape(4, -1)


def prepare(pixels: np.ndarray, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """What the network sees of a scan: uint8 (224, 224, 3), three equal channels.

    Cropped to the head, stretched to the full range of grey but for 1 % at each end, resized
    with its aspect ratio kept and padded with black. Training and serving both call this. `box`
    is head_box() of the pixels, where it is known. Raises ValueError unless `pixels` is uint8
    (H, W).
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise ValueError(f"expected uint8 pixels (H, W), got {pixels.dtype} {pixels.shape}")
    x0, y0, x1, y1 = box or head_box(pixels)
    head = ImageOps.autocontrast(Image.fromarray(pixels[y0:y1, x0:x1]), cutoff=1)
    padded = ImageOps.pad(head, (SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(padded.convert("RGB"))


# ---------------------------------------------------------------------------- classifier

NO_TUMOR = "no_tumor"
MEMBERS = ("card.json", "serving.tflite")  # of a model file, beside those that Keras knows
ENGINE_THREADS = 4  # of one interpreter at most; an interpreter takes about 40 MB
WORKERS = 1 + (os.cpu_count() or 1)  # threads of one upload: some prepare while others infer
MEASURED_SLICES = 15  # of a series from which on it is like the volumes that were measured
OUTPUTS = {"probabilities", "heat", "embedding", "texture"}  # of the serving network
GATE = ("scale", "weights", "bias", "refuse", "doubt")
UNLIKE = ("scale", "mean", "directions", "limit")


class ModelError(click.ClickException):
    """The model file cannot serve; one sentence says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class Finding:
    """The answer for one scan; a rejected one has a reason and nothing else."""

    verdict: str  # "tumor", "no_tumor", "uncertain" or "rejected"
    label: str | None = None
    evidence: str | None = None  # the tumor that `heat` speaks for, even if `label` is none
    risk: str | None = None  # "low", "medium" or "high"
    tumor_probability: float | None = None  # to four digits, as the rest
    probabilities: dict[str, float] | None = None
    heat: np.ndarray | None = None  # float32 (14, 14), from 0 on it counts as evidence
    reason: str | None = None
    warnings: tuple[str, ...] = ()


class Classifier:
    """VGG19 over a brain MRI slice, read from the `model.keras` that Brainmodel.ipynb writes.

    Task: tumor or not, and which type. Input: what prepare() returns. `card` is the archive's
    card.json: labels in output order, thresholds, figures. The archive's int8 network answers,
    through LiteRT.

    >>> classifier = Classifier("model.keras")
    >>> classifier.classify(read_scans(open("scan.png", "rb").read(), "scan.png"))[0].verdict
    """

    def __init__(self, path: str | pathlib.Path, threads: int = 1):
        """Load the archive and answer once; raises ModelError if that cannot be done."""
        path = pathlib.Path(path)
        archive = read_archive(path)
        network, self.card = archive["serving.tflite"], read_card(archive["card.json"], path)
        if self.card.get("serving_sha256") != hashlib.sha256(network).hexdigest():
            raise wrong_model(path, "holds another network than the one its card was written for")
        count = max(1, -(-threads // ENGINE_THREADS))
        self.engines = [litert(network, max(1, threads // count), path) for _ in range(count)]
        self.lock, self.waiting = threading.Lock(), deque()  # for a free one of the engines
        start = time.monotonic()
        outputs = self.infer(np.zeros((1, SIDE, SIDE, 3), np.uint8))
        self.seconds = time.monotonic() - start  # of one scan, rather more: it was the first
        self.labels = self.card["labels"]
        width = outputs["probabilities"].shape[1]
        if width != len(self.labels):
            labels = ", ".join(self.labels)
            raise wrong_model(path, f"gives {width} numbers per scan, but its labels are {labels}")
        self.gate, self.unlike = read_gate(self.card, outputs, path)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        engine = f"litert-{self.card.get('serving', 'int8')}"
        self.summary = {"sha256": self.sha256, "engine": engine, "labels": self.labels}

    def infer(self, prepared: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name for uint8 (N, 224, 224, 3), first come, first served."""
        turn = queue.SimpleQueue()  # where the engine comes that is free for this caller
        with self.lock:
            self.waiting.append(turn)
            if self.engines:
                self.waiting.popleft().put(self.engines.pop())
        engine = turn.get()
        try:
            return engine(prepared)
        finally:
            with self.lock:
                give = self.waiting.popleft().put if self.waiting else self.engines.append
                give(engine)

    def classify(self, scans: list[Scan]) -> list[Finding]:
        """A Finding for each scan, in order."""
        with threaded_map(len(scans)) as each:
            return list(each(self.classify_one, scans))

    def classify_one(self, scan: Scan) -> Finding:
        """The Finding for a scan."""
        prepared = prepare(scan.pixels, scan.box)
        outputs = {name: values[0] for name, values in self.infer(prepared[None]).items()}
        score = gate_score(self.gate, gate_input(outputs)) if self.gate else math.inf
        reason = why_rejected(scan, prepared[..., 0])
        if not reason and self.gate and score < self.gate["refuse"]:
            reason = "This does not look like a slice of a brain MRI."
        if reason:
            return Finding("rejected", reason=reason)
        distance = self.unlike and unlikeness(self.unlike, outputs["embedding"])
        unlike = self.unlike and distance > self.unlike["limit"]
        finding = self.finding(outputs["probabilities"], outputs["heat"], unlike)
        outside = finding.label != NO_TUMOR and outside_head(prepared, finding.heat) > 0.5
        said = {
            "This may not be a brain MRI.": self.gate and score < self.gate["doubt"],
            "Uncertain: unlike the scans this model was trained on.": unlike,
            "The network looked outside the head; the answer may be unreliable.": outside,
        }
        return replace(finding, warnings=tuple(text for text, holds in said.items() if holds))

    def finding(self, probabilities, heat, unlike=False):
        """The Finding for the network's outputs for one scan; uncertain if it is `unlike` all."""
        by_label = {label: float(p) for label, p in zip(self.labels, probabilities)}
        p = 1 - by_label[NO_TUMOR]
        verdict, risk = ("uncertain", "medium") if unlike else judge(p, **self.card["thresholds"])
        label = most_probable(by_label, verdict)
        evidence = most_probable(by_label, "tumor")
        start, scale = self.card["heat_from"], self.card["heat_scale"]
        heat = np.float32((heat[..., self.labels.index(evidence)] / scale - start) / (1 - start))
        rounded = {label: round(p, 4) for label, p in by_label.items()}
        return Finding(verdict, label, evidence, risk, round(p, 4), rounded, heat)


def why_rejected(scan, grey):
    """Why a picture is too blank, coloured or noisy for an MRI, else None; grey (224, 224)."""
    if reason := rejection(scan):
        return reason
    if not np.ptp(grey):
        return "The picture is blank or nearly so."
    rows = grey[::2] - grey.mean(dtype=np.float32)
    if np.vdot(rows[:, 1:], rows[:, :-1]) < 0.5 * np.vdot(rows, rows):  # their autocorrelation
        return "The picture is noise rather than a scan."
    return None


def read_gate(card: dict, outputs: dict[str, np.ndarray], path: pathlib.Path) -> tuple:
    """(gate, unlike) of a card as arrays, tried on the outputs of the network; None if absent."""
    try:
        gate, unlike = (
            card.get(part) and {name: np.asarray(card[part][name], np.float32) for name in names}
            for part, names in (("gate", GATE), ("unlike", UNLIKE))
        )
        tried = [unlikeness(unlike, outputs["embedding"])] if unlike else []
        tried += [gate_score(gate, gate_input(outputs))] if gate else []
        if any(values.shape != (len(outputs["probabilities"]),) for values in tried):
            raise ValueError("not one number for each scan")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise wrong_model(path, "has a gate that does not fit its network") from None
    return gate, unlike


def gate_input(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """What blocks 3 and 4 (texture) and 5 (embedding) see, averaged over the scan, (..., D)."""
    return np.concatenate([outputs["texture"], outputs["embedding"]], -1)


def gate_score(gate: dict, seen: np.ndarray) -> np.ndarray:
    """How much gate inputs (..., D) look like brain MRI, (...,): a logistic regression.

    Their logarithm takes out scale.
    """
    return np.log1p(gate["scale"] * seen) @ gate["weights"] + gate["bias"]


def unlikeness(unlike: dict, embedding: np.ndarray) -> np.ndarray:
    """How far embeddings (..., D) lie from those of the training scans, (...,): 1 is usual.

    The Mahalanobis distance within the largest components (Lee et al. 2018), root mean square.
    """
    whitened = (np.log1p(unlike["scale"] * embedding) - unlike["mean"]) @ unlike["directions"]
    return np.sqrt((whitened**2).mean(-1))


def outside_head(prepared: np.ndarray, heat: np.ndarray) -> float:
    """The share of the positive heat (14, 14) outside the head that the network saw; 0 of none."""
    _, mask = foreground(prepared[::2, ::2, 0])
    head = fill_rows(mask) & fill_rows(mask.T).T
    cells = head.reshape(14, SIDE // 28, 14, SIDE // 28).mean((1, 3))
    warm = np.maximum(heat, 0)
    return float((warm * (1 - cells)).sum() / max(warm.sum(), 1e-6))


@contextlib.contextmanager
def threaded_map(count: int) -> Iterator[Callable]:
    """A map() for `count` items, on daemon threads; on leaving, those that have begun are ended."""
    if count < 2:
        yield map
        return
    pool = ThreadPool(min(count, WORKERS))
    try:
        yield pool.imap
    finally:
        pool.terminate()
        pool.join()


def read_archive(path: pathlib.Path) -> dict[str, bytes]:
    """MEMBERS of a model file; raises ModelError if it does not hold them."""
    if not path.is_file():
        advice = "run Brainmodel.ipynb or fetch it with the repository"
        raise wrong_model(path, "is missing", advice)
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise wrong_model(path, "is a git-LFS pointer, not the model", "run `git lfs pull`")
    try:
        with zipfile.ZipFile(path) as archive:
            if missing := " and ".join(sorted(set(MEMBERS) - set(archive.namelist()))):
                advice = 'run Brainmodel.ipynb to its part "Export", which adds them'
                raise wrong_model(path, f"is a Keras file without {missing}", advice)
            return {name: archive.read(name) for name in MEMBERS}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        advice = "fetch it again or run Brainmodel.ipynb"
        raise wrong_model(path, "is cut off or damaged", advice) from None


def wrong_model(path, what, advice="run Brainmodel.ipynb to write one that fits"):
    """The ModelError for a file: what it is instead of a model that can serve."""
    return ModelError(f"{path} {what}; {advice}.")


def read_card(data: bytes, path: pathlib.Path) -> dict:
    """The card from the bytes of card.json, checked for what serving needs."""
    try:
        card = json.loads(data)
        judge(0.5, **card["thresholds"])
        card["labels"].index(NO_TUMOR)
        {**card["figures"], **card["data"]["counts"], **card["confusion"]}
        1 / card["heat_scale"] / (1 - card["heat_from"])
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise wrong_model(path, "has a card.json that cannot be read") from None
    return card


def litert(network: bytes, threads: int, path: str | pathlib.Path = "model.keras") -> Callable:
    """The serving network as a function from uint8 (N, 224, 224, 3) to outputs by name."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        runner = Interpreter(model_content=network, num_threads=threads).get_signature_runner()
        shape = tuple(runner.get_input_details()["scan"]["shape_signature"])
        outputs = set(runner.get_output_details())
    except (ValueError, KeyError, RuntimeError):
        raise wrong_model(path, "holds a network that cannot be read") from None
    if shape != (-1, SIDE, SIDE, 3) or not outputs >= OUTPUTS:
        raise wrong_model(path, f"takes scans {shape} and gives {', '.join(sorted(outputs))}")
    return lambda prepared: runner(scan=prepared.astype(np.float32))


def judge(tumor_probability: float, low: float, high: float) -> tuple[str, str]:
    """(verdict, risk) of a tumor probability between the card's two thresholds."""
    if tumor_probability < low:
        return NO_TUMOR, "low"
    return ("tumor", "high") if tumor_probability >= high else ("uncertain", "medium")


def most_probable(probabilities: dict[str, float], verdict: str) -> str:
    """The label to name: of the tumors alone if the verdict is `tumor`, so that both agree."""
    if verdict == NO_TUMOR:
        return NO_TUMOR
    named = [label for label in probabilities if verdict != "tumor" or label != NO_TUMOR]
    return max(named, key=probabilities.get)


# --------------------------------------------------------------------------------- store

ID = re.compile(r"[A-Za-z0-9_-]{22}")  # secrets.token_urlsafe(16)
FAST_PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}  # smaller than level 1 alone, faster
GREYS = bytes(np.arange(256, dtype=np.uint8).repeat(3))  # a palette: Pillow tries no filters on it
HEAT_COLOURS = {"black": (0, 0, 4), "mid": (188, 55, 84), "white": (252, 255, 164)}  # of `inferno`
GONE = "This result does not exist or has been removed."
OPENAPI = HERE / "static" / "openapi.json"


class Damaged(OSError):
    """A file of a result does not hold what was written."""


def new_result(model: dict, scans: list[Scan], skipped: list[Skipped]) -> dict:
    """The result of an upload, as result.json holds it, before anything of it is answered."""
    studies = len({scan.study for scan in scans} - {None})
    several = f"These scans belong to {studies} patients or studies; each is answered on its own."
    return {
        "id": secrets.token_urlsafe(16),
        "created": time.strftime(UTC, time.gmtime()),
        "status": "running",
        "progress": 0.0,
        "total": len(scans),
        "warnings": [several] if studies > 1 else [],
        "study": None,
        "studies": [],
        "scans": [],
        "skipped": [item._asdict() for item in skipped],
        "model": model,
    }


def write_result(folder: pathlib.Path, result: dict) -> None:
    """Write result.json in one move; raises FileNotFoundError if the folder is gone."""
    partial = folder / ".result.json"
    partial.write_text(json.dumps(result))
    partial.replace(folder / "result.json")


def scan_entry(upload_id: str, n: int, scan: Scan, finding: Finding) -> dict:
    """Scan n of an upload as the JSON of a result has it."""
    url = f"/results/{upload_id}/{n}"
    return {
        **{key: getattr(scan, key) for key in ("file", "study", "series", "slice", "plane")},
        **{key: value for key, value in vars(finding).items() if key != "heat"},
        "warnings": [*scan.warnings, *finding.warnings],
        "checks": [check._asdict() for check in scan.checks],
        "size": scan.size,
        "kept": scan.pixels.shape[::-1],
        "crop": scan.box,
        "window": scan.window,
        "scan": f"{url}/scan.png",
        "heatmap": None if finding.heat is None else f"{url}/heatmap.png",
    }


def keep_scan(folder: pathlib.Path, scan: Scan, finding: Finding) -> None:
    """Keep scan.png, heat.f32 and identifiers.json, if there are such, in one move."""
    partial = folder.with_name(f".{folder.name}")
    partial.mkdir()
    picture = Image.fromarray(scan.pixels)
    picture.putpalette(GREYS)
    data = png_of(picture, compress_level=0)  # half the size would take seven times as long
    (partial / "scan.png").write_bytes(data)
    if finding.heat is not None:
        (partial / "heat.f32").write_bytes(finding.heat.tobytes())  # float32 (14, 14)
    if scan.identifiers:
        (partial / "identifiers.json").write_text(json.dumps(scan.identifiers))
    partial.rename(folder)


def read_kept(path: pathlib.Path, decode: Callable[[bytes], object]) -> object:
    """What `decode` makes of a file of a result; raises Damaged if it is not what was written."""
    data = path.read_bytes()
    try:
        return decode(data)
    except (ImportError, MemoryError):  # the file is not to blame
        raise
    except Exception as error:  # whatever a library raises
        raise Damaged(f"{path} is damaged: {error}") from error


def read_result(folder: pathlib.Path) -> dict:
    """The result of an upload; raises Damaged, or JsonSchemaException for another version's."""
    return check_result()(read_kept(folder / "result.json", json.loads))


@cache
def check_result() -> Callable:
    """The schema of a result as a function, which raises JsonSchemaException or returns it."""
    components = json.loads(OPENAPI.read_text())["components"]
    return fastjsonschema.compile({"$ref": "#/components/schemas/Result", "components": components})


def is_damaged(folder: pathlib.Path) -> bool:
    """Whether a file of a finished upload is cut off, or a reader has met damage."""
    try:
        result = read_result(folder)
    except Damaged:
        return True
    scans = list(enumerate(result["scans"] if result["status"] == "done" else []))
    least = {f"{n}/scan.png": math.prod(scan["kept"]) for n, scan in scans}  # a byte a pixel
    least |= {f"{n}/heat.f32": 784 for n, scan in scans if scan["heatmap"]}
    cut_off = ((folder / name).stat().st_size < size for name, size in least.items())
    return (folder / "damaged").exists() or any(cut_off)


def kept_png(folder: pathlib.Path) -> bytes:
    """The file scan.png that keep_scan() kept; damage is told by its checksums."""

    def checked(data):
        Image.open(io.BytesIO(data)).verify()
        return data

    return read_kept(folder / "scan.png", checked)


def kept_picture(folder: pathlib.Path) -> Image.Image:
    """The grey picture in it."""
    return Image.open(io.BytesIO(kept_png(folder))).convert("L")


def png_of(picture: Image.Image, **options) -> bytes:
    """A picture as a PNG file, compressed fast unless Pillow's `options` say otherwise."""
    file = io.BytesIO()
    picture.save(file, "PNG", **(options or FAST_PNG))
    return file.getvalue()


def drawn_heatmap(folder: pathlib.Path, scan: dict, evidence: bool = False) -> Image.Image:
    """The heatmap of a scan; without heat if it shows no tumor, unless `evidence` is asked for."""
    picture = kept_picture(folder)
    if scan["verdict"] == NO_TUMOR and not evidence:
        return picture.convert("RGB")
    heat = heat_of(folder, picture, scan["crop"])
    return Image.alpha_composite(picture.convert("RGBA"), heat).convert("RGB")


def heat_of(folder: pathlib.Path, picture: Image.Image, box: tuple) -> Image.Image:
    """The heat of a scan that keep_scan() kept: RGBA, transparent where there is no evidence."""
    pixels, path = np.asarray(picture), folder / "heat.f32"
    heat = read_kept(path, lambda data: np.frombuffer(data, np.float32).reshape(14, 14))
    shares = heat_levels(pixels, heat, box).clip(0, 1)
    levels = Image.fromarray((shares * 255).astype(np.uint8))
    coloured = ImageOps.colorize(levels, **HEAT_COLOURS)
    coloured.putalpha(levels.point(lambda level: 0.7 * level))
    return coloured


def heat_levels(pixels: np.ndarray, heat: np.ndarray, box: tuple | None = None) -> np.ndarray:
    """The heat of a label (14, 14) over the scan it came from: float32 (H, W), not below 0.

    It lies over the square that prepare() made: ImageOps.fit() takes off what pad() has added.
    """
    x0, y0, x1, y1 = box or head_box(pixels)
    warm = Image.fromarray(np.maximum(heat, 0).astype(np.float32))
    levels = np.zeros(pixels.shape, np.float32)
    levels[y0:y1, x0:x1] = ImageOps.fit(warm, (x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
    return levels


def keep_correction(folder: pathlib.Path, picture: bytes, label: str, patient: str) -> None:
    """Add a picture with a reader's label, the last one given, to a folder for the notebook.

    Neither the picture nor its row tells whose it is or where it came from.
    """
    name, manifest = f"{hashlib.sha256(picture).hexdigest()[:32]}.png", folder / "manifest.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # against the other workers
        rows = [row for row in read_corrections(folder) if row["path"] != name]
        new = {"path": name, "label": label, "source": "corrections", "patient": patient}
        (folder / name).write_bytes(picture)
        partial = folder / ".manifest.csv"
        with open(partial, "w", encoding="utf-8", newline="") as file:
            write_csv(file, list(new), [*rows, new])
        partial.replace(manifest)


def read_corrections(folder: pathlib.Path) -> list[dict]:
    """The rows of a folder of corrections."""
    if not (folder / "manifest.csv").exists():
        return []
    with open(folder / "manifest.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def is_old(path: pathlib.Path, hours: float) -> bool:
    """Whether a path was changed more than `hours` ago, or in a future that a wrong clock set."""
    return abs(time.time() - path.stat().st_mtime) > hours * 3600


def sweep(uploads: pathlib.Path, hours: float) -> None:
    """Remove the uploads older than `hours`, half-written ones included, and damaged ones."""
    harmless = OSError, MemoryError, JsonSchemaException  # another worker was faster, say
    for folder in uploads.iterdir():
        with contextlib.suppress(*harmless):
            upload_id = folder.name.removeprefix(".")
            if not ID.fullmatch(upload_id):
                continue
            if why := "age" if is_old(folder, hours) else is_damaged(folder) and "damage":
                shutil.rmtree(folder)
                audit("deletion", id=upload_id, why=why)


def csv_columns(labels: list[str]) -> list[str]:
    """The columns of a scan in CSV: where it came from, the answer, or why there is none."""
    place = ["file", "study", "series", "slice", "plane", "crop"]
    return [*place, "verdict", "label", "risk", "tumor_probability", *labels, "reason", "warnings"]


def csv_rows(scans: list[dict], skipped: list[dict]) -> Iterator[dict]:
    """A row for each scan's entry, then one for each file or slice that was skipped."""
    for entry in scans:
        texts = {"warnings": " ".join(entry["warnings"]), "crop": " ".join(map(str, entry["crop"]))}
        yield entry | (entry["probabilities"] or {}) | texts
    for item in skipped:
        yield item | {"verdict": "skipped"}


def csv_of(result: dict) -> str:
    """A result as CSV."""
    file = io.StringIO()
    rows = csv_rows(result["scans"], result["skipped"])
    write_csv(file, csv_columns(result["model"]["labels"]), rows)
    return file.getvalue()


def write_csv(file, columns: list[str], rows: Iterable[dict], header: bool = True) -> None:
    """Write rows as CSV, in which no spreadsheet takes a text for a formula."""
    table = csv.DictWriter(file, columns, extrasaction="ignore")
    if header:
        table.writeheader()
    for row in rows:
        table.writerow({name: unformulated(value) for name, value in row.items()})


def unformulated(value: object) -> object:
    """Text that begins like a formula with an apostrophe before it; any other value as it is."""
    return re.sub(r"^(?=[=+@\t\r-])", "'", value) if isinstance(value, str) else value


# ---------------------------------------------------------------------------------- jobs

HEARTBEAT = 5.0  # seconds between two signs of life of an unfinished upload
SILENCE = 30.0  # seconds without one, after which its server must have stopped


def answer(classifier: Classifier, folder: pathlib.Path, result: dict, scans: list[Scan]) -> None:
    """Classify an upload into its folder and result, within its request or in the background."""
    start = time.monotonic()
    try:
        answer_all(classifier, folder, result, scans)
    finally:
        facts = {"scans": len(scans), "status": result["status"].replace("running", "failed")}
        facts["verdicts"] = Counter(entry["verdict"] for entry in result["scans"])
        facts["verdict"] = result["study"] and result["study"]["verdict"]
        audit("answer", start, id=result["id"], model=result["model"]["sha256"], **facts)


def answer_all(classifier, folder, result, scans):
    """What answer() does, but for the audit."""

    def answer_one(numbered):
        n, scan = numbered
        finding = classifier.classify_one(scan)
        keep_scan(folder / str(n), scan, finding)
        return scan_entry(result["id"], n, scan, finding)

    written = time.monotonic()
    with threaded_map(len(scans)) as each:
        for entry in each(answer_one, enumerate(scans)):
            result["scans"].append(entry)
            result["progress"] = round(len(result["scans"]) / len(scans), 3)
            if (folder / "cancel").exists():  # by any server on this folder
                break
            if time.monotonic() > written + 0.5:
                write_result(folder, result)
                written = time.monotonic()
    if (folder / "cancel").exists():
        end_early(folder, result, "cancelled")
        return
    result |= {"status": "done", "progress": 1.0} | study_answers(result["scans"], classifier.card)
    for found in result["studies"]:
        found["label"] = likely_label([result["scans"][n] for n in found["highest"]], found)
    write_result(folder, result)


def end_early(folder: pathlib.Path, result: dict, status: str, **more) -> None:
    """Keep of an upload only that it was cancelled or failed."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    result |= {"status": status, "scans": [], **more}
    write_result(folder, result)
    (folder / "cancel").unlink(missing_ok=True)


def study_answers(entries: list[dict], card: dict) -> dict:
    """`studies`, the answers for series; and `study`, the first of them if there is one study."""
    series = series_answers(entries, card)
    answers = [found for found in series if found["verdict"]]
    single = answers and len({found["study"] for found in series}) == 1
    return {"studies": answers, "study": answers[0] if single else None}


def by_series(entries: list[dict]) -> dict[tuple, list[int]]:
    """The numbers of the entries of each (study, series); single pictures have no series."""
    numbers = {}
    for n, entry in enumerate(entries):
        numbers.setdefault((entry["study"], entry["series"]), []).append(n)
    return numbers


def series_of(result: dict) -> list[tuple[dict | None, list[int]]]:
    """Each series of a result: its answer, or None without one, and the numbers of its scans."""
    answers = {(found["study"], found["series"]): found for found in result["studies"]}
    numbers = by_series(result["scans"])
    return [(answers.get(place), places) for place, places in numbers.items()]


def series_answers(entries: list[dict], card: dict) -> list[dict]:
    """What study_answer() says of each series, with its names, the most suspicious first."""
    answers = []
    for (study, name), places in by_series(entries).items():
        if name:
            found = study_answer([entries[n] for n in places], card)
            found["highest"] = [places[n] for n in found["highest"]]
            answers.append({"study": study, "series": name, "slices": len(places)} | found)
    return sorted(answers, key=lambda found: -(found["tumor_probability"] or 0))


def likely_label(entries: list[dict], found: dict) -> str:
    """The label of a series: by the mean probabilities of the slices that carry its answer."""
    sums = Counter()
    for entry in entries:
        sums.update(entry["probabilities"])
    return most_probable(sums, found["verdict"])


def study_answer(entries: list[dict], card: dict) -> dict:
    """One answer for the slices of a series by the card's rule; no verdict for fewer than two."""
    rule = {"head": 0.5, "stretch": 0.08, **card["thresholds"]} | (card.get("study") or {})
    p = np.array([entry["tumor_probability"] for entry in entries], float)  # None becomes NaN
    answered = np.flatnonzero(~np.isnan(p))
    found = dict.fromkeys(("verdict", "risk", "tumor_probability"))
    found |= {"highest": [], "counted": 0, "rejected": len(p) - len(answered)}
    if len(answered) < 2:
        return found
    x0, y0, x1, y1 = np.array([entries[n]["crop"] for n in answered], float).T
    shape = (x1 - x0) * (y1 - y0), rule["head"], rule["stretch"]
    probability, carrying, found["counted"] = series_probability(p[answered], *shape)
    found["verdict"], found["risk"] = judge(probability, rule["low"], rule["high"])
    found["tumor_probability"] = round(probability, 4)
    found["highest"] = answered[carrying].tolist()
    found["measured"] = bool(card.get("study")) and len(answered) >= MEASURED_SLICES
    return found


def series_probability(p, areas, head, stretch):
    """(tumor probability, the slices that carry it, how many counted) of a series in order.

    p (n,): of its slices; areas (n,): of their heads' boxes. Slices whose head is below the share
    `head` of the upper quartile do not count (the largest box may be that of noise beyond the
    head). The probability is the highest mean over a stretch of consecutive slices, `stretch` of
    those that count: a tumor spans slices, a lone peak does not.
    """
    counted = np.flatnonzero(areas >= head * np.quantile(areas, 0.75))
    length = max(1, round(stretch * len(counted)))
    means = np.convolve(p[counted], np.full(length, 1 / length), "valid")
    within = counted[means.argmax() : means.argmax() + length]
    carrying = within[np.argsort(-p[within], kind="stable")][:3]
    return float(means.max()), carrying.tolist(), len(counted)


class Jobs:
    """What is being answered: scans within requests, counted, and background uploads in a queue."""

    def __init__(self, classifier: Classifier, most_scans: int, most_uploads: int):
        self.classifier, self.most, self.count = classifier, most_scans, 0
        self.lock = threading.Lock()
        self.reading = threading.BoundedSemaphore(os.cpu_count() or 1)  # decoding takes memory
        self.waiting = queue.Queue(most_uploads)
        self.unfinished = set()  # folders of background uploads
        threading.Thread(target=self.work, name="uploads", daemon=True).start()

    @contextlib.contextmanager
    def reserve(self, count: int, force: bool = False) -> Iterator[None]:
        """Hold places for some scans of a request; 503 if none is free, unless by `force`."""
        with self.lock:
            if self.count >= self.most and not force:
                seconds = 1 + int(self.count * self.classifier.seconds)
                sentence = "The server is busy with other scans; try again in a few seconds."
                abort(503, sentence, retry_after=seconds)
            self.count += count
        try:
            yield
        finally:
            with self.lock:
                self.count -= count

    def start(self, folder: pathlib.Path, result: dict, scans: list[Scan]) -> None:
        """Answer an upload in the background; 503 if too many wait already."""
        with self.lock:
            if self.waiting.full():
                sentence = "The server is busy with other studies; try again in a minute."
                abort(503, sentence, retry_after=60)
            folder.mkdir(parents=True)
            write_result(folder, result)
            self.unfinished.add(folder)
            self.waiting.put_nowait((folder, result, scans))

    def work(self) -> None:
        """Answer queued uploads for ever."""
        while True:
            self.finish(*self.waiting.get())

    def finish(self, folder: pathlib.Path, result: dict, scans: list[Scan], then=None) -> None:
        """Answer an upload in the background, and do what comes `then`; it may fail, not raise."""
        try:
            answer(self.classifier, folder, result, scans)
            if then:
                then(folder, result)
        except FileNotFoundError:  # deleted meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        except Exception:
            LOG.exception("a study failed")
            error = "Something went wrong on the server; send the study again."
            try:
                end_early(folder, result, "failed", error=error)
            except OSError:  # not even its end can be written; the next upload has to run
                shutil.rmtree(folder, ignore_errors=True)
        self.unfinished.discard(folder)

    def touch(self) -> None:
        """Show every server on this folder that its uploads are alive, the queued ones as well."""
        for folder in list(self.unfinished):
            with contextlib.suppress(FileNotFoundError):
                os.utime(folder / "result.json")


def keep_house(jobs: Jobs, uploads: pathlib.Path, hours: float) -> None:
    """Touch unfinished uploads and sweep old ones, for ever."""
    swept = time.monotonic()
    while True:
        time.sleep(HEARTBEAT)
        with contextlib.suppress(OSError):  # the folder is away for a while: /healthz says so
            jobs.touch()
            if time.monotonic() > swept + min(60, hours * 360):  # a tenth of the retention
                swept = time.monotonic()
                sweep(uploads, hours)


# ------------------------------------------------------------------- results for a PACS

NO_NETWORK = "This needs the libraries of the network node: pip install -r requirements.txt"
ALGORITHM, NOT_DIAGNOSTIC = "Brain MRI classifier", "not for diagnosis"
SCHEME = "99BRAINMRI"  # of codes that no standard has; the others are of SNOMED CT
FIGURES = {"probability": "Tumor probability", "low": "No tumor below", "high": "Tumor from"}
TYPES = {
    "glioma": ("393564001", "SCT", "Glioma"),
    "meningioma": ("302820008", "SCT", "Intracranial meningioma"),
    "pituitary": ("127024001", "SCT", "Neoplasm of pituitary gland"),
}


def has_network() -> bool:
    """Whether the libraries are installed that receive, write and send DICOM objects."""
    return all(map(importlib.util.find_spec, ("highdicom", "pynetdicom")))


@quiet()
def dicom_objects(folder: pathlib.Path, result: dict, card: dict) -> dict[str, bytes]:
    """What a PACS can file of a result whose identifiers were kept, as files by name.

    For each study a report (DICOM SR, TID 1500) and a series of heatmaps of the slices that carry
    its answer. The same scans and model give the same UIDs.
    """
    from pydicom.uid import generate_uid

    entries, studies, objects = result["scans"], {}, {}
    for path in folder.glob("*/identifiers.json") if result["status"] == "done" else ():
        n = int(path.parent.name)
        studies.setdefault(entries[n]["study"], {})[n] = source_of(read_kept(path, identifiers_in))
    for study, sources in studies.items():
        seed = sorted(f"{s.SOPInstanceUID} {s.known['frame']}" for s in sources.values())
        seed.insert(0, result["model"]["sha256"])
        answers = []  # each with the scans that carry it
        for found, places in series_of(result):
            each = [(found, found["highest"])] if found else [(entries[n], [n]) for n in places]
            if entries[places[0]]["study"] == study:
                answers += [(one, [n for n in of if n in sources]) for one, of in each]
        shown = sorted({n for _, of in answers for n in of if entries[n]["heatmap"]})
        for number, n in reversed([*enumerate([None, *shown])]):  # the report last, since it
            title = "Heatmaps" if number else "Report"
            uids = [generate_uid(entropy_srcs=[*seed, title, str(n)]) for n in ("series", number)]
            place = dict(zip(("series_instance_uid", "sop_instance_uid"), uids))
            place |= {"series_number": 9002 if number else 9001, "instance_number": number or 1}
            place |= {"manufacturer": ALGORITHM, "software_versions": seed[0]}
            place |= {"series_description": f"{title}, {NOT_DIAGNOSTIC}"}
            place |= {"specific_character_set": "ISO_IR 192"}
            if number:
                heatmap = drawn_heatmap(folder / str(n), entries[n])
                dataset = secondary_capture(heatmap, sources[n], place)
            else:
                dataset = report_of(answers, sources, card, place)
            known = next(iter(sources.values())).known
            dataset.update({key: known[key] for key in IDENTIFIERS})  # shares its sources' elements
            dataset.save_as(file := io.BytesIO(), enforce_file_format=True)
            objects[f"heatmap_{n}.dcm" if number else f"report_{study}.dcm"] = file.getvalue()
    return objects


def identifiers_in(data):
    """What read_dicom() told of an object, from the bytes of its identifiers.json."""
    known = json.loads(data)
    return {key: known[key] for key in (*IDENTIFIERS, *SOURCE, "frame")}


def source_of(known):
    """The header of a scan whose identifiers are `known`."""
    from highdicom.sr import SourceImageForMeasurementGroup
    from pydicom import Dataset

    source = Dataset()
    source.known = known
    source.update(known | dict.fromkeys(IDENTIFIERS, ""))  # libraries check these
    source.StudyInstanceUID = known["StudyInstanceUID"]
    frames = known["frame"] and [known["frame"]]
    image = source.SOPClassUID, source.SOPInstanceUID, frames
    source.image = SourceImageForMeasurementGroup(*image)
    return source


def report_of(answers: list[tuple], sources: dict, card: dict, place: dict):
    """The answers of a study, each with the numbers of the scans that carry it, as a DICOM SR."""
    from highdicom import sr
    from pydicom import uid
    from pydicom.sr.codedict import codes

    model = f"model.keras sha256 {place['software_versions']}"
    algorithm = sr.AlgorithmIdentification(ALGORITHM, card["created"], [model, NOT_DIAGNOSTIC])
    presence = {"tumor": codes.SCT.Present, NO_TUMOR: codes.SCT.Absent}
    groups = []
    for one, numbers in answers:
        name, rule = f"series {one['series']}", card["thresholds"]
        if "highest" in one:
            rule = rule | (card.get("study") or {})
        else:
            reason = f": {one['reason']}" if one["reason"] else ""
            name += f", slice {one['slice'] + 1}{reason}"
        values = one["tumor_probability"], rule["low"], rule["high"]
        found = presence.get(one["verdict"], codes.SCT.Undetermined)
        said = [(sr.CodedConcept("705057003", "SCT", "Presence"), found)]
        if (label := one["label"]) not in (None, NO_TUMOR):
            kind = TYPES.get(label, (label[:16], SCHEME, label[:64]))
            type_of = sr.CodedConcept("type", SCHEME, "Most probable type")
            said.append((type_of, sr.CodedConcept(*kind)))
        tracking = uid.generate_uid(entropy_srcs=[place["sop_instance_uid"], name])
        group = sr.MeasurementsAndQualitativeEvaluations(
            sr.TrackingIdentifier(tracking, name),
            finding_type=codes.SCT.Neoplasm,
            finding_sites=[sr.FindingSite(codes.SCT.Brain)],
            algorithm_id=algorithm,
            measurements=[
                sr.Measurement(sr.CodedConcept(code, SCHEME, meaning), value, codes.UCUM.NoUnits)
                for (code, meaning), value in zip(FIGURES.items(), values)
                if value is not None
            ],
            qualitative_evaluations=[sr.QualitativeEvaluation(*pair) for pair in said],
            source_images=[sources[n].image for n in numbers],
        )
        groups.append(group)
    device = uid.generate_uid(entropy_srcs=[model])
    device = sr.DeviceObserverIdentifyingAttributes(device, ALGORITHM)
    observer = sr.ObserverContext(codes.DCM.Device, device)
    context = sr.ObservationContext(observer_device_context=observer)
    procedure, title = codes.LN.MRIUnspecifiedBodyRegion, codes.DCM.ImagingMeasurementReport
    content = sr.MeasurementReport(context, procedure, groups, title)
    return sr.ComprehensiveSR([*sources.values()], content, is_complete=True, **place)


def secondary_capture(picture: Image.Image, source, place: dict):
    """A heatmap of the scan whose header `source` is as a DICOM SC, marked in the picture."""
    from highdicom.sc import SCImage

    scale = -(-256 // picture.width)
    picture = picture.resize((picture.width * scale, picture.height * scale))
    style = {"anchor": "ld", "font_size": picture.width / 18, "stroke_width": 2}
    style |= {"fill": "white", "stroke_fill": "black"}
    ImageDraw.Draw(picture).text((6, picture.height - 6), NOT_DIAGNOSTIC, **style)
    kind = "RGB", 8, "PATIENT"
    place = place | {"patient_orientation": ("L", "P")}  # which is not known, and taken out
    dataset = SCImage.from_ref_dataset(source, np.asarray(picture), *kind, **place)
    dataset.PatientOrientation, dataset.BodyPartExamined = "", "BRAIN"
    dataset.FrameOfReferenceUID = source.FrameOfReferenceUID
    dataset.SourceImageSequence = source.image.ReferencedSOPSequence
    return dataset


# --------------------------------------------------------------------- the network node

network = Blueprint("network", __name__, cli_group=None)
MR = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # and Enhanced MR
UIDS = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"]
LOOKED_AT = 2**22  # bytes of an object in which its UIDs are looked for
LEAST_FREE = 2**28  # bytes of the disk that are left to results
OUT_OF_RESOURCES, UNREADABLE, UNSUPPORTED = 0xA700, 0xC000, 0x0122
PEER = re.compile(r"([^@]{1,16})@(.+):(\d{1,5})")
LONGEST_WAIT = 600  # seconds between two tries to send


def hashed(text: str) -> str:
    """A UID or an address as the name of a file."""
    return hashlib.sha256(text.encode()).hexdigest()


class Node:
    """What comes over the network and what goes back, on disk until it is done with.

    An object arrives in `arriving` and goes on to its study in `coming`: a folder that is named by
    a hash, after the ID of its result once the study has come whole. For each of `peers`,
    TITLE@HOST:PORT or a URL, there is a folder of results that are still to be sent.
    """

    def __init__(self, app: Flask, name: str, peers: Iterable[str] = (), title: str = ""):
        """Begin to answer and to send, once the other processes of this name have ended."""
        self.app, self.title, self.pause = app, title, app.config["STUDY_PAUSE"]
        self.lock, self.sending = threading.Lock(), {}  # which studies an association sends
        self.folder = app.uploads / ".network" / name
        self.arriving, self.coming = self.folder / "arriving", self.folder / "coming"
        self.peers = {peer: self.folder / hashed(peer) for peer in peers if peer}
        for folder in (self.arriving, self.coming, *self.peers.values()):
            folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self.work, name="network", daemon=True).start()

    def keep(self, path: pathlib.Path, association=None) -> tuple:
        """Put an object that has arrived to its study; (DIMSE status, 0 if it was kept; UIDs)."""
        from pydicom import Dataset, dcmread

        head = Dataset()
        try:
            with open(path, "rb") as file:
                start = CountedReads(inflated(file.read(LOOKED_AT), LOOKED_AT))
            head = dcmread(start, stop_before_pixels=True, specific_tags=UIDS)
            folder = self.coming / hashed(head.StudyInstanceUID)
            kept = folder / hashed(head.SOPInstanceUID)
            if head.SOPClassUID not in MR:
                return UNSUPPORTED, head
            if shutil.disk_usage(self.folder).free < LEAST_FREE:
                return OUT_OF_RESOURCES, head
            with self.lock:
                self.sending.setdefault(association, set()).add(folder)
                folder.mkdir(exist_ok=True)
                path.replace(kept)
            return 0, head
        except OSError:
            return OUT_OF_RESOURCES, head
        except Exception:  # as above
            return UNREADABLE, head

    def work(self) -> None:
        """Answer the studies that have come whole, and those that a stopped server has left."""
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for folder in self.coming.iterdir():
                os.utime(folder)  # what was cut short by the stop may be sent again
            for peer in self.peers:
                threading.Thread(target=self.send, args=(peer,), daemon=True).start()
            while True:
                for folder in list(self.coming.glob("*")):
                    try:
                        if study := self.whole(folder):
                            self.answer(study)
                    except Exception:  # the disk, say
                        LOG.exception("a study waits")
                        time.sleep(HEARTBEAT)
                for path in self.arriving.rglob("*.dcm"):
                    with contextlib.suppress(FileNotFoundError):
                        if is_old(path, 1 / 6):  # it came in part
                            path.unlink()
                time.sleep(min(1, self.pause / 4))

    def whole(self, folder: pathlib.Path) -> pathlib.Path | None:
        """The folder of a study under its ID, if it has come whole and there is room to answer."""
        with self.lock:
            self.sending = {one: of for one, of in self.sending.items() if one and one.is_alive()}
            waits = folder in set().union(*self.sending.values()) or "." in folder.name
            if not waits and is_old(folder, self.pause / 3600):
                name = f"{secrets.token_urlsafe(16)}.{folder.name}"
                folder = folder.rename(folder.with_name(name))
        room = shutil.disk_usage(folder).free >= LEAST_FREE
        return folder if room and "." in folder.name else None

    def answer(self, study: pathlib.Path) -> None:
        """Answer a study as if it were an upload, and queue what goes back."""
        app, (upload_id, uid) = self.app, study.name.split(".")
        shutil.rmtree(folder := app.uploads / upload_id, ignore_errors=True)  # of a stopped server
        files, scans, skipped, error = sorted(study.iterdir()), [], [], None
        sent = sum(path.stat().st_size for path in files)
        named = ((f"{n}.dcm", path.read_bytes()) for n, path in enumerate(files, 1))
        try:
            with app.jobs.reading:
                scans, skipped = read_upload(named, app.limits, None, True, sent)
        except UnreadableScan as refusal:
            error = str(refusal)
        result = new_result(app.classifier.summary, scans, skipped) | {"id": upload_id}
        folder.mkdir()
        write_result(folder, result)
        (folder / f"study.{uid}").touch()
        if error:
            end_early(folder, result, "failed", error=error)
        else:
            app.jobs.unfinished.add(folder)
            app.jobs.finish(folder, result, scans, self.queue)
        audit("study", id=upload_id, status=result["status"], files=len(files), bytes=sent)
        shutil.rmtree(study)

    def queue(self, folder: pathlib.Path, result: dict) -> None:
        """Queue the objects of a result for each peer; no identifier stays with the result."""
        objects = dicom_objects(folder, result, self.app.classifier.card) if self.peers else {}
        for queued in self.peers.values():
            partial, whole = self.arriving / result["id"], queued / result["id"]
            if objects and not whole.exists():
                partial.mkdir(exist_ok=True)
                for name, data in objects.items():
                    (partial / name).write_bytes(data)
                partial.rename(whole)
        for path in folder.glob("*/identifiers.json"):
            path.unlink()

    def send(self, peer: str) -> None:
        """Send a peer what is queued for it, for ever, with growing waits while that fails."""
        wait = 1
        while True:
            for folder in sorted(self.peers[peer].glob("*"), key=os.path.getmtime):
                try:
                    for path in sorted(folder.iterdir()):
                        if "://" in peer:
                            stow(peer, path)
                        else:
                            c_store(peer, path, self.title)
                        path.unlink()
                    folder.rmdir()
                    wait = 1
                except Exception as error:  # the libraries' own as well
                    wait = min(2 * wait, LONGEST_WAIT)
                    what = f"a result waits for {peer.rpartition('@')[2]}, {wait} seconds"
                    LOG.warning("%s: %s", what, error)
                    with contextlib.suppress(OSError):
                        os.utime(folder)  # the others have their turn first
                    break
            time.sleep(wait)


def c_store(peer: str, path: pathlib.Path, title: str) -> None:
    """Send an object to TITLE@HOST:PORT by C-STORE; raises what goes wrong."""
    from pydicom import dcmread
    from pynetdicom import AE

    (called, host, port), dataset, entity = PEER.fullmatch(peer).groups(), dcmread(path), AE(title)
    entity.add_requested_context(dataset.SOPClassUID)
    association = entity.associate(host, int(port), ae_title=called)
    if not association.is_established:
        raise ConnectionError("it accepts no association for this")
    status = association.send_c_store(dataset).get("Status")
    association.release()
    if status not in (0, 0xB000, 0xB006, 0xB007):  # the last three with a warning
        raise ConnectionError(f"it answered with status {status}")


def stow(url: str, path: pathlib.Path) -> None:
    """Send an object by STOW-RS to a URL, in which name and password may be; raises the same."""
    parts, boundary = urllib.parse.urlsplit(url), secrets.token_hex(16)
    kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
    headers = {"Content-Type": kind, "Accept": "application/dicom+json"}
    if parts.username:
        known = urllib.parse.unquote(parts.netloc.rpartition("@")[0])
        headers["Authorization"] = f"Basic {base64.b64encode(known.encode()).decode()}"
    start = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    body = start + path.read_bytes() + f"\r\n--{boundary}--".encode()
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    sent = urllib.request.Request(f"{address}/studies", body, headers)
    with urllib.request.urlopen(sent, timeout=60) as response:
        if response.status != 200:
            raise ConnectionError(f"it answered with status {response.status}")


@network.before_app_request
def go_on() -> None:
    """Answer and send what a stopped server has left."""
    if (current_app.uploads / ".network" / "stow").exists():
        current_app.stow()


@network.post("/dicomweb/studies")
def store_instances() -> Response:
    """Take DICOM objects by STOW-RS; each study is answered once it has come whole."""
    from pydicom import Dataset

    boundary, items = request.mimetype_params.get("boundary"), {}
    if not has_network():
        abort(501, NO_NETWORK)
    if request.mimetype != "multipart/related" or not boundary:
        abort(415, "DICOM objects are taken here as multipart/related, type application/dicom.")
    node, most = current_app.stow(), current_app.config["MAX_FORM_PARTS"]
    with current_app.jobs.reserve(1), tempfile.TemporaryDirectory(dir=node.arriving) as folder:

        def new_file(**_):
            return tempfile.NamedTemporaryFile(dir=folder, suffix=".dcm", delete=False)

        parser = formparser.MultiPartParser(new_file, max_form_parts=most)
        try:
            parts = parser.parse(request.stream, boundary.encode(), request.content_length)[1]
        except ValueError:
            abort(400, "The request is not the multipart/related that it says it is.")
        for part in parts.getlist("object"):
            part.close()
            status, head = node.keep(pathlib.Path(part.stream.name))
            item, key = Dataset(), "FailedSOPSequence" if status else "ReferencedSOPSequence"
            item.update({f"Referenced{uid}": head.get(uid, "") for uid in UIDS[:2]})
            item.update({"FailureReason": status} if status else {})
            items.setdefault(key, []).append(item)
    told = Dataset()
    told.update(items)
    status = 200 if "FailedSOPSequence" not in items else 409 if len(items) == 1 else 202
    return Response(told.to_json(), status, mimetype="application/dicom+json")


@network.get("/dicomweb/studies/<study>/results")
def study_results(study: str) -> Response:
    """The page of the last result of a study that came over the network."""
    found = current_app.uploads.glob(f"*/study.{hashed(study)}")
    last = max(found, key=os.path.getmtime, default=None)
    if not last:
        abort(404, "This study has not come whole yet, or its result has been removed.")
    return redirect(current_app.url_for("pages.result_page", upload_id=last.parent.name), 303)


@network.cli.command("listen")
@click.option("--host", default="0.0.0.0", show_default=True)
@click.option("--port", default=11112, show_default=True)
@click.option("--aet", default="BRAINMRI", show_default=True, help="The title of this node.")
@click.option("--peer", "peers", multiple=True, help="TITLE@HOST:PORT to send results to.")
def listen_command(host: str, port: int, aet: str, peers: tuple) -> None:
    """Receive studies as a DICOM node, and send a report and heatmaps of each to the peers."""
    if not has_network():
        raise click.ClickException(NO_NETWORK)
    from pydicom import uid
    from pynetdicom import AE, _config, evt, sop_class

    for peer in peers:
        if not PEER.fullmatch(peer):
            raise click.ClickException(f"--peer {peer} has to be TITLE@HOST:PORT.")
    config, entity = current_app.config, AE(aet)
    entity.maximum_pdu_size = 2**17
    entity.require_called_aet = True
    entity.require_calling_aet = [*filter(None, map(str.strip, config["PEERS"].split(",")))]
    entity.add_supported_context(sop_class.Verification)
    syntaxes = uid.UncompressedTransferSyntaxes + uid.JPEGTransferSyntaxes
    syntaxes += uid.JPEGLSTransferSyntaxes + uid.JPEG2000TransferSyntaxes[:2]
    for kind in MR:
        entity.add_supported_context(kind, syntaxes + uid.RLETransferSyntaxes)
    node = Node(current_app._get_current_object(), str(port), (*peers, config["DICOMWEB"]), aet)
    _config.STORE_RECV_CHUNKED_DATASET, tempfile.tempdir = True, str(node.arriving)

    def store(event):
        return node.keep(event.dataset_path, event.assoc)[0]

    try:
        entity.start_server((host, port), False, evt_handlers=[(evt.EVT_C_STORE, store)])
    except OSError as error:
        where = f"port {port} of {host}"
        raise click.ClickException(f"No node can listen on {where}: {error.strerror}.") from None
    click.echo(f"{aet} listens on port {port} of {host}.")
    threading.Event().wait()


# --------------------------------------------------------------------------------- pages

pages = Blueprint("pages", __name__, cli_group=None)
ROWS = 50  # of the table on one page
ENDING = re.compile(r"(\.nii)?\.(jpe?g|png|webp|bmp|tiff?|dcm|ima|nii|gz|zip)$|$", re.I)


class TolerantDecoder(formparser.MultipartDecoder):
    """Reads file names that are not UTF-8 as well, and parts of multipart/related without one."""

    def _parse_headers(self, data):
        headers = super()._parse_headers(bytes(data).decode(errors="replace").encode())
        headers.setdefault("Content-Disposition", 'form-data; name="object"; filename="object"')
        return headers


formparser.MultipartDecoder = TolerantDecoder


@pages.route("/", methods=["GET", "POST"])
def index() -> str | Response:
    """The form; what it sends is answered, and the page of the result comes next."""
    if request.method == "POST":
        url = current_app.url_for(".result_page", upload_id=handle_upload()["id"])
        return redirect(url, 303)
    return render_template("index.html")


@pages.post("/upload")
def upload() -> tuple[dict, int]:
    """The same for programs, in JSON."""
    result = addressed(handle_upload())
    return result, 202 if result["status"] == "running" else 200


def handle_upload() -> dict:
    """Read, classify and store the files of this request; returns the result so far."""
    start, (files, plane) = time.monotonic(), submitted_files()
    jobs, config = current_app.jobs, current_app.config
    asked = len(files) if len(files) <= config["MAX_AT_ONCE"] else 1  # a study has its own queue
    with jobs.reserve(asked):
        named = [(file.filename, file.read()) for file in files]
        identifiers = bool(request.form.get("identifiers"))
        if identifiers and not has_network():
            abort(501, NO_NETWORK)
        try:
            with jobs.reading:
                scans, skipped = read_upload(named, current_app.limits, plane, identifiers)
        except UnreadableScan as error:
            abort(error.status, str(error))
        if not config["KEEP_NAMES"]:
            scans, skipped = without_names(scans, skipped)
        result = new_result(current_app.classifier.summary, scans, skipped)
        folder = current_app.uploads / result["id"]
        status = 202 if len(scans) > config["MAX_AT_ONCE"] else 200
        if status == 202:
            jobs.start(folder, result | {"scans": []}, scans)
        else:
            with jobs.reserve(len(scans) - asked, force=True):
                try:
                    folder.mkdir(parents=True)  # the folder of uploads may have vanished
                    answer(current_app.classifier, folder, result, scans)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
    facts = {"files": len(files), "scans": len(scans), "skipped": len(skipped)}
    facts["bytes"] = sum(len(data) for _, data in named)
    audit("upload", start, id=result["id"], status=status, **facts)
    return result


def addressed(result: dict) -> dict:
    """The same with the addresses of pictures below the path under which a proxy has this app."""
    for scan in result["scans"]:
        scan |= {key: scan[key] and request.root_path + scan[key] for key in ("scan", "heatmap")}
    return result


def submitted_files() -> tuple[list, str | None]:
    """(files, plane) of this request; 400 or 413 if they cannot be taken."""
    config = current_app.config
    try:
        files = [file for file in request.files.getlist("file") if file.filename]
        plane = request.form.get("plane") or None
    except exceptions.RequestEntityTooLarge:
        allowed = f"larger than the {config['MAX_CONTENT_LENGTH'] // 2**20} MB allowed"
        abort(413, f"The upload is {allowed}; zip the folder, or send fewer or smaller files.")
    if not files:
        abort(400, "No file was chosen; choose a scan and send it again.")
    if len(files) > (most := config["MAX_FILES"]):
        abort(400, f"{len(files)} files were sent, but at most {most} are read at once.")
    if plane not in (None, "all", *PLANES):
        abort(400, f"The plane has to be {', '.join(PLANES)} or all.")
    return files, plane


def without_names(scans: list[Scan], skipped: list[Skipped]) -> tuple[list[Scan], list[Skipped]]:
    """The same with the files called "scan 1.jpg", "scan 2.jpg", …, wherever names stay."""
    new = {}
    for old in (item.file for item in (*scans, *skipped)):
        new.setdefault(old, f"scan {len(new) + 1}{ENDING.search(old)[0]}")
    longest_first = sorted(map(re.escape, new), key=len, reverse=True)
    known = re.compile(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)")
    return [replace(scan, file=new[scan.file]) for scan in scans], [
        item._replace(file=new[item.file], reason=known.sub(lambda m: new[m[0]], item.reason))
        for item in skipped
    ]


def result_folder(upload_id: str) -> pathlib.Path:
    """The folder of a result; 404 if there is none, or if it is too old to be served."""
    folder, hours = current_app.uploads / upload_id, current_app.config["RETENTION_HOURS"]
    known = ID.fullmatch(upload_id) and (folder / "result.json").is_file()
    if not known or is_old(folder, hours):
        abort(404, GONE)
    return folder


@pages.get("/results/<upload_id>.json", endpoint="result_json")
def load_result(upload_id: str) -> dict:
    """A result, or 404; one that shows no sign of life any more has failed."""
    folder = result_folder(upload_id)
    result = read_result(folder)
    if result["status"] == "running" and is_old(folder / "result.json", SILENCE / 3600):
        error = "The server stopped while reading this study; send it again."
        result |= {"status": "failed", "error": error}
    return addressed(result)


def load_scan(upload_id: str, n: int) -> tuple[dict, dict]:
    """(result, its entry of scan n), or 404."""
    result = load_result(upload_id)
    if n >= len(result["scans"]):
        abort(404, "There is no such scan in this result.")
    return result, result["scans"][n]


@pages.get("/results/<upload_id>")
def result_page(upload_id: str) -> str:
    """The answer for people: one scan, or series of them with a table, ROWS at a time."""
    result = load_result(upload_id)
    if result["status"] == "done" and len(result["scans"]) == 1:
        return render_scan(result, 0)
    scans, page = list(enumerate(result["scans"])), request.args.get("page", 1, int)
    if request.args.get("order") != "slice":
        scans.sort(key=lambda numbered: -(numbered[1]["tumor_probability"] or 0))
    known = {"result": result, "card": current_app.classifier.card, "series": series_of(result)}
    known |= {"first": scans[:1], "pages": -(-len(scans) // ROWS), "page": page}
    known["rows"] = scans[max(0, page - 1) * ROWS :][:ROWS]
    return render_template("results.html", **known, example=screening_example(known["card"], True))


@pages.get("/results/<upload_id>/<int:n>")
def scan_page(upload_id: str, n: int) -> str:
    """The answer for scan n of a result."""
    return render_scan(load_scan(upload_id, n)[0], n)


def render_scan(result: dict, n: int) -> str:
    """The page of scan n of a result."""
    card = current_app.classifier.card
    known = {"result": result, "scan": result["scans"][n], "n": n, "card": card}
    return render_template("result.html", **known, example=screening_example(card))


def screening_example(card: dict, study: bool = False) -> dict | None:
    """What the verdicts mean where 10 of 1,000 people have a tumor; None where not measured."""
    group, normals = ("Whole volumes", "healthy") if study else ("Other hospitals", "normals")
    figures = card["figures"].get(group, {})
    wrong = ("tumors answered “no tumor”", f"{normals} answered “tumor”")
    if not all(name in figures for name in wrong):
        return None
    missed, alarmed = (figures[name]["value"] for name in wrong)
    return {"people": 1000, "ill": 10, "missed": 10 * missed, "alarmed": 990 * alarmed}


@pages.get("/results/<upload_id>.csv")
def result_csv(upload_id: str) -> Response:
    """The answer as a table, one row per scan, then one per file or slice that was skipped."""
    headers = {"Content-Disposition": f"attachment; filename={upload_id}.csv"}
    return Response(csv_of(load_result(upload_id)), mimetype="text/csv", headers=headers)


@pages.get("/results/<upload_id>.zip")
def result_zip(upload_id: str) -> Response:
    """Everything at once: CSV, JSON, and the heatmaps of the scans that show evidence."""
    result, folder = load_result(upload_id), result_folder(upload_id)
    with contextlib.ExitStack() as failing:
        file = failing.enter_context(tempfile.TemporaryFile())
        archive = failing.enter_context(zipfile.ZipFile(file, "w"))
        archive.writestr("result.json", current_app.json.dumps(result))
        archive.writestr("result.csv", csv_of(result))
        for n, entry in enumerate(result["scans"]):
            if entry["verdict"] in ("tumor", "uncertain"):
                heatmap = drawn_heatmap(folder / str(n), entry)
                archive.writestr(f"heatmap_{n}.png", png_of(heatmap))
        for name, data in dicom_objects(folder, result, current_app.classifier.card).items():
            archive.writestr(f"dicom/{name}", data)
        archive.close()
        failing.pop_all()  # the response closes the file
    file.seek(0)
    return utils.send_file(file, request.environ, "application/zip", True, f"{upload_id}.zip")


@pages.get("/results/<upload_id>/<int:n>/<any(scan, thumbnail, heatmap, heat):name>.png")
def scan_png(upload_id: str, n: int, name: str) -> Response:
    """The scan as it was read; a thumbnail of it; the heat over it, or alone to be laid over it."""
    folder = result_folder(upload_id) / str(n)
    if name == "scan":
        return Response(kept_png(folder), mimetype="image/png")
    if name == "thumbnail":
        drawn = kept_picture(folder)
        drawn.thumbnail((96, 96), Image.Resampling.BILINEAR)
    elif name == "heat":  # also where the answer is no tumor
        drawn = heat_of(folder, kept_picture(folder), load_scan(upload_id, n)[1]["crop"])
    else:
        drawn = drawn_heatmap(folder, load_scan(upload_id, n)[1], "evidence" in request.args)
    return Response(png_of(drawn), mimetype="image/png")


@pages.post("/results/<upload_id>/<int:n>/label")
def correct(upload_id: str, n: int) -> Response:
    """Keep scan n with the label that its reader gives it, where the server keeps such."""
    folder, label = current_app.config["CORRECTIONS"], request.form.get("label")
    if not folder:
        abort(404, "This server keeps no corrections.")
    labels = (*current_app.classifier.labels, "tumor")
    if label not in labels:
        abort(400, f"The label has to be one of {', '.join(labels)}.")
    study = load_scan(upload_id, n)[1]["study"]
    scan = kept_png(result_folder(upload_id) / str(n))
    patient = hashlib.sha256(f"{upload_id} {study or n}".encode()).hexdigest()[:16]  # in one part
    keep_correction(pathlib.Path(folder), scan, label, patient)
    audit("correction", id=upload_id, scan=n, label=label)
    return redirect(current_app.url_for(".scan_page", upload_id=upload_id, n=n, kept=label), 303)


@pages.post("/results/<upload_id>/cancel")
def cancel(upload_id: str) -> Response:
    """Stop an upload that is being answered, by whichever server; nothing of it is kept."""
    if load_result(upload_id)["status"] == "running":
        (result_folder(upload_id) / "cancel").touch()
    return redirect(current_app.url_for(".result_page", upload_id=upload_id), 303)


@pages.post("/results/<upload_id>/delete")
def delete(upload_id: str) -> Response:
    """Remove an upload at once, also while it is being answered."""
    shutil.rmtree(result_folder(upload_id).rename(current_app.uploads / f".{upload_id}"))
    audit("deletion", id=upload_id, why="asked for")
    return redirect(current_app.url_for(".index", deleted=1), 303)


@pages.get("/model")
def model_page() -> str:
    """What the model was trained on and how well it did."""
    folder, classifier = current_app.config["CORRECTIONS"], current_app.classifier
    kept = read_corrections(pathlib.Path(folder)) if folder else []
    known = {"groups": figure_groups(classifier.card["figures"]), "model": classifier.summary}
    known |= {"card": classifier.card, "corrections": Counter(row["label"] for row in kept)}
    return render_template("model.html", **known)


def figure_groups(figures: dict) -> list[tuple[str, dict, dict, list]]:
    """A card's figures as (title, own figures, {part: its figures}, columns of the parts).

    "Other hospitals, utsw_glioma" is a part of "Other hospitals"; so is each family left out.
    """
    groups = {}
    for title, table in figures.items():
        group, _, part = title.partition(", ")
        if group not in groups:
            group, part = title, ""
        parts = groups.setdefault(group, {"": {}})
        for name, figure in table.items():
            family, measure = part, name
            if title.startswith("One family left out"):
                family, _, measure = name.rpartition(", ")
            parts.setdefault(family, {})[measure] = figure
    return [
        (title, parts.pop(""), parts, [*dict.fromkeys(chain(*parts.values()))])
        for title, parts in groups.items()
    ]


@pages.get("/healthz")
def healthz() -> dict:
    """200 once an upload can be answered and kept, else 503."""
    if not os.access(current_app.uploads, os.W_OK):
        abort(503, "The uploads folder cannot be written.")
    return {"status": "ok", "model": current_app.classifier.sha256}


@pages.get("/openapi.json")
def openapi() -> dict:
    """What every address takes and answers, for programs."""
    return json.loads(OPENAPI.read_text()) | {"servers": [{"url": request.root_path or "/"}]}


# -------------------------------------------------------------------- errors and headers

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # "none" would hide the origin of our own forms
    "Cross-Origin-Resource-Policy": "same-origin",
}


@pages.app_errorhandler(exceptions.HTTPException)
def show_error(error: exceptions.HTTPException) -> Response:
    """Any HTTP error as one sentence: JSON for programs, the form again or a page for people."""
    if request.method == "POST" and request.path in ("/", "/upload"):
        audit("upload", id=None, status=error.code)
    response, fault = error.get_response(), "Something went wrong on the server; the log has it."
    sentence = fault if getattr(error, "original_exception", None) else error.description
    kind = request.accept_mimetypes.best_match(("text/html", "application/json"))
    for_programs = request.path.endswith((".json", "/upload", "/healthz"))
    if for_programs or request.path.startswith("/dicomweb/") or kind == "application/json":
        response.data, response.mimetype = json.dumps({"error": sentence}), "application/json"
    else:
        template = "index.html" if request.path == "/" else "error.html"
        response.data = render_template(template, error=sentence, status=error.code)
    return response


@pages.app_errorhandler(JsonSchemaException)
@pages.app_errorhandler(OSError)
def show_storage_error(error: OSError | JsonSchemaException) -> Response:
    """The disk is full, read-only or away, or what it holds of a result is removed or damaged."""
    asked = (request.view_args or {}).get("upload_id")
    if isinstance(error, FileNotFoundError) and asked:
        return show_error(exceptions.NotFound(GONE))
    current_app.logger.error("a result of %s cannot be kept or read: %s", request.path, error)
    if isinstance(error, Damaged):
        with contextlib.suppress(OSError):
            (current_app.uploads / asked / "damaged").touch()  # for sweep()
    if isinstance(error, Damaged | JsonSchemaException):
        kept = "What is kept of this result is damaged, or was written by another version"
        return show_error(exceptions.Gone(f"{kept}; send the scans again."))
    if request.method != "POST":
        sentence = "The server's disk fails at the moment; try again later."
        return show_error(exceptions.InternalServerError(sentence))
    sentence = "The server cannot keep results at the moment; try again later."
    return show_error(exceptions.ServiceUnavailable(sentence, retry_after=60))


@pages.after_app_request
def add_headers(response: Response) -> Response:
    """HEADERS: own resources only, no sniffing; no caching but of static files; CORS as set."""
    response.headers.update(HEADERS)
    if request.endpoint != "static":
        response.headers["Cache-Control"] = "no-store"
    if request.path == "/upload":
        response.headers["Vary"] = "Origin"
        if request.origin in current_app.origins:
            response.headers["Access-Control-Allow-Origin"] = request.origin
            response.headers["Access-Control-Allow-Headers"] = "Authorization"
            response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    return response


@pages.before_app_request
def ask_for_password() -> None:
    """401 without the password of this server, where it has one; any user name will do."""
    password = current_app.config["PASSWORD"]
    if not password or request.path == "/healthz" or request.method == "OPTIONS":
        return  # browsers send no password ahead of a request of another origin
    sent = getattr(request.authorization, "password", None) or ""
    if not hmac.compare_digest(sent.encode(), password.encode(errors="surrogateescape")):
        challenge = WWWAuthenticate("basic", {"realm": "Brain MRI", "charset": "UTF-8"})
        sentence = "This server asks for its password, by HTTP Basic with any user name."
        raise exceptions.Unauthorized(sentence, www_authenticate=challenge)


@pages.before_app_request
def refuse_other_sites() -> None:
    """403 for what another site's page makes a browser send, by Fetch Metadata or the origin."""
    allowed = request.path == "/upload" and request.origin in current_app.origins
    if allowed or request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site = request.headers.get("Sec-Fetch-Site")
    forwarded = request.headers.get("X-Forwarded-Host", "")  # no page can make a browser send it
    hosts = {request.host, *map(str.strip, forwarded.split(","))} - {""}
    same_host = request.origin is None or request.origin.partition("://")[2] in hosts
    if site not in (None, "same-origin", "none") or site is None and not same_host:
        advice = "open the form here and try again; a proxy has to pass X-Forwarded-Host on"
        abort(403, f"The request came from a page of another site than {request.host}; {advice}.")


# ------------------------------------------------------------------------------- command

FILES_PER_TASK = 8  # a task costs a few milliseconds of its own
AHEAD = 3  # tasks per worker sent ahead, so that none waits; more would only take memory


@pages.cli.command("classify")
@click.argument("paths", nargs=-1, required=True, type=click.Path(True, path_type=pathlib.Path))
@click.option("--out", type=click.Path(path_type=pathlib.Path), help="A .csv or .parquet to fill.")
@click.option("--scheduler", help="tcp://host:port of a Dask cluster; else this machine's cores.")
def classify_command(paths: tuple, out: pathlib.Path | None, scheduler: str | None) -> None:
    """Classify the scans in PATHS: files, folders, ZIPs, of every format that the app reads.

    Prints CSV, or fills OUT, one row per slice, and resumes after an interruption; also writes
    OUT.studies.csv, one row per series of a study. Nothing else is kept.
    """
    files = [file for path in paths for file in files_under(path)]
    classifier, limits = current_app.classifier, current_app.limits
    columns = ["path", "slices", *csv_columns(classifier.labels), "error"]
    if out is None:
        rows = (rows_of_file(file, classifier, limits) for file in files)
        write_csv(sys.stdout, columns, chain.from_iterable(rows))
        return
    if out.suffix not in (".csv", ".parquet"):
        raise click.BadParameter(f"{out} has to end in .csv or .parquet.")
    journal = out.with_suffix(".journal.csv") if out.suffix == ".parquet" else out
    with cluster(scheduler) as client:
        fill(journal, files, columns, client, current_app.config["MODEL"], limits)
    write_studies(journal, out.with_suffix(".studies.csv"), classifier.card)
    if out.suffix == ".parquet":
        from pyarrow import csv as arrow_csv
        from pyarrow import parquet

        parquet.write_table(arrow_csv.read_csv(journal), out)
        journal.unlink()


def files_under(path: pathlib.Path) -> list[pathlib.Path]:
    """The files in a folder and its folders, hidden ones left out, in order; a file itself."""
    if path.is_file():
        return [path]
    inside = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in inside if not is_litter(file.relative_to(path).as_posix()))


def printable(path: pathlib.Path) -> str:
    """A path as text that can be written, also where its name is not UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def rows_of_file(path: pathlib.Path, classifier: Classifier, limits: Limits) -> list[dict]:
    """A row per slice of a file, or one that says why there is none: no file ends the work."""
    name, rows = printable(path), []
    try:
        scans, skipped = read_upload([(path.name, path.read_bytes())], limits)
        for scan in scans:
            names = {"study": name if scan.series else "", "series": scan.series}
            if scan.study_key:  # the same for every file of the study
                names = {"study": scan.study_key[:16], "series": scan.series_key[:16]}
            rows.append(scan_entry("", 0, scan, classifier.classify_one(scan)) | names)
        rows = list(csv_rows(rows, [item._asdict() for item in skipped]))
    except (UnreadableScan, OSError) as error:
        rows = [{"error": str(error)}]
    except Exception as error:
        kind = type(error).__name__
        rows = [{"error": f"{plain_name(name)} cannot be classified ({kind}); please report it."}]
    return [row | {"path": name, "slices": len(rows)} for row in rows]


worker_classifier = cache(Classifier)  # once per process, its network on one thread


def answer_files(paths: list[pathlib.Path], model: str, limits: Limits) -> list[list[dict]]:
    """The rows of each of some files, in a worker of a cluster."""
    return [rows_of_file(path, worker_classifier(model), limits) for path in paths]


def cluster(scheduler: str | None, workers: int | None = None) -> contextlib.AbstractContextManager:
    """A Dask client of a scheduler, or of a cluster of its own, by default one process per core."""
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise click.ClickException("--out needs Dask: pip install -r requirements.txt") from None

    if scheduler:
        return Client(scheduler)
    profiler = {"distributed.worker.profile.enabled": False}  # looks a hundred times a second
    patience = {"distributed.deploy.lost-worker-timeout": "1h"}  # a killed worker starts again
    dask.config.set(profiler | patience)
    processes = {"n_workers": workers or os.cpu_count()}
    processes["threads_per_worker"] = 2  # one reads a file while the network sees the other's
    any_port = {"dashboard_address": "127.0.0.1:0"}  # another cluster may have Dask's own
    calm = {"dashboard_address": None, "silence_logs": logging.ERROR}
    return Client(**processes, **calm, scheduler_kwargs=any_port)


def fill(
    journal: pathlib.Path, files: list, columns: list[str], client, model: str, limits: Limits
) -> None:
    """Append the rows of files that `journal` does not have yet, whole files at a time."""
    done = finished(journal, columns)
    files = [file for file in files if unformulated(printable(file)) not in done]
    with (
        open(journal, "a", encoding="utf-8", newline="") as file,
        tqdm(total=len(files), unit="file", mininterval=1) as bar,
    ):
        for rows in answered(files, client, model, limits):
            write_csv(file, columns, rows, header=False)
            file.flush()
            bar.update()


def answered(files: list, client, model: str, limits: Limits) -> Iterator[list[dict]]:
    """Yield the rows of each file as a cluster has them ready.

    Dask repeats the files of a worker that was killed on another one. Those that were there
    whenever one was killed are tried again at the end, each alone, to see which it is.
    """
    from distributed import KilledWorker, as_completed

    chunks = (files[n : n + FILES_PER_TASK] for n in range(0, len(files), FILES_PER_TASK))
    chunk_of, suspects = {}, []

    def submit(chunk):
        future = client.submit(answer_files, chunk, model, limits, pure=False)
        chunk_of[future] = chunk
        return future

    ahead = AHEAD * max(1, len(client.scheduler_info()["workers"]))
    running = as_completed(map(submit, islice(chunks, ahead)))
    for future in running:
        chunk, error = chunk_of.pop(future), future.exception()
        if isinstance(error, KilledWorker):
            suspects += chunk
        elif error:
            kind, needed = type(error).__name__, "with the repository on PYTHONPATH"
            workers = f"its scheduler and workers have to run this version, {needed}"
            raise click.ClickException(f"The cluster cannot do the work ({kind}); {workers}.")
        else:
            yield from future.result()
        running.update(map(submit, islice(chunks, 1)))
    for path in suspects:
        try:
            yield from submit([path]).result()
        except KilledWorker:
            name = printable(path)
            error = f"{plain_name(name)} crashes the worker that reads it."
            yield [{"path": name, "slices": 1, "error": error}]


def finished(journal: pathlib.Path, columns: list[str]) -> set[str]:
    """The paths whose rows `journal` has in full; all other rows are taken out of it."""
    rows = []
    if journal.exists():
        with open(journal, encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            if table.fieldnames not in (None, columns):
                advice = "move it away, or name another file"
                raise click.ClickException(f"{journal} has other columns; {advice}.")
            rows = [row for row in table if row["error"] is not None]  # the last column
    count = Counter(row["path"] for row in rows)
    rows = [row for row in rows if count[row["path"]] == int(row["slices"])]
    partial = journal.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        write_csv(file, columns, rows)
    partial.replace(journal)
    return {row["path"] for row in rows}


def write_studies(journal: pathlib.Path, path: pathlib.Path, card: dict) -> None:
    """A row for each series of each study in `journal`, by the card's rule."""
    entries = []
    with open(journal, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["study"]:
                entry = {key: row[key] for key in ("study", "series")}
                entry["tumor_probability"] = float(row["tumor_probability"] or "nan")
                entries.append(entry | {"crop": [float(n) for n in row["crop"].split()]})
    columns = ["study", "series", "slices", "rejected", "verdict", "risk", "tumor_probability"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        write_csv(file, columns, series_answers(entries, card))


# ----------------------------------------------------------------------------------- app


def create_app(overrides: dict | None = None) -> Flask:
    """The Flask app, its model loaded once; raises ModelError if that cannot serve."""
    app = Flask(__name__)
    app.json.sort_keys = False  # a result reads from its id to its model
    configure(app, overrides or {})
    config = app.config
    open_for_writing(config)
    app.limits = Limits(*(config[f"MAX_{name.upper()}"] for name in Limits._fields))
    app.origins = {origin.strip() for origin in config["CORS_ORIGINS"].split(",")} - {""}
    config["MAX_FORM_PARTS"] = config["MAX_FILES"] + 100  # submitted_files() has the sentence
    app.uploads, hours = pathlib.Path(config["UPLOADS"]), config["RETENTION_HOURS"]
    sweep(app.uploads, hours)
    app.classifier = Classifier(config["MODEL"], config["THREADS"])
    app.jobs = Jobs(app.classifier, config["MAX_WAITING"], config["MAX_STUDIES"])
    threading.Thread(target=keep_house, args=(app.jobs, app.uploads, hours), daemon=True).start()
    app.stow = cache(lambda: Node(app, "stow", [config["DICOMWEB"]]))
    app.register_blueprint(network)
    app.register_blueprint(pages)
    proxies = config["TRUSTED_PROXIES"]
    app.wsgi_app = ProxyFix(app.wsgi_app, proxies, proxies, proxies, x_prefix=proxies)
    return app

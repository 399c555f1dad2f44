"""Wrong input gets one sentence, that says what to do: as JSON, and on the form."""

import gzip
import html
import pathlib
import struct
import time
import zlib

import numpy as np
import phantoms
import pytest
from phantoms import NOT_READ, deep, dicom, encode, make_app, nifti, phantom, post, tiff, zipped
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

from app import SECONDS, Limits, UnreadableScan, read_upload

HEAD, DEEP = phantom(3, lesion=True, side=128), deep()
SCAN, FRAMES = encode(HEAD, "JPEG"), np.stack([deep(n) for n in range(6)])
SHIPPED = {name: pathlib.Path(get_testdata_file(f"{name}.dcm")).read_bytes()
           for name in ("JPGExtended", "rtplan")}
DAMAGED = "scan is damaged or cut off; export it again."
SMALLER = "more than the {} allowed; send it smaller."
PASSES = "scan is a progressive JPEG of too many passes; save it as an ordinary one."
ELEMENTS = "A header has too many elements; export the scan again."
UNPACKED = "{} is larger than {} MB when unpacked; send it in parts."
MB = {"MAX_UNPACKED": 2 * 2**20}


def blank(width, height, kind=bool):
    return encode(np.zeros((height, width), kind))


def locked():
    """A ZIP with a password."""
    data = bytearray(zipped(a=SCAN))
    for at in (6, data.index(b"PK\x01\x02") + 8):
        data[at] |= 1  # the flag of an encrypted member
    return bytes(data)


def many_passes():
    """A progressive JPEG that says 7000 x 7000, its last scan 500 times."""
    data = bytearray(encode(HEAD, "JPEG", progressive=True))
    size, last = data.index(b"\xff\xc2") + 5, data.rindex(b"\xff\xda")
    data[size : size + 4] = struct.pack(">HH", 7000, 7000)
    return bytes(data[:last] + data[last:-2] * 500 + data[-2:])


def in_dicom(frame, side):
    """A JPEG as the frame of a DICOM file that says another size."""
    packed = encapsulate([frame + bytes(len(frame) % 2)])
    return dicom(HEAD, uid.JPEGBaseline8Bit, PixelData=packed, Rows=side, Columns=side)


def packed_frames(syntax, said):
    """A DICOM file of more compressed frames than it says."""
    dataset = phantoms.dataset_of(FRAMES, NumberOfFrames=len(FRAMES))
    dataset.compress(syntax)
    dataset.NumberOfFrames = said
    return phantoms.written(dataset)


def one_page(stack):
    """A stack as old versions of ImageJ write it, with a page for the first picture alone."""
    data = tiff(*stack, description="ImageJ=1.40\nimages=6\n", metadata=None)
    (at,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, at)
    after = at + 2 + 12 * entries
    return data[:after] + bytes(4) + data[after + 4 :]


def private_mosaic():
    """A Siemens mosaic that only a private element tells."""
    dataset = phantoms.dataset_of(DEEP)
    dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 9)
    return phantoms.written(dataset)


def many_pages(count=20_000):
    """A TIFF of `count` empty pages."""
    pages = (struct.pack("<HI", 0, 8 + 6 * (n + 1) if n < count - 1 else 0) for n in range(count))
    return b"II*\0\x08\0\0\0" + b"".join(pages)


def many_elements(of_sequence, count=600_000):
    """A DICOM header of so many empty elements, or of one sequence of as many items."""
    elements = (b"\xfe\xff\0\xe0\0\0\0\0" if of_sequence else b"\x29\0\x10\x10LO\0\0") * count
    if of_sequence:
        elements = struct.pack("<HH2sHI", 0x5200, 0x9229, b"SQ", 0, len(elements)) + elements
    return DEEP_FILE.replace(b"\xe0\x7f\x10\0", elements + b"\xe0\x7f\x10\0", 1)


def strip_bomb():
    """A deflated TIFF whose only strip holds far more than its page."""
    bomb = zlib.compress(bytes(200_000_000), 1)
    data = tiff(HEAD, compression="zlib", rowsperstrip=128)
    for tag, value in ((273, len(data)), (279, len(bomb))):  # where the strip is, and how long
        entry = data.index(struct.pack("<HHI", tag, 4, 1))
        data = data[: entry + 8] + struct.pack("<I", value) + data[entry + 12 :]
    return data + bomb


DEEP_FILE = dicom(DEEP)
TAKEN_FOR_16_BITS = encode(np.dstack([HEAD] * 3), "TIFF", compression="tiff_lzw").replace(
    b"\x08\0\x08\0\x08\0", b"\x10\0\x10\0\x10\0")
SMALL_PAGES = tiff(*[phantom(n, side=64) for n in range(3)])


def of_syntax(name):
    """A DICOM file that names this transfer syntax."""
    return DEEP_FILE.replace(b"1.2.840.10008.1.2.1\0", name + b"\0")


# What is sent, bytes or files (bytes, name), made only once it is needed where that takes time;
# the status and the sentence; settings of the app
SENTENCES = [
    ([], 400, "No file was chosen; choose a scan and send it again."),
    ([(b"", "")], 400, "No file was chosen; choose a scan and send it again."),
    ([(b"x", "scan.jpg")] * 1001, 400, "1001 files were sent, but at most 1000 are read at once."),
    (b"", 400, "scan is empty; choose the file again."),
    (b"hello, I am text", 415, f"scan {NOT_READ}"),
    (encode(HEAD, "GIF"), 415, f"scan {NOT_READ}"),
    (gzip.compress(b"nothing of the kind"), 415, f"scan {NOT_READ}"),
    ([(zipped(**{"a.txt": b"text"}), "a.zip")], 415, f"a.txt {NOT_READ}"),
    (SCAN[:2000], 415, DAMAGED),
    (encode(phantom())[:3000], 415, DAMAGED),
    (DEEP_FILE[:9000], 415, DAMAGED),
    (gzip.compress(bytes(1000))[:-9], 415, DAMAGED),
    (zipped(a=b"x")[:40], 415, DAMAGED),
    *((of_syntax(name), 415, DAMAGED)
      for name in (b"1.2.840.10008.1.2.9", b"1.2.3.4.5.6.7.8.9.1", b"not a syntax at all")),
    (zipped(), 415, "scan is an empty ZIP; pack the scans into it."),
    (locked(), 415, "a is locked with a password; send it unlocked."),
    (blank(300, 20), 415, "scan has 300 x 20 pixels, but a scan needs at least 32 x 32."),
    (blank(600, 32), 415, "scan has 600 x 32 pixels, longer and narrower than any scan; "
     "crop it and send it again."),
    (SHIPPED["JPGExtended"], 415, "scan is compressed as JPEG Extended (Process 2 and 4) and "
     "cannot be decoded; export it uncompressed (Explicit VR Little Endian)."),
    *((data, 415, "scan is a DICOM file without a scan; send images of the study.")
      for data in (SHIPPED["rtplan"], dicom(DEEP, Modality="SEG"), dicom(DEEP, Modality="RTDOSE"))),
    *((dicom(DEEP, ImageType=["ORIGINAL", "PRIMARY", *kinds]), 415,
       "scan is a Siemens or UIH mosaic; export one picture per slice.")
      for kinds in (["M", "MOSAIC"], ["VFRAME"])),
    (private_mosaic(), 415, "scan is a Siemens or UIH mosaic; export one picture per slice."),
    *((data, 415, "scan is half of a volume; save both files as one .nii file.")
      for data in (nifti(DEEP[..., None], magic=b"ni1"),
                   nifti(DEEP[..., None], magic=bytes(4))[:348],
                   nifti(DEEP[..., None], order=">", magic=bytes(4))[:348])),
    *((nifti(*volume, **fields), 415,
       "scan holds labels or a map; send the scan that they belong to.")
      for volume, fields in ((((FRAMES[:4] // 1000),), {}), (((FRAMES[:4] > 99) * 4.0,), {}),
                             ((FRAMES[:4],), {"intent_code": 1002}),
                             ((FRAMES[:4] / 9,), {"intent_code": 1007}))),
    (nifti(DEEP[..., None], order=">")[:356] + DEEP.tobytes("F"), 415,
     "scan has its bytes in another order than its header says; export it again."),
    *((data, 415, "scan holds more pixels than its header says; export it again.")
      for data in (dicom(FRAMES), dicom(FRAMES, NumberOfFrames=3), dicom(DEEP, Rows=48),
                   dicom(DEEP, BitsAllocated=8, BitsStored=8, HighBit=7),
                   dicom(np.dstack([HEAD] * 3), SamplesPerPixel=1),
                   packed_frames(uid.RLELossless, said=3), packed_frames(uid.RLELossless, said=1),
                   packed_frames(uid.JPEGLSLossless, said=3),
                   one_page(FRAMES), nifti(FRAMES, dim=[3, 96, 96, 3, 1, 1, 1, 1]),
                   nifti(np.moveaxis(FRAMES, 0, -1), dim=[2, 96, 96, 1, 1, 1, 1, 1]))),
    (tiff(np.dstack([HEAD] * 3), photometric="rgb").replace(b"\x15\1\3\0", b"\xe8\xfd\3\0"), 415,
     "scan is a TIFF of packed 8-bit unsigned values, which is not read; save it uncompressed."),
    (TAKEN_FOR_16_BITS, 415, "scan is a TIFF of packed 16-bit unsigned values, which is not read; "
     "save it uncompressed."),
    # What would cost too much
    (blank(8000, 8000), 413, f"scan has 8000 x 8000 pixels, {SMALLER.format('50,000,000')}"),
    (lambda: blank(20_000, 20_000), 413,
     f"scan has 20000 x 20000 pixels, {SMALLER.format('50,000,000')}"),
    (tiff(HEAD, np.zeros((8000, 8000), bool), compression="zlib"), 413,
     f"scan has 8000 x 8000 pixels, {SMALLER.format('50,000,000')}"),
    (dicom(DEEP, Rows=30_000, Columns=30_000), 413,
     f"scan has 30000 x 30000 pixels, {SMALLER.format('25,000,000')}"),
    (dicom(DEEP, NumberOfFrames=5000), 413,
     "scan has 5000 frames, but only 1000 more scans are allowed; send fewer."),
    ([(SMALL_PAGES, "a.tif"), (SMALL_PAGES, "b.tif")], 413,
     "b.tif has 3 pages, but only 2 more scans are allowed; send fewer.", {"MAX_SCANS": 5}),
    (zipped(a=b"a", b=b"b", c=b"c"), 413, "scan holds 3 files, but at most 2 are read.",
     {"MAX_FILES": 2}),
    (zipped(a=bytes(3_000_000)), 413, UNPACKED.format("scan", 2), MB),
    (gzip.compress(bytes(3_000_000)), 413, UNPACKED.format("scan", 2), MB),
    ([(zipped(a=bytes(900_000)), f"{n}.zip") for n in range(3)], 413,
     UNPACKED.format("2.zip", 2), MB),
    ([(encode(np.tile(phantom(), (4, 4))), f"{n}.png") for n in range(6)], 413,
     UNPACKED.format("2.png", 2), MB),
    (many_passes, 413, PASSES),
    (lambda: in_dicom(many_passes(), 7000), 415, DAMAGED),
    (lambda: in_dicom(encode(HEAD, "JPEG"), 64), 415, DAMAGED),
    (lambda: in_dicom(encode(np.dstack([HEAD] * 3), "JPEG"), 128), 415, DAMAGED),
    (many_pages, 413,
     "scan has 1002 pages or more, but only 1000 more scans are allowed; send fewer."),
    (lambda: many_elements(of_sequence=False), 413, ELEMENTS),
    (lambda: many_elements(of_sequence=True), 413, ELEMENTS),
    (strip_bomb, 415, DAMAGED),
    (lambda: gzip.compress(b"", 1) * 50_000, 415, f"scan {NOT_READ}"),
    (lambda: gzip.compress(bytes(120_000_000), 1), 413,
     UNPACKED.format("scan", 96)),
    (lambda: zipped(**{f"{n}.zip": zipped(a=bytes(40_000_000)) for n in range(3)}), 413,
     UNPACKED.format("2.zip", 96)),
    (lambda: zipped(**{f"{n}.png": blank(6000, 6000) for n in range(4)}), 413,
     UNPACKED.format("2.png", 96)),
]


COSTLY = [row for row in SENTENCES if callable(row[0])]
CHEAP = [(*row, {})[:4] for row in SENTENCES if row not in COSTLY]


@pytest.mark.parametrize("files, status, sentence, settings", CHEAP)
def test_wrong_input_gets_its_sentence_and_leaves_nothing(
    tmp_path, files, status, sentence, settings
):
    app = make_app(tmp_path, **settings)
    sent = [files] if isinstance(files, bytes) else files
    response, page = (post(app, *sent, to=path) for path in ("/upload", "/"))
    assert (response.status_code, response.get_json()) == (status, {"error": sentence})
    assert page.status_code == status and "<form" in page.text
    assert sentence in html.unescape(page.text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make, status, sentence", COSTLY)
def test_a_small_file_of_large_cost_is_refused_before_the_work(make, status, sentence):
    data, start = make(), time.thread_time()
    with pytest.raises(UnreadableScan) as caught:
        read_upload([("scan", data)])
    assert time.thread_time() - start < SECONDS
    assert (caught.value.status, str(caught.value)) == (status, sentence)


@pytest.mark.parametrize("most", range(300, 303))
@pytest.mark.parametrize("of_sequence", [False, True])
def test_too_many_elements_are_refused_wherever_the_limit_is_met(monkeypatch, most, of_sequence):
    """Some of pydicom's reads make another error of any."""
    monkeypatch.setattr("app.MOST_READS", most)
    with pytest.raises(UnreadableScan, match=ELEMENTS):
        read_upload([("scan", many_elements(of_sequence, 1000))])


def test_a_plane_that_is_none_is_refused(app):
    response = post(app, SCAN, plane="up")
    assert (response.status_code, response.get_json()["error"]) == (
        400, "The plane has to be sagittal, coronal, axial or all.")


@pytest.mark.parametrize("path", ["/", "/upload"])
def test_a_file_of_100_megabytes_is_refused_before_it_is_read(client, uploads, path):
    response = client.post(path, content_type="multipart/form-data; boundary=x",
                           environ_overrides={"CONTENT_LENGTH": "100000000"})
    assert response.status_code == 413
    assert ("The upload is larger than the 64 MB allowed; zip the folder, or send fewer or "
            "smaller files.") in response.text
    assert uploads() == []


def test_an_upload_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("app.SECONDS", -1)
    monkeypatch.setattr("app.SECONDS_PER_MB", -1)
    with pytest.raises(UnreadableScan, match="takes too long to read"):
        read_upload([("study.zip", zipped(**{"a.dcm": DEEP_FILE}))], Limits())

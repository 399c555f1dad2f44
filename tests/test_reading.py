"""What is read of a file: the scan that it shows, whatever its kind, and what is said of it."""

import gzip
import itertools
import pathlib
import struct
import tracemalloc
import zlib

import gdcm
import nibabel
import numpy as np
import phantoms
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phantoms import close, dataset_of, deep, dicom, encode, items, nifti, phantom, tiff, volume
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pydicom import uid
from pydicom.data import get_testdata_file

from app import PLANES, SIDE, Limits, UnreadableScan, prepare, read_scans, read_upload

HEAD = phantom(3, lesion=True, side=128)
DEEP = HEAD.astype(np.uint16) * 16  # 12 bits
SIGNED = HEAD.astype(np.int16) * 8 - 1000
RGB, DEEP_RGB, NOTHING = np.dstack([HEAD] * 3), np.dstack([DEEP] * 3), np.zeros_like(HEAD)
CLEAR = np.dstack([RGB, NOTHING])  # an alpha channel of zeros alone


def alike(pixels, others=HEAD):
    """Whether two pictures show the same, however they were scaled."""
    return np.corrcoef(pixels.ravel(), others.ravel())[0, 1] > 0.99


def read_one(data, name="scan"):
    """The only scan of a file."""
    (scan,) = read_scans(data, name)
    return scan


# Pictures


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "JPEG"])
def test_every_kind_of_picture_gives_the_same_scan(kind):
    """The kind is told from the content, whatever the name says."""
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    scan = read_one(encode(phantom(), kind, **options), "scan.txt")
    assert scan.pixels.dtype == np.uint8
    difference = np.abs(scan.pixels.astype(int) - phantom()).mean()
    assert difference < (1.5 if kind == "JPEG" else 0.01)


def test_a_tiff_gives_a_scan_a_page():
    scans = read_scans(tiff(*[phantom(seed) for seed in range(3)]), "pages.tif")
    assert [scan.slice for scan in scans] == [0, 1, 2]
    assert np.array_equal(scans[2].pixels, phantom(2))


def test_what_is_transparent_is_black():
    layers = np.full((64, 64, 4), 255, np.uint8)
    layers[:32, :, 3] = 0
    scan = read_one(encode(layers))
    assert not scan.pixels[:32].any() and scan.pixels[32:].all()


def test_a_large_scan_is_reduced_with_its_aspect_kept():
    assert read_one(encode(np.zeros((1500, 3000), np.uint8))).pixels.shape == (512, 1024)


def deep_png(channels):
    """A PNG of 16 bits, which Pillow does not write: grey and alpha, RGB, or RGBA."""
    kind = {2: 4, 3: 2, 4: 6}[channels.shape[2]]
    header = struct.pack(">IIBBBBB", *channels.shape[1::-1], 16, kind, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels))
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        chunks += struct.pack(">I", len(data)) + kind + data + checksum
    return chunks


def long_text_png():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("k", "x" * 3_000_000)
    texts.add_text("k", "x" * 70_000_000, zip=True)
    return encode(HEAD, pnginfo=texts)


def hot(values, level=65535):
    """Values with one hot pixel."""
    return np.where(np.arange(values.size).reshape(values.shape) == 5, level, values)


NUMBERS = {"u1": HEAD, "i1": HEAD / 2.0 - 64, "u2": DEEP, "i2": SIGNED, "u4": DEEP, "i4": SIGNED}
NUMBERS |= dict.fromkeys(("f2", "f4", "f8"), HEAD / 255)


def tiff_of(kind, order, packed, photometric):
    values = NUMBERS[kind].astype(kind)
    if photometric == "miniswhite":
        values = -values if kind[0] == "f" else ~values
    return tiff(values, byteorder=order, compression=packed, photometric=photometric)


TIFFS = itertools.product(NUMBERS, "<>", (None, "zlib"), ("minisblack", "miniswhite"))
SMALLER = {"subfiletype": 1}
PALETTE = np.repeat(np.arange(255, -1, -1, np.uint16)[None] * 257, 3, 0)
LUT = {
    f"{colour}PaletteColorLookupTable{part}": value
    for colour in ("Red", "Green", "Blue")
    for part, value in (("Descriptor", [256, 0, 16]), ("Data", (PALETTE[0, ::-1] // 17).tobytes()))
}
AXIAL, table = phantoms.AXIAL, phantoms.table
INVERSE = np.arange(4095, -1, -1, np.uint16)


def lacking(key, pixels, **tags):
    """A DICOM file that lacks an element."""
    dataset = dataset_of(pixels, **tags)
    del dataset[key]
    return phantoms.written(dataset)


def overlaid():
    """A DICOM file with overlays in the bits above its values."""
    dataset = dataset_of(DEEP | HEAD[::-1].astype(np.uint16) << 7 & 0x7000, BitsStored=12, HighBit=11)
    dataset.add_new(0x60000100, "US", 16)
    return phantoms.written(dataset)


UPSIDE = nifti(HEAD[::-1, ::-1].T[..., None], qform_code=1)
YBR = np.asarray(Image.fromarray(RGB).convert("YCbCr"))
ODD = {
    **{" ".join(("TIFF", *map(str, how))): tiff_of(*how) for how in TIFFS},
    "TIFF hot pixel": tiff(hot(DEEP)),
    "TIFF RGB 12 bits in 16": tiff(DEEP_RGB, photometric="rgb"),
    "TIFF RGB by plane": tiff(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
    "TIFF alpha of zeros": tiff(CLEAR, photometric="rgb", extrasamples=["unassalpha"]),
    "TIFF far brighter spot": tiff(np.where(HEAD > 240, 4095, HEAD * np.uint16(4))),
    "TIFF of a stack that it was": tiff(DEEP, description="ImageJ=1.40\nimages=6\n", metadata=None),
    "TIFF palette": tiff(255 - HEAD, photometric="palette", colormap=PALETTE),
    "TIFF tiles": tiff(DEEP, tile=(32, 32)),
    "TIFF LZW": encode(DEEP, "TIFF", compression="tiff_lzw"),
    "BigTIFF": tiff(DEEP, bigtiff=True),
    "TIFF thumbnail first": tiff((HEAD[::3, ::3].copy(), SMALLER), HEAD),
    "TIFF thumbnail unsaid": tiff(HEAD[::6, ::6].copy(), HEAD),
    "TIFF picture within": tiff((HEAD[::3, ::3].copy(), SMALLER | {"subifds": 1}), HEAD),
    "PNG 16 bits": encode(DEEP + 100),
    "PNG alpha of zeros": encode(CLEAR),
    "BMP alpha of zeros": encode(CLEAR, "BMP"),
    "PNG RGB 12 bits in 16": deep_png(DEEP_RGB),
    "PNG RGBA 12 bits in 16": deep_png(np.dstack([DEEP_RGB, NOTHING])),
    "PNG grey and alpha, 12 bits in 16": deep_png(np.dstack([DEEP, np.full_like(DEEP, 4095)])),
    "PNG long texts": long_text_png(),
    **{f"DICOM HighBit {high}": dicom(DEEP << (high - 11), BitsStored=12, HighBit=high)
       for high in range(11, 16)},
    "DICOM HighBit 15, signed": dicom(SIGNED << 4, BitsStored=12, HighBit=15),
    "DICOM HighBit 13, signed": dicom((SIGNED & 4095) << 2, BitsStored=12, HighBit=13),
    "DICOM overlay above": dicom(DEEP | np.uint16(32768), BitsStored=12, HighBit=11),
    "DICOM overlay below": dicom(DEEP << 4 | HEAD & 1, BitsStored=12, HighBit=15),
    "DICOM HighBit of no sense": dicom(DEEP, BitsStored=12, HighBit=3),
    "DICOM 32 bits": dicom(DEEP.astype(np.uint32) * 1000),
    "DICOM signed bytes": dicom((HEAD.astype(int) - 128).astype(np.int8)),
    **{f"DICOM RGB {planar} {stored}": dicom(
           RGB.astype(np.uint16) * factor, PlanarConfiguration=planar, BitsStored=stored,
           HighBit=stored - 1)
       for planar in (0, 1) for stored, factor in ((8, 1), (12, 16), (16, 16))},
    "DICOM YBR": dicom(YBR, PhotometricInterpretation="YBR_FULL"),
    **{f"DICOM {kind} table of {bits} bits": dicom(
           4095 - DEEP, **{f"{kind}LUTSequence": table(INVERSE, bits)})
       for kind in ("Modality", "VOI") for bits in (8, 10, 12, 16)},
    "DICOM table of bytes": dicom(255 - HEAD, VOILUTSequence=table(INVERSE[-256:].astype("u1"), 8)),
    "DICOM table of small entries": dicom(4095 - DEEP, VOILUTSequence=table(INVERSE // 16, 16)),
    "DICOM table below zero": dicom(
        4095 - DEEP, VOILUTSequence=table(INVERSE, 12, -1000), RescaleSlope=1, RescaleIntercept=-1000),
    "DICOM table written unsigned": dicom(
        4095 - DEEP, VOILUTSequence=table(INVERSE, 12, 64536), RescaleSlope=1, RescaleIntercept=-1000),
    "DICOM table of a frame": dicom(4095 - DEEP, SharedFunctionalGroupsSequence=items(
        FrameVOILUTSequence=[{"VOILUTSequence": table(INVERSE, 12)}])),
    "DICOM table of one level": dicom(DEEP, VOILUTSequence=table(INVERSE * 0, 12)),
    "DICOM table written unsigned, with padding": dicom(
        4095 - DEEP, VOILUTSequence=table(INVERSE, 12, 64536), RescaleSlope=1,
        RescaleIntercept=-1000, PixelPaddingValue=4095),
    "DICOM more bits than said": dicom(DEEP, BitsStored=8, HighBit=7),
    "DICOM more bits than said, signed": dicom(SIGNED, BitsStored=10, HighBit=9),
    "DICOM few values beyond the bits said": dicom(HEAD * np.uint16(20), BitsStored=12, HighBit=11),
    "DICOM signed, but it is not": dicom(DEEP.astype(np.int16), BitsStored=12, HighBit=11),
    "DICOM overlay unsaid": dicom(DEEP | HEAD[::-1].astype(np.uint16) << 5 & 4096, BitsStored=12, HighBit=11),
    "DICOM overlays above": overlaid(),
    "DICOM polarity in small letters": dicom(4095 - DEEP).replace(b"MONOCHROME2", b"Monochrome1"),
    **{f"DICOM polarity {kind}": dicom(DEEP).replace(b"MONOCHROME2", kind.ljust(11))
       for kind in (b"MONOTONE", b"MONOCHROME")},
    "DICOM RGB of samples unsaid": lacking("SamplesPerPixel", RGB),
    "TIFF of photometric unsaid": tiff(DEEP).replace(b"\x06\1\3\0\1", b"\xe8\xfd\3\0\1"),
    "TIFF RGB of photometric unsaid": tiff(RGB, photometric="rgb").replace(
        b"\x06\1\3\0\1", b"\xe8\xfd\3\0\1"),
    "TIFF of channels": tiff(np.dstack([DEEP, DEEP[::-1], DEEP.T]), planarconfig="contig"),
    "TIFF of planes": tiff(np.stack([DEEP, DEEP[::-1], *[DEEP.T] * 4]), planarconfig="separate"),
    "TIFF with a channel that is no alpha": tiff(np.dstack([HEAD, HEAD.T]), planarconfig="contig"),
    "NIfTI without an offset": UPSIDE[:108] + bytes(4) + UPSIDE[112:352] + UPSIDE[356:],
    "DICOM palette of 12 bits": dicom(HEAD, PhotometricInterpretation="PALETTE COLOR", **LUT),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_shows_the_same_head(name):
    ((scan,), skipped) = read_upload([(name, ODD[name])])
    assert alike(scan.pixels) and not skipped
    assert scan.window is None or scan.window[0] < scan.window[1]


def half(value, kind):
    """The head, its upper half of one value."""
    values = HEAD.astype(kind) * 4
    values[:64] = value
    return values


PADDING = {"PixelPaddingValue": -2000}
PADDED = {
    f"{kind} {stored.min()} {tags}": dicom(stored, PhotometricInterpretation=kind, **tags)
    for kind in ("MONOCHROME1", "MONOCHROME2")
    for stored, tags in (
        (half(-2000, np.int16), PADDING),
        (half(-32768, np.int16), {"PixelPaddingValue": -32768}),
        (half(-2000, np.int16), {"PixelPaddingValue": -1500, "PixelPaddingRangeLimit": -2100}),
        (half(65535, np.uint16), {"PixelPaddingValue": 65535}),
        (half(65535, np.uint16), {"PixelPaddingValue": 65535, "BitsStored": 12, "HighBit": 11}),
        (half(-2000, np.int16), PADDING | {"WindowCenter": 500, "WindowWidth": 1000}),
    )
} | {
    f"undeclared {value}": dicom(half(value, kind))
    for value, kind in ((-32768, np.int16), (-9999, np.int16), (65535, np.uint16))
} | {
    f"{write.__name__} of {value}": write(half(value, np.float32))
    for value in (np.nan, np.inf, -np.inf, -3.4e38)
    for write in (tiff, lambda values: nifti(values[::-1, ::-1].T[..., None], qform_code=1))
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_and_what_is_no_number_are_black_and_take_no_part(name):
    pixels = read_one(PADDED[name]).pixels
    shown = 255 - pixels if "MONOCHROME1" in name else pixels
    assert not pixels[:64].any() and alike(shown[64:], HEAD[64:]) and np.ptp(shown[64:]) > 200


# What is said of a scan


def lettered(side, points):
    """A head with a name written beside it."""
    picture = Image.fromarray(phantom(3, side=side))
    font = ImageFont.load_default(points)
    ImageDraw.Draw(picture).text((6, 6), "DOE JOHN\n1950-01-01", fill=255, font=font)
    return np.asarray(picture)


BESIDE = "There is text or a scale beside the head; check that it identifies nobody."
BURNED = "The file says that text is burned in; check that it identifies nobody."
COMPUTED = "The file says that it is no plain slice ({}); the answer may be unreliable."
AS_STORED = "The picture is stored turned or mirrored, and is shown as it is stored."
COLOURED = np.dstack([phantom()] * 2 + [phantom() // 3])
TAGGED = deep(side=160)
FAINT = phantom(3, side=256)
LETTERS = ((256, 9), (256, 16), (512, 12), (512, 24), (1024, 24))


@pytest.mark.parametrize("data, warning", [
    (encode(np.dstack([phantom()] * 3)), None),
    (encode(phantom(side=100)), "The picture is small (100 pixels); details may be lost."),
    (encode(phantom() // 8), "The contrast is low; the answer may be unreliable."),
    (encode(COLOURED), "The picture is in colour; it was turned to grey."),
    (encode(255 - phantom()),
     "The background is bright; the answer for an inverted picture is unreliable."),
    *((encode(lettered(*size)), BESIDE) for size in LETTERS),
    (dicom(np.where(lettered(256, 16) > FAINT, 4095, FAINT * np.uint16(4))), BESIDE),
    (dicom(TAGGED, Modality="CT"), "The file says that it is no MRI (modality CT)."),
    (dicom(TAGGED, BodyPartExamined="KNEE"),
     "The file says that it shows no head (body part KNEE)."),
    (dicom(TAGGED, BurnedInAnnotation="YES"), BURNED),
    (dicom(TAGGED, BodyPartExamined="BRAIN"), None),
    (dicom(TAGGED, ImageType=["ORIGINAL", "PRIMARY", "M", "FFE"]), None),
    (dicom(TAGGED, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), None),
    *((dicom(TAGGED, ImageOrientationPatient=axes), AS_STORED)
      for axes in ([-1, 0, 0, 0, 1, 0], [0, -1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1])),
    *((dicom(TAGGED, ImageType=["DERIVED", "PRIMARY", *kinds]), COMPUTED.format(found))
      for kinds, found in ((["DIFFUSION", "ADC"], "ADC"), (["P"], "P"), (["T2 MAP"], "T2 MAP"),
                           (["PROJECTION IMAGE"], "PROJECTION"), (["PHASE_MAP"], "PHASE"), (["LOCALIZER"], "LOCALIZER"))),
    (dicom(TAGGED, SOPClassUID=uid.SecondaryCaptureImageStorage),
     COMPUTED.format("SECONDARY CAPTURE")),
    *((encode(phantom(), kind, save_all=True, append_images=[Image.fromarray(phantom(1))]),
       "The file holds several pictures; the first was read.") for kind in ("PNG", "WEBP")),
    (tiff(np.dstack([phantom(), phantom(1)]), planarconfig="contig"),
     "The page holds several channels; the first was read."),
])
def test_what_is_doubtful_is_said_and_nothing_else(data, warning):
    assert read_one(data).warnings == ((warning,) if warning else ())


def test_the_checks_say_what_was_looked_at():
    checks = read_one(encode(phantom(side=300))).checks
    names = ["Size", "Contrast", "Colour", "Background", "Text"]
    assert [check.name for check in checks] == names
    assert all(check.passed for check in checks) and checks[0].message == "300 x 300 pixels"


# Where the head is, and what the network sees


@pytest.mark.parametrize("background", [0, 20, 255])
def test_the_head_is_found_on_any_background(background):
    """From where it stands out by an eighth of most of it, whatever is around."""
    y, x = np.mgrid[:256, :240]
    height = (200 - 2 * np.hypot(x - 100, y - 140)).clip(0)
    pixels = np.abs(background - height).astype(np.uint8)
    difference = np.abs(pixels - float(background))
    mask = difference > 0.12 * np.percentile(difference, 99)
    sides = (np.flatnonzero(mask.mean(axis) > 0.02)[[0, -1]] + (0, 1) for axis in (0, 1))
    assert np.abs(read_one(encode(pixels)).box - np.stack([*sides], 1).ravel()).max() <= 1


def test_noise_around_a_head_is_not_taken_for_it():
    """Noise of a twentieth of the range, which no eye minds, leaves the crop where it was."""
    clean = np.pad(phantom(), 80)
    noise = np.random.default_rng(0).normal(0, 0.05 * 255, clean.shape)
    boxes = [read_one(encode(p.clip(0, 255).astype(np.uint8))).box for p in (clean, clean + noise)]
    assert np.abs(np.subtract(*boxes)).max() <= 8


def test_an_even_picture_is_not_cropped():
    assert read_one(encode(np.full((50, 80), 7, np.uint8))).box == (0, 0, 80, 50)


def test_the_margin_around_a_head_does_not_matter():
    """The same head in a wider frame gives nearly the same prepared picture."""
    wide = np.pad(phantom(), ((30, 90), (60, 10)))
    assert np.abs(prepare(wide).astype(int) - prepare(phantom())).mean() < 3


def test_prepare_gives_three_equal_channels_of_the_full_range():
    prepared = prepare(phantom())
    assert (prepared.shape, prepared.dtype) == ((SIDE, SIDE, 3), np.uint8)
    assert np.ptp(prepared, axis=2).max() == 0
    assert (prepared.min(), prepared.max()) == (0, 255)


def test_prepare_refuses_what_is_not_a_greyscale_picture():
    sentence = r"expected uint8 pixels \(H, W\), got float64 \(4, 4, 3\)"
    with pytest.raises(ValueError, match=sentence):
        prepare(np.zeros((4, 4, 3)))


# DICOM


PACKED = {f"MR_small_{how}": "MR_small" for how in
          ("RLE", "implicit", "expb", "bigendian", "jp2klossless", "jpeg_ls_lossless", "padded")}
PACKED |= {"SC_rgb_jpeg_gdcm": "SC_rgb_rle", "SC_rgb_gdcm_KY": "SC_rgb_rle"}  # lossless as well


def shipped(name):
    """The bytes of a file that pydicom ships for tests."""
    return pathlib.Path(get_testdata_file(f"{name}.dcm")).read_bytes()


@pytest.mark.parametrize("name", PACKED)
def test_every_transfer_syntax_gives_the_same_scan(name):
    assert close(read_one(shipped(name)).pixels, read_one(shipped(PACKED[name])).pixels)


def test_a_lossless_jpeg_of_16_bits_gives_the_same_scan(tmp_path):
    """As scanners write it; GDCM packs it here."""
    reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
    change = gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(phantoms.put(tmp_path / "plain", dicom(deep()))))
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    assert reader.Read()
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "packed"))
    assert writer.Write()
    packed = read_one((tmp_path / "packed").read_bytes())
    assert close(packed.pixels, read_one(dicom(deep())).pixels)


def test_a_deflated_file_gives_the_same_scan():
    packed = dicom(deep(), uid.DeflatedExplicitVRLittleEndian)
    assert close(read_one(packed).pixels, read_one(dicom(deep())).pixels)


@pytest.mark.parametrize("name, size", [
    ("examples_palette", (350, 800)), ("examples_rgb_color", (240, 320)),
    ("examples_ybr_color", (240, 320)), ("examples_jpeg2k", (480, 640)),
    ("image_dfl", (512, 512)), ("J2K_pixelrep_mismatch", (512, 512)),
])
def test_files_that_pydicom_ships_are_read(name, size):
    assert {scan.pixels.shape for scan in read_scans(shipped(name), name)} == {size}


def test_a_dicom_file_is_known_by_its_content():
    """Without preamble, without extension, gzipped: the same scan."""
    bare, whole = dataset_of(deep()), dicom(deep())
    del bare.file_meta
    bare = phantoms.written(bare, bare=True, implicit_vr=True, little_endian=True)
    for data in (bare, gzip.compress(whole)):
        assert close(read_one(data).pixels, read_one(whole).pixels)


WINDOW = {"WindowCenter": 1900, "WindowWidth": 1600}
NARROW = {"WindowCenter": 1000, "WindowWidth": 800}


def test_the_window_of_the_file_is_applied_and_named():
    scan = read_one(dicom(deep(), **NARROW))
    shown = ((deep().astype(float) - 600.5) / 799 * 255).clip(0, 255).astype(np.uint8)
    assert scan.window == (600, 1400) and close(scan.pixels[20:80, 20:80], shown[20:80, 20:80])


@pytest.mark.parametrize("stored, tags, same", [
    (deep(), {"WindowCenter": 60000, "WindowWidth": 10}, {}),  # beyond the values
    (deep(), {"WindowCenter": 1000, "WindowWidth": 50000}, {}),  # which would hide them all
    (deep(), {"RescaleSlope": 2, "RescaleIntercept": -100} | WINDOW, NARROW),
    (4095 - deep(), {"PhotometricInterpretation": "MONOCHROME1"}, {}),
])
def test_tags_that_come_to_the_same_show_the_same(stored, tags, same):
    assert close(read_one(dicom(stored, **tags)).pixels, read_one(dicom(deep(), **same)).pixels)


def test_the_frames_of_an_enhanced_file_have_their_own_window_and_place():
    shared = items(PlaneOrientationSequence=[{"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}])
    frames = items(
        PlanePositionSequence=[{"ImagePositionPatient": [0, 0, n]} for n in range(3)],
        FrameVOILUTSequence=[{"WindowCenter": c, "WindowWidth": 500} for c in (500, 600, 700)])
    data = dicom(np.stack([deep(n) for n in range(3)]), NumberOfFrames=3,
                 SharedFunctionalGroupsSequence=shared, PerFrameFunctionalGroupsSequence=frames)
    scans = read_scans(data, "enhanced")
    windows = {scan.slice: scan.window for scan in scans}
    assert windows == {0: (250, 750), 1: (350, 850), 2: (450, 950)}
    assert {scan.plane for scan in scans} == {"coronal"}


def with_element(key, kind, value):
    """A DICOM file with one element of text that pydicom would not write as that kind."""
    dataset = dataset_of(DEEP, WindowCenter=2040, WindowWidth=4080)
    tag = pydicom.tag.Tag(key)
    dataset.add_new(tag, "LO", value)
    start = struct.pack("<HH", tag.group, tag.element)
    return phantoms.written(dataset).replace(start + b"LO", start + kind.encode())


ODD_ELEMENTS = [
    r"PixelSpacing DS 0,5\0,5", "PixelSpacing DS 0.5", "PixelSpacing DS wide",
    "PixelSpacing LO 0.5", "PixelSpacing US ab", r"PixelSpacing DS nan\nan",
    "SliceLocation DS 12,25", "SliceLocation LO top", r"ImagePositionPatient DS 1\2",
    r"ImageOrientationPatient DS 1\0\0", "InstanceNumber IS one", "RescaleSlope DS x",
    "RescaleIntercept DS 1e999", "WindowCenter DS mid", "WindowWidth DS 4080,0",
    "NumberOfFrames IS 1,0", "PixelPaddingValue LO none", "HighBit LO ab",
]


@pytest.mark.parametrize("element", ODD_ELEMENTS)
def test_an_odd_value_is_as_if_absent_and_is_said(element):
    scan = read_one(with_element(*element.split()))
    assert alike(scan.pixels) and len(scan.remarks) == 1
    assert scan.remarks[0].startswith(element.split()[0])


def test_a_decimal_comma_is_read_as_a_point():
    assert read_one(with_element("PixelSpacing", "DS", r"1,0\0,5")).pixels.shape == (256, 128)


# NIfTI

STACK = np.stack([phantom(n, side=128) for n in range(3)], -1)
VOLUME = STACK[::-1, ::-1].transpose(1, 0, 2)  # towards right, front and top
TURNED = "The file does not say how the head lies; the slices may be turned."


def coloured(*channels):
    """VOLUME as NIfTI's RGB voxels."""
    values = np.zeros(VOLUME.shape, [(channel, np.uint8) for channel in channels])
    for channel in "RGB":
        values[channel] = VOLUME
    return values


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "i8", "f4", "f8", "c8", "c16"])
def test_every_type_of_voxel_shows_the_same_slices(kind, order, dtype):
    values = VOLUME.astype(dtype) * (1j if dtype[0] == "c" else 1)
    scans = read_scans(nifti(values, kind=kind, order=order, qform_code=1), "head.nii")
    assert [scan.plane for scan in scans] == ["axial"] * 3 and alike(scans[1].pixels, STACK[..., 1])


@pytest.mark.parametrize("values, spacing, count", [
    (coloured(*"RGB"), (1, 1, 5), 3), (coloured(*"RGBA"), (1, 1, 5), 3),
    (VOLUME, (1, 1, 1), 3), (VOLUME[..., 1], (1, 1), 1), (VOLUME[..., 1:2], (1, 1, 1), 1),
    (np.stack([VOLUME, VOLUME[::-1]], -1), (1, 1, 5), 3),
])
def test_a_volume_of_any_shape_is_cut_across_its_shortest_axis(values, spacing, count):
    scans = read_scans(nifti(values, spacing, qform_code=1), "head.nii")
    assert len(scans) == count and alike(scans[count // 2].pixels, STACK[..., 1])


@pytest.mark.parametrize("fields, remark", [
    ({"qform_code": 1, "scl_slope": np.nan}, None),
    ({"qform_code": 1, "scl_slope": 2, "scl_inter": 7}, None),
    ({"qform_code": 1, "scl_inter": np.inf},
     "The scaling in the file makes no sense and was ignored."),
    ({}, TURNED),
    ({"sform_code": 1}, TURNED),
    ({"sform_code": 1, "srow_x": np.nan}, TURNED),
    ({"qform_code": 1, "sform_code": 1, "srow_x": np.nan}, None),
    ({"qform_code": 1, "quatern_b": 5}, TURNED),
    ({"qform_code": 1, "pixdim": [1] * 8},
     "The file does not say in which plane it was acquired; axial was taken."),
])
def test_an_odd_field_of_a_volume_is_as_if_absent(fields, remark):
    data = nifti(VOLUME.astype(np.int16), **{"scl_slope": 1} | fields)
    scans = read_scans(data, "head.nii")
    assert len(scans) == 3 and scans[0].remarks == ((remark,) if remark else ())


@pytest.mark.parametrize("tail", [b"", bytes(600), b"junk of a tape"])
def test_gzip_of_several_members_is_read(tail):
    data = nifti(VOLUME, qform_code=1)
    packed = b"".join(gzip.compress(part) for part in (data[:999], data[999:30_000], data[30_000:]))
    assert len(read_scans(packed + tail, "head.nii.gz")) == 3


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_volume_is_shown_as_radiologists_see_it(plane):
    """Front or top above, the patient's right or the face on the left: there lies the bright spot.

    The way in which it is stored does not matter.
    """
    scans, turned = (read_scans(volume(flip=flip), "head.nii", plane=plane) for flip in (0, 1))
    middle = scans[int(0.65 * len(scans))].pixels.astype(float)
    h, w = (n // 2 for n in middle.shape)
    rows = middle[:h], middle[h:]
    quarters = [part.sum() for row in rows for part in (row[:, :w], row[:, w:])]
    assert np.argmax(quarters) == 0
    assert all(close(a.pixels, b.pixels) for a, b in zip(scans, turned, strict=True))


def test_voxels_that_are_no_cubes_are_made_square():
    (scan, *_) = read_scans(volume((64, 64, 40), (1, 1, 2)), "head.nii", plane="coronal")
    assert scan.pixels.shape == (80, 64)


@pytest.mark.parametrize("plane, shown", [
    (None, {"axial"}), ("coronal", {"coronal"}), ("all", {*PLANES}),
])
def test_the_plane_is_that_of_acquisition_the_one_chosen_or_all(plane, shown):
    data = gzip.compress(volume((48, 48, 40), (1, 1, 5)))
    assert {scan.plane for scan in read_scans(data, "head.nii.gz", plane=plane)} == shown


def test_a_volume_whose_first_column_is_nearly_even_is_no_mask():
    values = np.add.outer(8 * np.arange(32), np.arange(512 * 190) % 2).reshape(32, 512, 190)
    assert len(read_scans(nifti(values.astype(np.uint8), qform_code=1), "head.nii")) == 190


def test_of_several_volumes_the_first_is_read_with_a_warning():
    (scan, *_) = read_scans(nifti(np.stack([VOLUME] * 3, -1), qform_code=1), "dwi.nii")
    assert scan.warnings[0] == "The file holds 3 volumes; the first was read."


def test_empty_slices_of_a_volume_are_left_out_one_by_one():
    """None more where what lies outside the head is NaN, neither more nor less than anything."""
    image = nibabel.Nifti1Image.from_bytes(volume())
    values = image.get_fdata(dtype=np.float32) * np.linspace(0.2, 1, 40)[:, None, None]
    masked = np.where(values == 0, np.nan, values)
    files = (nibabel.Nifti1Image(each, image.affine).to_bytes() for each in (values, masked))
    (scans, skipped), again = (read_upload([("head.nii", data)], plane="axial") for data in files)
    assert len(scans) + len(skipped) == 60 and len(skipped) >= 4 and again[1] == skipped
    assert skipped[0] == ("head.nii", "The slice is blank.", "1", 0)
    assert [scan.slice for scan in scans] == list(range(scans[0].slice, scans[-1].slice + 1))


# Series: which slices count

HEADS = [deep(n, lesion=True) for n in range(6)]
NOISE = np.random.default_rng(2).rayleigh(9, (96, 96))
SMOOTH = NOISE[:48, :48].repeat(2, 0).repeat(2, 1)  # as a scanner interpolates it


@pytest.mark.parametrize("pictures", [
    [pixels // (1 + 15 * (n % 2)) for n, pixels in enumerate(HEADS)],  # half of them faint
    [*HEADS, HEADS[0] * np.uint16(12)],  # one very bright
    [*HEADS[:5], hot(HEADS[5])],
    [np.where(pixels == 0, 3000, pixels) for pixels in HEADS],  # bright around
    [np.pad(pixels[24:72, 24:72], 24) for pixels in HEADS],  # a small field within zeros
    [*HEADS[:3], *(p[28:68, 28:68].repeat(2, 0).repeat(2, 1) for p in HEADS)],  # filled
    [*HEADS, np.pad(deep(9, lesion=True, side=64), 16, constant_values=1)],
    [phantom(n, side=side) for n in range(4) for side in (48, 64, 128, 512)],
    [*HEADS[:2], NOISE, NOISE[::-1], NOISE[:, ::-1]],  # never is most of a series left out
])
def test_no_slice_that_shows_something_is_left_out(pictures):
    scans, skipped = read_upload(phantoms.slices(pictures))
    assert len(scans) == len(pictures) and not skipped


def test_blank_and_noisy_slices_are_left_out_one_by_one():
    pictures = [NOISE, *HEADS, NOISE[::-1], SMOOTH, NOISE * 0 + 5]
    scans, skipped = read_upload(phantoms.slices(pictures))
    assert [scan.slice for scan in scans] == [1, 2, 3, 4, 5, 6]
    noise, blank = "The slice shows nothing but noise.", "The slice is blank."
    reasons = {item.slice: item.reason for item in skipped}
    assert reasons == {0: noise, 7: noise, 8: noise, 9: blank}


def test_frames_with_slopes_of_their_own_are_all_answered():
    slopes = [{"RescaleSlope": n, "RescaleIntercept": 0} for n in (1, 50, 0.01, 1, 1, 3)]
    groups = items(PixelValueTransformationSequence=slopes)
    data = dicom(np.stack(HEADS), NumberOfFrames=6, PerFrameFunctionalGroupsSequence=groups,
                 ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])  # which it was once
    scans, skipped = read_upload([("enhanced", data)])
    assert len(scans) == 6 and not skipped


def test_an_instance_counts_once_and_so_does_the_same_picture():
    files = phantoms.slices(HEADS)
    again = [("copy", files[2][1]), *phantoms.slices(HEADS[:1], SeriesDescription="Sent again")]
    scans, skipped = read_upload([*files, *again])
    assert len(scans) == 6 and {item.file for item in skipped} in ({"copy", "IM0"}, {"IM2", "IM0"})
    assert all("counts once" in item.reason for item in skipped)


def test_an_instance_sent_again_with_another_spacing_is_kept():
    tags = {"SOPInstanceUID": "1.2.3", "InstanceNumber": 1}
    files = [("a", dicom(DEEP, **tags)), ("b", dicom(DEEP, PixelSpacing=[1, 0.5], **tags))]
    assert len(read_upload(files)[0]) == 2


def test_slices_that_share_a_number_but_not_a_place_are_not_the_same():
    """A careless anonymiser gives all instances one UID."""
    scans, skipped = read_upload(phantoms.slices(HEADS, SOPInstanceUID="1.2.3"))
    assert len(scans) == 6 and not skipped


PLACED = {"ImageOrientationPatient": AXIAL, "ImagePositionPatient": [0, 0, 0]}
NUMBERED = [{"InstanceNumber": n} for n in range(6)]
PARTS = [{"NumberOfFrames": 3, "InConcatenationNumber": n, "InstanceNumber": 1} for n in (1, 2)]
ORDERS = {
    "number, one place for all": [PLACED | tags for tags in NUMBERED],
    "number, one location for all": [{"SliceLocation": 5} | tags for tags in NUMBERED],
    "number, some without a place": [PLACED | tags for tags in NUMBERED[:3]] + [
        {"ImageOrientationPatient": AXIAL} | tags for tags in NUMBERED[3:]],
    "number, one UID for all": [PLACED | tags | {"SOPInstanceUID": "1.2"} for tags in NUMBERED],
    "place without an orientation": [{"ImagePositionPatient": [0, 0, 5 * n]} for n in range(6)],
    "orientation of zeros": [
        {"ImagePositionPatient": [n, n, n], "ImageOrientationPatient": [0] * 6} for n in range(6)],
    "number in the concatenation": PARTS,
    "same UID in the concatenation": [tags | {"SOPInstanceUID": "1.2"} for tags in PARTS],
    "number of the file": [{"NumberOfFrames": 3, "InstanceNumber": n} for n in range(2)],
    "name of the file": [{"NumberOfFrames": 3}] * 2,
}


@pytest.mark.parametrize("name", ORDERS)
def test_slices_lie_in_the_order_that_the_files_tell(name):
    each = 6 // len(ORDERS[name])
    stacks = np.stack(HEADS).reshape(-1, each, 96, 96) if each > 1 else HEADS
    files = [dicom(stack, **tags) for stack, tags in zip(stacks, ORDERS[name])]
    order = range(len(files)) if name == "name of the file" else [5, 1, 3, 0, 2, 4][-len(files):]
    scans, skipped = read_upload([(f"IM{n}", data) for n, data in zip(order, files)])
    assert not skipped and [scan.series for scan in scans] == ["1"] * 6
    assert all(alike(scan.pixels, head) for scan, head in zip(scans, HEADS))


def test_the_places_of_frames_in_a_stack_are_their_order():
    places = items(FrameContentSequence=[{"InStackPositionNumber": 6 - n} for n in range(6)])
    data = dicom(np.stack(HEADS), NumberOfFrames=6, PerFrameFunctionalGroupsSequence=places)
    scans, _ = read_upload([("enhanced", data)])
    assert all(alike(scan.pixels, head) for scan, head in zip(scans, HEADS[::-1], strict=True))


def test_the_planes_of_a_localizer_are_series_of_their_own():
    planes = (AXIAL, [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1])
    files = [(f"IM{n}", dicom(head, ImageOrientationPatient=planes[n % 3],
                              ImagePositionPatient=[n, n, n])) for n, head in enumerate(HEADS)]
    scans, _ = read_upload(files)
    assert [(scan.series, scan.plane) for scan in scans[::2]] == [
        ("1", "axial"), ("2", "sagittal"), ("3", "coronal")]


@pytest.mark.parametrize("one, other, studies", [
    ({}, {"PatientID": "B"}, 2), ({}, {"PatientName": "B"}, 2),
    ({}, {"PatientBirthDate": "19600101"}, 2), ({}, {"StudyInstanceUID": "1.2.9"}, 2),
    ({"PatientName": "DOE^JANE"}, {"PatientName": "Doe^Jane^^^", "SeriesInstanceUID": "1.9"}, 1),
    ({"SeriesInstanceUID": "", "SeriesNumber": 1}, {"SeriesInstanceUID": "", "SeriesNumber": 2}, 1),
])
def test_patients_are_told_apart_in_one_series_and_series_without_uid(one, other, studies):
    files = phantoms.slices(HEADS[:3], **one) + phantoms.slices(HEADS[3:], **other)
    scans, _ = read_upload(files)
    assert [scan.series for scan in scans] == ["1"] * 3 + ["2"] * 3
    assert [scan.study for scan in scans] == ["1"] * 3 + [str(studies)] * 3
    assert len({scan.study_key for scan in scans}) == studies


# Files around the scans


def test_one_stray_file_refuses_no_upload():
    files = [("a.png", encode(HEAD)), ("notes.txt", b"notes"), ("cut.png", encode(HEAD)[:900])]
    scans, skipped = read_upload(files)
    assert [scan.file for scan in scans] == ["a.png"]
    assert [item.file for item in skipped] == ["notes.txt", "cut.png"]
    assert skipped[1].reason == "cut.png is damaged or cut off; export it again."


def test_a_zip_in_a_zip_is_opened_once():
    deeper = phantoms.zipped(b=encode(HEAD))
    inner = phantoms.zipped(**{"a.png": encode(HEAD), "deeper.zip": deeper})
    scans, skipped = read_upload([("study.zip", phantoms.zipped(**{"inner.zip": inner}))])
    assert [scan.file for scan in scans] == ["a.png"]
    assert skipped[0].reason == "deeper.zip lies too deep, in a ZIP within a ZIP; unpack it."


def test_a_zip_with_a_name_that_is_not_the_utf_8_it_promises_is_read():
    data = phantoms.zipped(**{"aä.png": encode(HEAD)}).replace("aä".encode(), b"a\xe4\xff")
    assert read_one(data).file.endswith(".png")


def test_a_study_in_files_with_strange_numbers_in_their_names_is_read():
    files = [(f"IM{digit}", data) for data, digit in zip(phantoms.series(3).values(), "²①٣")]
    assert len(read_upload(files)[0]) == 3


def test_identifiers_are_read_only_if_asked_for_and_keep_their_letters():
    data = dicom(DEEP, SpecificCharacterSet="ISO_IR 144", PatientName="Иванов^Иван")
    ((unasked,), _), ((asked,), _) = (read_upload([("", data)], identifiers=n) for n in (0, 1))
    assert unasked.identifiers is None and asked.identifiers["PatientName"] == "Иванов^Иван"
    assert asked.study_key == unasked.study_key


# Bytes of strangers: the sentences for them are in test_sentences.py

SMALL, SMALL_DEEP = phantom(side=64), deep(side=48)
SEEDS = {kind: encode(SMALL, kind) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP")} | {
    "deep PNG": encode(deep(side=64)),
    "DICOM": dicom(SMALL_DEEP),
    "RLE": dicom(SMALL_DEEP, uid.RLELossless),
    "deflated": dicom(SMALL_DEEP, uid.DeflatedExplicitVRLittleEndian),
    "NIfTI": volume((33, 34, 35)),
    "ZIP": phantoms.zipped(a=encode(SMALL), b=dicom(SMALL_DEEP)),
}


LARGE = st.just(b"\xff\xff\xff\x7f")
EDITS = st.tuples(st.integers(0, 2**16), st.integers(0, 64) | st.just(2**16),
                  st.binary(max_size=16) | LARGE)


def spoilt(data, edits):
    """A file with bytes changed, put in, taken out, or its end cut off."""
    for place, removed, put_in in edits:
        at = place % len(data)
        data = data[:at] + put_in + data[at + removed :] or b"x"
    return data


def read_or_refused(data):
    """Read bytes as the app does, up to what the network sees, or get a sentence for people."""
    try:
        scans = read_scans(data, "scan", Limits(pixels=4_000_000, unpacked=2**22))
    except UnreadableScan as error:
        assert str(error).endswith(".") and error.status in (400, 413, 415)
    else:
        for scan in scans:
            assert scan.pixels.dtype == np.uint8 and isinstance(scan.warnings, tuple)
            assert prepare(scan.pixels, scan.box).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("kind", SEEDS)
def test_a_spoilt_file_gives_scans_or_a_sentence(kind):
    @settings(
        max_examples=80, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(EDITS, min_size=1, max_size=8))
    def check(edits):
        read_or_refused(spoilt(SEEDS[kind], edits))

    check()


@settings(max_examples=300, deadline=5000)
@given(st.binary(max_size=400))
def test_any_bytes_give_scans_or_a_sentence(data):
    read_or_refused(data)


BOMBS = {
    "ZIP": phantoms.zipped(**{f"{n}": bytes(20 * 2**20) for n in range(4)}),
    "gzip": gzip.compress(bytes(80 * 2**20)),
    "deflated DICOM": dicom(SMALL_DEEP, uid.DeflatedExplicitVRLittleEndian,
                            DataSetTrailingPadding=bytes(80 * 2**20)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_in_memory(kind):
    """What is unpacked on the way stays near the limit, by the process' own allocations."""
    assert len(BOMBS[kind]) < 2**20
    tracemalloc.start()
    with pytest.raises(UnreadableScan, match="larger than 4 MB when unpacked"):
        read_scans(BOMBS[kind], "bomb", Limits(unpacked=4 * 2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20

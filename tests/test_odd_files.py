"""Files as real scanners write them, each odd in one way: read right, or refused by name."""

import gzip
import io
import itertools
import struct
import time
import zlib

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from phantoms import ORIENTATIONS, dataset_of, deep, dicom, encode, phantom, series, written, zipped
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from app import Limits, UnreadableScan, emptiness, plain_name, read_scans, read_upload

HEAD = phantom(3, lesion=True, side=128)
DEEP = HEAD.astype(np.uint16) * 16  # 12 bits
RGB, NO_ALPHA = np.dstack([HEAD] * 3), np.zeros_like(HEAD)
AXIAL = {"ImageOrientationPatient": ORIENTATIONS["axial"]}


def shows_head(scan, pixels=HEAD):
    """Whether a scan shows the phantom, however it was scaled."""
    return np.corrcoef(scan.pixels.ravel(), pixels.ravel())[0, 1] > 0.99


def tiff(values, **how):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack"} | how)
    return file.getvalue()


def tiff_pages(*pages):
    """A TIFF of pages (values, how)."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for values, how in pages:
            writer.write(values, photometric="minisblack", **how)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(channels):
    """A PNG of 16 bits: grey and alpha, RGB, or RGBA."""
    kind = {2: 4, 3: 2, 4: 6}[channels.shape[2]]
    header = struct.pack(">IIBBBBB", *channels.shape[1::-1], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def long_text_png():
    data = encode(HEAD)
    texts = [b"tEXtk\0" + b"x" * 3_000_000, b"zTXtk\0\0" + zlib.compress(bytes(70_000_000), 1)]
    return data[:33] + b"".join(chunk(text[:4], text[4:]) for text in texts) + data[33:]


def bits(allocated, stored, high, signed=0):
    names = "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"
    return dict(zip(names, (allocated, stored, high, signed)))


def dicom_of(values, **tags):
    """A DICOM file of values of whatever type."""
    return dicom(HEAD, PixelData=values.tobytes(), **tags)


def colour_dicom(values, planar, **tags):
    values = np.moveaxis(values, -1, 0) if planar else values
    kind = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": planar}
    return dicom_of(values, **kind | tags)


def padded_dicom(value, limit=None, dtype=np.int16, **tags):
    """A file whose upper half is padding."""
    values = HEAD.astype(dtype) * 4
    values[:64] = value
    dataset = dataset_of(
        HEAD, PixelData=values.tobytes(), **bits(16, 16, 15, dtype == np.int16), **tags
    )
    dataset.add_new("PixelPaddingValue", "SS" if value < 0 else "US", limit or value)
    if limit:
        dataset.add_new("PixelPaddingRangeLimit", "SS", value - 100)
    return written(dataset)


SIGNED = HEAD.astype(np.int16) * 8 - 1000
LUT = {
    f"{colour}PaletteColorLookupTable{part}": value
    for colour in ("Red", "Green", "Blue")
    for part, value in (
        ("Descriptor", [256, 0, 16]),
        ("Data", (np.arange(256) * 16).astype("<u2").tobytes()),
    )
}
ODD = {
    **{
        f"TIFF {order}{kind} {packed} {photometric}": tiff(
            values.astype(kind)
            if photometric == "minisblack"
            else (~values.astype(kind) if kind[0] in "iu" else -values.astype(kind)),
            byteorder=order,
            compression=packed,
            photometric=photometric,
        )
        for order, packed, photometric in itertools.product(
            "<>", (None, "zlib"), ("minisblack", "miniswhite")
        )
        for kind, values in (
            ("u1", HEAD),
            ("i1", HEAD / 2.0 - 64),
            ("u2", DEEP),
            ("i2", SIGNED),
            ("u4", DEEP),
            ("i4", SIGNED),
            ("f2", HEAD / 255),
            ("f4", HEAD / 255),
            ("f8", HEAD / 255),
        )
    },
    "TIFF RGB 12 bits in 16": tiff(np.dstack([DEEP] * 3), photometric="rgb"),
    "TIFF RGB plane by plane": tiff(
        np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate"
    ),
    "TIFF alpha of zeros": tiff(
        np.dstack([RGB, NO_ALPHA]), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "TIFF palette": tiff(
        255 - HEAD,
        photometric="palette",
        colormap=np.repeat(np.arange(255, -1, -1, np.uint16)[None] * 257, 3, 0),
    ),
    "TIFF tiles": tiff(DEEP, tile=(32, 32)),
    "TIFF LZW": encode(DEEP, "TIFF", compression="tiff_lzw"),
    "BigTIFF": tiff(DEEP, bigtiff=True),
    "TIFF thumbnail first": tiff_pages((HEAD[::3, ::3].copy(), {"subfiletype": 1}), (HEAD, {})),
    "TIFF thumbnail unsaid": tiff_pages((HEAD[::6, ::6].copy(), {}), (HEAD, {})),
    "TIFF picture within": tiff_pages(
        (HEAD[::3, ::3].copy(), {"subfiletype": 1, "subifds": 1}), (HEAD, {})
    ),
    "PNG alpha of zeros": encode(np.dstack([RGB, NO_ALPHA])),
    "BMP alpha of zeros": encode(np.dstack([RGB, NO_ALPHA]), "BMP"),
    "PNG RGB 12 bits in 16": deep_png(np.dstack([DEEP] * 3)),
    "PNG RGBA 12 bits in 16": deep_png(np.dstack([DEEP] * 3 + [NO_ALPHA])),
    "PNG grey and alpha, 12 bits in 16": deep_png(np.dstack([DEEP, np.full_like(DEEP, 4095)])),
    "PNG long texts": long_text_png(),
    **{
        f"DICOM HighBit {high}": dicom(DEEP << (high - 11), **bits(16, 12, high))
        for high in range(11, 16)
    },
    "DICOM HighBit 15, signed": dicom_of(SIGNED << 4, **bits(16, 12, 15, 1)),
    "DICOM HighBit 13, signed": dicom_of((SIGNED & 4095) << 2, **bits(16, 12, 13, 1)),
    "DICOM overlay above": dicom(
        DEEP | (np.uint16(32768) * (NO_ALPHA[:, ::-1] == 0)), **bits(16, 12, 11)
    ),
    "DICOM overlay below": dicom(
        DEEP << 4 | np.random.default_rng(0).integers(0, 2, HEAD.shape), **bits(16, 12, 15)
    ),
    "DICOM HighBit of no sense": dicom(DEEP, **bits(16, 12, 3)),
    "DICOM 32 bits": dicom_of(DEEP.astype(np.uint32) * 1000, **bits(32, 32, 31)),
    "DICOM signed bytes": dicom_of((HEAD.astype(int) - 128).astype(np.int8), **bits(8, 8, 7, 1)),
    **{
        f"DICOM RGB {planar} {stored}": colour_dicom(
            RGB.astype(np.uint16) * factor, planar, **bits(16, stored, stored - 1)
        )
        for planar in (0, 1)
        for stored, factor in ((8, 1), (12, 16), (16, 16))
    },
    "DICOM YBR": colour_dicom(
        np.asarray(Image.fromarray(RGB).convert("YCbCr")),
        0,
        **bits(8, 8, 7) | {"PhotometricInterpretation": "YBR_FULL"},
    ),
    "DICOM palette of 12 bits": dicom_of(
        HEAD, **bits(8, 8, 7), PhotometricInterpretation="PALETTE COLOR", **LUT
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_shows_the_same_head(name):
    scans, skipped = read_upload([(name, ODD[name])])
    assert len(scans) == 1 and not skipped and shows_head(scans[0])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "how",
    [
        {"value": -2000},
        {"value": -32768},
        {"value": -2000, "limit": -1500},
        {"value": 65535, "dtype": np.uint16},
        {"value": -2000, "WindowCenter": 500, "WindowWidth": 1000},
    ],
)
def test_declared_padding_is_black_and_takes_no_part(how, photometric):
    (scan,) = read_scans(padded_dicom(**how, PhotometricInterpretation=photometric), "IM1")
    shown = 255 - scan.pixels if photometric == "MONOCHROME1" else scan.pixels
    assert (
        not scan.pixels[:64].any()
        and np.corrcoef(shown[64:].ravel(), HEAD[64:].ravel())[0, 1] > 0.99
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "write", [tiff, lambda values: nifti(values[::-1, ::-1].T[..., None], qform_code=1)]
)
def test_what_is_no_number_is_black_and_takes_no_part(value, write):
    values = HEAD.astype(np.float32)
    values[:64] = value
    (scan,) = read_scans(write(values), "scan")
    assert (
        not scan.pixels[:64].any()
        and np.corrcoef(scan.pixels[64:].ravel(), HEAD[64:].ravel())[0, 1] > 0.99
    )


# NIfTI


STACK = np.stack([phantom(n, side=128) for n in range(3)], -1)
VOLUME = STACK[::-1, ::-1].transpose(1, 0, 2)  # towards right, front and top


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
    data = nifti(values, kind=kind, order=order, qform_code=1)
    scans = read_scans(data, "head.nii")
    assert [scan.plane for scan in scans] == ["axial"] * 3 and shows_head(scans[1], STACK[..., 1])


@pytest.mark.parametrize(
    "values, spacing, count",
    [
        (coloured(*"RGB"), (1, 1, 5), 3),
        (coloured(*"RGBA"), (1, 1, 5), 3),
        (VOLUME, (1, 1, 1), 3),
        (VOLUME[..., 1], (1, 1), 1),
        (VOLUME[..., 1:2], (1, 1, 1), 1),
        (np.stack([VOLUME, VOLUME[::-1]], -1), (1, 1, 5), 3),
    ],
)
def test_a_volume_of_any_shape_is_cut_across_its_shortest_axis(values, spacing, count):
    scans = read_scans(nifti(values, spacing, qform_code=1), "head.nii")
    assert len(scans) == count and shows_head(scans[count // 2], STACK[..., 1])


@pytest.mark.parametrize(
    "fields, remark",
    [
        ({"scl_slope": np.nan}, None),
        ({"scl_slope": 2, "scl_inter": 7}, None),
        (
            {"scl_slope": 1, "scl_inter": np.inf},
            "The scaling in the file makes no sense and was ignored.",
        ),
        ({"sform_code": 1}, "The file does not say how the head lies; the slices may be turned."),
        (
            {"sform_code": 1, "srow_x": np.nan},
            "The file does not say how the head lies; the slices may be turned.",
        ),
        (
            {"qform_code": 1, "quatern_b": 5},
            "The file does not say how the head lies; the slices may be turned.",
        ),
    ],
)
def test_an_odd_field_of_a_volume_is_as_if_absent(fields, remark):
    scans = read_scans(nifti(VOLUME.astype(np.int16), **fields), "head.nii")
    assert len(scans) == 3 and scans[0].remarks == ((remark,) if remark else ())


def test_a_guessed_plane_is_said():
    remarks = read_scans(nifti(VOLUME, (1, 1, 1), qform_code=1), "head.nii")[0].remarks
    assert remarks == ("The file does not say in which plane it was acquired; axial was taken.",)


@pytest.mark.parametrize("tail", [b"", bytes(600), b"junk of a tape"])
def test_gzip_of_several_members_is_read(tail):
    data = nifti(VOLUME, qform_code=1)
    packed = b"".join(gzip.compress(part) for part in (data[:999], data[999:30_000], data[30_000:]))
    assert len(read_scans(packed + tail, "head.nii.gz")) == 3


# Odd headers


def with_raw(key, value, vr):
    """A DICOM file with one element of bytes that pydicom would not write."""
    data, tag = dicom(DEEP, WindowCenter=2040, WindowWidth=4080), pydicom.tag.Tag(key)
    start, new = (
        144 + int.from_bytes(data[140:144], "little"),
        value.encode() + b" " * (len(value) % 2),
    )
    element = struct.pack("<HH2sH", tag.group, tag.element, vr, len(new)) + new
    at = start
    while struct.unpack("<HH", data[at : at + 4]) < (tag.group, tag.element):
        at += 8 + int.from_bytes(data[at + 6 : at + 8], "little")
    same = data[at : at + 4] == element[:4]
    return (
        data[:at]
        + element
        + data[at + same * (8 + int.from_bytes(data[at + 6 : at + 8], "little")) :]
    )


@pytest.mark.parametrize(
    "key, value, vr",
    [
        ("PixelSpacing", "0,5\\0,5", b"DS"),
        ("PixelSpacing", "0.5", b"DS"),
        ("PixelSpacing", "wide", b"DS"),
        ("PixelSpacing", "0.5", b"LO"),
        ("PixelSpacing", "ab", b"US"),
        ("PixelSpacing", "nan\\nan", b"DS"),
        ("SliceLocation", "12,25", b"DS"),
        ("SliceLocation", "top", b"LO"),
        ("ImagePositionPatient", "1\\2", b"DS"),
        ("ImageOrientationPatient", "1\\0\\0", b"DS"),
        ("InstanceNumber", "one", b"IS"),
        ("RescaleSlope", "x", b"DS"),
        ("RescaleIntercept", "1e999", b"DS"),
        ("WindowCenter", "mid", b"DS"),
        ("WindowWidth", "4080,0", b"DS"),
        ("NumberOfFrames", "1,0", b"IS"),
        ("PixelPaddingValue", "none", b"LO"),
        ("HighBit", "ab", b"LO"),
    ],
)
def test_an_odd_value_is_as_if_absent_and_is_said(key, value, vr):
    (scan,) = read_scans(with_raw(key, value, vr), "IM1")
    assert shows_head(scan) and len(scan.remarks) == 1 and scan.remarks[0].startswith(key)


def test_a_decimal_comma_is_read_as_a_point():
    assert read_scans(with_raw("PixelSpacing", "1,0\\0,5", b"DS"), "IM1")[0].pixels.shape == (
        256,
        128,
    )


@pytest.mark.parametrize(
    "data, words",
    [
        (dicom(DEEP, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "Siemens mosaic"),
        (nifti(VOLUME, magic=b"ni1"), "half of a NIfTI pair"),
        (
            encode(np.dstack([HEAD] * 3), "TIFF", compression="tiff_lzw").replace(
                b"\x08\0\x08\0\x08\0", b"\x10\0\x10\0\x10\0"
            ),
            "TIFF of packed 16-bit unsigned values",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(data, words):
    with pytest.raises(UnreadableScan, match=words):
        read_scans(data, "scan")


# Series and studies


def slices(pictures, **tags):
    """Files of one series, a picture each, with their places."""
    return [
        (f"IM{n}", dicom(pixels, ImagePositionPatient=[0, 0, 5 * n], **AXIAL, **tags))
        for n, pixels in enumerate(pictures)
    ]


HEADS = [deep(n, lesion=True) for n in range(6)]
NOISE = np.random.default_rng(2).rayleigh(9, (96, 96))
PAD = np.pad(deep(9, lesion=True, side=64), 16, constant_values=1)


@pytest.mark.parametrize(
    "pictures",
    [
        [pixels // (1 + 15 * (n % 2)) for n, pixels in enumerate(HEADS)],  # half of them faint
        [*HEADS, HEADS[0] * np.uint16(12)],  # one very bright
        [
            *HEADS[:5],
            np.where(np.arange(96 * 96).reshape(96, 96) == 5, 65535, HEADS[5]),
        ],  # one hot pixel
        [np.where(pixels == 0, 3000, pixels) for pixels in HEADS],  # bright around
        [np.pad(pixels[24:72, 24:72], 24) for pixels in HEADS],  # a small field within zeros
        [
            *HEADS[:3],
            *(pixels[28:68, 28:68].repeat(2, 0).repeat(2, 1)[:96, :96] for pixels in HEADS),
        ],  # filled
        [*HEADS, PAD],
    ],
)
def test_no_slice_that_shows_something_is_left_out(pictures):
    sides = {min(pixels.shape) for pixels in pictures}
    pictures = [
        np.pad(p, (0, max(sides) - min(p.shape)), mode="edge").astype(np.uint16) for p in pictures
    ]
    scans, skipped = read_upload(slices(pictures))
    assert len(scans) == len(pictures) and not skipped


def test_frames_with_slopes_of_their_own_are_all_answered():
    def frame(slope):
        item, values = pydicom.Dataset(), pydicom.Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, 0
        item.PixelValueTransformationSequence = Sequence([values])
        return item

    groups = Sequence([frame(slope) for slope in (1, 50, 0.01, 1, 1, 3)])
    data = dicom(np.stack(HEADS), NumberOfFrames=6, PerFrameFunctionalGroupsSequence=groups)
    scans, skipped = read_upload([("enhanced", data)])
    assert len(scans) == 6 and not skipped


def test_blank_and_noisy_slices_are_left_out_one_by_one():
    scans, skipped = read_upload(slices([NOISE, *HEADS, NOISE[::-1], NOISE * 0 + 5]))
    assert [scan.slice for scan in scans] == [1, 2, 3, 4, 5, 6]
    reason = "The slice shows nothing but noise."
    assert [item[1:] for item in skipped] == [
        (reason, "1", 0),
        (reason, "1", 7),
        ("The slice is blank.", "1", 8),
    ]


def test_never_is_most_of_a_series_left_out():
    scans, skipped = read_upload(slices([*HEADS[:2], NOISE, NOISE[::-1], NOISE[:, ::-1]]))
    assert len(scans) == 5 and not skipped


@pytest.mark.parametrize("smooth", [1, 2])
def test_noise_is_told_from_heads_of_any_size(smooth):
    """Also noise that the scanner has interpolated."""
    noise = (
        np.random.default_rng(3)
        .normal(100, 20, (256 // smooth,) * 2)
        .repeat(smooth, 0)
        .repeat(smooth, 1)
    )
    assert emptiness(noise.clip(0, 255).astype(np.uint8)) == "The slice shows nothing but noise."
    assert {emptiness(phantom(n, side=side)) for n in range(4) for side in (48, 64, 128, 512)} == {
        None
    }


def test_an_instance_counts_once_and_so_does_the_same_picture():
    files = slices(HEADS)
    again = [("copy", files[2][1]), *slices(HEADS[:1], SeriesDescription="Sent again")]
    scans, skipped = read_upload([*files, *again])
    assert len(scans) == 6 and {item.file for item in skipped} == {"copy", "IM0"} | {"IM2"} & {
        skipped[-1].file
    }
    assert all("counts once" in item.reason for item in skipped)


def test_slices_that_share_a_number_but_not_a_place_are_not_the_same():
    """A careless anonymiser gives all instances one UID."""
    scans, skipped = read_upload(slices(HEADS, SOPInstanceUID="1.2.3"))
    assert len(scans) == 6 and not skipped


@pytest.mark.parametrize(
    "other",
    [
        {"PatientID": "B"},
        {"PatientName": "B"},
        {"PatientBirthDate": "19600101"},
        {"StudyInstanceUID": "1.2.9"},
    ],
)
def test_two_patients_are_two_studies_even_with_one_series_uid(other):
    scans, _ = read_upload([*slices(HEADS[:3]), *slices(HEADS[3:], **other)])
    assert [(scan.study, scan.series) for scan in scans] == [("1", "1")] * 3 + [("2", "2")] * 3
    assert len({scan.study_key for scan in scans}) == 2


def test_series_without_uid_are_told_apart_by_their_numbers():
    files = [
        *slices(HEADS[:3], SeriesInstanceUID="", SeriesNumber=1),
        *slices(HEADS[3:], SeriesInstanceUID="", SeriesNumber=2),
    ]
    assert [scan.series for scan in read_upload(files)[0]] == ["1"] * 3 + ["2"] * 3


def test_one_stray_file_refuses_no_upload():
    files = [("a.png", encode(HEAD)), ("notes.txt", b"notes"), ("cut.png", encode(HEAD)[:900])]
    scans, skipped = read_upload(files)
    assert [scan.file for scan in scans] == ["a.png"] and [item.file for item in skipped] == [
        "notes.txt",
        "cut.png",
    ]
    assert skipped[1].reason == "cut.png is damaged or cut off; export it again."


def test_a_zip_in_a_zip_is_opened_once():
    inner = zipped(**{"a.png": encode(HEAD), "deeper.zip": zipped(b=encode(HEAD))})
    scans, skipped = read_upload([("study.zip", zipped(**{"inner.zip": inner}))])
    assert [scan.file for scan in scans] == ["a.png"]
    assert skipped[0].reason == "deeper.zip lies too deep, in a ZIP within a ZIP; unpack it."


@pytest.mark.parametrize("name", ["caf\udce9.png", "\udcff\udcfe.dcm", "слайд.png"])
def test_any_name_can_be_kept(name):
    assert read_scans(encode(HEAD), name)[0].file == plain_name(name)
    plain_name(name).encode()


def test_a_zip_with_a_name_that_is_not_the_utf_8_it_promises_is_read():
    data = zipped(**{"aä.png": encode(HEAD)}).replace("aä".encode(), b"a\xe4\xff")
    assert read_scans(data, "study.zip")[0].file.endswith(".png")


def test_identifiers_are_read_only_if_asked_for_and_keep_their_letters(client):
    data = dicom(DEEP, SpecificCharacterSet="ISO_IR 144", PatientName="Иванов^Иван")
    assert read_upload([("IM1", data)])[0][0].identifiers is None
    assert (
        read_upload([("IM1", data)], identifiers=True)[0][0].identifiers["PatientName"]
        == "Иванов^Иван"
    )
    form = {"file": (io.BytesIO(data), "IM1"), "identifiers": "keep"}
    result = client.post("/upload", data=form).get_json()
    capture = client.get(f"/results/{result['id']}/0/heatmap.dcm").data
    assert pydicom.dcmread(io.BytesIO(capture)).PatientName == "Иванов^Иван"


# Cost


def many_passes():
    """A progressive JPEG that says 7000 x 7000, its last scan 500 times."""
    data = bytearray(encode(HEAD, "JPEG", progressive=True))
    size, last = data.index(b"\xff\xc2") + 5, data.rindex(b"\xff\xda")
    data[size : size + 4] = struct.pack(">HH", 7000, 7000)
    return bytes(data[:last] + data[last:-2] * 500 + data[-2:])


def in_dicom(frame, side, syntax=uid.JPEGBaseline8Bit):
    dataset = dataset_of(HEAD, Rows=side, Columns=side, **bits(8, 8, 7))
    dataset.PixelData = encapsulate([frame + bytes(len(frame) % 2)])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = syntax
    return written(dataset)


def many_pages(count=20_000):
    """A TIFF of `count` empty pages."""
    pages = (struct.pack("<HI", 0, 8 + 6 * (n + 1) if n < count - 1 else 0) for n in range(count))
    return b"II*\0\x08\0\0\0" + b"".join(pages)


def many_elements(inside=b""):
    """A DICOM header of 600,000 empty elements, or of one sequence of as many items."""
    data = dicom(DEEP)
    at = data.index(struct.pack("<HH", 0x7FE0, 0x0010))
    empty = b"\x29\0\x10\x10LO\0\0" * 600_000
    return data[:at] + (inside or empty) + data[at:]


ITEMS = b"\xfe\xff\0\xe0\0\0\0\0" * 600_000
SEQUENCE = struct.pack("<HH2sHI", 0x5200, 0x9229, b"SQ", 0, len(ITEMS)) + ITEMS


def strip_bomb():
    """A deflated TIFF whose only strip holds far more than its page."""
    data = bytearray(tiff(HEAD, compression="zlib", rowsperstrip=128))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages[0].tags
        offset, size = tags["StripOffsets"].valueoffset, tags["StripByteCounts"].valueoffset
    bomb = zlib.compress(bytes(200_000_000), 1)
    data[offset : offset + 4], data[size : size + 4] = (
        struct.pack("<I", len(data)),
        struct.pack("<I", len(bomb)),
    )
    return bytes(data) + bomb


@pytest.mark.parametrize(
    "make, words",
    [
        (many_passes, "too many passes"),
        (lambda: in_dicom(many_passes(), 7000), "damaged"),
        (lambda: in_dicom(encode(HEAD, "JPEG"), 64), "damaged"),
        (many_pages, "pages or more|damaged"),
        (many_elements, "too many elements"),
        (lambda: many_elements(SEQUENCE), "too many elements"),
        (strip_bomb, "damaged|packed"),
        (lambda: gzip.compress(bytes(120_000_000), 1), "larger than 96 MB"),
        (lambda: gzip.compress(b"", 1) * 50_000, "is not a DICOM"),
        (
            lambda: zipped(**{f"{n}.zip": zipped(a=bytes(40_000_000)) for n in range(3)}),
            "larger than 96 MB",
        ),
        (
            lambda: zipped(**{f"{n}.png": encode(np.zeros((6000, 6000), bool)) for n in range(4)}),
            "larger than 96 MB",
        ),
    ],
)
def test_a_small_file_of_large_cost_is_refused_before_the_work(make, words):
    data, start = make(), time.thread_time()
    with pytest.raises(UnreadableScan, match=words):
        read_scans(data, "scan")
    assert time.thread_time() - start < 3


def test_all_files_of_an_upload_share_one_budget():
    files = [(f"{n}.zip", zipped(a=bytes(900_000))) for n in range(3)]
    with pytest.raises(UnreadableScan, match="larger than 2 MB when unpacked"):
        read_upload(files, Limits(unpacked=2 * 2**20))


def test_an_upload_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("app.SECONDS", -1)
    monkeypatch.setattr("app.SECONDS_PER_MB", -1)
    with pytest.raises(UnreadableScan, match="takes too long to read"):
        read_upload([("study.zip", zipped(**series(3)))])

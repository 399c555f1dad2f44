"""What read_scans() and prepare() promise."""

import gzip
import io
import pathlib
import time
import zlib

import gdcm
import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phantoms import (
    ORIENTATIONS,
    close,
    dataset_of,
    deep,
    dicom,
    encode,
    phantom,
    series,
    volume,
    written,
    zipped,
)
from PIL import Image, ImageDraw, ImageFont
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.sequence import Sequence

import app as web
from app import (
    SIDE,
    Limits,
    UnreadableScan,
    distance_from,
    head_box,
    heat_levels,
    prepare,
    quantile,
    read_scans,
    read_upload,
)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "JPEG"])
def test_every_kind_of_picture_gives_the_same_scan(kind):
    """The kind is told from the content, whatever the name says."""
    pixels = phantom()
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    (scan,) = read_scans(encode(pixels, kind, **options), "scan.txt")
    assert scan.pixels.dtype == np.uint8
    assert np.abs(scan.pixels.astype(int) - pixels).mean() < (1.5 if kind == "JPEG" else 0.01)


def test_sixteen_bits_are_scaled_to_the_same_scan():
    """12-bit values in a 16-bit picture read like the 8-bit ones they came from."""
    pixels = phantom()
    deep = pixels.astype(np.uint16) * 16 + 100
    (scan,) = read_scans(encode(deep, "PNG"), "deep.png")
    assert np.corrcoef(scan.pixels.ravel(), pixels.ravel())[0, 1] > 0.999
    assert scan.window[0] < scan.window[1]


def test_one_hot_pixel_does_not_turn_a_deep_scan_black():
    deep = phantom().astype(np.uint16) * 4
    deep[0, 0] = 65535
    (scan,) = read_scans(encode(deep, "TIFF"), "hot.tif")
    assert scan.pixels.mean() > 20


def test_a_tiff_gives_a_scan_a_page():
    pages = [Image.fromarray(phantom(seed)) for seed in range(3)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    scans = read_scans(file.getvalue(), "pages.tif")
    assert [scan.slice for scan in scans] == [0, 1, 2]
    assert np.array_equal(scans[2].pixels, phantom(2))


def test_a_large_page_behind_a_small_one_is_refused_as_well():
    file = io.BytesIO()
    Image.new("1", (64, 64)).save(
        file, "TIFF", save_all=True, append_images=[Image.new("1", (8000, 8000))]
    )
    with pytest.raises(UnreadableScan, match="8000 x 8000 pixels"):
        read_scans(file.getvalue(), "pages.tif")


def test_what_is_transparent_is_black():
    layers = np.full((64, 64, 4), 255, np.uint8)
    layers[:32, :, 3] = 0
    (scan,) = read_scans(encode(layers), "clear.png")
    assert not scan.pixels[:32].any() and scan.pixels[32:].all()


def test_a_large_scan_is_reduced_with_its_aspect_kept():
    (scan,) = read_scans(encode(np.zeros((1500, 3000), np.uint8)), "large.png")
    assert scan.pixels.shape == (512, 1024)


@pytest.mark.parametrize(
    "name, kept",
    [
        ("../../etc/passwd", "passwd"),
        (r"C:\patients\Doe.png", "Doe.png"),
        ("a\r\nSet-Cookie: x", "aSet-Cookie: x"),
        ("", "The file"),
        ("x" * 300, "x" * 100),
    ],
)
def test_only_the_last_part_of_a_name_is_kept(name, kept):
    assert read_scans(encode(phantom()), name)[0].file == kept


@pytest.mark.parametrize(
    "picture, warning",
    [
        (phantom(side=100), "The picture is small (100 pixels); details may be lost."),
        (phantom() // 8, "The contrast is low; the answer may be unreliable."),
        (
            np.dstack([phantom()] * 2 + [phantom() // 3]),
            "The picture is in colour; it was turned to grey.",
        ),
        (
            255 - phantom(),
            "The background is bright; the answer for an inverted picture is unreliable.",
        ),
    ],
)
def test_a_doubtful_picture_carries_a_warning(picture, warning):
    assert read_scans(encode(picture), "scan")[0].warnings == (warning,)


@pytest.mark.parametrize("side, points", [(256, 9), (256, 16), (512, 12), (512, 24), (1024, 24)])
def test_text_beside_the_head_is_warned_of(side, points):
    picture = Image.fromarray(phantom(3, side=side))
    font = ImageFont.load_default(points)
    ImageDraw.Draw(picture).text((6, 6), "DOE JOHN\n1950-01-01", fill=255, font=font)
    (scan,) = read_scans(encode(np.asarray(picture)), "scan")
    assert scan.warnings == (
        "There is text or a scale beside the head; check that it identifies nobody.",
    )


def test_the_checks_say_what_was_looked_at():
    (scan,) = read_scans(encode(phantom(side=300)), "scan")
    assert [check.name for check in scan.checks] == [
        "Size",
        "Contrast",
        "Colour",
        "Background",
        "Text",
    ]
    assert (
        all(check.passed for check in scan.checks) and scan.checks[0].message == "300 x 300 pixels"
    )


def test_a_good_picture_carries_no_warning():
    assert read_scans(encode(np.dstack([phantom()] * 3)), "scan")[0].warnings == ()


def test_prepare_gives_three_equal_channels_of_the_full_range():
    prepared = prepare(phantom())
    assert (prepared.shape, prepared.dtype) == ((SIDE, SIDE, 3), np.uint8)
    assert np.ptp(prepared, axis=2).max() == 0
    assert (prepared.min(), prepared.max()) == (0, 255)


def test_prepare_refuses_what_is_not_a_greyscale_picture():
    with pytest.raises(
        ValueError, match=r"expected uint8 pixels \(H, W\), got float64 \(4, 4, 3\)"
    ):
        prepare(np.zeros((4, 4, 3)))


@pytest.mark.parametrize("background", [0, 255])
def test_the_head_is_found_on_any_background(background):
    """A head of 100 x 120 in a wide frame, on black or white, is boxed to within its soft edge."""
    frame = np.full((400, 300), background, np.uint8)
    frame[90:210, 60:160] = 128
    x0, y0, x1, y1 = head_box(frame)
    assert np.abs(np.array([x0, y0, x1, y1]) - (60, 90, 160, 210)).max() <= 2


def test_noise_around_a_head_is_not_taken_for_it():
    """Noise of a twentieth of the range, which no eye minds, leaves the crop where it was."""
    clean = np.pad(phantom(), 80)
    noisy = (
        (clean + np.random.default_rng(0).normal(0, 0.05 * 255, clean.shape))
        .clip(0, 255)
        .astype(np.uint8)
    )
    assert np.abs(np.subtract(head_box(noisy), head_box(clean))).max() <= 8


def test_the_margin_around_a_head_does_not_matter():
    """The same head in a wider frame gives nearly the same prepared picture."""
    wide = np.pad(phantom(), ((30, 90), (60, 10)))
    assert np.abs(prepare(wide).astype(int) - prepare(phantom())).mean() < 3


def test_an_even_picture_is_not_cropped():
    assert head_box(np.full((50, 80), 7, np.uint8)) == (0, 0, 80, 50)


@pytest.mark.parametrize("background", [0, 20.5, 255])
def test_distances_come_with_the_percentile_that_sorting_gives(background):
    noisy = np.random.default_rng(1).integers(0, 256, (40, 63), dtype=np.uint8)
    for pixels in (phantom(), noisy, np.full((9, 9), 7, np.uint8)):
        difference, most = distance_from(background, pixels, pixels[::2, ::2])
        assert np.array_equal(difference, np.abs(pixels - np.float32(background)))
        assert most == pytest.approx(np.percentile(difference[::2, ::2], 99), rel=1e-6)


def test_heat_lies_over_the_spot_that_was_hot():
    """A lesion's place in the prepared picture and in the scan are the same place of the head."""
    pixels = np.zeros((300, 400), np.uint8)
    pixels[100:220, 80:180] = 90
    pixels[120:136, 150:166] = 255
    prepared = prepare(pixels)[..., 0]
    heat = prepared.reshape(14, 16, 14, 16).mean((1, 3)).astype(np.float32) - 130
    y, x = np.unravel_index(heat_levels(pixels, heat).argmax(), pixels.shape)
    assert abs(y - 128) < 12 and abs(x - 158) < 12


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.95, 1])
def test_quantiles_are_those_of_numpy(share):
    ordered = np.sort(np.random.default_rng(0).normal(size=(4, 38)))
    assert quantile(ordered, share) == pytest.approx(np.quantile(ordered, share, axis=1))


# DICOM


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ExplicitVRLittleEndian,
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.RLELossless,
    ],
    ids=lambda syntax: syntax.name,
)
def test_every_syntax_that_pydicom_writes_gives_the_same_scan(syntax):
    plain = dataset_of(deep())
    (expected,) = read_scans(written(plain), "IM1")
    if syntax.is_compressed and not syntax.is_deflated:
        plain.compress(syntax)
    plain.file_meta.TransferSyntaxUID = syntax
    if syntax == uid.ExplicitVRBigEndian:
        plain.PixelData = deep().astype(">u2").tobytes()
        plain["PixelData"].VR = "OW"
    (scan,) = read_scans(written(plain), "IM1")
    assert close(scan.pixels, expected.pixels)


@pytest.mark.parametrize(
    "name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"]
)
def test_every_syntax_that_gdcm_writes_gives_the_same_scan(tmp_path, name):
    (tmp_path / "plain").write_bytes(dicom(deep()))
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(tmp_path / "plain"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "packed"))
    assert writer.Write()
    plain, packed = (
        read_scans((tmp_path / kind).read_bytes(), kind)[0] for kind in ("plain", "packed")
    )
    assert close(packed.pixels, plain.pixels)


def test_a_dicom_file_is_known_by_its_content():
    """Without preamble, without extension, gzipped: the same scan."""
    bare, whole = dataset_of(deep()), dicom(deep())
    del bare.file_meta
    bare = written(bare, bare=True, implicit_vr=True, little_endian=True)
    for data in (bare, gzip.compress(whole)):
        assert close(read_scans(data, "scan")[0].pixels, read_scans(whole, "scan")[0].pixels)


def test_the_window_of_the_file_is_applied_and_named():
    (scan,) = read_scans(dicom(deep(), WindowCenter=1000, WindowWidth=800), "IM1")
    values = deep()[20:80, 20:80].astype(float)
    assert scan.window == (600, 1400)
    assert close(
        scan.pixels[20:80, 20:80], ((values - 600.5) / 799 * 255).clip(0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize("centre, width", [(60000, 10), (1000, 50000)])
def test_a_window_that_would_hide_the_scan_is_not_applied(centre, width):
    """Beyond the values, or so wide that next to nothing is told apart."""
    hidden, plain = (
        read_scans(dicom(deep(), **tags), "IM1")[0]
        for tags in ({"WindowCenter": centre, "WindowWidth": width}, {})
    )
    assert close(hidden.pixels, plain.pixels)


def test_rescaling_comes_before_the_window():
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 1900, "WindowWidth": 1600}
    (scan,) = read_scans(dicom(deep(), **tags), "IM1")
    (same,) = read_scans(dicom(deep(), WindowCenter=1000, WindowWidth=800), "IM1")
    assert close(scan.pixels, same.pixels)


def test_monochrome1_is_turned_over():
    inverted, plain = (
        read_scans(dicom(pixels, PhotometricInterpretation=kind), "IM1")[0]
        for pixels, kind in ((4095 - deep(), "MONOCHROME1"), (deep(), "MONOCHROME2"))
    )
    assert close(inverted.pixels, plain.pixels)


def test_the_frames_of_an_enhanced_file_have_their_own_window_and_place():
    def group(z, centre):
        item, plane, window = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        plane.ImagePositionPatient, window.WindowCenter, window.WindowWidth = [0, 0, z], centre, 500
        item.PlanePositionSequence, item.FrameVOILUTSequence = Sequence([plane]), Sequence([window])
        return item

    shared, plane = pydicom.Dataset(), pydicom.Dataset()
    plane.ImageOrientationPatient = ORIENTATIONS["coronal"]
    shared.PlaneOrientationSequence = Sequence([plane])
    data = dicom(
        np.stack([deep(n) for n in range(3)]),
        NumberOfFrames=3,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence([group(n, 500 + 100 * n) for n in range(3)]),
    )
    scans = read_scans(data, "enhanced")
    assert {(scan.slice, scan.window) for scan in scans} == {
        (0, (250, 750)),
        (1, (350, 850)),
        (2, (450, 950)),
    }
    assert {scan.plane for scan in scans} == {"coronal"}


@pytest.mark.parametrize(
    "file, size",
    [
        ("examples_palette.dcm", (350, 800)),
        ("examples_rgb_color.dcm", (240, 320)),
        ("examples_jpeg2k.dcm", (480, 640)),
        ("image_dfl.dcm", (512, 512)),
        ("MR_small_bigendian.dcm", (64, 64)),
        ("MR_small_jpeg_ls_lossless.dcm", (64, 64)),
        ("J2K_pixelrep_mismatch.dcm", (512, 512)),
        ("examples_ybr_color.dcm", (240, 320)),
    ],
)
def test_files_that_pydicom_ships_are_read(file, size):
    data = pathlib.Path(get_testdata_file(file)).read_bytes()
    assert {scan.pixels.shape for scan in read_scans(data, file)} == {size}


@pytest.mark.parametrize(
    "tags, warning",
    [
        ({"Modality": "CT"}, "The file says that it is no MRI (modality CT)."),
        ({"BodyPartExamined": "KNEE"}, "The file says that it shows no head (body part KNEE)."),
        (
            {"BurnedInAnnotation": "YES"},
            "The file says that text is burned in; check that it identifies nobody.",
        ),
        ({"BodyPartExamined": "BRAIN"}, None),
    ],
)
def test_what_speaks_against_a_brain_mri_is_a_warning(tags, warning):
    warnings = read_scans(dicom(deep(side=160), **tags), "IM1")[0].warnings
    assert warnings == ((warning,) if warning else ())


@pytest.mark.parametrize(
    "data, sentence, status",
    [
        (b"", "scan is empty; choose the file again.", 400),
        (
            b"hello, I am text",
            "scan is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them; "
            "export the scan as one of these.",
            415,
        ),
        (encode(phantom(), "JPEG")[:3000], "scan is damaged or cut off; export it again.", 415),
        (encode(phantom())[:3000], "scan is damaged or cut off; export it again.", 415),
        (
            encode(phantom(), "GIF"),
            "scan is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them; "
            "export the scan as one of these.",
            415,
        ),
        (
            encode(np.zeros((20, 300), np.uint8)),
            "scan has 300 x 20 pixels, but a scan needs at least 32 x 32.",
            415,
        ),
        (
            encode(np.zeros((32, 600), np.uint8)),
            "scan has 600 x 32 pixels, longer and narrower than any scan; "
            "crop it and send it again.",
            415,
        ),
        (
            encode(np.zeros((8000, 8000), bool)),
            "scan has 8000 x 8000 pixels, more than the 50,000,000 allowed; send it smaller.",
            413,
        ),
        (
            pathlib.Path(get_testdata_file("JPGExtended.dcm")).read_bytes(),
            "scan is compressed as JPEG Extended (Process 2 and 4) and cannot be decoded; "
            "export it uncompressed (Explicit VR Little Endian).",
            415,
        ),
        (
            pathlib.Path(get_testdata_file("rtplan.dcm")).read_bytes(),
            "scan is a DICOM file without a picture; send the images of the study.",
            415,
        ),
        (dicom(deep())[:9000], "scan is damaged or cut off; export it again.", 415),
        (
            dicom(deep(), Rows=30_000, Columns=30_000),
            "scan has 30000 x 30000 pixels, more than the 25,000,000 allowed; send it smaller.",
            413,
        ),
        (
            dicom(deep(), NumberOfFrames=5000),
            "scan has 5000 frames, but only 1000 more scans are allowed; send fewer.",
            413,
        ),
        (
            gzip.compress(b"nothing of the kind"),
            "scan is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, "
            "or a ZIP of them; export the scan as one of these.",
            415,
        ),
        (gzip.compress(bytes(1000))[:-9], "scan is damaged or cut off; export it again.", 415),
        (
            zipped(**{"a.txt": b"text"}),
            "a.txt is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, "
            "or a ZIP of them; export the scan as one of these.",
            415,
        ),
        (zipped(), "scan is an empty ZIP; pack the scans into it.", 415),
        (zipped(a=b"x")[:40], "scan is damaged or cut off; export it again.", 415),
    ],
)
def test_a_bad_file_gets_one_sentence(data, status, sentence):
    with pytest.raises(UnreadableScan) as caught:
        read_scans(data, "scan")
    assert (str(caught.value), caught.value.status) == (sentence, status)


@pytest.mark.parametrize("data", [zipped(a=bytes(3_000_000)), gzip.compress(bytes(3_000_000))])
def test_what_unpacks_to_too_much_is_refused_by_size(data):
    with pytest.raises(UnreadableScan, match="larger than 2 MB when unpacked") as caught:
        read_scans(data, "bomb", Limits(unpacked=2 * 2**20))
    assert caught.value.status == 413


def test_a_zip_of_too_many_files_is_refused():
    with pytest.raises(UnreadableScan, match="holds 3 files, but at most 2 are read") as caught:
        read_scans(zipped(a=b"a", b=b"b", c=b"c"), "many.zip", Limits(files=2))
    assert caught.value.status == 413


# NIfTI


@pytest.mark.parametrize(
    "plane, bright",
    [
        ("axial", (0, 0)),  # front above, the patient's right on the left
        ("coronal", (0, 0)),  # top above, the patient's right on the left
        ("sagittal", (0, 0)),  # top above, the face on the left
    ],
)
def test_a_volume_is_shown_as_radiologists_see_it(plane, bright):
    scans = read_scans(volume(), "head.nii", plane=plane)
    middle = scans[int(0.65 * len(scans))].pixels.astype(float)
    h, w = (n // 2 for n in middle.shape)
    quarters = [
        [middle[:h, :w].sum(), middle[:h, w:].sum()],
        [middle[h:, :w].sum(), middle[h:, w:].sum()],
    ]
    assert np.unravel_index(np.argmax(quarters), (2, 2)) == bright


def test_the_way_a_volume_is_stored_does_not_matter():
    straight, turned = (
        read_scans(volume(flip=flip), "head.nii", plane="axial") for flip in (False, True)
    )
    assert all(close(a.pixels, b.pixels) for a, b in zip(straight, turned, strict=True))


def test_voxels_that_are_no_cubes_are_made_square():
    (scan, *_) = read_scans(volume((64, 64, 40), (1, 1, 2)), "head.nii", plane="coronal")
    assert scan.pixels.shape == (80, 64)


def test_the_plane_is_that_of_acquisition_the_one_chosen_or_all():
    data = gzip.compress(volume((48, 48, 40), (1, 1, 5)))
    planes = {
        choice: {scan.plane for scan in read_scans(data, "head.nii.gz", plane=choice)}
        for choice in (None, "coronal", "all")
    }
    assert planes == {
        None: {"axial"},
        "coronal": {"coronal"},
        "all": {"axial", "coronal", "sagittal"},
    }


def test_empty_slices_of_a_volume_are_left_out_one_by_one():
    scans, skipped = read_upload([("head.nii", volume())], plane="axial")
    assert len(scans) + len(skipped) == 60 and len(skipped) >= 4
    assert skipped[0] == ("head.nii", "The slice is blank.", "1", 0)
    assert [scan.slice for scan in scans] == list(range(scans[0].slice, scans[-1].slice + 1))


def test_a_volume_without_values_outside_the_head_loses_no_slice():
    """Masked volumes hold NaN there, which is neither more nor less than anything."""
    image = nibabel.Nifti1Image.from_bytes(volume())
    values = image.get_fdata(dtype=np.float32)
    values *= np.linspace(0.2, 1, values.shape[0])[:, None, None]
    masked = np.where(values == 0, np.nan, values)
    found = [
        read_upload([("head.nii", nibabel.Nifti1Image(v, image.affine).to_bytes())], plane="axial")
        for v in (values, masked)
    ]
    assert found[0][1] == found[1][1]


def test_a_study_in_files_with_strange_numbers_in_their_names_is_read():
    files = [(data, f"IM{digit}") for data, digit in zip(series(3).values(), "²①٣")]
    assert len(read_upload([(name, data) for data, name in files])[0]) == 3


def test_of_several_volumes_the_first_is_read_with_a_warning():
    (scan, *_) = read_scans(volume((160, 160, 40), extra=(3,)), "dwi.nii", plane="axial")
    assert scan.warnings[0] == "The file holds 3 volumes; the first was read."


# Bytes of strangers

SCAN = encode(phantom(1, lesion=True, side=64))


def deflated():
    """A DICOM file of the deflated syntax."""
    dataset = dataset_of(deep(side=48))
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    return written(dataset)


def run_length_encoded():
    dataset = dataset_of(deep(side=48))
    dataset.compress(uid.RLELossless)
    return written(dataset)


SEEDS = {
    "JPEG": encode(phantom(side=64), "JPEG"),
    "PNG": encode(phantom(side=64)),
    "TIFF": encode(phantom(side=64), "TIFF"),
    "WEBP": encode(phantom(side=64), "WEBP"),
    "BMP": encode(phantom(side=64), "BMP"),
    "deep PNG": encode(deep(side=64)),
    "DICOM": dicom(deep(side=48)),
    "RLE": run_length_encoded(),
    "deflated": deflated(),
    "NIfTI": volume((33, 34, 35)),
    "ZIP": zipped(a=SCAN, b=dicom(deep(side=48))),
}


# Bytes


@st.composite
def spoilt(draw, data):
    """A file with bytes changed, put in, taken out, or its end cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(("change", "insert", "remove", "cut", "large")))
        if kind == "change":
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "large":
            data[at : at + 4] = b"\xff\xff\xff\x7f"
        else:
            del data[max(at, 1) :]
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.parametrize("kind", SEEDS)
def test_a_spoilt_file_gives_scans_or_a_sentence(kind):
    @settings(
        max_examples=80, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(spoilt(SEEDS[kind]))
    def check(data):
        try:
            scans = read_scans(data, "scan", Limits(pixels=4_000_000, unpacked=2**22))
        except UnreadableScan as error:
            assert str(error).endswith(".") and error.status in (400, 413, 415)
        else:
            assert all(seen(scan).shape == (224, 224, 3) for scan in scans)

    check()


@pytest.mark.parametrize(
    "syntax", [b"1.2.840.10008.1.2.9", b"1.2.3.4.5.6.7.8.9.1", b"not a syntax at all"]
)
def test_an_unknown_transfer_syntax_is_a_sentence(syntax):
    """Found by fuzz_reading.py."""
    data = dicom(deep(side=48)).replace(b"1.2.840.10008.1.2.1\0", syntax + b"\0")
    assert syntax in data
    with pytest.raises(UnreadableScan, match="damaged or cut off"):
        read_scans(data, "scan")


@settings(max_examples=300, deadline=5000)
@given(st.binary(max_size=400))
def test_any_bytes_give_scans_or_a_sentence(data):
    try:
        for scan in read_scans(data, "scan"):
            seen(scan)
    except UnreadableScan as error:
        assert str(error).endswith(".")


def seen(scan):
    """What the network sees of a scan, and all that is found out about it."""
    assert scan.pixels.dtype == np.uint8 and isinstance(scan.warnings, tuple)
    return web.prepare(scan.pixels, scan.box)


def bomb_of(kind, size=80 * 2**20):
    """A small file that unpacks to a large one."""
    if kind == "deflated DICOM":
        dataset = dataset_of(deep(side=48))
        dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
        data = written(dataset)
        start = 144 + int.from_bytes(data[140:144], "little")
        inner = zlib.decompressobj(-15).decompress(data[start:])
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return data[:start] + packer.compress(inner + bytes(size)) + packer.flush()
    if kind == "ZIP":
        return zipped(**{f"{n}": bytes(size // 4) for n in range(4)})
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(bytes(size)) + packer.flush()


@pytest.mark.parametrize("kind", ["deflated DICOM", "ZIP", "gzip"])
def test_a_bomb_is_refused_before_it_is_in_memory(kind):
    """What is unpacked on the way stays near the limit, by the process' own allocations."""
    import tracemalloc

    bomb = bomb_of(kind)
    assert len(bomb) < 2**20
    tracemalloc.start()
    with pytest.raises(UnreadableScan, match="larger than 4 MB when unpacked"):
        read_scans(bomb, "bomb", Limits(unpacked=4 * 2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20


def test_a_png_bomb_is_refused_by_its_header():
    data = encode(np.zeros((20_000, 20_000), bool))
    start = time.monotonic()
    with pytest.raises(UnreadableScan, match="20000 x 20000 pixels"):
        read_scans(data, "bomb.png")
    assert time.monotonic() - start < 1


def test_many_large_pictures_together_are_refused():
    """A thousand of 1024 x 1024 would fill the memory that a study may take."""
    page = encode(np.tile(phantom(side=256), (4, 4)))
    with pytest.raises(UnreadableScan, match="when unpacked; send it in parts"):
        read_upload([(f"{n}.png", page) for n in range(6)], Limits(unpacked=4 * 2**20))


def test_a_zip_with_a_password_is_a_sentence():
    data = bytearray(zipped(a=SCAN))
    for at in (6, data.index(b"PK\x01\x02") + 8):
        data[at] |= 1  # the flag of an encrypted member
    with pytest.raises(UnreadableScan, match="a is locked with a password; send it unlocked."):
        read_scans(bytes(data), "secret.zip")

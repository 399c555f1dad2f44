"""What read_scans() and prepare() promise."""

import io

import numpy as np
import pytest
from conftest import encode, phantom
from PIL import Image, ImageDraw, ImageFont

from app import SIDE, UnreadableScan, differences, head_box, heat_levels, prepare, quantile, read_scans


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
    Image.new("1", (64, 64)).save(file, "TIFF", save_all=True, append_images=[Image.new("1", (8000, 8000))])
    with pytest.raises(UnreadableScan, match="8000 x 8000 pixels"):
        read_scans(file.getvalue(), "pages.tif")


def test_what_is_transparent_is_black():
    layers = np.dstack([np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), np.uint8)])
    assert not read_scans(encode(layers), "clear.png")[0].pixels.any()


def test_a_large_scan_is_reduced_with_its_aspect_kept():
    (scan,) = read_scans(encode(np.zeros((1500, 3000), np.uint8)), "large.png")
    assert scan.pixels.shape == (512, 1024)


@pytest.mark.parametrize("name, kept", [
    ("../../etc/passwd", "passwd"), (r"C:\patients\Doe.png", "Doe.png"),
    ("a\r\nSet-Cookie: x", "aSet-Cookie: x"), ("", "The file"), ("x" * 300, "x" * 100),
])  # fmt: skip
def test_only_the_last_part_of_a_name_is_kept(name, kept):
    assert read_scans(encode(phantom()), name)[0].file == kept


@pytest.mark.parametrize("data, status, sentence", [
    (b"", 400, "scan is empty; choose the file again."),
    (b"hello, I am text", 415,
     "scan is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them; "
         "export the scan as one of these."),
    (encode(phantom(), "JPEG")[:3000], 415, "scan is damaged or cut off; export it again."),
    (encode(phantom())[:3000], 415, "scan is damaged or cut off; export it again."),
    (encode(phantom(), "GIF"), 415,
     "scan is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, or a ZIP of them; "
         "export the scan as one of these."),
    (encode(np.zeros((20, 300), np.uint8)), 415,
     "scan has 300 x 20 pixels, but a scan needs at least 32 x 32."),
    (encode(np.zeros((32, 600), np.uint8)), 415,
     "scan has 600 x 32 pixels, longer and narrower than any scan; cut it out and send it again."),
    (encode(np.zeros((8000, 8000), bool)), 413,
     "scan has 8000 x 8000 pixels, more than the 50,000,000 allowed; send it smaller."),
])  # fmt: skip
def test_a_bad_file_gets_one_sentence(data, status, sentence):
    with pytest.raises(UnreadableScan) as caught:
        read_scans(data, "scan")
    assert (str(caught.value), caught.value.status) == (sentence, status)


@pytest.mark.parametrize("picture, warning", [
    (phantom(side=100), "The picture is small (100 pixels); details may be lost."),
    (phantom() // 8, "The contrast is low; the answer may be unreliable."),
    (np.dstack([phantom()] * 2 + [phantom() // 3]), "The picture is in colour; it was turned to grey."),
    (255 - phantom(), "The background is bright; the answer for an inverted picture is unreliable."),
])
def test_a_doubtful_picture_carries_a_warning(picture, warning):
    assert read_scans(encode(picture), "scan")[0].warnings == (warning,)


@pytest.mark.parametrize("side, points", [(256, 9), (256, 16), (512, 12), (512, 24), (1024, 24)])
def test_text_beside_the_head_is_warned_of(side, points):
    picture = Image.fromarray(phantom(3, side=side))
    font = ImageFont.load_default(points)
    ImageDraw.Draw(picture).text((6, 6), "DOE JOHN\n1950-01-01", fill=255, font=font)
    (scan,) = read_scans(encode(np.asarray(picture)), "scan")
    assert scan.warnings == ("There is text or a scale beside the head; see that it names nobody.",)


def test_the_checks_say_what_was_looked_at():
    (scan,) = read_scans(encode(phantom(side=300)), "scan")
    assert [check.name for check in scan.checks] == ["Size", "Contrast", "Colour", "Background", "Text"]
    assert all(check.passed for check in scan.checks) and scan.checks[0].says == "300 x 300 pixels"


def test_a_good_picture_carries_no_warning():
    assert read_scans(encode(np.dstack([phantom()] * 3)), "scan")[0].warnings == ()


def test_prepare_gives_three_equal_channels_of_the_full_range():
    prepared = prepare(phantom())
    assert (prepared.shape, prepared.dtype) == ((SIDE, SIDE, 3), np.uint8)
    assert np.ptp(prepared, axis=2).max() == 0
    assert (prepared.min(), prepared.max()) == (0, 255)


def test_prepare_refuses_what_is_not_a_greyscale_picture():
    with pytest.raises(ValueError, match=r"expected uint8 pixels \(H, W\), got float64 \(4, 4, 3\)"):
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
    noisy = (clean + np.random.default_rng(0).normal(0, 0.05 * 255, clean.shape)).clip(0, 255).astype(np.uint8)
    assert np.abs(np.subtract(head_box(noisy), head_box(clean))).max() <= 8


def test_the_margin_around_a_head_does_not_matter():
    """The same head in a wider frame gives nearly the same prepared picture."""
    wide = np.pad(phantom(), ((30, 90), (60, 10)))
    assert np.abs(prepare(wide).astype(int) - prepare(phantom())).mean() < 3


def test_an_even_picture_is_not_cropped():
    assert head_box(np.full((50, 80), 7, np.uint8)) == (0, 0, 80, 50)


@pytest.mark.parametrize("background", [0, 20.5, 255])
def test_differences_give_the_percentile_that_sorting_gives(background):
    noisy = np.random.default_rng(1).integers(0, 256, (40, 63), dtype=np.uint8)
    for pixels in (phantom(), noisy, np.full((9, 9), 7, np.uint8)):
        difference, most = differences(pixels, pixels[::2, ::2], background)
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

"""What the app promises for scans as hospitals have them: DICOM, NIfTI, ZIP, whole studies."""

import gzip
import io
import logging
import pathlib
import time
import zipfile

import gdcm
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import encode, make_app, phantom
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.sequence import Sequence

import app as web
from app import Limits, UnreadableScan, prepare, read_scans, read_upload, study_answer

ORIENTATIONS = {"axial": [1, 0, 0, 0, 1, 0], "coronal": [1, 0, 0, 0, 0, -1], "sagittal": [0, 1, 0, 0, 0, -1]}


def dataset_of(pixels, **tags):
    """An MR image, 16 bits, as a pydicom dataset; tags given beat those here."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.MRImageStorage, uid.generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.1"
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MR", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
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


def dicom(pixels, **tags):
    return written(dataset_of(pixels, **tags))


def deep(seed=0, side=96, **options):
    """A phantom with 12 bits, uint16."""
    return phantom(seed, side=side, **options).astype(np.uint16) * 16


def zipped(**files):
    """A ZIP of files {path: bytes}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def series(count=8, uid="1.2.3.1", **tags):
    """{name: bytes} of a series, its file names in an order that is not that of its positions."""
    return {f"IM{(7 * n) % count:04}": dicom(deep(n), SeriesInstanceUID=uid, ImagePositionPatient=[0, 0, 5 * n],
                                             ImageOrientationPatient=ORIENTATIONS["axial"], **tags)
            for n in range(count)}  # fmt: skip


def close(a, b):
    """Whether two pictures differ by a level of rounding at most."""
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


# One file


@pytest.mark.parametrize("syntax", [
    uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian, uid.RLELossless,
], ids=lambda syntax: syntax.name)  # fmt: skip
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


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"])
def test_every_syntax_that_gdcm_writes_gives_the_same_scan(tmp_path, name):
    (tmp_path / "plain").write_bytes(dicom(deep()))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(tmp_path / "plain"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "packed"))
    assert writer.Write()
    plain, packed = (read_scans((tmp_path / kind).read_bytes(), kind)[0] for kind in ("plain", "packed"))
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
    assert close(scan.pixels[20:80, 20:80], ((values - 600.5) / 799 * 255).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("centre, width", [(60000, 10), (1000, 50000)])
def test_a_window_that_would_hide_the_scan_is_not_applied(centre, width):
    """Beyond the values, or so wide that next to nothing is told apart."""
    hidden, plain = (read_scans(dicom(deep(), **tags), "IM1")[0] for tags in (
        {"WindowCenter": centre, "WindowWidth": width}, {}))
    assert close(hidden.pixels, plain.pixels)


def test_rescaling_comes_before_the_window():
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 1900, "WindowWidth": 1600}
    (scan,) = read_scans(dicom(deep(), **tags), "IM1")
    (same,) = read_scans(dicom(deep(), WindowCenter=1000, WindowWidth=800), "IM1")
    assert close(scan.pixels, same.pixels)


def test_monochrome1_is_turned_over():
    inverted, plain = (read_scans(dicom(pixels, PhotometricInterpretation=kind), "IM1")[0] for pixels, kind in (
        (4095 - deep(), "MONOCHROME1"), (deep(), "MONOCHROME2")))
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
    data = dicom(np.stack([deep(n) for n in range(3)]), NumberOfFrames=3,
                 SharedFunctionalGroupsSequence=Sequence([shared]),
                 PerFrameFunctionalGroupsSequence=Sequence([group(n, 500 + 100 * n) for n in range(3)]))  # fmt: skip
    scans = read_scans(data, "enhanced")
    assert {(scan.slice, scan.window) for scan in scans} == {(0, (250, 750)), (1, (350, 850)), (2, (450, 950))}
    assert {scan.plane for scan in scans} == {"coronal"}


@pytest.mark.parametrize("file, size", [
    ("examples_palette.dcm", (350, 800)), ("examples_rgb_color.dcm", (240, 320)), ("examples_jpeg2k.dcm", (480, 640)),
    ("image_dfl.dcm", (512, 512)), ("MR_small_bigendian.dcm", (64, 64)), ("MR_small_jpeg_ls_lossless.dcm", (64, 64)),
    ("J2K_pixelrep_mismatch.dcm", (512, 512)), ("examples_ybr_color.dcm", (240, 320)),
])  # fmt: skip
def test_files_that_pydicom_ships_are_read(file, size):
    data = pathlib.Path(get_testdata_file(file)).read_bytes()
    assert {scan.pixels.shape for scan in read_scans(data, file)} == {size}


@pytest.mark.parametrize("tags, warning", [
    ({"Modality": "CT"}, "The file says that it is no MRI (modality CT)."),
    ({"BodyPartExamined": "KNEE"}, "The file says that it shows no head (body part KNEE)."),
    ({"BurnedInAnnotation": "YES"}, "The file says that text is burned into the picture; see that it names nobody."),
    ({"BodyPartExamined": "BRAIN"}, None),
])
def test_what_speaks_against_a_brain_mri_is_a_warning(tags, warning):
    warnings = read_scans(dicom(deep(side=160), **tags), "IM1")[0].warnings
    assert warnings == ((warning,) if warning else ())


@pytest.mark.parametrize("data, sentence, status", [
    (pathlib.Path(get_testdata_file("JPGExtended.dcm")).read_bytes(),
     "scan is compressed as JPEG Extended (Process 2 and 4) and cannot be decoded; "
     "export it uncompressed (Explicit VR Little Endian).", 415),
    (pathlib.Path(get_testdata_file("rtplan.dcm")).read_bytes(),
     "scan is a DICOM file without a picture; send the images of the study.", 415),
    (dicom(deep())[:9000], "scan is damaged or cut off; export it again.", 415),
    (dicom(deep(), Rows=30_000, Columns=30_000),
     "scan has 30000 x 30000 pixels, more than the 50,000,000 allowed; send it smaller.", 413),
    (dicom(deep(), NumberOfFrames=5000),
     "scan has 5000 frames, but only 1000 more scans are allowed; send fewer.", 413),
    (gzip.compress(b"nothing of the kind"), "scan is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, "
     "or a ZIP of them; export the scan as one of these.", 415),
    (gzip.compress(bytes(1000))[:-9], "scan is damaged or cut off; export it again.", 415),
    (zipped(**{"a.txt": b"text"}), "a.txt is not a DICOM, NIfTI, JPEG, PNG, WEBP, BMP or TIFF file, "
     "or a ZIP of them; export the scan as one of these.", 415),
    (zipped(), "scan is an empty ZIP; pack the scans into it.", 415),
    (zipped(a=b"x")[:40], "scan is damaged or cut off; export it again.", 415),
])  # fmt: skip
def test_a_bad_file_gets_one_sentence(data, sentence, status):
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


def volume(shape=(40, 50, 60), zooms=(1, 1, 1), flip=False, extra=()):
    """A .nii of an ellipsoid head with one bright corner: towards right, front and top."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    values = 500.0 * (x**2 + y**2 + z**2 < 0.8) + 400 * ((x > 0.2) & (y > 0.2) & (z > 0.2) & (x**2 + y**2 + z**2 < 0.7))
    affine = np.diag([*zooms, 1.0])
    if flip:
        values, affine = values[::-1].transpose(1, 0, 2), affine[:, [1, 0, 2, 3]] * [[-1], [1], [1], [1]]
    for n in extra:
        values = np.stack([values] * n, -1)
    return nibabel.Nifti1Image(values.astype(np.float32), affine).to_bytes()


@pytest.mark.parametrize("plane, bright", [
    ("axial", (0, 0)),  # front above, the patient's right on the left
    ("coronal", (0, 0)),  # top above, the patient's right on the left
    ("sagittal", (0, 0)),  # top above, the face on the left
])
def test_a_volume_is_shown_as_radiologists_see_it(plane, bright):
    scans = read_scans(volume(), "head.nii", plane=plane)
    middle = scans[int(0.65 * len(scans))].pixels.astype(float)
    h, w = (n // 2 for n in middle.shape)
    quarters = [[middle[:h, :w].sum(), middle[:h, w:].sum()], [middle[h:, :w].sum(), middle[h:, w:].sum()]]
    assert np.unravel_index(np.argmax(quarters), (2, 2)) == bright


def test_the_way_a_volume_is_stored_does_not_matter():
    straight, turned = (read_scans(volume(flip=flip), "head.nii", plane="axial") for flip in (False, True))
    assert all(close(a.pixels, b.pixels) for a, b in zip(straight, turned, strict=True))


def test_voxels_that_are_no_cubes_are_made_square():
    (scan, *_) = read_scans(volume((64, 64, 40), (1, 1, 2)), "head.nii", plane="coronal")
    assert scan.pixels.shape == (80, 64)


def test_the_plane_is_that_of_acquisition_the_one_chosen_or_all():
    data = gzip.compress(volume((48, 48, 40), (1, 1, 5)))
    planes = {choice: {scan.plane for scan in read_scans(data, "head.nii.gz", plane=choice)}
              for choice in (None, "coronal", "all")}
    assert planes == {None: {"axial"}, "coronal": {"coronal"}, "all": {"axial", "coronal", "sagittal"}}


def test_empty_slices_of_a_volume_are_skipped_and_counted():
    scans, skipped = read_upload([("head.nii", volume())], plane="axial")
    assert len(scans) + skipped["empty or edge slices"] == 60 and skipped["empty or edge slices"] >= 4
    assert [scan.slice for scan in scans] == list(range(scans[0].slice, scans[-1].slice + 1))


def test_a_volume_without_values_outside_the_head_loses_no_slice():
    """Masked volumes hold NaN there, which is neither more nor less than anything."""
    image = nibabel.Nifti1Image.from_bytes(volume())
    values = image.get_fdata(dtype=np.float32)
    masked = np.where(values == 0, np.nan, values)
    found = [read_upload([("head.nii", nibabel.Nifti1Image(v, image.affine).to_bytes())], plane="axial")
             for v in (values, masked)]
    assert found[0][1] == found[1][1]


def test_a_study_in_files_with_strange_numbers_in_their_names_is_read():
    files = [(data, f"IM{digit}") for data, digit in zip(series(3).values(), "²①٣")]
    assert len(read_upload([(name, data) for data, name in files])[0]) == 3


def test_of_several_volumes_the_first_is_read_with_a_warning():
    (scan, *_) = read_scans(volume((160, 160, 40), extra=(3,)), "dwi.nii", plane="axial")
    assert scan.warnings[0] == "The file holds 3 volumes; the first was read."


# Studies


def test_a_study_is_read_series_by_series_in_order():
    """From nested folders without extensions, with a DICOMDIR and junk beside."""
    first, second = series(6), series(5, "1.2.3.2")
    junk = {"DICOMDIR": pathlib.Path(get_testdata_file("rtplan.dcm")).read_bytes(), "README.TXT": b"Read me",
            "__MACOSX/x": b"x", ".DS_Store": b"x"}  # fmt: skip
    files = {f"A/{k}": v for k, v in first.items()} | {f"B/C/{k}": v for k, v in second.items()} | junk
    scans, skipped = read_upload([("study.zip", zipped(**files))])
    assert [scan.series for scan in scans] == ["1"] * 6 + ["2"] * 5
    assert [scan.slice for scan in scans] == [*range(6), *range(5)]
    assert all(np.all(np.diff([scan.position for scan in scans if scan.series == n]) > 0) for n in "12")
    assert skipped == {"files that are no scans": 2}


def test_several_files_of_a_study_are_arranged_and_junk_is_skipped(send):
    files = [(data, name) for name, data in series(4).items()] + [(b"junk", "notes.txt")]
    result = send(*files).get_json()
    assert [scan["file"] for scan in result["scans"]] == ["IM0000", "IM0003", "IM0002", "IM0001"]
    assert result["skipped"] == {"files that are no scans": 1}
    assert result["study"]["verdict"] and len(result["study"]["highest"]) >= 1


def test_a_slice_gets_the_same_pixels_alone_and_in_its_study():
    files = series(8, WindowCenter=1000, WindowWidth=1500)
    together = read_scans(zipped(**files), "study.zip")
    for scan in together:
        (alone,) = read_scans(files[scan.file], scan.file)
        assert np.array_equal(prepare(alone.pixels), prepare(scan.pixels))


def test_the_rule_for_a_study_is_the_mean_of_its_highest():
    entries = [{"series": "1", "tumor_probability": p} for p in (0.1, 0.9, 0.2, None, 0.7)]
    card = {"thresholds": {"low": 0.2, "high": 0.8}, "study": {"k": 2, "low": 0.3, "high": 0.75}}
    answer = study_answer(entries, card)
    assert (answer["tumor_probability"], answer["highest"], answer["verdict"]) == (0.8, [1, 4], "tumor")
    assert answer["rejected"] == 1
    assert study_answer([{"series": None, "tumor_probability": 0.9}] * 3, card) is None


@pytest.fixture
def study_app(tmp_path):
    """An app that answers more than two scans by and by."""
    return make_app(tmp_path / "uploads", MAX_AT_ONCE=2)


def begin(app, count=8, **form):
    """The result so far of a study sent to the API."""
    data = {"file": (io.BytesIO(zipped(**series(count))), "study.zip")} | form
    response = app.test_client().post("/upload", data=data)
    assert response.status_code == 202
    return response.get_json()


def wait_for(app, result, *statuses):
    """The result once it has one of these statuses."""
    for _ in range(600):
        now = app.test_client().get(f"/results/{result['id']}.json").get_json()
        if now.get("status") in statuses:
            return now
        time.sleep(0.05)
    pytest.fail(f"never {statuses}")


def held_back(app, monkeypatch, seconds=0.2):
    """Make every slice take at least so long."""
    infer = app.classifier.infer_beside
    monkeypatch.setattr(app.classifier, "infer_beside", lambda prepared: time.sleep(seconds) or infer(prepared))


def test_a_large_study_is_answered_at_once_and_fills(study_app, monkeypatch):
    held_back(study_app, monkeypatch)
    result = begin(study_app)
    assert (result["status"], result["scans"], result["total"]) == ("running", [], 8)
    page = study_app.test_client().get(f"/results/{result['id']}").text
    assert "Reading 8 scans" in page and 'http-equiv="refresh"' in page
    done = wait_for(study_app, result, "done")
    assert [scan["file"] for scan in done["scans"]] == [f"IM{7 * n % 8:04}" for n in range(8)]
    assert (done["progress"], done["study"]["risk"] in ("low", "medium", "high")) == (1.0, True)
    page = study_app.test_client().get(f"/results/{result['id']}").text
    assert "http-equiv" not in page and "highest tumor probabilities" in page


def test_a_process_is_told_from_a_later_one_of_the_same_number():
    """In a container every server has the same number; after a restart its study must not seem to be at work."""
    number, began = web.this_process()
    assert web.is_alive((number, began)) and not web.is_alive((number, began - 60)) and not web.is_alive((0, began))


def test_nothing_of_the_server_is_in_the_answer(study_app):
    assert "worker" not in begin(study_app)


def test_a_study_deleted_twice_at_once_is_not_found(study_app, monkeypatch):
    result = wait_for(study_app, begin(study_app, 3), "done")
    monkeypatch.setattr("app.found", lambda upload_id: pathlib.Path(study_app.config["UPLOADS"]) / "gone")
    response = study_app.test_client().post(f"/results/{result['id']}/delete")
    assert response.status_code == 404 and "no such result" in response.text


def test_a_cancelled_study_leaves_nothing_behind(study_app, monkeypatch):
    held_back(study_app, monkeypatch)
    result = begin(study_app, 12)
    assert study_app.test_client().post(f"/results/{result['id']}/cancel").status_code == 303
    assert wait_for(study_app, result, "cancelled")["scans"] == []
    folder = pathlib.Path(study_app.config["UPLOADS"]) / result["id"]
    assert [path.name for path in folder.iterdir()] == ["result.json"]
    assert "Cancelled" in study_app.test_client().get(f"/results/{result['id']}").text


def test_a_study_deleted_while_it_is_read_is_gone(study_app, monkeypatch):
    held_back(study_app, monkeypatch)
    result = begin(study_app, 12)
    study_app.test_client().post(f"/results/{result['id']}/delete")
    wait_for(study_app, begin(study_app, 3), "done")  # the next one runs once this one has ended
    assert len(list(pathlib.Path(study_app.config["UPLOADS"]).iterdir())) == 1


def test_a_study_that_breaks_says_so_and_the_next_one_works(study_app, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(study_app.classifier, "finding", lambda *_: 1 / 0)
        failed = wait_for(study_app, begin(study_app), "failed")
    assert failed["error"] == "Something went wrong on the server; send the study again."
    assert "a study failed" in caplog.text
    wait_for(study_app, begin(study_app), "done")


def test_a_study_that_cannot_even_be_ended_does_not_stop_the_next_one(study_app, monkeypatch):
    """The disk is full all through the first study."""
    held_back(study_app, monkeypatch)
    result = begin(study_app, 4)
    with monkeypatch.context() as patch:
        patch.setattr("app.write_result", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        wait_until_gone(study_app, result)
    wait_for(study_app, begin(study_app, 3), "done")


def wait_until_gone(app, result):
    for _ in range(400):
        if app.test_client().get(f"/results/{result['id']}").status_code == 404:
            return
        time.sleep(0.05)
    pytest.fail("never gone")


def test_a_study_whose_server_was_stopped_has_failed(study_app, monkeypatch):
    held_back(study_app, monkeypatch)
    result = begin(study_app)
    monkeypatch.setattr("app.is_alive", lambda process: False)
    now = study_app.test_client().get(f"/results/{result['id']}.json").get_json()
    assert (now["status"], now["error"]) == ("failed", "The server was stopped while it read; send the study again.")


def test_too_many_studies_are_told_to_come_back(tmp_path, monkeypatch):
    app = make_app(tmp_path, MAX_AT_ONCE=2, MAX_STUDIES=1)
    held_back(app, monkeypatch)
    for _ in range(2):
        begin(app)
        time.sleep(0.1)
    response = app.test_client().post("/upload", data={"file": (io.BytesIO(zipped(**series(4))), "study.zip")})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "60")
    assert len(list(tmp_path.iterdir())) == 2


# Privacy


SECRETS = {
    "PatientName": "DOE^JANE", "PatientID": "PID-4711", "PatientBirthDate": "19500102",
    "PatientAddress": "Elm Street 9", "OtherPatientNames": "ROE^JANE", "PatientComments": "Likes tea",
    "InstitutionName": "Mercy Hospital", "InstitutionAddress": "Hill Road 8",
    "ReferringPhysicianName": "HOUSE^GREG", "AccessionNumber": "ACC-0815", "StudyID": "STUDY-77",
    "StudyDate": "20200304", "SeriesDate": "20200305", "StudyTime": "112233.44",
    "StudyDescription": "Headache after fall", "SeriesDescription": "T1 of Jane", "ProtocolName": "Jane protocol",
    "OperatorsName": "WILSON^JIM", "StationName": "SCANNER-5", "DeviceSerialNumber": "SN-99887",
    "StudyInstanceUID": "1.2.840.99.1", "SeriesInstanceUID": "1.2.840.99.2", "SOPInstanceUID": "1.2.840.99.3",
    "FrameOfReferenceUID": "1.2.840.99.4", "RequestedProcedureDescription": "MRI for Jane",
    "PerformingPhysicianName": "CUDDY^LISA", "ImageComments": "Jane moved",
}  # fmt: skip


def everything_said(app, result):
    """What is on disk, on the pages and in the files of a result, as bytes."""
    client, address = app.test_client(), f"/results/{result['id']}"
    said = [path.read_bytes() for path in pathlib.Path(app.config["UPLOADS"]).rglob("*") if path.is_file()]
    paths = ("", ".json", ".csv", "/0", "/0/heatmap.png", "/0/heatmap.dcm")
    return b"".join(said + [client.get(address + path).data for path in paths])


def test_no_value_of_a_patient_is_stored_logged_or_shown(app, send, caplog):
    caplog.set_level(logging.DEBUG)
    result = send((dicom(deep(), **SECRETS), "IM1"), (dicom(deep(1), **SECRETS), "IM2")).get_json()
    said = everything_said(app, result) + caplog.text.encode()
    assert not [key for key, value in SECRETS.items() if value.encode() in said]


def test_identifiers_are_kept_on_request_for_a_heatmap_that_can_be_filed(app, client):
    data = {"file": (io.BytesIO(dicom(deep(), **SECRETS)), "IM1"), "identifiers": "keep"}
    result = client.post("/upload", data=data).get_json()
    capture = pydicom.dcmread(io.BytesIO(client.get(f"/results/{result['id']}/0/heatmap.dcm").data))
    assert (capture.PatientID, capture.StudyInstanceUID) == (SECRETS["PatientID"], SECRETS["StudyInstanceUID"])
    assert (capture.SOPClassUID, capture.pixel_array.shape) == (uid.SecondaryCaptureImageStorage, (96, 96, 3))
    assert SECRETS["PatientID"] not in client.get(f"/results/{result['id']}").text


def test_without_the_request_a_heatmap_belongs_to_no_study(app, client, send):
    result = send((dicom(deep(), **SECRETS), "IM1")).get_json()
    capture = pydicom.dcmread(io.BytesIO(client.get(f"/results/{result['id']}/0/heatmap.dcm").data))
    assert capture.PatientID == "" and capture.StudyInstanceUID not in SECRETS.values()


def test_a_plane_that_is_none_is_refused(client):
    response = client.post("/upload", data={"file": (io.BytesIO(encode(phantom())), "a.png"), "plane": "up"})
    assert response.status_code == 400
    assert response.get_json()["error"] == "The plane has to be sagittal, coronal, axial or all."

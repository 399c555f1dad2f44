"""The network node against the real thing: dcmtk as the scanner, Orthanc as the PACS."""

import io
import shutil
import subprocess
import zipfile
from importlib import util

import numpy as np
import pydicom
import pytest
from phantoms import deep, dicom, series
from pydicom import uid

PACKAGES = {"storescu": "dcmtk", "Orthanc": "orthanc", "dciodvfy": "dicom3tools"}
TAGS = {
    "SpecificCharacterSet": "ISO_IR 144", "PatientName": "Иванов^Иван", "PatientID": "P-17",
    "PatientBirthDate": "19700131", "PatientSex": "M", "AccessionNumber": "A-4", "StudyID": "S-9",
    "StudyDate": "20260102", "StudyTime": "101500", "FrameOfReferenceUID": "1.2.840.99.5",
}  # fmt: skip
KEPT = [key for key in TAGS if key != "SpecificCharacterSet"]


@pytest.fixture(scope="module", autouse=True)
def tools():
    missing = sorted(package for tool, package in PACKAGES.items() if not shutil.which(tool))
    assert not missing, f"apt-get install {' '.join(missing)}, which these tests talk to"


def contents(dataset):
    """[(name, value)] of a report, from top to bottom; of an image its UID and frame."""
    found = []
    for item in dataset.ContentSequence:
        value = item.get("TextValue") or item.get("UID")
        if item.ValueType == "NUM":
            value = float(item.MeasuredValueSequence[0].NumericValue)
        elif item.ValueType == "CODE":
            value = item.ConceptCodeSequence[0].CodeMeaning
        elif item.ValueType == "IMAGE":
            image = item.ReferencedSOPSequence[0]
            value = image.ReferencedSOPInstanceUID, image.get("ReferencedFrameNumber")
        found.append((item.ConceptNameCodeSequence[0].CodeMeaning, value))
        found += contents(item) if "ContentSequence" in item else []
    return found


def check(objects, sent, result, folder):
    """Check the objects (bytes) of a study, which was `sent` (bytes), against its result."""
    datasets = [pydicom.dcmread(io.BytesIO(data)) for data in objects]
    headers = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, map(io.BytesIO, sent))}
    (report,) = (one for one in datasets if one.Modality == "SR")
    heatmaps = sorted((o for o in datasets if o != report), key=lambda one: one.InstanceNumber)
    (answer,) = result["studies"]
    said, source = contents(report), next(iter(headers.values()))
    presence = {"tumor": "Present", "no_tumor": "Absent", "uncertain": "Undetermined"}
    assert dict(said)["Presence"] == presence[answer["verdict"]]
    assert dict(said)["Tumor probability"] == answer["tumor_probability"]
    assert dict(said)["No tumor below"] < dict(said)["Tumor from"]
    assert dict(said).get("Most probable type", "no_tumor").lower()[:4] in ("intr", "neop", answer["label"][:4])
    assert ("Algorithm Parameters", f"model.keras sha256 {result['model']['sha256']}") in said
    shown = [value for name, value in said if name == "Source of Measurement"]
    carrying = [result["scans"][n] for n in answer["highest"]]
    assert [headers[instance].InstanceNumber for instance, _ in shown] == [one["slice"] + 1 for one in carrying]
    assert [one.InstanceNumber for one in heatmaps] == list(range(1, len(shown) + 1))
    assert {one.SourceImageSequence[0].ReferencedSOPInstanceUID for one in heatmaps} == {u for u, _ in shown}
    assert len({one.SeriesInstanceUID for one in heatmaps}) == 1 and heatmaps[0].Modality == "OT"
    for one in datasets:
        assert all(one[key].value == source[key].value for key in KEPT if key in one)
        assert one.StudyInstanceUID == source.StudyInstanceUID and "not for diagnosis" in one.SeriesDescription
        assert one.SeriesInstanceUID != source.SeriesInstanceUID
    for one in heatmaps:
        assert one.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert (one.pixel_array[-24:, :130].min(-1) > 200).sum() > 150  # burnt in
    for n, data in enumerate(objects):
        (path := folder / f"{n}.dcm").write_bytes(data)
        verdict = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
        assert verdict.returncode == 0 and "Error" not in verdict.stderr, verdict.stderr
        if datasets[n] == report:
            assert b"Tumor probability" in subprocess.check_output(["dsrdump", path])
    return sorted(one.SOPInstanceUID for one in datasets)


def drawn(count=8, study="1.2.3", **tags):
    """Files (bytes) of a study of one series, numbered in the order of their places."""
    files = series(count, f"{study}.1", StudyInstanceUID=study, **TAGS | tags)
    return [with_number(data) for data in files.values()]


def with_number(data):
    dataset, file = pydicom.dcmread(io.BytesIO(data)), io.BytesIO()
    dataset.InstanceNumber = int(dataset.ImagePositionPatient[2]) // 5 + 1
    dataset.add_new(0x00291001, "UN", b"private")
    dataset.save_as(file)
    return file.getvalue()


def in_zip(app, result):
    with (
        app.test_client().get(f"/results/{result['id']}.zip") as response,
        zipfile.ZipFile(io.BytesIO(response.data)) as archive,
    ):
        return [archive.read(name) for name in archive.namelist() if name.startswith("dicom/")]


def test_the_zip_holds_what_a_pacs_can_file_if_identifiers_were_kept(app, send, tmp_path):
    """The same objects for the second upload as for the first."""
    sent, uids = drawn(), []
    for _ in range(2):
        result = send(*sent, identifiers="keep").get_json()
        uids.append(check(in_zip(app, result), sent, result, tmp_path))
    assert uids[0] == uids[1]
    assert "P-17" not in app.test_client().get(f"/results/{result['id']}").text
    assert not in_zip(app, send(*sent).get_json())


def test_two_patients_of_one_upload_are_filed_each_under_their_own_name(app, send):
    sent = drawn(3, "1.2.3", PatientID="A") + drawn(3, "1.2.4", PatientID="B")
    objects = in_zip(app, send(*sent, identifiers="keep").get_json())
    filed = [pydicom.dcmread(io.BytesIO(data)) for data in objects]
    found = {(one.PatientID, one.StudyInstanceUID) for one in filed}
    assert found == {("A", "1.2.3"), ("B", "1.2.4")}


def test_the_report_names_frames_and_says_what_was_rejected(app, send):
    frames = np.stack([deep(1), np.zeros_like(deep(1)) + 7])
    data = dicom(frames, SOPClassUID=uid.EnhancedMRImageStorage, NumberOfFrames=2, **TAGS)
    result = send(data, identifiers="keep").get_json()
    report, heatmap = (pydicom.dcmread(io.BytesIO(data)) for data in in_zip(app, result))
    said = contents(report)
    assert [value[1] for name, value in said if name == "Source of Measurement"] == [1, 2]
    assert ("Presence", "The picture is blank or nearly so.") in said
    assert heatmap.SourceImageSequence[0].ReferencedFrameNumber == 1


def test_without_its_libraries_one_sentence_says_how_to_install_them(app, send, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    said = [send(dicom(deep()), identifiers="keep").get_json()["error"]]
    assert all("pip install -r requirements.txt" in sentence for sentence in said)

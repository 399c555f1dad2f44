"""The network node against the real thing: dcmtk as the scanner, Orthanc as the PACS."""

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
import zipfile
from importlib import util

import numpy as np
import phantoms
import psutil
import pydicom
import pytest
from phantoms import ROOT, deep, dicom, free_port, make_app, put, until, zipped
from pydicom import uid
from pynetdicom import AE

import app as web

PACKAGES = {"storescu": "dcmtk", "Orthanc": "orthanc orthanc-dicomweb", "dciodvfy": "dicom3tools"}
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
    """Files (bytes) of a series, numbered in the order of their places, with a private tag each."""
    files, tags = [], {"ImageOrientationPatient": phantoms.AXIAL, "StudyInstanceUID": study, **TAGS, **tags}
    for n in range(count):
        tags |= {"ImagePositionPatient": [0, 0, 5 * n], "InstanceNumber": n + 1}
        dataset = phantoms.dataset_of(deep(n), SeriesInstanceUID=f"{study}.1", **tags)
        dataset.add_new(0x00291001, "UN", b"private!")
        files.append(phantoms.written(dataset))
    return files[::-1]


def copies(study, count):
    """Files (bytes) of one slice under as many UIDs, 128 kB each."""
    data = dicom(deep(side=256), SOPInstanceUID="9.9.1000", StudyInstanceUID=study)
    return (data.replace(b"9.9.1000", b"9.9.%04d" % n) for n in range(1000, 1000 + count))


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


@pytest.mark.filterwarnings("ignore:(Invalid value|A value of type):UserWarning")  # of pydicom, here
def test_two_patients_of_one_upload_are_filed_each_under_their_own_name(app, send):
    """Also where a date or the sex is not as the standard has it; no warning quotes them."""
    odd = {"PatientBirthDate": "1950/02/31x", "PatientSex": "MALE"}
    sent = drawn(1, "1.2.3", PatientID="A", **odd) + drawn(3, "1.2.4", PatientID="B")
    result = send(*sent, identifiers="keep").get_json()
    with warnings.catch_warnings(action="error"):
        objects = in_zip(app, result)
    filed = [pydicom.dcmread(io.BytesIO(data)) for data in objects]
    found = {(one.PatientID, one.StudyInstanceUID) for one in filed}
    assert found == {("A", "1.2.3"), ("B", "1.2.4")}


@pytest.mark.parametrize("tags", [{"SOPClassUID": "1.2.3"}, {"StudyInstanceUID": ""}])
def test_what_nothing_can_refer_to_gets_its_zip_without_objects(app, send, tags):
    result = send(dicom(deep(), **TAGS | tags), identifiers="keep").get_json()
    assert not in_zip(app, result)


def test_the_report_names_frames_and_says_what_was_rejected(app, send):
    frames = np.stack([deep(1), np.zeros_like(deep(1)) + 7])
    data = dicom(frames, SOPClassUID=uid.EnhancedMRImageStorage, NumberOfFrames=2, **TAGS)
    result = send(data, identifiers="keep").get_json()
    heatmap, report = (pydicom.dcmread(io.BytesIO(data)) for data in in_zip(app, result))
    said = contents(report)
    assert [value[1] for name, value in said if name == "Source of Measurement"] == [1, 2]
    assert ("Tracking Identifier", "series 1, slice 2: The picture is blank or nearly so.") in said
    assert heatmap.SourceImageSequence[0].ReferencedFrameNumber == 1


def test_without_its_libraries_one_sentence_says_how_to_install_them(app, send, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    said = [send(dicom(deep()), identifiers="keep"), app.test_client().post("/dicomweb/studies")]
    assert [response.status_code for response in said] == [501, 501]
    run = app.test_cli_runner().invoke(args=["listen"])
    for sentence in (said[0].get_json()["error"], said[1].get_json()["error"], run.output):
        assert "pip install -r requirements.txt" in sentence


# Over the network


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped model with its gate open, so that a phantom gets an answer."""
    archive, path = web.read_archive(ROOT / "model.keras"), tmp_path_factory.mktemp("model") / "model.keras"
    card = json.loads(archive["card.json"]) | {"gate": None}
    path.write_bytes(zipped(**archive | {"card.json": json.dumps(card)}))
    return path


@contextlib.contextmanager
def running(command, ready, log, **env):
    """A server, once what it prints has `ready` in it; killed at the end."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=file, stderr=file)
    try:
        until(lambda: ready in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    """Orthanc: its DICOM address, its DICOMweb address, and a function to ask it."""
    folder, http, dicom_port = tmp_path_factory.mktemp("pacs"), free_port(), free_port()
    settings = {
        "HttpPort": http, "DicomPort": dicom_port, "DicomAet": "PACS", "DicomCheckCalledAet": True,
        "AuthenticationEnabled": True, "RegisteredUsers": {"brain": "m r"}, "StorageDirectory": str(folder),
        "Plugins": ["/usr/share/orthanc/plugins/libOrthancDicomWeb.so"], "OverwriteInstances": True,
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))

    def ask(path):
        token = base64.b64encode(b"brain:m r").decode()
        asked = urllib.request.Request(f"http://127.0.0.1:{http}{path}", headers={"Authorization": f"Basic {token}"})
        return urllib.request.urlopen(asked).read()

    with running(["Orthanc", folder / "orthanc.json"], "Orthanc has started", folder / "log"):
        yield f"PACS@127.0.0.1:{dicom_port}", f"http://brain:m%20r@127.0.0.1:{http}/dicom-web", ask


def received(ask, study, count=2):
    """The objects (bytes) of a study once the PACS has at least so many."""

    def find():
        studies = [json.loads(ask(f"/studies/{name}")) for name in json.loads(ask("/studies"))]
        known = [one["ID"] for one in studies if one["MainDicomTags"]["StudyInstanceUID"] == study]
        found = json.loads(ask(f"/studies/{known[0]}/instances")) if known else []
        return len(found) >= count and [ask(f"/instances/{one['ID']}/file") for one in found]

    return until(find, 40)


@contextlib.contextmanager
def listening(folder, model, *options, port=None, **settings):
    """The port of a listener over `folder`, and its process."""
    port = port or free_port()
    env = {"FLASK_MODEL": str(model), "FLASK_UPLOADS": str(folder), "FLASK_STUDY_PAUSE": "0.5"} | settings
    command = [sys.executable, "-m", "flask", "listen", "--host", "127.0.0.1", "--port", str(port), *options]
    with running(command, "listens on port", folder.parent / "listener.log", **env) as process:
        yield port, process


def storescu(port, files, folder, *options, title="BRAINMRI"):
    """A process of dcmtk that sends files (bytes)."""
    for n, data in enumerate(files):
        put(folder / f"{n:04}", data)
    command = ["storescu", *(options or ["-v"]), "-aec", title, "127.0.0.1", str(port), "+sd", folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def result_of(folder, study):
    """The result of a study that came over the network, once it is done."""
    client = make_app(folder).test_client()
    page = until(lambda: client.get(f"/dicomweb/studies/{study}/results").location, 60)
    return until(lambda: (found := client.get(f"{page}.json").get_json())["status"] != "running" and found, 60)


def test_four_studies_at_once_go_from_the_scanner_to_the_node_and_to_the_pacs(tmp_path, model, pacs):
    peer, _, ask = pacs
    studies = {f"1.2.840.1.{n}": drawn(8 + n, f"1.2.840.1.{n}") for n in range(4)}
    with listening(tmp_path / "uploads", model, "--peer", peer) as (port, _):
        assert subprocess.run(["echoscu", "-aec", "BRAINMRI", "127.0.0.1", str(port)]).returncode == 0
        senders = [storescu(port, files, tmp_path / study) for study, files in studies.items()]
        assert [sender.communicate() and sender.returncode for sender in senders] == [0] * 4
        for study, files in studies.items():
            result = result_of(tmp_path / "uploads", study)
            check(received(ask, study), files, result, tmp_path)
        until(lambda: not list(tmp_path.glob("uploads/.network/*/*/*/*")))
    assert (tmp_path / "listener.log").read_text().count('"kind": "study"') == 4
    stored = [path.read_bytes() for path in tmp_path.glob("uploads/**/*") if path.is_file()]
    assert len(stored) > 20 and not [1 for data in stored if b"P-17" in data or "Иванов".encode() in data]


def test_the_same_over_stow(tmp_path, pacs):
    """Each object is answered for as the standard says; what is no MRI is refused."""
    _, url, ask = pacs
    study, app = "1.2.840.2", make_app(tmp_path / "uploads", DICOMWEB=url, STUDY_PAUSE=0.5)
    files, other = drawn(study=study), dicom(deep(), SOPClassUID=uid.CTImageStorage, StudyInstanceUID=study)

    def post(*parts, kind="multipart/related; type=application/dicom; boundary=b"):
        body = b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n%b\r\n" % part for part in parts)
        return app.test_client().post("/dicomweb/studies", data=body + b"--b--", content_type=kind)

    def reasons(response):
        return [item["00081197"]["Value"][0] for item in response.get_json(True)["00081198"]["Value"]]

    first = post(*files[:5])
    assert first.status_code == 200 and first.mimetype == "application/dicom+json"
    assert len(first.get_json()["00081199"]["Value"]) == 5 and "00081198" not in first.get_json()
    second = post(*files[5:], other)
    assert second.status_code == 202 and reasons(second) == [0x0122]
    alone = post(other, b"junk")
    assert alone.status_code == 409 and reasons(alone) == [0x0122, 0xC000]
    assert post(b"x", kind="application/json").status_code == 415
    assert post(kind="multipart/related; boundary=c").status_code == 400
    result = result_of(tmp_path / "uploads", study)
    check(received(ask, study), files, result, tmp_path)
    assert not list(tmp_path.glob("uploads/.network/stow/arriving/*"))


@pytest.mark.parametrize("options, title, tags, said", [
    ({}, "WRONG", {}, "Called AE Title Not Recognized"),
    ({"FLASK_PEERS": "MR1, MR2"}, "BRAINMRI", {}, "Calling AE Title Not Recognized"),
    ({}, "BRAINMRI", {"SOPClassUID": uid.CTImageStorage}, "No presentation context for: (CT)"),
])  # fmt: skip
def test_what_is_not_meant_for_the_node_is_refused_in_the_words_of_the_standard(tmp_path, model, options, title, tags, said):
    with listening(tmp_path / "uploads", model, **options) as (port, process):
        with socket.create_connection(("127.0.0.1", port)) as garbage:
            garbage.sendall(os.urandom(4096))
        sender = storescu(port, [dicom(deep(), **tags)], tmp_path / "files", title=title)
        assert said in sender.communicate()[0] and sender.returncode
        assert process.poll() is None and not list(tmp_path.glob("uploads/.network/*/coming/*"))


def sending(port, files, *syntaxes):
    """An association that has sent files (bytes) and is open."""
    entity = AE()
    for syntax in syntaxes or [uid.ExplicitVRLittleEndian]:
        entity.add_requested_context(uid.MRImageStorage, syntax)
    association = entity.associate("127.0.0.1", port, ae_title="BRAINMRI")
    for data in files:
        assert association.send_c_store(pydicom.dcmread(io.BytesIO(data))).Status == 0
    return association


def test_an_association_is_waited_for_and_may_send_in_every_syntax(tmp_path, model):
    syntaxes = [*uid.UncompressedTransferSyntaxes, uid.RLELossless, uid.JPEGLSLossless]
    files = [dicom(deep(n), syntax, StudyInstanceUID="1.2.840.8") for n, syntax in enumerate(syntaxes)]
    with listening(tmp_path / "uploads", model) as (port, _):
        first, second = (sending(port, part, *syntaxes) for part in (files[:3], files[3:]))
        second.release()
        time.sleep(2)  # longer than the pause
        assert not list(tmp_path.glob("uploads/*/result.json"))
        first.release()
        assert len(result_of(tmp_path / "uploads", "1.2.840.8")["scans"]) == len(syntaxes)


def test_nothing_is_lost_while_the_peer_is_down_and_over_a_kill(tmp_path, model):
    """The listener dies in the middle of a study, and again before the peer is there."""
    folder, study, peer_port = tmp_path / "uploads", "1.2.840.4", free_port()
    peer, files, log = f"PACS@127.0.0.1:{peer_port}", drawn(12, study), tmp_path / "listener.log"
    with listening(folder, model, "--peer", peer) as (port, process):
        association = sending(port, files[:7])
        process.kill()
    until(lambda: not association.is_alive())
    association.dul.socket.close()
    assert len(list(folder.glob(".network/*/coming/*/*"))) == 7
    with listening(folder, model, "--peer", peer, port=port, FLASK_STUDY_PAUSE="2"):
        sending(port, files[7:]).release()
        result = result_of(folder, study)
        assert len(result["scans"]) == 12 and not result["skipped"]
        until(lambda: "4 seconds" in log.read_text())
    (tmp_path / "pacs").mkdir()
    storescp = ["storescp", "-v", "-od", tmp_path / "pacs", "-aet", "PACS", str(peer_port)]
    with running(storescp, "", tmp_path / "log"), listening(folder, model, "--peer", peer, port=port):
        until(lambda: not list(folder.glob(".network/*/*/*/*")))
    check([path.read_bytes() for path in (tmp_path / "pacs").iterdir()], files, result, tmp_path)


def test_a_thousand_objects_do_not_fill_the_memory(tmp_path, model):
    """128 MB of them, which are one slice a thousand times."""
    files = copies("1.2.840.5", 1000)
    with listening(tmp_path / "uploads", model) as (port, process):
        memory = psutil.Process(process.pid).memory_info
        before, seen, sender = memory().rss, [], storescu(port, files, tmp_path / "files", "-q")
        until(lambda: seen.append(memory().rss) or sender.poll() is not None, 60)
        assert sender.communicate() and sender.returncode == 0 and max(seen) - before < 40e6
        result = result_of(tmp_path / "uploads", "1.2.840.5")
        assert len(result["scans"]) == 1 and len(result["skipped"]) == 999


def test_a_full_disk_refuses_objects_and_keeps_what_it_has(tmp_path, model):
    (disk := tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=258m", "none", disk], check=True)
    try:
        with listening(disk / "uploads", model) as (port, _):
            other, files = put(disk / "other", b"x" * 2**20), copies("1.2.840.6", 30)
            said = storescu(port, files, tmp_path / "files", "-v", "-nh").communicate()[0]
            kept = len(list(disk.glob("uploads/.network/*/coming/*/*")))
            assert 0 < kept < 30 and said.count("Refused: OutOfResources") == 30 - kept
            other.unlink()
            assert len(result_of(disk / "uploads", "1.2.840.6")["skipped"]) == kept - 1
    finally:
        subprocess.run(["umount", disk], check=True)

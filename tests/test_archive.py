"""What `flask classify` promises for folders of any size, on a Dask cluster of this machine."""

import csv
import os
import signal
import threading
import time

import pytest
from conftest import encode, phantom
from pyarrow import parquet
from test_studies import series, volume, zipped

import app as web

pytestmark = [
    # distributed's own code, not ours to mend
    pytest.mark.filterwarnings("ignore:::(distributed|dask|tornado)"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def folder(tmp_path):
    """An archive: pictures, a study as a ZIP, a volume, a broken file, something hidden."""
    folder = tmp_path / "archive"
    (folder / "deep" / "er").mkdir(parents=True)
    for n in range(4):
        (folder / f"{n}.png").write_bytes(encode(phantom(n, side=96)))
    (folder / "deep" / "study.zip").write_bytes(zipped(**series(4)))
    (folder / "deep" / "er" / "head.nii").write_bytes(volume((40, 40, 36), (1, 1, 6)))
    (folder / "broken.jpg").write_bytes(b"junk")
    (folder / ".hidden").write_bytes(b"junk")
    return folder


def rows_in(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def classify(app, *args):
    run = app.test_cli_runner().invoke(args=["classify", *map(str, args)])
    assert run.exit_code == 0, run.output
    return run


def test_a_folder_becomes_a_row_a_slice_and_a_row_a_study(app, folder, tmp_path):
    """And the same rows again from a journal that was cut off, with nothing done twice."""
    out = tmp_path / "results.csv"
    classify(app, folder, "--out", out)
    rows = rows_in(out)
    assert len({row["path"] for row in rows}) == 7
    (broken,) = [row for row in rows if row["error"]]
    assert broken["error"].startswith("broken.jpg is not a DICOM") and broken["path"].endswith("broken.jpg")
    assert all(int(row["slices"]) == sum(r["path"] == row["path"] for r in rows) for row in rows)
    studies = rows_in(tmp_path / "results.studies.csv")
    assert {int(study["slices"]) for study in studies} == {4, len([r for r in rows if r["path"].endswith(".nii")])}

    text = out.read_text()
    out.write_text(text[: len(text) // 2])
    classify(app, folder, "--out", out)
    assert sorted(map(str, rows_in(out))) == sorted(map(str, rows))
    classify(app, folder, "--out", out)
    assert sorted(map(str, rows_in(out))) == sorted(map(str, rows))


def test_the_answers_are_those_of_the_app(app, real_scans, tmp_path):
    path = real_scans["glioma"][0]
    classify(app, path, "--out", tmp_path / "one.parquet")
    (row,) = parquet.read_table(tmp_path / "one.parquet").to_pylist()
    (scan,) = web.read_scans(path.read_bytes(), path.name)
    (finding,) = web.Classifier(app.config["MODEL"], 2).classify([scan])
    assert row["verdict"] == finding.verdict
    assert row["tumor_probability"] == pytest.approx(finding.tumor_probability, abs=1e-4)
    assert sorted(path.name for path in tmp_path.glob("one*")) == ["one.parquet", "one.studies.csv"]


def test_a_killed_worker_loses_nothing(app, tmp_path):
    """Its files are done again; every one has its row, once."""
    files = []
    for n in range(64):
        files.append(tmp_path / f"{n}.png")
        files[-1].write_bytes(encode(phantom(n, side=64)))
    journal, labels = tmp_path / "out.csv", app.classifier.labels
    with web.cluster(None) as client:
        filling = threading.Thread(target=web.fill, args=(
            journal, files, web.columns_of(labels), client, app.config["MODEL"], web.LIMITS))
        filling.start()
        while not journal.exists() or len(journal.read_text().splitlines()) < 9:
            time.sleep(0.05)
        victim = next(iter(client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        filling.join(120)
        assert not filling.is_alive()
    rows = rows_in(journal)
    assert sorted(row["path"] for row in rows) == sorted(file.as_posix() for file in files)
    assert all(row["verdict"] for row in rows)


def test_a_cluster_that_cannot_do_the_work_is_no_fault_of_the_files(app, folder, tmp_path):
    """No row blames a file; the sentence says what the machines need."""
    journal, columns = tmp_path / "out.csv", web.columns_of(app.classifier.labels)
    with web.cluster(None) as client, pytest.raises(web.click.ClickException, match="cannot do the work"):
        web.fill(journal, web.files_under(folder), columns, client, "missing.keras", web.LIMITS)
    assert rows_in(journal) == []


@pytest.mark.parametrize("text", ["a,b,error\n1,2,3\n", "a,b,error\n1,2\n", "a,b\n1,2\n"])
def test_a_file_that_is_no_table_of_ours_is_not_written_over(app, folder, tmp_path, text):
    out = tmp_path / "mine.csv"
    out.write_text(text)
    run = app.test_cli_runner().invoke(args=["classify", str(folder), "--out", str(out)])
    assert run.exit_code == 1 and "has other columns; move it away" in run.output
    assert out.read_text() == text


def test_parquet_leaves_a_csv_of_the_same_name_alone(app, folder, tmp_path):
    (tmp_path / "results.csv").write_text("mine")
    classify(app, folder / "0.png", "--out", tmp_path / "results.parquet")
    assert (tmp_path / "results.csv").read_text() == "mine"


def test_a_file_that_nobody_foresaw_is_a_row(app, folder, monkeypatch):
    monkeypatch.setattr("app.read_scans", lambda *_: 1 / 0)
    (row,) = web.rows_for([folder / "0.png"], app.classifier, web.LIMITS)
    assert row["error"] == "0.png cannot be classified (ZeroDivisionError); please report it."


def test_files_that_name_no_study_are_not_one_study(tmp_path):
    scan = web.Scan(phantom(), "a", series="1", identifiers={"StudyInstanceUID": ""})
    assert web.study_of(scan, tmp_path / "a") != web.study_of(scan, tmp_path / "b")

def test_an_ending_that_is_unknown_is_refused(app, folder, tmp_path):
    run = app.test_cli_runner().invoke(args=["classify", str(folder), "--out", str(tmp_path / "out.xls")])
    assert run.exit_code == 2 and "has to end in .csv or .parquet" in run.output

"""What `flask classify` promises for folders of any size, on a Dask cluster of this machine."""

import contextlib
import csv
import io
import os
import pathlib
import signal
import socket
import sys
import threading
import warnings

import pytest
from phantoms import deep, dicom, encode, phantom, put, series, until, volume, zipped
from pyarrow import parquet

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
    files = {f"{n}.png": encode(phantom(n, side=96)) for n in range(4)}
    files |= {"deep/study.zip": zipped(**series(4)), "broken.jpg": b"junk", ".hidden": b"junk"}
    files["deep/er/head.nii"] = volume((40, 40, 36), (1, 1, 6))
    for name, data in files.items():
        put(tmp_path / "archive" / name, data)
    return tmp_path / "archive"


def rows_in(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def classify(app, *args, code=0):
    run = app.test_cli_runner().invoke(args=["classify", *map(str, args)])
    assert run.exit_code == code, run.output
    return run


def printed(app, *args):
    """The rows that the command prints."""
    return list(csv.DictReader(io.StringIO(classify(app, *args).stdout)))


def test_the_command_prints_csv(app, folder):
    rows = printed(app, folder / "0.png", folder / "broken.jpg")
    assert [row["path"] for row in rows] == [str(folder / name) for name in ("0.png", "broken.jpg")]
    assert rows[0]["verdict"] and not rows[0]["error"]
    assert rows[1]["error"].startswith("broken.jpg is not a DICOM") and not rows[1]["verdict"]


def test_a_folder_becomes_one_row_per_slice_and_one_per_series(app, folder, tmp_path):
    """And the same rows again from a journal that was cut off, with nothing done twice."""
    out = tmp_path / "results.csv"
    classify(app, folder, "--out", out)
    rows = rows_in(out)
    assert len({row["path"] for row in rows}) == 7
    (broken,) = [row for row in rows if row["error"]]
    assert broken["error"].startswith("broken.jpg is not a DICOM")
    assert broken["path"].endswith("broken.jpg")
    assert all(int(row["slices"]) == sum(r["path"] == row["path"] for r in rows) for row in rows)
    studies = rows_in(tmp_path / "results.studies.csv")
    of_volume = [row for row in rows if row["path"].endswith(".nii")]
    scans = [row for row in of_volume if row["verdict"] != "skipped"]
    assert {int(study["slices"]) for study in studies} == {4, len(scans)}
    assert all(row["reason"] and not row["label"] for row in of_volume if row not in scans)

    text = out.read_text()
    out.write_text(text[: len(text) // 2])
    for _ in range(2):
        classify(app, folder, "--out", out)
        assert sorted(map(str, rows_in(out))) == sorted(map(str, rows))


def columns(app):
    return ["path", "slices", *web.csv_columns(app.classifier.labels), "error"]


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
    files = [put(tmp_path / f"{n}.png", encode(phantom(n, side=64))) for n in range(64)]
    journal = tmp_path / "out.csv"
    with web.cluster(None) as client:
        arguments = journal, files, columns(app), client, app.config["MODEL"], web.LIMITS
        filling = threading.Thread(target=web.fill, args=arguments)
        filling.start()
        until(lambda: journal.exists() and len(journal.read_text().splitlines()) >= 9, 120)
        victim = next(iter(client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        filling.join(120)
        assert not filling.is_alive()
    rows = rows_in(journal)
    assert sorted(row["path"] for row in rows) == sorted(file.as_posix() for file in files)
    assert all(row["verdict"] for row in rows)


def test_a_cluster_that_cannot_do_the_work_is_no_fault_of_the_files(app, folder, tmp_path):
    """No row blames a file; the sentence says what the machines need."""
    journal = tmp_path / "out.csv"
    refused = pytest.raises(web.click.ClickException, match="cannot do the work")
    with web.cluster(None) as client, refused:
        files = web.files_under(folder)
        web.fill(journal, files, columns(app), client, "missing.keras", web.LIMITS)
    assert rows_in(journal) == []


OTHER, DASK = "has other columns; move it away", "--out needs Dask: pip install -r requirements.txt"


@pytest.mark.parametrize("name, text, code, sentence", [
    ("mine.csv", "a,b,error\n1,2,3\n", 1, OTHER), ("mine.csv", "a,b,error\n1,2\n", 1, OTHER),
    ("mine.csv", "a,b\n1,2\n", 1, OTHER), ("out.csv", "", 1, DASK),
    ("out.xls", "", 2, "has to end in .csv or .parquet"),
])
def test_a_table_that_cannot_be_filled_is_left_alone(
    app, folder, tmp_path, monkeypatch, name, text, code, sentence
):
    out = put(tmp_path / name, text.encode())
    if sentence == DASK:
        monkeypatch.setitem(sys.modules, "distributed", None)
    assert sentence in classify(app, folder, "--out", out, code=code).output
    assert out.read_text() == text


def test_parquet_leaves_a_csv_of_the_same_name_alone(app, folder, tmp_path):
    (tmp_path / "results.csv").write_text("mine")
    classify(app, folder / "0.png", "--out", tmp_path / "results.parquet")
    assert (tmp_path / "results.csv").read_text() == "mine"


def test_a_file_that_nobody_foresaw_is_a_row(app, folder, monkeypatch):
    monkeypatch.setattr("app.read_upload", lambda *_, **__: 1 / 0)
    (row,) = web.rows_of_file(folder / "0.png", app.classifier, web.LIMITS)
    assert row["error"] == "0.png cannot be classified (ZeroDivisionError); please report it."


def test_series_and_studies_are_the_same_in_every_file(app, tmp_path):
    """Loose files of two series and two studies, and one that names none; no row holds a UID."""
    uids = [("1.2.3", "1.2.3.1")] * 2 + [("1.2.3", "1.2.3.2"), ("1.9", "1.9.1"), ("", "")]
    paths = [tmp_path / str(n) for n in range(len(uids))]
    for n, (study, name) in enumerate(uids):
        data = dicom(deep(n), StudyInstanceUID=study, SeriesInstanceUID=name)
        paths[n].write_bytes(data)
    rows = [web.rows_of_file(path, app.classifier, web.LIMITS)[0] for path in paths]
    names = [(row["study"], row["series"]) for row in rows]
    assert names[0] == names[1] and len(set(names)) == 4
    assert names[0][0] == names[2][0] != names[3][0] and names[4][0] == paths[4].as_posix()
    assert not any("1.2.3" in part for name in names for part in name)


def test_what_is_skipped_in_a_file_is_a_row_with_its_reason(app, tmp_path):
    (tmp_path / "study.zip").write_bytes(zipped(**series(2), **{"=notes.txt": b"text"}))
    scans = printed(app, tmp_path)
    assert [row["verdict"] == "skipped" for row in scans] == [False, False, True]
    assert scans[2]["file"] == "'=notes.txt" and "is not a DICOM" in scans[2]["reason"]


def test_names_that_are_no_utf_8_or_begin_like_a_formula_end_nothing(app, tmp_path, monkeypatch):
    """On the terminal as in a file, and again from that file, which is complete."""
    (tmp_path / "in").mkdir()
    for name in (b"d\xe9.png", b"=1+1.png", b"bad\xff.png"):
        data = b"junk" if b"bad" in name else encode(phantom(side=64))
        pathlib.Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_bytes(data)
    monkeypatch.chdir(tmp_path / "in")
    out = tmp_path / "out.csv"
    for _ in range(2):
        classify(app, ".", "--out", out)
        rows = rows_in(out)
        assert sorted(row["path"] for row in rows) == ["'=1+1.png", "bad\\xff.png", "d\\xe9.png"]
        assert sum(bool(row["verdict"]) for row in rows) == 2
    assert len(printed(app, ".")) == 3


def test_a_cluster_starts_beside_another():
    """Dask's own port is taken, of which it would warn."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("error", "Port")
        taken = stack.enter_context(socket.socket())
        with contextlib.suppress(OSError):  # then somebody else has it
            taken.bind(("127.0.0.1", 8787))
            taken.listen()
        client = stack.enter_context(web.cluster(None, 1))
        assert client.submit(max, 1, 2).result() == 2

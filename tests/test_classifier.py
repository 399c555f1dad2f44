"""What the classifier promises: the model file, the verdict and the gate."""

import hashlib
import json
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from phantoms import DRAWINGS, ROOT, encode, phantom

import app as web
from app import Classifier, Finding, ModelError, prepare, read_scans

MODEL = ROOT / "model.keras"


def repack(target, change):
    """Copy the shipped archive with members changed: {name: bytes, or None to leave out}."""
    with zipfile.ZipFile(MODEL) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            data = change.get(name, source.read(name))
            if data is not None:
                copy.writestr(name, data)
    return target


def changed_card(**changes):
    return json.dumps(json.loads(web.read_archive(MODEL)["card.json"]) | changes).encode()


def test_the_shipped_model_answers_with_one_probability_per_label(classifier):
    (finding,) = classifier.classify(read_scans(encode(phantom()), "scan.png"))
    assert finding.verdict in {"tumor", "no_tumor", "uncertain", "rejected"}
    outputs = classifier.infer(np.zeros((2, 224, 224, 3), np.uint8))
    labels = len(classifier.labels)
    assert outputs["probabilities"].shape == (2, labels)
    assert np.allclose(outputs["probabilities"].sum(1), 1, atol=1e-3)
    assert (outputs["heat"].shape, outputs["embedding"].shape) == (
        (2, 14, 14, labels), (2, 512))


def test_a_scan_gets_the_same_answer_alone_and_among_others(classifier, monkeypatch):
    monkeypatch.setattr(classifier, "gate", None)  # a phantom is no brain MRI
    scans = [read_scans(encode(phantom(n, lesion=n % 2)), "scan.png")[0] for n in range(6)]
    prepared = np.stack([prepare(scan.pixels) for scan in scans])
    at_once = classifier.infer(prepared)["probabilities"]
    assert np.ptp(at_once, axis=0).max() > 1e-3
    for scan, outputs, found in zip(scans, at_once, classifier.classify(scans), strict=True):
        alone = classifier.classify_one(scan)
        assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        assert np.allclose(outputs, [*alone.probabilities.values()], atol=1e-4)
        assert np.allclose(found.heat, alone.heat, atol=1e-3)


def test_engines_share_the_threads_and_each_is_used_by_one_caller(monkeypatch):
    made, used = [], []

    def litert(network, threads, path):
        made.append(threads)

        def run(prepared):
            used.append(1)
            assert len(used) <= 3
            time.sleep(0.02)
            used.pop()
            return outputs

        return run

    outputs = Classifier(MODEL).infer(np.zeros((1, 224, 224, 3), np.uint8))
    monkeypatch.setattr("app.litert", litert)
    classifier = Classifier(MODEL, threads=12)
    assert made == [4, 4, 4]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(classifier.infer, [None] * 16))
    assert len(classifier.engines) == 3


def test_no_caller_waits_while_the_others_are_answered_again_and_again(monkeypatch):
    outputs = Classifier(MODEL).infer(np.zeros((1, 224, 224, 3), np.uint8))
    monkeypatch.setattr("app.litert", lambda *_: lambda _: time.sleep(0.002) or outputs)
    classifier, end = Classifier(MODEL), time.monotonic() + 1

    def answers(_):
        return sum(1 for _ in iter(lambda: time.monotonic() < end and classifier.infer(None), False))

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(answers, range(8)))
    assert min(counts) > max(counts) / 4, counts


def test_no_scan_no_finding(classifier):
    assert classifier.classify([]) == []


@pytest.mark.parametrize("p, verdict, risk", [
    (0.0, "no_tumor", "low"), (0.099, "no_tumor", "low"), (0.1, "uncertain", "medium"),
    (0.799, "uncertain", "medium"), (0.8, "tumor", "high"), (1.0, "tumor", "high"),
])
def test_judge_puts_a_probability_between_the_thresholds(p, verdict, risk):
    assert web.judge(p, low=0.1, high=0.8) == (verdict, risk)


@pytest.mark.parametrize("verdict, label", [
    ("tumor", "glioma"), ("no_tumor", "no_tumor"), ("uncertain", "no_tumor"),
])
def test_the_label_never_contradicts_the_verdict(verdict, label):
    assert web.most_probable({"glioma": 0.4, "meningioma": 0.1, "no_tumor": 0.5}, verdict) == label


y, x = np.mgrid[:256, :256]
PATCH = np.zeros((256, 256), np.uint8)
PATCH[60:190, 60:190] = 255


@pytest.mark.parametrize("pixels, reason", [
    (np.dstack([x, 255 - y, (x + y) // 2]).astype(np.uint8),
     "The picture is in strong colours, which no MRI is."),
    (np.full((99, 99), 40, np.uint8), "The picture is blank or nearly so."),
    (PATCH, "The picture is blank or nearly so."),  # nothing to look at once it is cropped
    (np.random.default_rng(0).integers(0, 255, (256, 256), dtype=np.uint8),
     "The picture is noise rather than a scan."),
], ids=["photo", "blank", "patch", "noise"])
def test_what_cannot_be_a_scan_gets_a_reason_and_no_diagnosis(classifier, pixels, reason):
    (finding,) = classifier.classify(read_scans(encode(pixels), "picture.png"))
    assert finding == Finding("rejected", reason=reason)


def test_the_gate_rejects_what_lies_below_its_threshold(classifier, monkeypatch):
    """The card's threshold decides: moved beyond every score, it lets nothing pass."""
    monkeypatch.setitem(classifier.gate, "refuse", 1e9)
    (finding,) = classifier.classify(read_scans(encode(phantom()), "scan.png"))
    assert finding == Finding("rejected", reason="This does not look like a slice of a brain MRI.")


def test_the_gate_weighs_texture_and_embedding():
    """By hand: log(1 + 2 * 0.5) = log 2 of two textures and log(1 + 4 * 0.5) of an embedding, weighed, plus the bias."""
    seen = web.gate_input({"texture": np.full((2, 2), 0.5), "embedding": np.full((2, 1), 0.5)})
    gate = {"scale": np.array([2.0, 2.0, 4.0]), "weights": np.array([1.0, 2.0, -4.0]), "bias": 0.25}
    assert web.gate_score(gate, seen) == pytest.approx(0.25 + 3 * np.log(2) - 4 * np.log(3))


def test_what_is_no_scan_gets_no_diagnosis(classifier):
    """Drawings and this app's own pages: the card has the figures for each kind of picture."""
    drawn = [draw(np.random.default_rng(seed)) for draw in DRAWINGS for seed in range(4)]
    files = [encode(pixels) for pixels in drawn]
    files.append((ROOT / "static" / "screenshot.png").read_bytes())
    findings = classifier.classify([read_scans(data, "drawn.png")[0] for data in files])
    verdicts = [finding.verdict for finding in findings]
    assert set(verdicts) <= {"rejected", "uncertain"}
    assert verdicts.count("rejected") >= 0.75 * len(verdicts)


def test_real_scans_pass_the_gate_and_mostly_get_their_verdict(classifier, real_scans):
    """A smoke test on scans that training may have seen; the card has the figures on others."""
    for label, paths in real_scans.items():
        scans = [read_scans(path.read_bytes(), path.name)[0] for path in paths]
        verdicts = [finding.verdict for finding in classifier.classify(scans)]
        opposite = "tumor" if label == "no_tumor" else "no_tumor"
        assert verdicts.count("rejected") <= 2 and verdicts.count(opposite) <= 3


OTHER = b"TFL3 but not really"
AGAIN = "run Brainmodel.ipynb to write one that fits."
EXPORT = 'run Brainmodel.ipynb to its part "Export", which adds them.'


@pytest.mark.parametrize("spoil, sentence", [
    (lambda path: None, "is missing; run Brainmodel.ipynb or fetch it with the repository."),
    (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     "is a git-LFS pointer, not the model; run `git lfs pull`."),
    (lambda path: path.write_bytes(MODEL.read_bytes()[:1_000_000]),
     "is cut off or damaged; fetch it again or run Brainmodel.ipynb."),
    (lambda path: path.write_bytes(b""),
     "is cut off or damaged; fetch it again or run Brainmodel.ipynb."),
    ({"card.json": None, "serving.tflite": None},
     f"is a Keras file without card.json and serving.tflite; {EXPORT}"),
    ({"serving.tflite": None}, f"is a Keras file without serving.tflite; {EXPORT}"),
    ({"serving.tflite": OTHER},
     f"holds another network than the one its card was written for; {AGAIN}"),
    ({"serving.tflite": OTHER, "card.json": changed_card(serving_sha256=hashlib.sha256(OTHER).hexdigest())},
     f"holds a network that cannot be read; {AGAIN}"),
    ({"card.json": changed_card(labels=["no_tumor", "tumor"])},
     f"gives 4 numbers per scan, but its labels are no_tumor, tumor; {AGAIN}"),
    ({"card.json": b"{"}, f"has a card.json that cannot be read; {AGAIN}"),
    ({"card.json": changed_card(thresholds={"low": 0.1})},
     f"has a card.json that cannot be read; {AGAIN}"),
    ({"card.json": changed_card(gate=dict.fromkeys(web.GATE, [[1.0]]))},
     f"has a gate that does not fit its network; {AGAIN}"),
    ({"card.json": changed_card(gate={"weights": [1.0], "bias": 0, "threshold": 0})},
     f"has a gate that does not fit its network; {AGAIN}"),
])
def test_a_model_file_that_cannot_serve_is_named_in_one_sentence(tmp_path, spoil, sentence):
    path = tmp_path / "model.keras"
    if callable(spoil):
        spoil(path)
    else:
        repack(path, spoil)
    with pytest.raises(ModelError) as caught:
        Classifier(path)
    assert caught.value.message == f"{path} {sentence}"


def test_flask_run_ends_with_that_sentence(tmp_path):
    command = [sys.executable, "-m", "flask", "run", "--port", "0"]
    settings = {"FLASK_MODEL": str(tmp_path / "none.keras"), "FLASK_UPLOADS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=settings | {"PATH": ""}, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        f"Error: {tmp_path}/none.keras is missing; "
        "run Brainmodel.ipynb or fetch it with the repository.")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("place, share", [((7, 7), 0.0), ((0, 0), 1.0), (slice(0), 0.0)])
def test_heat_outside_the_head_is_told_from_heat_inside(place, share):
    heat = np.zeros((14, 14), np.float32)
    heat[place] = 1
    assert web.outside_head(prepare(phantom(1)), heat) == pytest.approx(share, abs=0.05)


def test_an_answer_from_outside_the_head_carries_a_warning(classifier, monkeypatch):
    (scan,) = read_scans(encode(phantom(1, lesion=True)), "scan")
    monkeypatch.setattr("app.outside_head", lambda *_: 0.9)
    monkeypatch.setattr(classifier, "gate", None)
    monkeypatch.setattr("app.most_probable", lambda *_: classifier.labels[0])
    (finding,) = classifier.classify([scan])
    assert "outside the head" in finding.warnings[0]


HEAVY = "print({'ai_edge_litert', 'keras', 'tensorflow'} & set(sys.modules))"


@pytest.mark.parametrize("code, loaded", [
    ("import sys, app; app.create_app({'UPLOADS': '.'}); ", "{'ai_edge_litert'}"),
    ("import sys, app; ", "set()"),  # neither model nor framework: the notebook imports it
])
def test_the_web_process_loads_no_tensorflow_and_an_import_nothing(tmp_path, code, loaded):
    for name in ("app.py", "model.keras"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-c", f"{code}{HEAVY}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{loaded}\n"


def test_the_readme_quotes_the_card(card):
    """Every figure of the README's table is the card's, to three digits."""
    row = r"^\| (.+?): (.+?) \| ([\d.]+)(?: \(([\d.]+) to ([\d.]+)\))? \|$"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 8
    for title, name, *quoted in rows:
        figure = card["figures"][title][name]
        numbers = [figure["value"], *figure["interval"]] if isinstance(figure, dict) else [figure]
        assert [n for n in quoted if n] == [f"{number:.3f}" for number in numbers]

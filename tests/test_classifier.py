"""What the classifier promises: the model file, the verdict, the gate and both engines."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT, encode, phantom

from app import (
    GATE,
    Classifier,
    Finding,
    ModelError,
    Scan,
    gate_features,
    judge,
    most_probable,
    outside_head,
    prepare,
    read_archive,
    read_scans,
    sha256,
)
from model_weights import counter_examples

MODEL = ROOT / "model.keras"


def repack(target, change):
    """Copy the shipped archive to `target` with members changed: {name: bytes, or None to leave out}."""
    with zipfile.ZipFile(MODEL) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            data = change.get(name, source.read(name))
            if data is not None:
                copy.writestr(name, data)
    return target


def changed_card(**changes):
    return json.dumps(json.loads(read_archive(MODEL)["card.json"]) | changes).encode()


def test_the_shipped_model_answers_with_one_probability_a_label(classifier):
    (finding,) = classifier.classify([Scan(phantom(), "scan.png")])
    assert finding.verdict in {"tumor", "no_tumor", "uncertain", "rejected"}
    outputs = classifier.infer(np.zeros((2, 224, 224, 3), np.uint8))
    assert outputs["probabilities"].shape == (2, 4)
    assert np.allclose(outputs["probabilities"].sum(1), 1, atol=1e-3)
    assert (outputs["heat"].shape, outputs["embedding"].shape) == ((2, 14, 14, 4), (2, 512))


def test_a_scan_gets_the_same_answer_alone_and_among_others(classifier):
    prepared = np.stack([prepare(phantom(n, lesion=n % 2 == 1)) for n in range(4)])
    together = classifier.infer(prepared)["probabilities"]
    alone = np.concatenate([classifier.infer(prepared[n : n + 1])["probabilities"] for n in range(4)])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.ptp(together, axis=0).max() > 1e-3


def test_no_scan_no_finding(classifier):
    assert classifier.classify([]) == []


@pytest.mark.parametrize("p, verdict, risk", [
    (0.0, "no_tumor", "low"), (0.099, "no_tumor", "low"), (0.1, "uncertain", "medium"),
    (0.799, "uncertain", "medium"), (0.8, "tumor", "high"), (1.0, "tumor", "high"),
])  # fmt: skip
def test_judge_puts_a_probability_between_the_thresholds(p, verdict, risk):
    assert judge(p, low=0.1, high=0.8) == (verdict, risk)


@pytest.mark.parametrize("verdict, label", [("tumor", "glioma"), ("no_tumor", "no_tumor"), ("uncertain", "no_tumor")])
def test_the_label_never_contradicts_the_verdict(verdict, label):
    assert most_probable({"glioma": 0.4, "meningioma": 0.1, "no_tumor": 0.5}, verdict) == label


def test_a_photo_in_colour_gets_no_diagnosis(classifier):
    y, x = np.mgrid[:256, :256]
    photo = np.dstack([x, 255 - y, (x + y) // 2]).astype(np.uint8)
    (finding,) = classifier.classify(read_scans(encode(photo), "cat.png"))
    assert finding == Finding("rejected", reason="The picture is in strong colours, which no MRI is.")


def test_a_blank_picture_gets_no_diagnosis(classifier):
    (finding,) = classifier.classify(read_scans(encode(np.full((99, 99), 40, np.uint8)), "blank.png"))
    assert finding == Finding("rejected", reason="The picture is blank or nearly so.")


def test_an_even_patch_gets_no_diagnosis(classifier):
    """A white square on black leaves nothing to look at once it is cropped."""
    patch = np.zeros((256, 256), np.uint8)
    patch[60:190, 60:190] = 255
    (finding,) = classifier.classify([Scan(patch, "patch.png")])
    assert finding == Finding("rejected", reason="The picture is blank or nearly so.")


def test_noise_gets_no_diagnosis(classifier):
    noise = np.random.default_rng(0).integers(0, 255, (256, 256), dtype=np.uint8)
    (finding,) = classifier.classify([Scan(noise, "noise.png")])
    assert (finding.verdict, finding.probabilities) == ("rejected", None)
    assert finding.reason == "The picture is noise rather than a scan."


def test_the_gate_rejects_what_lies_below_its_threshold(classifier, monkeypatch):
    """The card's threshold decides: moved beyond every score, it lets nothing pass."""
    monkeypatch.setitem(classifier.gate, "threshold", 1e9)
    (finding,) = classifier.classify([Scan(phantom(), "scan.png")])
    assert finding == Finding("rejected", reason="This does not look like a slice of a brain MRI.")


def test_the_gate_sees_what_is_there_and_where():
    """The embedding has lost the places; a picture upside down is told by its thumbnail."""
    embedding, grey = np.full(512, 0.5), prepare(phantom(1, lesion=True))[..., 0]
    upright, turned = gate_features(2.0, np.stack([embedding] * 2), np.stack([grey, grey[::-1]]))
    assert upright.shape == (512 + 196,) and (gate_features(2.0, embedding, grey) == upright).all()
    assert (upright[:512] == np.log(2)).all() and (turned[:512] == np.log(2)).all()
    assert np.abs(upright[512:] - turned[512:]).max() > 0.1


@pytest.mark.parametrize("kind", counter_examples.KINDS)
def test_drawings_get_no_diagnosis(classifier, kind):
    """Drawings that training has not seen, of kinds that it has; the card has the figures on those it has not."""
    drawn = [counter_examples.KINDS[kind](np.random.default_rng(seed)) for seed in range(1000, 1010)]
    findings = classifier.classify([scan for pixels in drawn for scan in read_scans(encode(pixels), "drawn.png")])
    assert sum(finding.verdict != "rejected" for finding in findings) <= 1


@pytest.mark.parametrize("name", ["screenshot.png", "screenshot_many.png"])
def test_a_picture_of_the_app_itself_gets_no_diagnosis(classifier, name):
    (finding,) = classifier.classify(read_scans((ROOT / "static" / name).read_bytes(), name))
    assert (finding.verdict, finding.label, finding.risk, finding.heat) == ("rejected", None, None, None)


def test_real_scans_pass_the_gate_and_mostly_get_their_verdict(classifier, real_scans):
    """A smoke test on scans that training may have seen; the card has the figures on those it has not."""
    for label, paths in real_scans.items():
        findings = classifier.classify([scan for path in paths for scan in read_scans(path.read_bytes(), path.name)])
        verdicts = [finding.verdict for finding in findings]
        assert verdicts.count("rejected") <= 1
        opposite = "tumor" if label == "no_tumor" else "no_tumor"
        assert verdicts.count(opposite) <= 2


@pytest.mark.parametrize("spoil, sentence", [
    (lambda path: None, "is missing; run Brainmodel.ipynb or fetch it with the repository."),
    (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
     "is a git-LFS pointer, not the model; run `git lfs pull`."),
    (lambda path: path.write_bytes(MODEL.read_bytes()[:1_000_000]),
     "is cut off or damaged; fetch it again or run Brainmodel.ipynb."),
    (lambda path: path.write_bytes(b""), "is cut off or damaged; fetch it again or run Brainmodel.ipynb."),
    (lambda path: repack(path, {"serving.tflite": b"TFL3 but not really"}),
     "holds another network than the one its card was written for; run Brainmodel.ipynb to write one that fits."),
    (lambda path: repack(path, {"serving.tflite": b"TFL3 but not really",
                                "card.json": changed_card(serving_sha256=sha256(b"TFL3 but not really"))}),
     "holds a network that cannot be read; run Brainmodel.ipynb to write one that fits."),
    (lambda path: repack(path, {"card.json": changed_card(labels=["no_tumor", "tumor"])}),
     r"gives 4 numbers a scan, but its labels are no_tumor, tumor; run Brainmodel.ipynb to write one that fits."),
    (lambda path: repack(path, {"card.json": b"{"}),
     "has a card.json that cannot be read; run Brainmodel.ipynb to write one that fits."),
    (lambda path: repack(path, {"card.json": changed_card(gate=dict.fromkeys(GATE, [[1.0]]))}),
     "has a gate that does not fit an embedding of 512; run Brainmodel.ipynb to write one that fits."),
    (lambda path: repack(path, {"card.json": changed_card(gate={"weights": [1.0], "bias": 0, "threshold": 0})}),
     "has a gate that does not fit an embedding of 512; run Brainmodel.ipynb to write one that fits."),
    (lambda path: repack(path, {"card.json": changed_card(thresholds={"low": 0.1})}),
     "has a card.json that cannot be read; run Brainmodel.ipynb to write one that fits."),
])  # fmt: skip
def test_a_model_file_that_cannot_serve_is_named_in_one_sentence(tmp_path, spoil, sentence):
    path = tmp_path / "model.keras"
    spoil(path)
    with pytest.raises(ModelError) as caught:
        Classifier(path)
    assert caught.value.message == f"{path} {sentence}"


def test_flask_run_ends_with_that_sentence(tmp_path):
    command = [sys.executable, "-m", "flask", "run", "--port", "0"]
    environment = {"FLASK_MODEL": str(tmp_path / "none.keras"), "FLASK_UPLOADS": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        f"Error: {tmp_path}/none.keras is missing; run Brainmodel.ipynb or fetch it with the repository.")
    assert "Traceback" not in done.stderr


def test_without_the_fast_network_keras_gives_the_same_answer(tmp_path, classifier):
    """Float against int8 on one scan, and the result says which engine answered."""
    slow = Classifier(repack(tmp_path / "model.keras", {"serving.tflite": None}))
    prepared = np.stack([phantom(1, side=224)] * 3, axis=2)[None]
    fast, exact = classifier.infer(prepared), slow.infer(prepared)
    assert slow.engine == "keras-float32"
    assert np.abs(fast["probabilities"] - exact["probabilities"]).max() < 0.1
    assert np.corrcoef(fast["heat"].ravel(), exact["heat"].ravel())[0, 1] > 0.95


def test_a_plain_keras_model_serves_and_says_that_it_has_no_card(tmp_path):
    path = repack(tmp_path / "model.keras", {"serving.tflite": None, "card.json": None})
    plain = Classifier(path)
    assert (plain.labels, plain.card["plain"]) == (["glioma", "meningioma", "no_tumor", "pituitary"], True)


@pytest.mark.parametrize("place, share", [((7, 7), 0.0), ((0, 0), 1.0)])
def test_heat_outside_the_head_is_told_from_heat_inside(place, share):
    heat = np.zeros((14, 14), np.float32)
    heat[place] = 1
    assert outside_head(prepare(phantom(1)), heat) == pytest.approx(share, abs=0.05)


def test_an_answer_from_outside_the_head_carries_a_warning(classifier, monkeypatch):
    (scan,) = read_scans(encode(phantom(1, lesion=True)), "scan")
    monkeypatch.setattr("app.outside_head", lambda *_: 0.9)
    monkeypatch.setattr(classifier, "why_rejected", lambda *_: None)
    monkeypatch.setattr("app.most_probable", lambda *_: "glioma")
    (finding,) = classifier.classify([scan])
    assert "outside the head" in finding.warnings[0]


def test_the_web_process_does_not_import_tensorflow(tmp_path):
    code = f"import sys, app; app.create_app({{'UPLOADS': {str(tmp_path)!r}}}); print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_importing_the_app_loads_nothing(tmp_path):
    """Neither the model nor a framework: the notebook imports it for two functions."""
    shutil.copy(ROOT / "app.py", tmp_path)
    code = "import sys, app; print({'ai_edge_litert', 'keras', 'tensorflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_the_card_says_what_the_page_and_the_readme_quote(card):
    assert card["labels"] == ["glioma", "meningioma", "no_tumor", "pituitary"]
    assert {"thresholds", "temperature", "figures", "confusion", "gate", "data", "limits", "versions"} <= set(card)
    assert {"same label", "mean change of the tumor probability"} == set(card["figures"]["int8 against float"])


def test_the_readme_quotes_the_card(card):
    """Every figure of the README's table is the card's, to three digits."""
    row = r"^\| (.+?): (.+?) \| ([\d.]+)(?: \(([\d.]+) to ([\d.]+)\))? \|$"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 8
    for title, name, *quoted in rows:
        figure = card["figures"][title][name]
        numbers = [figure["value"], *figure["interval"]] if isinstance(figure, dict) else [figure]
        assert [n for n in quoted if n] == [f"{number:.3f}" for number in numbers]

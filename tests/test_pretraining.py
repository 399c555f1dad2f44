"""The base: what its training sees, that it goes on where it stopped, and that folding changes nothing."""

import csv
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "model_weights"))
import cross_validate  # noqa: E402
import pretrain_base as base  # noqa: E402

STILL = base.Augmentation(rotation=0, zoom=(1, 1), shift=0, mirrored=0, coarse=0, gamma=(1, 1), contrast=(1, 1),
                          brightness=(1, 1), inverted=0, noise=0, painted=0, without=0)  # fmt: skip
NOWHERE = np.full(4, np.nan)
TUMOR, NONE = np.array([1, 0], "float32"), np.array([0, 1], "float32")


def spotted(side=128, box=(0.25, 0.5, 0.5, 0.75)):
    """A grey picture with a bright square, and the square's box."""
    picture = np.full((side, side), 60, np.uint8)
    x0, y0, x1, y1 = (round(side * share) for share in box)
    picture[y0:y1, x0:x1] = 220
    return picture, np.array(box)


@pytest.mark.parametrize("seed", range(5))
def test_a_box_moves_with_its_picture(seed):
    """Turned, mirrored, zoomed and shifted, the cells marked are the cells that are bright."""
    moving = base.Augmentation(coarse=0, gamma=(1, 1), contrast=(1, 1), brightness=(1, 1), inverted=0, noise=0,
                               painted=0, without=0)  # fmt: skip
    grey, _, cells = moving.view(*spotted(), TUMOR, NONE, 112, np.random.default_rng(seed))
    bright = base.cells_of((255 * (grey > 140)).astype(np.uint8), 112)
    assert np.abs(bright - cells).max() < 0.15
    assert cells.max() > 0.5


def test_a_tumor_painted_over_counts_as_none():
    picture, box = spotted()
    view = base.Augmentation(**vars(STILL) | {"without": 1})
    grey, targets, cells = view.view(picture, box, TUMOR, NONE, 128, np.random.default_rng(0))
    assert targets.tolist() == NONE.tolist()
    assert not cells.any()
    assert (grey < 100).mean() > 0.99


def test_without_targets_for_it_no_tumor_is_painted_over():
    view = base.Augmentation(**vars(STILL) | {"without": 1})
    _, targets, cells = view.view(*spotted(), TUMOR, np.zeros(2), 128, np.random.default_rng(0))
    assert targets.tolist() == TUMOR.tolist() and cells.any()


def test_an_unchanged_view_is_the_picture():
    picture, _ = spotted()
    grey, _, cells = STILL.view(picture, NOWHERE, TUMOR, NONE, 128, np.random.default_rng(0))
    assert np.abs(grey - picture).max() < 1
    assert not cells.any()


def test_evidence_outside_the_box_costs():
    """The same logits cost less where they lie in the box, and nothing is asked without one."""
    logits, inside = np.zeros((3, 4, 4, 2), "float32"), np.zeros((3, 4, 4), "float32")
    logits[:, 1, 1, 0] = 5
    inside[0, 1, 1] = inside[1, 2, 2] = 1
    right, wrong, nowhere = np.asarray(base.place_loss(np.array([TUMOR] * 3), logits, inside))
    assert right < 0.2
    assert wrong > 4
    assert nowhere == 0


def test_the_loss_of_a_scan_sums_what_is_allowed():
    logits = np.log(np.array([[[[0.2, 0.5, 0.3]]]], "float32"))
    marks = base.with_place(np.array([[1, 0, 1]], "float32"), np.zeros((1, 1, 1), "float32"))
    assert np.allclose(base.loss(marks, logits), -np.log(0.5), atol=1e-5)
    assert float(base.hit(marks, logits)[0]) == 0


def test_differing_from_a_teacher_costs():
    """Nothing but the labels' own loss where answers and features agree; more for either that does not."""
    random = np.random.default_rng(0)
    answers, features = np.full((2, 3, 3, 2), (2, -1), "float32"), random.random((2, 3, 3, 4), "float32")
    mean = np.broadcast_to(features.mean((0, 1, 2)), features.shape)
    taught = np.concatenate([answers, features], -1)
    marks = base.with_place(np.array([TUMOR] * 2), np.zeros((2, 3, 3), "float32"), taught)
    same, other_answer, other_features = (
        np.asarray(base.loss(marks, np.concatenate(outputs, -1), classes=2))
        for outputs in ((answers, features), (-answers, features), (answers, mean)))  # fmt: skip
    assert np.allclose(same, base.loss(marks[..., :3], answers))
    labels_alone = np.asarray(base.loss(marks[..., :3], -answers))
    assert (other_answer > labels_alone + 1).all()
    assert np.isclose((other_features - same).mean(), 1, atol=0.01)  # the mean leaves the whole variance
    assert np.asarray(base.hit(marks, np.concatenate([answers, 9 * features], -1), classes=2)).all()


def test_pictures_of_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    """A ramp to 40,000 stays a ramp; eight bits stay as they are."""
    ramp = np.linspace(0, 40000, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name, pixels in (("deep", ramp), ("plain", (ramp // 256).astype(np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    deep, plain = base.read_folder(tmp_path, 64)["pixels"].astype(int)
    assert abs(deep.mean() - 127.5) < 1 and deep.max() == 255
    assert (plain == ramp // 256).all()


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """An array file of 40 pictures in two classes and five folds, bright squares in boxes."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("base") / "prepared.npz"
    pictures, boxes = zip(*[spotted(64, (0.25, 0.25, 0.5 + 0.25 * (n % 2), 0.5)) for n in range(40)])
    pixels = (np.stack(pictures) + random.integers(0, 30, (40, 64, 64))).astype(np.uint8)
    folds = np.array([str(n // 8 + 1) for n in range(40)])
    joined = folds.copy()
    joined[0] = "2"
    np.savez(path, pixels=pixels, targets=np.eye(2, dtype=np.uint8)[np.arange(40) % 2], labels=["long", "wide"],
             boxes=np.stack(boxes), part=np.where(np.arange(40) < 32, "train", "validation"), fold=folds, joined=joined,
             digest=[f"{n:02}" for n in range(40)])
    return path


def run(script, *arguments):
    """Run a script's main() with arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()


QUICK = ("--schedule", "32:2", "--draws", 8, "--batch", 4, "--rate", 0.01, "--dtype", "float32")


def test_training_goes_on_where_it_stopped(arrays, tmp_path, monkeypatch, capsys):
    """Stopped after the first of two epochs and started again, it ends as if it had never stopped."""
    monkeypatch.setattr(base, "BLOCKS", ((2, 8), (2, 8), (4, 8), (4, 8), (4, 8)))
    monkeypatch.setattr(base, "write_folded", lambda *arguments: None)
    run(base, arrays, "--checkpoint", tmp_path / "a", *QUICK)
    save, stop = base.save_state, KeyboardInterrupt

    def save_and_stop(*arguments):
        save(*arguments)
        raise stop

    monkeypatch.setattr(base, "save_state", save_and_stop)
    with pytest.raises(stop):
        run(base, arrays, "--checkpoint", tmp_path / "b", *QUICK)
    monkeypatch.setattr(base, "save_state", save)
    run(base, arrays, "--checkpoint", tmp_path / "b", *QUICK)
    assert "1 of 2 epochs done" in capsys.readouterr().out
    with np.load(tmp_path / "a" / "branches.npz") as one, np.load(tmp_path / "b" / "branches.npz") as other:
        for name in one:
            assert np.allclose(one[name], other[name], atol=1e-3), name
    with pytest.raises(SystemExit, match="another rate"):
        run(base, arrays, "--checkpoint", tmp_path / "b", *QUICK, "--rate", 0.5)


class Brightness:
    """A teacher that knows how bright each place is, and no class from another."""

    classes, features = 2, 1

    def __call__(self, grey):
        cells = np.stack([base.cells_of(picture.astype(np.uint8), grey.shape[1]) for picture in grey])[..., None]
        return np.concatenate([np.zeros((*cells.shape[:3], 2), "float32"), cells], axis=-1)


def test_a_teacher_is_learned_from_and_leaves_no_trace_in_the_base(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "BLOCKS", ((2, 8), (2, 8), (4, 8), (4, 8), (4, 8)))
    monkeypatch.setattr(base, "read_teacher", lambda path, classes: path and Brightness())
    written = []
    monkeypatch.setattr(base, "write_folded", lambda model, *arguments: written.append(base.branched_layers(model)))
    run(base, arrays, "--checkpoint", tmp_path, *QUICK, "--teacher", "bright")
    assert "validation" in capsys.readouterr().out
    assert len(written[0]) == 16
    with np.load(tmp_path / "branches.npz") as branches:
        assert branches["logits/1"].shape == (2,)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("torch", "efficientnet_lite_pytorch"))), reason=(
    "the teacher needs PyTorch and two packages more, which nothing else does; train_teacher.py names them"))
def test_a_teacher_says_at_every_cell_what_its_network_says(arrays, tmp_path):
    import torch
    import train_teacher

    path = tmp_path / "teacher.pt"
    command = [sys.executable, train_teacher.__file__, arrays, "--out", path, "--schedule", "64:1", "--draws", "32"]
    trained = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": "torch"}, capture_output=True, check=True)
    assert b"epoch 1/1, 64 pixels: accuracy" in trained.stdout
    teacher, grey = train_teacher.Teacher(path), np.load(arrays)["pixels"][:2].astype("float32")
    said = teacher(grey)
    assert said.shape == (2, 4, 4, teacher.classes + teacher.features) and teacher.classes == 2
    with torch.inference_mode():
        logits = teacher.net(train_teacher.network_input(grey)).numpy()
    np.testing.assert_allclose(said[:, 3, 1, :2], logits, atol=0.05)  # bfloat16
    assert np.array_equal(said[:, 0, 0, 2:], said[:, 1, 1, 2:]) and not np.array_equal(said[:, 0, 0], said[:, 2, 0])
    with pytest.raises(SystemExit, match="knows 2 classes, the pictures have 3"):
        base.read_teacher(path, 3)


def test_folding_and_starting_from_the_folded_file_change_but_one_factor(arrays, tmp_path):
    """Branches of every kind fold into a plain VGG19; that unfolds again, each map brought to a mean square of 1."""
    random, pictures = np.random.default_rng(0), np.load(arrays)["pixels"][:8]
    model = base.branched_base("float32")
    for layer in base.branched_layers(model):
        for gamma, beta, mean, variance in layer.norms.values():
            for variable, low, high in ((gamma, 0.5, 1), (beta, -0.2, 0.2), (mean, -0.2, 0.2), (variance, 1, 3)):
                variable.assign(random.uniform(low, high, variable.shape))
    path = tmp_path / "folded.weights.h5"
    base.write_folded(model, pictures, path)  # ends the program where it is not exact
    plain = base.keras.applications.VGG19(include_top=False, weights=str(path))
    started = base.branched_base("float32", points=False, frozen=2)
    factor = base.load_folded(started, str(path), pictures)
    given = base.keras.applications.vgg19.preprocess_input(np.repeat(pictures[..., None].astype("float32"), 3, -1))
    expected = factor * plain.predict(given, verbose=0)
    np.testing.assert_allclose(started.predict(base.network_input(pictures), verbose=0), expected,
                               atol=base.FOLD_TOLERANCE * expected.max())
    for layer in base.branched_layers(started):
        maps = base.keras.Model(started.input, layer.output)(base.network_input(pictures))
        assert abs(np.mean(np.square(maps)) - 1) < 0.01
    assert [layer.trainable for layer in base.branched_layers(started)] == [False] * 4 + [True] * 12


def test_a_network_that_folds_otherwise_is_not_written(tmp_path):
    model = base.branched_base("float32")
    other = base.keras.applications.VGG19(include_top=False, weights=None)
    with pytest.raises(SystemExit, match="no weights file was written"):
        base.check_fold(model, other, np.full((2, 64, 64), 90, np.uint8))


def test_no_fold_sees_its_scans_or_persons(arrays):
    scans, labels = cross_validate.typed_scans(arrays)
    assert labels == ["long", "wide"]
    for fold in "12345":
        training, held_out = cross_validate.parts_of(scans, fold)
        assert len(training["pixels"]) + len(held_out) == 40
        assert set(np.flatnonzero((scans["fold"] == fold) | (scans["joined"] == fold))) == set(held_out)
    assert 0 in cross_validate.parts_of(scans, "1")[1] and 0 in cross_validate.parts_of(scans, "2")[1]


def test_cross_validation_writes_every_scan_once_a_fold_and_does_no_fold_twice(arrays, tmp_path, monkeypatch, capsys):
    def answer(scans, fold, options):
        held_out = cross_validate.parts_of(scans, fold)[1]
        return held_out, scans["targets"][held_out] * 0.8 + 0.1

    monkeypatch.setattr(cross_validate, "train_fold", answer)
    out = tmp_path / "answers.csv"
    for _ in range(2):
        run(cross_validate, arrays, "--out", out)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 41  # one scan is held out twice: by its fold and by its person's
    assert sorted(int(row["sha256"]) for row in rows if row["model"] == row["fold"]) == list(range(40))
    assert {row["fold"] for row in rows} == set("12345")
    assert capsys.readouterr().out.count("accuracy 1.000") == 5


@pytest.mark.parametrize("arguments, sentence", [
    (["missing.npz"], "neither a folder of class folders nor an .npz file"),
    (["{data}", "--schedule", "80"], "not of the form pixels:epochs"),
    (["{data}", "--schedule", "16:2"], "at least 32 pixels"),
    (["{data}", "--start", "nothing.weights.h5", "--schedule", "32:1"], "cannot be read as the weights of VGG19"),
    (["{data}", "--start", "nothing.npz", "--schedule", "32:1"], "cannot be read as the branches of VGG19"),
    (["{data}", "--teacher", "nothing.pt", "--schedule", "32:1"], "--teacher needs|cannot be read as a network of"),
])  # fmt: skip
def test_what_cannot_be_trained_is_said_in_a_sentence(arrays, tmp_path, arguments, sentence):
    arguments = [argument.format(data=arrays) for argument in arguments]
    with pytest.raises(SystemExit, match=sentence):
        run(base, *arguments, "--out", tmp_path / "x.weights.h5", "--checkpoint", tmp_path, "--draws", 8, "--batch", 4)
    assert not pathlib.Path(tmp_path / "x.weights.h5").exists()

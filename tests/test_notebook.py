"""The notebook: its functions, and the whole of it on drawn phantoms, headless, as a user runs it."""

import io
import json
import os
import subprocess
import sys
import warnings
from collections import Counter

import nbformat
import nibabel
import numpy as np
import pytest
from conftest import ROOT, encode, phantom

import app as web
from model_weights import counter_examples

SETTINGS = {
    "BASE_WEIGHTS": "scratch", "VIEWS": 1, "BATCH": 16, "EPOCHS_1": 2, "EPOCHS_2": 1, "EPOCHS_3": 1,
    "DROPOUTS": "0.4", "RATES_1": "0.001,0.002", "TOPS": "1", "RATES_2": "0.002", "SEARCH_DRAWS": 16, "DRAWS_3": 16,
    "NAIVE_BATCHES": 1, "EPOCHS_BASELINE": 1, "BOOTSTRAP": 50, "CALIBRATIONS": "10", "ROUNDING": 4, "AGREEMENT": 2,
    "GATE_SCANS": 12, "GATE_DRAWN": 4, "RESUME": 0, "LIMIT": 0, "COUNTER_EXAMPLES": "", "OTHER_SCANS": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def notebook():
    """The names that the notebook's imports and its cells of functions define."""
    cells = nbformat.read(ROOT / "Brainmodel.ipynb", 4).cells
    imports = next(c for c in cells if c.cell_type == "code")
    functions = [c for c in cells if "functions" in c.metadata.get("tags", [])]
    names = {"WEIGHTS": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TensorFlow's own imports warn of
        for cell in [imports, *functions]:
            exec(compile(cell.source, "Brainmodel.ipynb", "exec"), names)
    return names


@pytest.mark.parametrize("name, label", [
    ("yes", "tumor"), ("Tumorous", "tumor"), ("Unhealthy", "tumor"), ("brain_tumor", "tumor"),
    ("no", "no_tumor"), ("nontumorous", "no_tumor"), ("Healthy", "no_tumor"), ("notumor", "no_tumor"),
    ("glioma_tumor", "glioma"), ("pituitary", "pituitary"), ("Metastasis, lung", "metastasis_lung"),
])  # fmt: skip
def test_label_of_understands_the_names_of_public_collections(notebook, name, label):
    assert notebook["label_of"](name) == label


def test_list_scans_reads_parts_and_sources_above_class_folders(notebook, tmp_path):
    for path in ("Training/glioma_tumor/1.png", "val/no_tumor/2.png", "siteA/yes/3.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(encode(phantom()))
    scans = notebook["list_scans"](tmp_path)
    found = {(s["label"], s["part"], s["source"]) for s in scans}
    folder = tmp_path.name
    assert found == {("glioma", "train", folder), ("no_tumor", "validation", folder), ("tumor", "", "sitea")}


def test_list_scans_reads_a_manifest(notebook, tmp_path):
    (tmp_path / "manifest.csv").write_text(
        "path,label,source,patient_fold,box\na/1.jpg,Glioma,cheng,3,0.1 0.2 0.3 0.4\nb/2.jpg,no,web,,\n")
    first, second = notebook["list_scans"](tmp_path)
    assert first == {"path": tmp_path / "a/1.jpg", "folder": tmp_path, "label": "glioma", "source": "cheng",
                     "patient_fold": "3", "box": "0.1 0.2 0.3 0.4", "part": ""}  # fmt: skip
    assert (second["label"], second["patient_fold"], second["box"]) == ("no_tumor", "", "")


@pytest.mark.parametrize("fill, sentence", [
    (lambda folder: folder.mkdir(), "holds no pictures"), (lambda folder: None, "is no folder"),
])  # fmt: skip
def test_list_scans_says_what_is_missing(notebook, tmp_path, fill, sentence):
    fill(tmp_path / "data")
    with pytest.raises(SystemExit, match=sentence):
        notebook["list_scans"](tmp_path / "data")


def test_a_blank_picture_is_of_no_use(notebook, tmp_path):
    (tmp_path / "black.png").write_bytes(encode(np.zeros((99, 99), np.uint8)))
    assert notebook["read"]({"path": tmp_path / "black.png"}) == (None, None, "black.png is blank or nearly so.")


def prepared(pixels):
    return web.prepare(pixels)[..., 0]


def test_copies_of_a_scan_are_one_group(notebook):
    """Mirrored, brightened, cropped and noisy copies join; other heads do not."""
    one = phantom(1)
    random = np.random.default_rng(0)
    copies = [one, one[:, ::-1], (one * 0.6 + 30).astype(np.uint8), np.pad(one, 40),
              (one * random.uniform(0.9, 1, one.shape)).astype(np.uint8)]  # fmt: skip
    others = [phantom(seed) for seed in range(2, 6)]
    groups = notebook["duplicate_groups"](np.stack([prepared(p) for p in copies + others]), 0.93)
    assert len(set(groups[:5])) == 1
    assert len(set(groups)) == 5


def test_split_holds_groups_and_folds_together_and_shares_about_right(notebook):
    random = np.random.default_rng(0)
    groups = random.integers(0, 300, 1000)
    folds = np.where(groups < 100, np.char.mod("%d", groups % 5), "")
    strata = np.where(folds != "", "typed", np.where(groups % 2, "tumor", "none"))
    folder, shares = np.array(["data"] * 1000), {"validation": 0.15, "test": 0.15}
    parts = notebook["split"](strata, groups, folds, [""] * 1000, [False] * 1000, folder, shares, 1)
    for units in (groups, folds[folds != ""]):
        of = parts[folds != ""] if units is not groups else parts
        assert all(len(set(of[units == unit])) == 1 for unit in set(units))
    for stratum in ("tumor", "none"):
        shares = [np.mean(parts[strata == stratum] == part) for part in ("train", "validation", "test")]
        assert np.abs(np.array(shares) - (0.7, 0.15, 0.15)).max() < 0.05


def test_a_group_that_straddles_folds_moves_to_one(notebook):
    folds, groups = np.array(["1", "1", "2", "3", ""]), np.array([7, 7, 7, 8, 8])
    assert notebook["join_folds"](folds, groups).tolist() == ["1", "1", "1", "3", "3"]


def test_a_split_that_the_data_brings_is_kept_but_for_what_leaks(notebook):
    groups, given = np.array([0, 0, 1, 2, 3]), ["train", "test", "test", "validation", "train"]
    folder, unknown = np.array(["data"] * 5), [False] * 5
    parts = notebook["split"](np.array(["a"] * 5), groups, np.array([""] * 5), given, unknown, folder, {"test": 0.5}, 1)
    assert parts.tolist() == ["train", "", "test", "validation", "train"]


def test_a_folder_that_brings_its_parts_leaves_another_to_be_dealt_out(notebook):
    """Slices that are split already do not send the whole of another folder to training."""
    given = np.array([""] * 100 + ["train", "validation", "test"] * 5)
    folder = np.array(["mine"] * 100 + ["slices"] * 15)
    parts = notebook["split"](np.array(["a"] * 115), np.arange(115), np.array([""] * 115), given, [False] * 115, folder,
                              {"validation": 0.15, "test": 0.15}, 1)  # fmt: skip
    assert Counter(parts[:100]) == {"train": 70, "validation": 15, "test": 15}
    assert (parts[100:] == given[100:]).all()


def test_public_pictures_among_others_keep_their_parts_and_the_others_are_dealt_out(notebook):
    """What the base was trained on is not held out, nor its copy; a few public ones do not stand for a part."""
    given = np.array(["train", "train", "validation", "test"] + [""] * 100)
    groups = np.r_[np.arange(4), 0, np.arange(5, 104)]
    parts = notebook["split"](np.array(["a"] * 104), groups, np.array([""] * 104), given, given != "",
                              np.array(["mine"] * 104), {"validation": 0.15, "test": 0.15}, 1)  # fmt: skip
    assert (parts[:4] == given[:4]).all() and parts[4] == "train"
    assert min(Counter(parts[5:]).values()) >= 14


def test_who_is_trained_on_is_not_held_out(notebook):
    parts = np.array(["train", "test", "validation", "test", "test", "train"])
    persons = np.array(["1", "1", "2", "2", "3", ""])
    assert notebook["without_torn"](parts, persons).tolist() == ["train", "", "", "", "test", "train"]


def test_a_public_picture_is_known_by_its_content(notebook, tmp_path):
    """What the kept base has trained on is recognised under any name; split.csv deals no picture twice."""
    lines = (ROOT / "model_weights" / "split.csv").read_text().splitlines()[1:]
    known = {line.split(",")[0]: line.split(",")[1] for line in lines}
    assert len(known) == len(lines) > 5000
    assert set(known.values()) == {"train", "validation", "test"}
    (tmp_path / "a.png").write_bytes(encode(phantom(1)))
    (tmp_path / "b.jpeg").write_bytes(encode(phantom(1)))
    assert notebook["digest"](tmp_path / "a.png") == notebook["digest"](tmp_path / "b.jpeg") not in known


def test_no_doubted_label_is_of_a_scan_that_has_trained_the_shipped_model(notebook):
    """They are left out of training from now on; of the training part none was looked at."""
    dealt, doubted = notebook["by_digest"]("split.csv", "part"), notebook["by_digest"]("doubted_labels.csv", "path")
    assert len(doubted) > 20
    assert {dealt[name] for name in doubted} == {"validation", "test"}


def test_tumor_of_unknown_type_allows_every_type(notebook):
    labels, targets = notebook["targets_of"](np.array(["glioma", "tumor", "no_tumor", "pituitary"]))
    assert labels == ["glioma", "no_tumor", "pituitary"]
    assert targets.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_tumor_is_a_label_of_its_own_where_no_type_is_known(notebook):
    labels, targets = notebook["targets_of"](np.array(["tumor", "no_tumor"]))
    assert (labels, targets.tolist()) == (["no_tumor", "tumor"], [[0, 1], [1, 0]])


def test_data_without_normal_scans_is_refused(notebook):
    with pytest.raises(SystemExit, match="the app needs `no_tumor` and another"):
        notebook["targets_of"](np.array(["glioma", "pituitary"]))


@pytest.mark.parametrize("parts, sentence", [
    (["train"] * 8 + ["test"] * 4, "No scan of the validation part is no_tumor"),
    (["test"] * 12, "No scan of the train part is no_tumor"),
])  # fmt: skip
def test_a_label_that_a_part_lacks_is_refused(notebook, parts, sentence):
    targets = np.eye(2, dtype=np.uint8)[[0] * 12 + [1] * 12]
    parts = np.array(parts + ["train"] * 8 + ["validation", "validation", "test", "test"])
    with pytest.raises(SystemExit, match=sentence):
        notebook["check_enough"](["no_tumor", "tumor"], targets, parts, np.arange(24))


def test_a_tumor_of_unknown_type_stands_for_no_type_of_its_own(notebook):
    """Scans of three types and of an unknown one, but pituitary ones in the test part alone."""
    labels, targets = notebook["targets_of"](np.repeat(["glioma", "no_tumor", "pituitary", "tumor"], 12))
    parts = np.tile(["train", "validation", "test"], 16)
    parts[24:36] = "test"
    with pytest.raises(SystemExit, match="No scan of the train part is pituitary"):
        notebook["check_enough"](labels, targets, parts, np.arange(48))


def test_too_few_different_scans_of_a_label_are_refused(notebook):
    targets, parts = np.eye(2, dtype=np.uint8)[[0] * 12 + [1] * 12], np.array(["train", "validation", "test"] * 8)
    with pytest.raises(SystemExit, match="Only 3 different scans are tumor; at least 10 are needed"):
        notebook["check_enough"](["no_tumor", "tumor"], targets, parts, np.r_[np.arange(12), [12, 13, 14] * 4])


def test_an_empty_class_folder_is_named(notebook, tmp_path):
    (tmp_path / "glioma").mkdir()
    (tmp_path / "glioma" / ".DS_Store").write_bytes(b"")
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "1.png").write_bytes(encode(phantom()))
    with pytest.raises(SystemExit, match="glioma is empty; fill it or remove it"):
        notebook["list_scans"](tmp_path)


def test_a_box_follows_the_crop_and_the_padding(notebook):
    """A bright square's box, given as shares of the scan, lies over the square in the prepared picture."""
    pixels = np.zeros((200, 400), np.uint8)
    pixels[40:160, 100:350] = 90
    pixels[60:90, 300:340] = 250
    x0, y0, x1, y1 = np.round(notebook["prepared_box"](pixels, "0.75 0.3 0.85 0.45") * web.SIDE).astype(int)
    bright = prepared(pixels) > 200
    assert bright[y0 + 1:y1 - 1, x0 + 1:x1 - 1].all()
    assert bright.sum() <= (y1 - y0 + 2) * (x1 - x0 + 2)


def test_rounding_keeps_the_outputs_and_stays_on_the_converters_grid(notebook):
    """Each output channel has 127 steps a side, and correlated inputs see less of the rounding than plain rounding."""
    random = np.random.default_rng(0)
    inputs = (random.normal(size=(4000, 8)) @ random.normal(size=(8, 72)) + 3).astype("float32")
    kernel = random.normal(size=(72, 5)).astype("float32")
    rounded, step = notebook["carried_rounding"](kernel, inputs, block=16), notebook["steps_of"](kernel)
    steps = rounded / step
    assert np.allclose(steps, np.round(steps), atol=1e-3)
    assert np.allclose(np.abs(steps).max(0), 127)
    plainly = np.round(kernel / step) * step
    def error(weights):
        return np.square(inputs @ (weights - kernel)).mean()
    assert error(rounded) < 0.3 * error(plainly)


def test_views_within_fills_the_cache_and_no_more(notebook):
    train = np.arange(100)
    notebook["BATCH"] = 8
    assert notebook["views_within"](train, 3, np.ones(100), 5, 20, 1).tolist() == [*range(100)] * 3
    assert len(notebook["views_within"](train, 3, np.ones(100), 0.02, 20, 1)) == 29


def test_the_blanked_tenth_is_the_hottest_of_the_head(notebook):
    picture, heat = np.zeros((224, 224), np.uint8), np.zeros((14, 14))
    picture[16:-16, 16:-16] = 100
    picture[32:48, 48:64] = 200
    heat[2, 3], heat[0] = 1, 5
    assert notebook["blanked"](picture, heat, 1 / 144)[40, 56] == 100
    assert (notebook["blanked"](picture, heat, 0.1)[:16] == 0).all()


@pytest.mark.parametrize("overlap", [0.0, 2.0])
def test_thresholds_keep_both_promises(notebook, overlap):
    """At least 99 % of tumors from `low` on, 99 % of the others below `high`, crossing or not."""
    random = np.random.default_rng(0)
    tumor = np.arange(2000) % 2 == 0
    p = 1 / (1 + np.exp(-(random.normal(0, overlap, 2000) + np.where(tumor, 3, -3))))
    found = notebook["thresholds"](p, tumor)
    assert found["low"] <= found["high"]
    assert np.mean(p[tumor] >= found["low"]) >= 0.99
    assert np.mean(p[~tumor] < found["high"]) >= 0.99


def test_calibration_undoes_overconfidence_and_a_preference(notebook):
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.5, (4000, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.eye(3)[[random.choice(3, p=row) for row in p]]
    temperature, offsets = notebook["calibrated"](2.5 * (logits + [1, 0, -1]), targets)
    assert abs(temperature - 2.5) < 0.2
    np.testing.assert_allclose(offsets, (-1, 0, 1), atol=0.15)


def test_few_scans_set_no_large_offsets(notebook):
    """Nine scans of one label would make any other impossible."""
    _, offsets = notebook["calibrated"](np.zeros((9, 2)), np.eye(2)[[0] * 9])
    assert 0 < np.ptp(offsets) < 3


def test_figures_of_a_known_answer(notebook):
    tumor, p = np.array([True] * 4 + [False] * 4), np.array([0.9, 0.8, 0.7, 0.2, 0.6, 0.1, 0.1, 0.1])
    assert notebook["sensitivity_at"](tumor, p) == 0.75
    assert notebook["specificity_at"](tumor, p) == 0.75
    targets, probabilities = np.eye(2)[[0, 0, 1, 1]], np.array([[0.8, 0.2]] * 4)
    assert notebook["calibration_error"](targets, probabilities) == pytest.approx(0.3)


def test_pointing_widens_the_box(notebook):
    pixels, heat = phantom(), np.zeros((14, 14), np.float32)
    heat[7, 7] = 1
    assert notebook["pointing"](pixels, heat, "0.4 0.4 0.6 0.6")[0]
    assert not notebook["pointing"](pixels, heat, "0.05 0.05 0.2 0.2")[0]


@pytest.fixture
def clouds():
    """Embeddings of brain MRI, of two sets of it that fitting does not see, and of others."""
    random = np.random.default_rng(0)
    scale = np.where(np.arange(32) < 16, 1.0, 3.0)
    brain, held_out, odd = (random.gamma(4, scale, (n, 32)) for n in (300, 200, 100))
    return brain, held_out, odd, random.gamma(4, scale[::-1], (300, 32))


def test_the_gate_keeps_its_promise_to_each_held_out_set(notebook, clouds, monkeypatch):
    """It parts the two clouds, and refuses no more of a held-out set than the share given for it."""
    for name, value in {"GATE_UNITS": 4, "GATE_NETWORKS": 2, "SEED": 1}.items():
        monkeypatch.setitem(notebook, name, value)
    brain, held_out, odd, others = clouds
    kinds = np.array(["photographs"] * 180 + ["charts"] * 20)
    gate = notebook["fit_gate"](brain, others[:200], kinds, [(held_out, 0.01), (odd, 0.05)])
    assert json.loads(json.dumps(gate)) == gate
    passes = notebook["passes"]
    assert passes(gate, held_out).mean() >= 0.985 and passes(gate, odd).mean() >= 0.94
    assert passes(gate, others[200:]).mean() < 0.05


def test_a_share_counts_patients_not_pictures(notebook):
    """Wilson's interval for 0 of 50 reaches to 0.071, where a bootstrap would say 0; for 50 of one patient to 0.79."""
    figure = notebook["share"](np.zeros(50, bool), range(50))
    assert figure["value"] == 0
    assert figure["interval"] == pytest.approx([0, 0.0714], abs=1e-3)
    assert notebook["share"](np.zeros(50, bool), ["anna"] * 50)["interval"][1] == pytest.approx(0.793, abs=1e-3)


@pytest.mark.parametrize("name", ["closely cropped", "inverted", "of low resolution", "with text burned in"])
def test_an_unusual_view_is_a_picture_that_the_app_prepares(notebook, name):
    pixels = phantom()
    seen = notebook["UNUSUAL"][name](pixels, np.random.default_rng(0))
    assert seen.dtype == np.uint8 and (seen.shape != pixels.shape or (seen != pixels).any())
    assert np.ptp(web.prepare(np.ascontiguousarray(seen))) > 100


@pytest.mark.parametrize("kind", counter_examples.KINDS)
def test_every_drawn_counter_example_is_a_readable_picture_of_its_own(kind):
    first, second = (counter_examples.KINDS[kind](np.random.default_rng(seed)) for seed in (1, 2))
    assert first.shape != second.shape or (first != second).any()
    (scan,) = web.read_scans(encode(first), f"{kind}.png")
    assert web.prepare(scan.pixels).shape == (224, 224, 3)


def test_volumes_are_cut_into_a_folder_that_the_notebook_reads(notebook, tmp_path):
    """All planes, a part, a label and a patient fold for each slice, and a gap between the slices."""
    path = tmp_path / "volumes" / "train" / "no" / "anna" / "t1.nii.gz"
    path.parent.mkdir(parents=True)
    cube = np.stack([phantom(side=64) for _ in range(64)]).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(cube, np.eye(4)), path)
    command = [sys.executable, "model_weights/slice_volumes.py", path.parents[3], tmp_path / "slices", "--gap", "8"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    scans = notebook["list_scans"](tmp_path / "slices")
    assert {(s["label"], s["part"], s["patient_fold"], s["source"]) for s in scans} == {
        ("no_tumor", "train", "anna", "volumes")}
    for plane in web.PLANES:  # 64 mm less the rim, and less slices that show little of the head
        assert 3 <= sum(plane in scan["path"].name for scan in scans) <= 5


def test_radiographs_of_a_volume_join_the_slices(notebook, tmp_path):
    """Upright, of different sizes and contrast, all of one patient and one part."""
    (tmp_path / "volumes" / "train").mkdir(parents=True)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, 48)] * 3, indexing="ij")
    body = np.where(x**2 + y**2 < 0.7, np.where((x**2 + y**2 < 0.3) & (z > 0), -800, 40), -1000).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(body, np.eye(4)), tmp_path / "volumes" / "train" / "ben.nii.gz")
    command = [sys.executable, "model_weights/simulate_radiographs.py", tmp_path / "volumes", tmp_path / "slices"]
    for _ in range(2):
        subprocess.run([*command, "--count", "4"], cwd=ROOT, check=True, capture_output=True)
    scans = notebook["list_scans"](tmp_path / "slices")
    assert len(scans) == 8 and {(s["label"], s["part"], s["patient_fold"]) for s in scans} == {
        ("radiographs", "train", "simulated ben")}
    assert len({web.read_scans(s["path"].read_bytes(), "x")[0].pixels.tobytes() for s in scans}) == 4


FIVE = ("glioma", "meningioma", "metastasis", "no_tumor", "pituitary")


def fill_with_two(folder):
    """64 phantoms as Kaggle's first set of brain MRI has them: folders `yes` and `no`, grey."""
    for n in range(64):
        path = folder / ("yes" if n % 2 else "no") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(phantom(n, lesion=bool(n % 2))))


def fill_with_five(folder):
    """60 phantoms in five classes, one of them of no public collection, in colour and in 16 bits."""
    for n in range(60):
        pixels = phantom(n, lesion=FIVE[n % 5] != "no_tumor")
        path = folder / FIVE[n % 5] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.stack([pixels] * 3, axis=2) if n % 3 else pixels.astype(np.uint16) * 200))


WITHOUT_EXTRAS = {"NAIVE_BATCHES": 0, "EPOCHS_BASELINE": 0, "ROUNDING": 0}  # which take longer than the rest


@pytest.fixture(scope="module", params=[(fill_with_two, ("no_tumor", "tumor"), {}),
                                        (fill_with_five, FIVE, WITHOUT_EXTRAS)],
                ids=["two classes", "five classes"])  # fmt: skip
def trained(request, tmp_path_factory):
    """(folder that the notebook wrote to, run headless on phantoms and a broken file; the labels there should be)."""
    fill, labels, changed = request.param
    folder = tmp_path_factory.mktemp("notebook")
    fill(folder / "data")
    min((folder / "data").iterdir()).joinpath("broken.jpg").write_bytes(b"not a picture")
    environment = os.environ | {name: str(value) for name, value in (SETTINGS | changed).items()}
    environment |= {"DATA": str(folder / "data"), "OUTPUT": str(folder)}
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute",
               "--output-dir", str(folder), "Brainmodel.ipynb"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, labels


def test_the_notebook_writes_a_model_that_the_app_serves(trained):
    """Staged weights, archive and card are there, and an upload gets the new model's labels."""
    folder, labels = trained
    weights = {path.name for path in (folder / "model_weights").glob("*.weights.h5")}
    assert weights >= {"vgg19_model_01.weights.h5", "vgg19_model_02.weights.h5", "vgg_unfrozen.weights.h5"}
    app = web.create_app({"MODEL": str(folder / "model.keras"), "UPLOADS": str(folder / "uploads")})
    app.classifier.gate = None
    data = {"file": (io.BytesIO(encode(phantom(99, lesion=True))), "new.png")}
    result = app.test_client().post("/upload", data=data).get_json()
    assert result["model"]["labels"] == list(labels)
    assert result["model"]["engine"] == "litert-float16"  # int8 cannot agree as often as AGREEMENT asks here
    assert sum(result["scans"][0]["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert app.test_client().get("/model").status_code == 200


def test_the_notebook_sets_unreadable_files_aside(trained):
    folder, _ = trained
    assert len(list((folder / "data" / "invalid_images").glob("*/broken.jpg"))) == 1


def test_the_card_holds_what_the_split_was(trained):
    folder, _ = trained
    card = json.loads(web.read_archive(folder / "model.keras")["card.json"])
    counts = card["data"]["counts"].values()
    assert sum(sum(parts.values()) for parts in counts) == len(list((folder / "data").rglob("*.png")))
    assert all(parts["train"] > parts["test"] > 0 for parts in counts)
    assert 0 <= card["thresholds"]["low"] <= card["thresholds"]["high"] <= 1.0001
    assert card["figures"]["float16 against float"]["mean change of the tumor probability"] < 0.02


def test_the_baselines_are_on_the_card_where_they_were_trained(trained):
    """The small network, and VGG16 after the same three stages; without epochs for them, neither."""
    folder, labels = trained
    figures = json.loads(web.read_archive(folder / "model.keras")["card.json"])["figures"]
    baselines = [name for name in figures if name.startswith("Baseline")]
    assert len(baselines) == (2 if len(labels) == 2 else 0)
    stages = {path.name for path in (folder / "model_weights").glob("vgg16_*.weights.h5")}
    assert len(stages) == (3 if baselines else 0)


def test_the_standard_error_of_an_auroc_is_that_of_its_source(notebook):
    """The worked example of Hanley & McNeil 1982: 0.893 of 51 and 58."""
    assert notebook["standard_error"](0.893, 51, 58) == pytest.approx(0.032, abs=1e-3)
    assert notebook["standard_error"](1.0, 20, 20) == 0


def test_the_rule_for_studies_takes_as_many_slices_as_the_standard_error_allows(notebook):
    """Of 100 studies of either kind an AUROC of 0.98 has an error of 0.010; a certain one allows no lower one."""
    assert notebook["slices_of_the_rule"]({1: 0.98, 3: 0.973, 5: 0.965}, 100) == 3
    assert notebook["slices_of_the_rule"]({1: 1.0, 3: 1.0, 5: 0.999}, 100) == 3


def test_the_committed_notebook_shows_its_figures_and_no_patient():
    """It was run to its end; the cells that show scans carry no picture."""
    cells = [c for c in nbformat.read(ROOT / "Brainmodel.ipynb", 4).cells if c.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    shown = [c for c in cells if any("image/png" in o.get("data", {}) for o in c.outputs)]
    assert shown and not any("imshow" in cell.source for cell in shown)

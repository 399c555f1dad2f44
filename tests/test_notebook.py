"""The notebook: its functions, and the whole of it on drawn phantoms, headless, as a user runs it."""

import ast
import io
import json
import os
import subprocess
import sys
import warnings

import nbformat
import numpy as np
import phantoms
import pytest
from phantoms import ROOT, ball, encode, fill_with_four, fill_with_two, phantom, put, write_manifest
from PIL import Image

import app as web

CELLS = nbformat.read(ROOT / "Brainmodel.ipynb", 4).cells
CODE = [cell for cell in CELLS if cell.cell_type == "code"]
LABELS = ["glioma", "meningioma", "no_tumor", "pituitary"]
OUTSIDE = {"outside validation": ["c"], "outside test": ["d"]}  # parts and their sources


@pytest.fixture(scope="module")
def notebook():
    """The names that the notebook's imports and its cells of functions define."""
    names = {"SEED": 1, "BOOTSTRAP": 200}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's own imports warn
        for cell in [CODE[0], *(cell for cell in CODE if "functions" in cell.metadata.get("tags", []))]:
            exec(compile(cell.source, "Brainmodel.ipynb", "exec"), names)
    return names


@pytest.fixture
def random():
    return np.random.default_rng(0)


def prepared(pixels):
    return web.prepare(pixels)[..., 0]


@pytest.mark.parametrize("name, label", [
    ("yes", "tumor"), ("Unhealthy", "tumor"), ("brain_tumor", "tumor"), ("no", "no_tumor"), ("nontumorous", "no_tumor"),
    ("glioma_tumor", "glioma"), ("pituitary", "pituitary"), ("Metastasis, lung", "metastasis_lung"),
])  # fmt: skip
def test_label_of_understands_the_names_of_public_collections(notebook, name, label):
    assert notebook["label_of"](name) == label


def test_list_files_reads_parts_and_sources_above_class_folders(notebook, tmp_path):
    for path in ("Training/glioma_tumor/1.png", "val/no_tumor/2.png", "siteA/yes/3.png", "siteA/yes/.hidden"):
        put(tmp_path / path, b"")
    found = {(file["label"], file["part"], file["source"]) for file in notebook["list_files"](tmp_path)}
    own = tmp_path.name
    assert found == {("glioma", "train", own), ("no_tumor", "validation", own), ("tumor", "", "sitea")}


def test_list_files_reads_all_columns_of_a_manifest(notebook, tmp_path):
    full = {"path": "a/1.jpg", "label": "Glioma", "source": "cheng", "family": "figshare", "patient": "p7",
            "patient_fold": "3", "part": "Testing", "box": "0.1 0.2 0.3 0.4"}  # fmt: skip
    write_manifest(tmp_path, [full, {"path": "test/2.jpg", "label": "no"}])
    first, second = notebook["list_files"](tmp_path)
    assert first == full | {"path": tmp_path / "a/1.jpg", "label": "glioma", "part": "test"}
    assert [second[name] for name in ("label", "source", "part", "box")] == ["no_tumor", tmp_path.name, "test", ""]


@pytest.mark.parametrize("fill, sentence", [
    (lambda folder: None, "is no folder"), (lambda folder: folder.mkdir(), "holds no scans"),
    (lambda folder: write_manifest(folder, [{"path": "../1.png", "label": "no"}]), "1.png, which is not in"),
])  # fmt: skip
def test_list_files_says_what_is_wrong(notebook, tmp_path, fill, sentence):
    fill(tmp_path / "data")
    with pytest.raises(SystemExit, match=sentence):
        notebook["list_files"](tmp_path / "data")


def read(notebook, path, data, label="no_tumor", box=""):
    return notebook["read"]({"path": put(path, data), "label": label, "box": box})


def test_read_says_why_a_file_holds_no_scan(notebook, tmp_path):
    blank = encode(np.zeros((99, 99), np.uint8))
    assert read(notebook, tmp_path / "a.png", blank) == ([], "a.png is blank or nearly so.")
    assert read(notebook, tmp_path / "b.png", b"a text")[1].startswith("b.png is not a DICOM")


def test_read_takes_the_slices_of_a_volume_in_three_planes_if_it_is_healthy(notebook, tmp_path):
    """Of one with a tumor some slices show none, and nothing says which."""
    rows, why = read(notebook, tmp_path / "head.nii", ball())
    scans = web.read_scans(ball(), "head.nii", plane="all")
    assert {scan.plane for scan in scans} == set(web.PLANES) and (len(rows), why) == (len(scans), "")
    assert sorted(row["pixels"].tobytes() for row in rows) == sorted(prepared(s.pixels).tobytes() for s in scans)
    assert np.isnan([row["box"] for row in rows]).all()
    assert read(notebook, tmp_path / "head.nii", ball(lesion=True), "glioma") == ([], "")


def test_a_box_follows_the_crop_and_the_padding(notebook, tmp_path):
    """A bright square's box, in shares of the scan, lies over the square in the prepared picture."""
    pixels = np.zeros((200, 400), np.uint8)
    pixels[40:160, 100:350] = 90
    pixels[60:90, 300:340] = 250
    ((row,), _) = read(notebook, tmp_path / "scan.png", encode(pixels), "tumor", "0.75 0.3 0.85 0.45")
    (x0, y0, x1, y1), bright = np.round(row["box"] * web.SIDE).astype(int), row["pixels"] > 200
    assert bright[y0 + 1:y1 - 1, x0 + 1:x1 - 1].all() and bright.sum() <= (y1 - y0 + 2) * (x1 - x0 + 2)


def test_copies_of_a_scan_are_one_group(notebook, random):
    """Mirrored, brightened, cropped and noisy copies join, of other sources or persons only if they are close."""
    def groups_of(pictures, sources, patients):
        pairs = notebook["duplicate_pairs"](pictures, np.array(sources), np.array(patients))
        return notebook["components"](pairs)
    one = phantom(1)
    copies = [one, one[:, ::-1], (one * 0.6 + 30).astype(np.uint8), np.pad(one, 40),
              (one * random.uniform(0.9, 1, one.shape)).astype(np.uint8)]  # fmt: skip
    pictures = np.stack([prepared(p) for p in copies + [phantom(seed) for seed in range(2, 6)]])
    groups, similar = groups_of(pictures, [*"aaaabaaaa"], [""] * 9), pictures[[0, 0]]
    assert len(set(groups[:5])) == 1 and len(set(groups)) == 5
    similar[1, 60:110, 60:110] = 255
    for sources, patients, joined in ("aa", ["", "eve"], 1), ("ab", ["", ""], 2), ("aa", ["eve", "ann"], 2):
        assert len(set(groups_of(similar, [*sources], patients))) == joined


def test_a_person_is_named_or_a_stretch_of_numbers_and_joins_units(notebook, tmp_path):
    known = [(3, "glioma", "", "1"), (1, "glioma", "", "1"), (2, "glioma", "", "1"), (5, "glioma", "", "1"),
             (4, "pituitary", "", "1"), (6, "glioma", "", "2"), (7, "glioma", "anna", "2"), (8, "glioma", "", "")]
    columns = ("path", "label", "patient", "patient_fold")
    scans = [{"source": "cheng"} | dict(zip(columns, (tmp_path / f"{n}.jpg", *more))) for n, *more in known]
    persons = notebook["persons_of"](scans)
    assert len(set(persons[:3])) == 1 and len(set(persons[2:7])) == 5 and persons[6:].tolist() == ["cheng anna", ""]
    copies, numbers = np.array([[*range(8), 7], [*range(8), 6]]), ["", "", "", "", "x", "x", "", ""]
    units = notebook["components"](copies, persons, numbers)
    assert [len(set(units[of])) for of in ([0, 1, 2], [4, 5], [6, 7], range(8))] == [1, 1, 1, 4]


def test_no_unit_straddles_the_parts_a_large_one_trains_and_the_shares_are_about_right(notebook, random):
    units = np.r_[np.zeros(150, int), random.integers(1, 300, 850)]
    strata, given = np.where(units % 2, "tumor", "none"), [""] * 1000
    parts = notebook["split"](strata, units, np.array(["a"] * 1000), given, OUTSIDE, 1)
    assert all(len(set(parts[units == unit])) == 1 for unit in set(units)) and parts[0] == "train"
    for stratum in ("tumor", "none"):
        dealt = parts[150:][strata[150:] == stratum]
        shares = [np.mean(dealt == part) for part in ("train", "validation", "test")]
        assert np.abs(np.array(shares) - (0.8, 0.1, 0.1)).max() < 0.05


def test_outside_sources_go_whole_with_their_units_and_given_parts_stay(notebook):
    """A copy of an outside scan goes with it; what the data holds out is not trained on in another copy."""
    sources, units = np.array([*"aaabbccd", *"e" * 40]), np.array([0, 1, 2, 3, 3, 0, 5, 1, *range(6, 46)])
    given = ["train", "train", "test", "validation", "train"] + [""] * 43
    parts = notebook["split"](sources, units, sources, given, OUTSIDE, 1)
    assert parts[:5].tolist() == ["outside validation", "outside test", "test", "validation", "validation"]
    assert parts[5:8].tolist() == ["outside validation", "outside validation", "outside test"]
    assert set(parts[8:]) == {"train", "validation", "test"}


def test_targets_hold_every_label_that_a_scan_allows(notebook):
    """A tumor of unknown type allows every type, and is a label where no type is known; normal scans there must be."""
    labels, targets = notebook["targets_of"](np.array(["glioma", "tumor", "no_tumor", "pituitary"]))
    assert labels == ["glioma", "no_tumor", "pituitary"]
    assert targets.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]]
    labels, targets = notebook["targets_of"](np.array(["tumor", "no_tumor"]))
    assert (labels, targets.tolist()) == (["no_tumor", "tumor"], [[0, 1], [1, 0]])
    with pytest.raises(SystemExit, match="the app needs `no_tumor` and another"):
        notebook["targets_of"](np.array(["glioma", "pituitary"]))


def test_draws_are_balanced_by_label_source_and_copies(notebook):
    """Two fifths normal; 16 times as many scans have 16 ** 0.6 times the share; 16 copies of a scan count as four."""
    raw_labels, sources = np.repeat(["no_tumor", "glioma"], (50, 85)), np.repeat(["a", "large", "small"], (50, 80, 5))
    notebook |= dict(raw_labels=raw_labels, strata=np.char.add(sources, raw_labels), groups=np.r_[[0] * 16, 1:120])
    shares = notebook["draw_shares"](np.arange(135))
    assert shares.sum() == pytest.approx(1) and shares[:50].sum() == pytest.approx(0.4)
    assert shares[50:130].sum() / shares[130:].sum() == pytest.approx(16**0.6)
    assert shares[:16].sum() / shares[16] == pytest.approx(4)


def test_a_mover_moves_all_pictures_alike_and_a_style_keeps_the_place(notebook, random):
    move = notebook["mover"](160, random)
    moved, again, other = (move(prepared(p)) for p in (phantom(1, True), phantom(1, True), phantom(2)))
    assert moved.shape == (160, 160) and (moved == again).all()
    for _ in range(20):
        styled = notebook["restyled"](moved, other, random)
        assert (styled.shape, styled.dtype) == ((160, 160), np.float32) and 0 <= styled.min() <= styled.max() <= 255
        assert np.ptp(styled) > 60 and abs(np.corrcoef(styled.ravel(), moved.ravel())[0, 1]) > 0.5


def test_depth_grows_from_the_rim_to_the_middle_of_the_head(notebook):
    depth = notebook["depth_of"](prepared(phantom(1)))
    assert np.abs(depth[:2, :2]).max() < 1 and 130 > depth[112, 112] > depth[112, 60] > depth[112, 20]


def beside(notebook, box):
    """Where a picture lies outside its widened box."""
    mask = np.ones((224, 224), bool)
    mask[notebook["place_of"](box, 224)] = False
    return mask


@pytest.fixture
def lender():
    """(a prepared phantom with a lesion, the lesion's box in shares of the side)."""
    picture = prepared(phantom(3, lesion=True))
    y, x = np.nonzero(np.asarray(Image.fromarray(picture).resize((28, 28), Image.Resampling.BOX)) > 225)
    return picture, np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 28


def test_a_tumor_is_painted_over_and_nothing_else(notebook, random, lender):
    picture, outside = lender[0], beside(notebook, lender[1])
    painted = notebook["without_tumor"](*lender)
    assert (painted[outside] == picture[outside]).all() and painted[~outside].mean() < picture[~outside].mean() - 40
    assert notebook["without_tumor"](picture, np.array([0.3, 0.3, 0.7, 0.7])) is None  # no other half to borrow from


def test_a_tumor_is_grafted_into_the_head_where_it_fits(notebook, random, lender):
    picture = prepared(phantom(4))
    for _ in range(10):
        grafted, box = notebook["grafted"](picture, *lender, random)
        outside = beside(notebook, box)
        assert (grafted[outside] == picture[outside]).all() and (grafted[~outside] != picture[~outside]).mean() > 0.5
        assert (notebook["depth_of"](picture)[~outside] > 0).mean() > 0.75
    assert notebook["grafted"](picture, lender[0], np.array([0, 0, 1, 1]), random) is None


def loss(notebook, allowed, logits, inside=((0, 0), (0, 0))):
    marks = np.concatenate([np.broadcast_to(allowed, (2, 2, len(allowed))), np.array(inside)[..., None]], -1)
    return float(notebook["loss"](marks[None].astype(np.float32), logits)[0])


@pytest.mark.parametrize("allowed, p", [([1, 0, 0, 0], 0.5), ([1, 1, 0, 1], 0.8), ([0, 0, 1, 0], 0.2)])
def test_the_loss_of_a_partial_label_is_that_of_the_sum_it_allows(notebook, allowed, p):
    logits = np.log(np.broadcast_to([0.5, 0.1, 0.2, 0.2], (1, 2, 2, 4))).astype(np.float32)
    assert loss(notebook, allowed, logits) == pytest.approx(-np.log(0.96 * p + 0.01), abs=1e-4)


def test_evidence_outside_a_tumors_box_costs(notebook):
    there, elsewhere = np.zeros((2, 1, 2, 2, 2), np.float32)
    there[0, 0, 0, 0] = elsewhere[0, 1, 1, 0] = 8
    within, beside_it = (loss(notebook, [1, 0], logits, ((1, 0), (0, 0))) for logits in (there, elsewhere))
    assert beside_it - within > 3.5 * notebook["PLACE_WEIGHT"]
    assert loss(notebook, [1, 0], there) == pytest.approx(loss(notebook, [1, 0], elsewhere))


@pytest.fixture(scope="module")
def network(notebook):
    return notebook["build"](LABELS)


@pytest.mark.parametrize("blocks, count", [((), 2_052), ((5,), 9_441_284), ((3, 4, 5), 19_766_276)])
def test_only_the_chosen_blocks_learn(notebook, network, capsys, blocks, count):
    notebook["unfreeze"](network, *blocks)
    assert capsys.readouterr().out == f"{count:,} of 20,026,436 weights learn\n"


def test_a_network_starts_from_the_weights_of_its_base(notebook, network):
    again = notebook["build"](LABELS, network)
    for name, same in (("block1_conv1", True), ("block5_conv4", True), ("logits", False)):
        one, two = (model.get_layer(name).get_weights()[0] for model in (network, again))
        assert (one == two).all() == same


@pytest.mark.parametrize("after", ["scan", "block4_pool"])
def test_the_mean_of_a_tail_is_the_logits_of_the_network(notebook, network, after):
    scans = np.stack([phantom(seed, side=64) for seed in (1, 2)])[..., None].repeat(3, -1).astype(np.float32)
    before = notebook["keras"].Model(network.input, network.get_layer(after).output)
    logits = np.asarray(notebook["tail"](network, after)(before(scans))).mean((1, 2))
    np.testing.assert_allclose(notebook["special"].softmax(logits, 1), np.asarray(network(scans)), atol=1e-4)


def test_an_interval_is_that_of_units_not_of_scans(notebook):
    """100 scans of ten persons, each all right or all wrong, are ten pieces of evidence."""
    right = np.repeat(np.arange(10) < 5, 10)
    figures = [notebook["measured"](lambda r: right[r].mean(), np.arange(100) // size) for size in (1, 10)]
    assert [figure["value"] for figure in figures] == [0.5, 0.5]
    assert [np.ptp(figure["interval"]) for figure in figures] == pytest.approx([0.2, 0.6], abs=0.1)


@pytest.mark.parametrize("overlap", [0.0, 2.0])
def test_thresholds_keep_both_promises(notebook, random, overlap):
    """At least 99 % of tumors by weight from `low` on, 99 % of the others below `high`, crossing or not."""
    tumor = np.arange(2000) % 2 == 0
    p = 1 / (1 + np.exp(-(random.normal(0, overlap, 2000) + np.where(tumor, 3, -3))))
    weights = random.uniform(0, 1, 2000)
    found = notebook["thresholds"](p, tumor, 0.99, weights)
    assert found["low"] <= found["high"]
    assert np.average(p[tumor] >= found["low"], weights=weights[tumor]) >= 0.99
    assert np.average(p[~tumor] < found["high"], weights=weights[~tumor]) >= 0.99


def test_a_dressed_scan_is_another_picture_that_the_app_prepares(notebook, random):
    pixels = prepared(phantom(1))
    seen = [notebook["dressed"](pixels, random) for _ in range(60)]
    assert all(s.dtype == np.uint8 and (s.shape != pixels.shape or (s != pixels).any()) for s in seen)
    assert all(np.ptp(web.prepare(np.ascontiguousarray(s))) > 100 for s in seen) and len({s.shape for s in seen}) > 10


def test_the_notebook_keeps_its_size():
    nodes = [node for cell in CODE for node in ast.walk(ast.parse(cell.source))]
    defined = sum(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)
    assert len(CELLS) <= 60 and len(CODE) <= 0.6 * len(CELLS) and defined <= 30
    assert sum(len(cell.source.splitlines()) for cell in CODE) <= 800


def test_the_committed_notebook_is_one_run_and_shows_no_patient(card):
    """In order, to its end, as long as the shipped card says; the cell that shows scans carries no picture."""
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    printed = "".join(output.get("text", "") for cell in CODE for output in cell.outputs)
    assert f"training took {card['training']['minutes']} minutes" in printed and card["training"]["minutes"] <= 140
    assert printed.endswith("the app gives the answers that were measured: True\n")
    drawn = [cell.source for cell in CODE if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(drawn) >= 2 and not any("imshow" in source for source in drawn)


def run_notebook(settings, folder):
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "Brainmodel.ipynb",
               "--output-dir", str(folder)]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=1800)


ALWAYS = {"Known collections", "Heatmap", "Altered scans, AUROC", "int8 against float"}
ALL = ALWAYS | {"Other hospitals", "Other hospitals, brats_peds", "Known collections, br35h", "Gate", "Whole volumes",
                "One family left out at a time, head and block 5", "Cheng, three types, five patient folds"}


@pytest.mark.parametrize("fill, labels, titles", [
    (fill_with_two, ["no_tumor", "tumor"], ALWAYS), (fill_with_four, LABELS, ALL)], ids=["two", "four"])  # fmt: skip
def test_the_notebook_writes_a_model_that_the_app_serves(tmp_path, fill, labels, titles):
    """Staged weights, the archive and a whole card are there; an upload is answered, and /model shows the card.

    It also trains on the folder of corrections that the app keeps, as it is.
    """
    fill(tmp_path)
    tumor, server = labels[-1], phantoms.make_app(tmp_path / "kept", CORRECTIONS=f"{tmp_path}/corrections")
    sent = phantoms.post(server, *[encode(phantom(200 + n, lesion=bool(n % 2))) for n in range(6)]).get_json()
    for n in range(6):
        correction = {"label": tumor if n % 2 else "no_tumor"}
        server.test_client().post(f"/results/{sent['id']}/{n}/label", data=correction)
    small = dict(DRAWS_1="64", DRAWS_2="32", DRAWS="64", ANEW="32", BOOTSTRAP="20", BASE_WEIGHTS="scratch")
    small |= dict(DATA=os.pathsep.join((f"{tmp_path}/data", f"{tmp_path}/corrections")), OUTPUT=f"{tmp_path}", OTHER_SCANS=f"{tmp_path}/others" * (titles is ALL))
    done = run_notebook(small, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    staged = sorted(path.name.partition(".")[0] for path in (tmp_path / "model_weights").iterdir())
    assert staged == ["vgg19_model_01", "vgg19_model_02", "vgg_unfrozen"]
    card = json.loads(web.read_archive(tmp_path / "model.keras")["card.json"])
    counts = card["data"]["counts"]
    assert all(counts[f"corrections {label}"]["train"] > 0 for label in ("no_tumor", tumor))
    assert sum(sum(counts[f"corrections {label}"].values()) for label in ("no_tumor", tumor)) == 6
    assert set(card["figures"]) >= titles and ("Other hospitals" in card["figures"]) == (titles is ALL)
    assert (bool(card["study"]), bool(card["gate"])) == (titles is ALL,) * 2
    app = web.create_app({"MODEL": str(tmp_path / "model.keras"), "UPLOADS": str(tmp_path / "uploads")})
    app.classifier.gate = None
    scan = io.BytesIO(encode(phantom(99, lesion=True)))
    result = app.test_client().post("/upload", data={"file": (scan, "new.png")}).get_json()
    assert (result["model"]["labels"], result["model"]["engine"]) == (labels, "litert-int8")
    page = app.test_client().get("/model").text
    assert all(text in page for text in (*card["limits"], *(title.split(", ")[0] for title in card["figures"])))
    if titles is ALL:
        network_is_kept(tmp_path, small, card)


def network_is_kept(tmp_path, settings, card):
    """With NETWORK the same answers get another gate, and nothing is trained; other training scans are refused.

    So is a test on scans that chose the network's temperature.
    """
    again = {"NETWORK": f"{tmp_path}/model.keras", "OUTPUT": f"{tmp_path}/again"}
    refused = run_notebook(settings | again | {"DATA": f"{tmp_path}/data"}, tmp_path / "again")
    assert "was trained on other scans than DATA puts into training" in refused.stderr
    refused = run_notebook(settings | again | {"OUTSIDE_TEST": "brats_peds,hippo_healthy_mr,utsw_glioma"}, tmp_path / "again")
    assert "chose its temperature on utsw_glioma; take that out of OUTSIDE_TEST" in refused.stderr
    done = run_notebook(settings | again, tmp_path / "again")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (web.read_archive(folder / "model.keras") for folder in (tmp_path, tmp_path / "again"))
    new = json.loads(after["card.json"])
    assert before["serving.tflite"] == after["serving.tflite"] and new["training"] == card["training"]
    assert new["figures"].keys() == card["figures"].keys() and new["gate"] and not list(tmp_path.glob("again/*/*.h5"))

#!/usr/bin/env python3
"""Cross-validate the recipe of the base over patient folds: train without a fold, answer for its scans.

    python cross_validate.py prepared.npz --start base.weights.h5 --schedule 112:5,160:3

`prepared.npz` is what Brainmodel.ipynb writes. Only scans of one known tumor type take part. A model never sees a
scan of its fold, nor a near-duplicate of one: both the fold as its authors made it and the one with near-duplicates
joined are held out. The answers are added to a .csv, a row a scan; a fold that is in it is not trained again, and an
interrupted one goes on where it stopped.
"""

import csv
import pathlib

import keras
import numpy as np
import pretrain_base as base

KINDS = ("fold", "joined")  # as the authors made them, and with near-duplicates joined


def typed_scans(path):
    """The scans with a fold and one tumor type: arrays by name, and the names of the types."""
    with np.load(path) as arrays:
        targets, none = arrays["targets"], arrays["labels"] == "no_tumor"
        rows = (arrays["fold"] != "") & (targets.sum(axis=1) == 1) & ~targets[:, none].any(axis=1)
        scans = {name: arrays[name][rows] for name in ("pixels", "targets", "boxes", "digest", *KINDS)}
        labels = arrays["labels"]
    there = scans["targets"].any(axis=0)
    scans["targets"] = scans["targets"][:, there].astype("float32")
    return scans, labels[there].tolist()


def parts_of(scans, fold):
    """(training part as pretrain_base takes it, rows that are held out) of one fold."""
    held_out = np.any([scans[kind] == fold for kind in KINDS], axis=0)
    seen = ~held_out
    part = {name: scans[name][seen] for name in ("pixels", "targets", "boxes")}
    share = part["targets"].mean(axis=0)
    draw = 1 / np.sqrt(share[part["targets"].argmax(axis=1)])
    return part | {"draw": draw, "without": np.zeros_like(share)}, np.flatnonzero(held_out)


def probabilities(model, pictures, pixels, batch):
    """Softmax (N, classes) of the mean logits of pictures (N, S, S) and their mirror images, at a size."""
    small = base.resized(pictures, pixels)
    logits = sum(model.predict(base.network_input(view), batch_size=batch, verbose=0).mean(axis=(1, 2))
                 for view in (small, small[:, :, ::-1]))
    return keras.ops.convert_to_numpy(keras.ops.softmax(logits / 2))


def train_fold(scans, fold, options):
    """Train without one fold; its rows and their probabilities."""
    keras.utils.set_random_seed(options.seed)
    sizes = base.parse_schedule(options.schedule)
    training, held_out = parts_of(scans, fold)
    training["pixels"] = base.resized(training["pixels"], round(base.MARGIN * max(sizes)))
    model = base.started(options, training, sizes)
    folder = options.checkpoint / f"fold_{fold}"
    finished = base.load_state(model, folder, base.run_settings(options))
    nothing = {name: training[name][:0] for name in ("pixels", "targets")}
    base.train(model, training, nothing, sizes, options, folder, finished)
    return held_out, probabilities(model, scans["pixels"][held_out], sizes[-1], options.batch)


def main():
    parser = base.argument_parser(__doc__)
    parser.set_defaults(out=pathlib.Path("model_weights/cross_validation.csv"))
    options = base.checked(parser, ".csv")
    scans, labels = typed_scans(options.data)
    columns = ["sha256", "label", *KINDS, "model", *labels]
    done = set()
    if options.out.exists():
        with open(options.out, newline="") as file:
            done = {row["model"] for row in csv.DictReader(file)}
    for fold in sorted(set(scans["fold"]) - done):
        print(f"fold {fold}", flush=True)
        rows, answers = train_fold(scans, fold, options)
        new = not options.out.exists()
        with open(options.out, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(columns)
            for row, p in zip(rows, answers):
                writer.writerow([scans["digest"][row], labels[scans["targets"][row].argmax()],
                                 *(scans[kind][row] for kind in KINDS), fold, *(f"{value:.5f}" for value in p)])
        right = answers.argmax(axis=1) == scans["targets"][rows].argmax(axis=1)
        print(f"fold {fold}: accuracy {right[scans['fold'][rows] == fold].mean():.3f}, near-duplicates joined "
              f"{right[scans['joined'][rows] == fold].mean():.3f}", flush=True)


if __name__ == "__main__":
    main()

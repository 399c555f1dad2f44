#!/usr/bin/env python3
"""Pretrain the VGG19 base on greyscale pictures and fold it into a plain Keras weights file.

A plain 19-layer VGG hardly trains without a good start. This script trains it with RepVGG branches: every
layer is ReLU(BN(3x3 convolution) + BN(1x1 convolution) + BN(input)). At inference each branch is linear, so at
the end the three are added into one 3x3 convolution with a bias, and the result is exactly VGG19:

    python pretrain_base.py pictures/ --schedule 80:6,112:3
    keras.applications.VGG19(include_top=False, weights="vgg19_base.weights.h5")

The same command continues an interrupted run. Any Keras backend will do (KERAS_BACKEND=tensorflow, jax, torch).

Where an array file holds boxes, two lessons more are drawn from them: the evidence for a box's label has to lie in
the box, and a scan whose box is painted over shows what `without` says. Both keep the network from learning what
stands around a tumor: the scanner, the plane, the border.

With --teacher, a network of train_teacher.py that has seen ImageNet, the base learns its answers and features as well.

Sources: Simonyan & Zisserman 2015, "Very deep convolutional networks for large-scale image recognition";
Ding et al. 2021, "RepVGG: making VGG-style ConvNets great again"; Goyal et al. 2017 (warm-up);
Hinton et al. 2015, "Distilling the knowledge in a neural network"; Romero et al. 2015, "FitNets" (features).
"""

import argparse
import json
import pathlib
import time
from dataclasses import dataclass
from functools import partial

import h5py
import keras
import numpy as np
from keras import ops
from PIL import Image

BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))  # convolutions and channels of each block of VGG19
GREY_MEAN, GREY_SCALE = 115.2, 64.0  # the branched network sees (grey - mean) / scale on three equal channels
CAFFE_MEAN = np.array([103.939, 116.779, 123.68], np.float32)  # subtracted by vgg19.preprocess_input, in BGR order

NORM_MOMENTUM, NORM_EPSILON = 0.9, 1e-5
MOMENTUM, WEIGHT_DECAY, WARM_UP_STEPS, DROPOUT = 0.9, 5e-4, 200, 0.3
FOLD_TOLERANCE, FOLD_PIXELS = 1e-3, 64

MARGIN = 1.25  # training pictures are stored this much larger than the network's input
CELL = 16  # pixels of a picture to one of its feature map
PLACE_WEIGHT = 0.3  # of the loss for evidence outside the box
TEACHER_WEIGHT = 1.0  # of the losses for differing from a teacher
WITHOUT_MARGIN = 0.15  # a box that is painted over is widened by this share of its sides
PROGRESS_STEPS = 50


# Pictures

def load_pictures(path, pixels):
    """Training and validation parts, each a dict of pixels (N, S, S) uint8, targets (N, C), draw (N,),
    boxes (N, 4) as shares x0, y0, x1, y1 of the side or NaN, and without (C,), the targets of a box painted over.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        arrays = read_folder(path, pixels)
    elif path.is_file():
        arrays = dict(np.load(path))
    else:
        raise SystemExit(f"{path} is neither a folder of class folders nor an .npz file.")
    if not {"pixels", "targets"} <= set(arrays) or len(arrays["pixels"]) != len(arrays["targets"]):
        raise SystemExit(f"{path} must hold 'pixels' and 'targets' of the same length.")
    count = len(arrays["pixels"])
    part = arrays.get("part", np.full(count, "train"))
    draw = arrays.get("draw", np.ones(count))
    boxes = arrays.get("boxes", np.full((count, 4), np.nan))
    without = arrays.get("without", np.zeros(arrays["targets"].shape[1])).astype("float32")
    rows = {name: part == name for name in ("train", "validation")}
    if not draw[rows["train"]].sum() > 0:
        raise SystemExit(f"{path} holds no training picture that could be drawn.")
    if not arrays["targets"][rows["train"] | rows["validation"]].any(axis=1).all():
        raise SystemExit(f"{path} holds a picture without any target.")
    return [{"pixels": arrays["pixels"][chosen], "targets": arrays["targets"][chosen].astype("float32"),
             "draw": draw[chosen], "boxes": boxes[chosen], "without": without} for chosen in rows.values()]


def read_folder(folder, pixels):
    """Every picture of a folder of class folders as pixels (N, S, S) uint8 and one-hot targets (N, C)."""
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    known = Image.registered_extensions()
    found = [(file, label) for label, entry in enumerate(classes)
             for file in sorted(entry.rglob("*")) if file.suffix.lower() in known]
    if not found:
        raise SystemExit(f"{folder} holds no class folder with pictures.")
    grey = np.empty((len(found), pixels, pixels), np.uint8)
    for row, (file, _) in enumerate(found):
        with Image.open(file) as picture:
            grey[row] = in_eight_bits(picture).resize((pixels, pixels), Image.Resampling.BILINEAR)
    return {"pixels": grey, "targets": np.eye(len(classes), dtype=np.uint8)[[label for _, label in found]]}


def in_eight_bits(picture):
    """A Pillow picture in grey; what has more than 8 bits is scaled to its own brightest point, not cut off."""
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("L")
    values = np.asarray(picture, "float32")
    return Image.fromarray((255 * values / max(values.max(), 1)).clip(0, 255).astype(np.uint8))


def resized(pictures, pixels):
    """Pictures (N, S, S) uint8 as (N, pixels, pixels) uint8, smoothed where they shrink."""
    if pictures.shape[1:] == (pixels, pixels):
        return pictures
    size = (pixels, pixels)
    result = np.empty((len(pictures), *size), np.uint8)
    for row, picture in enumerate(pictures):
        result[row] = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    return result


def network_input(grey):
    """Grey values (N, S, S) from 0 to 255 as the branched network's input (N, S, S, 3) float32."""
    return np.repeat(((grey - GREY_MEAN) / GREY_SCALE).astype("float32")[..., None], 3, axis=-1)


# Augmentation

@dataclass(frozen=True)
class Augmentation:
    """How training pictures are drawn; pairs are the lowest and the highest of an even draw."""

    rotation: float = 20.0  # degrees, either way
    zoom: tuple[float, float] = (0.8, 1.2)
    shift: float = 0.08  # of the picture's side, either way
    mirrored: float = 0.5  # share of the pictures
    coarse: float = 0.3  # share of the pictures with less resolution
    coarsest: float = 0.35  # least share of the side that they are reduced to, and back
    gamma: tuple[float, float] = (0.6, 1.6)
    contrast: tuple[float, float] = (0.7, 1.3)
    brightness: tuple[float, float] = (0.8, 1.2)
    inverted: float = 0.1  # share of the pictures
    noise: float = 0.06  # largest standard deviation, of the full range of grey
    painted: float = 0.5  # share of the pictures with a box somewhere painted over
    painted_side: tuple[float, float] = (0.1, 0.35)  # of the picture's side
    without: float = 0.12  # share of the boxed pictures whose own box is painted over

    def view(self, picture, box, targets, without, pixels, rng):
        """One view of a picture (S, S) uint8: grey (pixels, pixels) float32, 0 to 255; its targets (C,); and the
        share of each cell of its feature map that lies in the box, 0 without one.

        box: x0, y0, x1, y1 as shares of the side, or NaN; without: the targets of a box painted over, or zeros.
        """
        if rng.random() < self.without and without.any() and not np.isnan(box).any():
            picture, box, targets = without_tumor(picture, box, rng), np.full(4, np.nan), without
        elif rng.random() < self.painted:
            width, height = (len(picture) * rng.uniform(*self.painted_side, 2)).astype(int)
            left, top = rng.integers(len(picture) - width), rng.integers(len(picture) - height)
            picture = painted_over(picture, left, top, left + width, top + height, rng)
        affine = self.affine(len(picture), pixels, rng)
        grey = self.recoloured(self.coarsened(moved(picture, affine, pixels), rng), rng)
        mask = None if np.isnan(box).any() else moved(mask_of(box, len(picture)), affine, pixels)
        return grey, targets, cells_of(mask, pixels)

    def affine(self, side, pixels, rng):
        """The six numbers that lead from a view (pixels) back to a picture (side): turned, zoomed, shifted."""
        angle = np.radians(rng.uniform(-self.rotation, self.rotation))
        step = side / pixels / rng.uniform(*self.zoom)
        turn = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        if rng.random() < self.mirrored:
            turn[:, 0] *= -1
        offset = side * (0.5 + rng.uniform(-self.shift, self.shift, 2)) - turn.sum(axis=1) * pixels / 2
        return (*turn[0], offset[0], *turn[1], offset[1])

    def coarsened(self, picture, rng):
        """A picture (S, S) uint8, perhaps reduced and enlarged again."""
        if rng.random() >= self.coarse:
            return picture
        small = round(len(picture) * rng.uniform(self.coarsest, 0.9))
        return resized(resized(picture[None], small), len(picture))[0]

    def recoloured(self, picture, rng):
        """A picture (S, S) uint8 with other gamma, contrast, brightness, polarity and noise, float32, 0 to 255."""
        grey = (picture.astype("float32") / 255) ** rng.uniform(*self.gamma)
        grey = (grey.mean() + (grey - grey.mean()) * rng.uniform(*self.contrast)) * rng.uniform(*self.brightness)
        if rng.random() < self.inverted:
            grey = 1 - grey
        grey += rng.uniform(0, self.noise) * rng.standard_normal(grey.shape, dtype="float32")
        return 255 * np.clip(grey, 0, 1).astype("float32")


def moved(picture, affine, pixels):
    """A picture (S, S) uint8 under an affine map, as (pixels, pixels) uint8; black where it has nothing."""
    return np.asarray(Image.fromarray(picture).transform(
        (pixels, pixels), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))


def mask_of(box, side):
    """A box (x0, y0, x1, y1), shares of the side, as a mask (side, side) uint8 of 0 and 255."""
    x0, y0, x1, y1 = np.round(np.clip(box, 0, 1) * side).astype(int)
    mask = np.zeros((side, side), np.uint8)
    mask[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)] = 255
    return mask


def cells_of(mask, pixels):
    """The share (n, n) float32 of each cell of a feature map that a mask (pixels, pixels) uint8 covers; 0 for None."""
    count = pixels // CELL
    if mask is None:
        return np.zeros((count, count), "float32")
    return mask[:count * CELL, :count * CELL].reshape(count, CELL, count, CELL).mean((1, 3), dtype="float32") / 255


def without_tumor(picture, box, rng):
    """A copy of a picture (S, S) uint8 whose box, widened by WITHOUT_MARGIN, is painted over."""
    margin = WITHOUT_MARGIN * (box[2:] - box[:2])
    wide = np.clip(np.concatenate([box[:2] - margin, box[2:] + margin]), 0, 1)
    return painted_over(picture, *np.round(wide * len(picture)).astype(int), rng)


def painted_over(picture, x0, y0, x1, y1, rng):
    """A copy of a picture (S, S) with a box, in pixels, filled: with what stands elsewhere in it, or with one grey.

    Elsewhere is the mirrored place, where the other half of a head lies, or any place.
    """
    picture = picture.copy()
    side, width, height = len(picture), x1 - x0, y1 - y0
    left, top = ((side - x1, y0), (rng.integers(side - width + 1), rng.integers(side - height + 1)))[rng.integers(2)]
    patch = picture[top:top + height, left:left + width][:, ::-1]
    apart = abs(left - x0) >= width or abs(top - y0) >= height
    picture[y0:y1, x0:x1] = patch if apart and rng.random() < 0.7 else rng.choice(picture.ravel())
    return picture


AUGMENTATION = Augmentation()


class Draws(keras.utils.PyDataset):
    """One epoch of augmented training batches, drawn by weight; the same for the same seed and epoch.

    `teacher` gives of grey pictures (N, S, S) what taught_loss() takes, or is None.
    """

    def __init__(self, part, pixels, draws, batch, seed, teacher=None):
        super().__init__(workers=1 if teacher else 2)
        self.part, self.pixels, self.batch, self.seed, self.teacher = part, pixels, batch, seed, teacher
        rng = np.random.default_rng(seed)
        self.rows = rng.choice(len(part["draw"]), draws, p=part["draw"] / part["draw"].sum())

    def __len__(self):
        return len(self.rows) // self.batch

    def __getitem__(self, index):
        rng = np.random.default_rng([*self.seed, index])
        rows = self.rows[index * self.batch:(index + 1) * self.batch]
        views = [AUGMENTATION.view(*(self.part[name][row] for name in ("pixels", "boxes", "targets")),
                                   self.part["without"], self.pixels, rng) for row in rows]
        grey, targets, cells = (np.stack(values) for values in zip(*views))
        return network_input(grey), with_place(targets, cells, self.teacher and self.teacher(grey))


class Plain(keras.utils.PyDataset):
    """Every picture of a part once, in order and unchanged."""

    def __init__(self, part, batch):
        super().__init__()
        self.part, self.batch = part, batch

    def __len__(self):
        return -(-len(self.part["pixels"]) // self.batch)

    def __getitem__(self, index):
        rows = slice(index * self.batch, (index + 1) * self.batch)
        grey, targets = self.part["pixels"][rows], self.part["targets"][rows]
        return network_input(grey), with_place(targets, np.stack([cells_of(None, len(grey[0]))] * len(grey)))


def with_place(targets, cells, taught=None):
    """Targets (N, C) and shares in the box (N, h, w) as what the loss takes, (N, h, w, C + 1).

    `taught`: what a teacher says at every place (N, h, w, C + F), which then follows.
    """
    everywhere = np.broadcast_to(targets[:, None, None], (*cells.shape, targets.shape[1]))
    return np.concatenate([everywhere, cells[..., None]] + [taught] * (taught is not None), axis=-1)


# Network

@ops.custom_gradient
def raw_moments(values):
    """Mean and mean square (2, channels) in float32 of maps (N, H, W, channels).

    The gradient is written out in the type of the maps, without float32 copies, which take time.
    """
    wide = ops.cast(values, "float32")
    moments = ops.stack([ops.mean(wide, axis=(0, 1, 2)), ops.mean(ops.square(wide), axis=(0, 1, 2))])

    def gradient(*upstreams, upstream=None):
        upstream = upstreams[0] if upstream is None else upstream
        count = ops.cast(ops.size(values) // values.shape[-1], "float32")
        of_mean, of_square = ops.unstack(ops.cast(upstream / count, values.dtype), num=2)
        return of_mean + values * (2 * of_square)

    return moments, gradient


class BranchedConvolution(keras.layers.Layer):
    """ReLU(BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x)), the last where input and output have as many channels.

    With `points` false the first branch stands alone. A layer that is not trainable keeps its moving moments.
    """

    def __init__(self, filters, points=True, **options):
        super().__init__(**options)
        self.filters, self.points = filters, points

    def build(self, shape):
        channels = shape[-1]
        branches = ["bn3x3"] + ["bn1x1"] * self.points + ["bnid"] * (self.points and channels == self.filters)
        self.kernels = [self.add_weight(name=f"kernel{size}x{size}", shape=(size, size, channels, self.filters),
                                        initializer="he_normal") for size in (3, 1)[:1 + self.points]]
        self.norms = {branch: [self.add_weight(name=f"{branch}_{row}", shape=(self.filters,), initializer=start,
                                               trainable=row in ("gamma", "beta"), autocast=False)
                               for row, start in (("gamma", "ones"), ("beta", "zeros"),
                                                  ("mean", "zeros"), ("variance", "ones"))]
                      for branch in branches}

    def call(self, x, training=False):
        maps = [ops.conv(x, kernel, padding="same", data_format="channels_last") for kernel in self.kernels] + [x]
        total, bias = 0, 0
        for values, (gamma, beta, *moving) in zip(maps, self.norms.values()):
            mean, variance = self.moments(values, moving) if training and self.trainable else moving
            scale = gamma * ops.rsqrt(variance + NORM_EPSILON)
            total += values * ops.cast(scale, values.dtype)
            bias += beta - mean * scale
        return ops.relu(total + ops.cast(bias, total.dtype))

    def moments(self, values, moving):
        """Mean and variance (channels,) of a batch in float32; the moving ones follow them."""
        mean, square = ops.unstack(raw_moments(values), num=2)
        variance = ops.maximum(square - ops.square(mean), 0)
        for average, new in zip(moving, (mean, variance)):
            average.assign(average * NORM_MOMENTUM + ops.stop_gradient(new) * (1 - NORM_MOMENTUM))
        return mean, variance

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.filters)

    def branches(self):
        """The layer's arrays by their names in a branches file: kernels in float16, norms as rows in float32."""
        kernels = zip(("conv3x3", "conv1x1"), self.kernels)
        return ({name: ops.convert_to_numpy(kernel).astype("float16") for name, kernel in kernels}
                | {name: np.stack([ops.convert_to_numpy(row) for row in rows]) for name, rows in self.norms.items()})


def branched_base(dtype, points=True, frozen=0):
    """VGG19 without its top, of branched layers under the names of keras.applications; any input size.

    `points`: with the 1x1 and identity branches; `frozen`: blocks that do not learn, from the first.
    """
    inputs = x = keras.Input((None, None, 3))
    for block, (convolutions, filters) in enumerate(BLOCKS, start=1):
        for convolution in range(1, convolutions + 1):
            x = BranchedConvolution(filters, points, name=f"block{block}_conv{convolution}", dtype=dtype,
                                    trainable=block > frozen)(x)
        x = keras.layers.MaxPooling2D(2, name=f"block{block}_pool", dtype=dtype)(x)
    return keras.Model(inputs, x, name="branched_vgg19")


def classifier(base, classes, features=0):
    """The base with dropout of whole channels and one float32 logit a class at every place (N, h, w, classes).

    The mean over the places is what global average pooling and a dense layer give. The guesses at a teacher's
    `features` follow the logits.
    """
    x = keras.layers.SpatialDropout2D(DROPOUT, dtype="float32", name="dropout")(base.get_layer("block5_conv4").output)
    outputs = keras.layers.Dense(classes, name="logits", dtype="float32", kernel_initializer="zeros")(x)
    if features:
        guesses = keras.layers.Dense(features, name="guesses", dtype="float32")(x)
        outputs = keras.layers.Concatenate(dtype="float32")([outputs, guesses])
    return keras.Model(base.input, outputs)


def branched_layers(model):
    """The sixteen branched layers of a model, first to last."""
    return [layer for layer in model.layers if isinstance(layer, BranchedConvolution)]


def save_branches(model, path):
    """Write the branches of every layer, and the head, as an .npz file that --start reads."""
    arrays = {f"{layer.name}/{name}": array for layer in branched_layers(model)
              for name, array in layer.branches().items()}
    arrays |= {f"logits/{row}": array for row, array in enumerate(model.get_layer("logits").get_weights())}
    replace(path, lambda new: np.savez(new, **arrays))


def load_branches(model, arrays):
    """Set the branches of every layer from the arrays of an .npz file, and the head where it has as many classes."""
    for layer in branched_layers(model):
        for name, kernel in zip(("conv3x3", "conv1x1"), layer.kernels):
            kernel.assign(arrays[f"{layer.name}/{name}"].astype("float32"))
        for name, rows in layer.norms.items():
            for variable, row in zip(rows, arrays[f"{layer.name}/{name}"]):
                variable.assign(row.astype("float32"))
    head = model.get_layer("logits")
    if "logits/1" in arrays and arrays["logits/1"].shape == head.bias.shape:
        head.set_weights([arrays["logits/0"], arrays["logits/1"]])


def load_folded(model, path, pictures):
    """Set the 3x3 branches of a model without points from a plain VGG19 weights file.

    Each norm takes the moments of some pictures (N, S, S) uint8, and each layer gives maps whose mean square is 1, so
    that one rate suits any file: ImageNet's maps reach hundreds. Returns the factor by which the base's answers differ.
    """
    try:
        plain = keras.applications.VGG19(include_top=False, weights=path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as the weights of VGG19: {error}.") from None
    x, factor = ops.convert_to_tensor(network_input(pictures)), 1.0  # x: factor times what the plain base has there
    last = model.layers.index(branched_layers(model)[-1])
    for layer in model.layers[1:last + 1]:
        if isinstance(layer, BranchedConvolution):
            kernel, bias = plain.get_layer(layer.name).get_weights()
            if layer.name == "block1_conv1":
                bias = bias + kernel.sum((0, 1)).T @ (GREY_MEAN - CAFFE_MEAN)
                kernel = np.repeat(kernel.sum(axis=2, keepdims=True) * GREY_SCALE / 3, 3, axis=2)
            maps = ops.convert_to_numpy(ops.conv(x, kernel, padding="same", data_format="channels_last"))
            mean, deviation = maps.mean((0, 1, 2)), maps.std((0, 1, 2)) + NORM_EPSILON
            level = np.sqrt(np.mean(np.maximum(maps + factor * bias, 0) ** 2))
            size = np.sqrt((kernel**2).sum((0, 1, 2)) / 2) + 1e-12  # to the length that He's initialisation gives
            variance = (deviation / size) ** 2 - NORM_EPSILON
            layer.set_weights([kernel / size, deviation / level, (mean + factor * bias) / level, mean / size,
                               np.maximum(variance, 0)])
            factor /= level
        x = ops.cast(layer(ops.cast(x, layer.compute_dtype)), "float32")
    return factor


# Training

def set_loss(targets, logits):
    """Minus the log of the probability (N,) that the class is one of the targets."""
    allowed = ops.where(targets > 0, logits, -1e9)
    return ops.logsumexp(logits, axis=-1) - ops.logsumexp(allowed, axis=-1)


def place_loss(targets, logits, inside):
    """Minus the log of the share (N,) of the evidence for the targets that lies inside the box; 0 without a box.

    logits (N, h, w, C), inside (N, h, w); the evidence of a place is its share in a softmax over all places.
    """
    allowed = ops.where(targets[:, None, None] > 0, logits, -1e9)
    evidence = ops.reshape(ops.logsumexp(allowed, axis=-1), (ops.shape(inside)[0], -1))
    inside = ops.reshape(inside, ops.shape(evidence))
    share = ops.sum(ops.softmax(evidence, axis=-1) * inside, axis=-1) / ops.maximum(ops.max(inside, axis=-1), 1e-6)
    return ops.where(ops.max(inside, axis=-1) > 0, -ops.log(share + 1e-3), 0.0)


def taught_loss(answers, features, logits, guesses):
    """How far logits (N, C) and guesses (N, h, w, F) are from a teacher's answers, logits too, and features (N,).

    The divergence of the probabilities, and the share of the features' variance that the guesses leave.
    """
    p = ops.softmax(answers, axis=-1)
    divergence = ops.sum(p * (ops.log_softmax(answers, axis=-1) - ops.log_softmax(logits, axis=-1)), axis=-1)
    variance = ops.mean(ops.square(features - ops.mean(features, axis=(0, 1, 2))))
    return divergence + ops.mean(ops.square(features - guesses), axis=(1, 2, 3)) / variance


def loss(marks, outputs, classes=None):
    """The loss (N,) of outputs (N, h, w, C + F), the first C of them logits, against what with_place() made."""
    classes = classes or outputs.shape[-1]
    targets, inside, taught = marks[:, 0, 0, :classes], marks[..., classes], marks[..., classes + 1:]
    logits = outputs[..., :classes]
    total = set_loss(targets, ops.mean(logits, axis=(1, 2))) + PLACE_WEIGHT * place_loss(targets, logits, inside)
    if not taught.shape[-1]:
        return total
    return total + TEACHER_WEIGHT * taught_loss(
        taught[:, 0, 0, :classes], taught[..., classes:], ops.mean(logits, axis=(1, 2)), outputs[..., classes:])


def hit(marks, outputs, classes=None):
    """1 where the likeliest class is one of the targets, else 0 (N,)."""
    classes = classes or outputs.shape[-1]
    best = ops.argmax(ops.mean(outputs[..., :classes], axis=(1, 2)), axis=-1)
    return ops.take_along_axis(marks[:, 0, 0, :classes], best[:, None], axis=-1)[:, 0]


def compile_for(model, classes, rate, steps):
    """Compile with SGD whose rate warms up, then falls along one cosine over all steps of the schedule."""
    warm_up = min(WARM_UP_STEPS, steps // 5)
    cosine = keras.optimizers.schedules.CosineDecay(
        0.0, max(steps - warm_up, 1), warmup_target=rate, warmup_steps=max(warm_up, 1))
    # Keras subtracts the decay outside the momentum, which would multiply it by 1 / (1 - momentum).
    optimizer = keras.optimizers.SGD(cosine, momentum=MOMENTUM, nesterov=True,
                                     weight_decay=WEIGHT_DECAY / (1 - MOMENTUM))
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    optimizer.build(model.trainable_variables)
    # XLA compiles slow convolutions for processors; elsewhere the backend chooses.
    jit = False if keras.backend.backend() == "tensorflow" else "auto"
    metric = keras.metrics.MeanMetricWrapper(partial(hit, classes=classes), name="hit")
    model.compile(optimizer, loss=partial(loss, classes=classes), metrics=[metric], jit_compile=jit)


class Progress(keras.callbacks.Callback):
    """A line every PROGRESS_STEPS steps: seconds a step and minutes left; time goes with the pixel count."""

    def __init__(self, pixels, later):
        super().__init__()
        self.pixels, self.later = pixels, later

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.monotonic()

    def minutes_left(self, steps_done):
        """Minutes to the end of the schedule at the mean speed of this epoch."""
        a_step = (time.monotonic() - self.start) / steps_done
        work = (self.params["steps"] - steps_done) * self.pixels**2 + self.later
        return a_step * work / self.pixels**2 / 60

    def on_train_batch_end(self, step, logs=None):
        if (done := step + 1) % PROGRESS_STEPS == 0:
            a_step = (time.monotonic() - self.start) / done
            print(f"  step {done}/{self.params['steps']}: loss {logs['loss']:.3f}, accuracy {logs['hit']:.3f}, "
                  f"{a_step:.2f} s/step, {self.minutes_left(done):.1f} minutes left", flush=True)


def train(model, training, validation, sizes, options, folder, finished, teacher=None):
    """Train the epochs of `sizes` (pixels of each epoch) that are not finished; save the state after each."""
    stage = None
    for epoch, pixels in list(enumerate(sizes))[finished:]:
        if pixels != stage:
            stage = pixels
            drawn = training | {"pixels": resized(training["pixels"], round(pixels * MARGIN))}
            held_out = validation | {"pixels": resized(validation["pixels"], pixels)}
        start = time.monotonic()
        model.get_layer("dropout").seed_generator.state.assign([options.seed, epoch])  # a continued run drops the same
        draws = Draws(drawn, pixels, options.draws, options.batch, (options.seed, epoch), teacher)
        progress = Progress(pixels, len(draws) * sum(size**2 for size in sizes[epoch + 1:]))
        logs = model.fit(draws, epochs=1, shuffle=False, verbose=0, callbacks=[progress]).history
        left = progress.minutes_left(len(draws))
        line = (f"epoch {epoch + 1}/{len(sizes)}, {pixels} pixels: loss {logs['loss'][0]:.3f}, "
                f"accuracy {logs['hit'][0]:.3f}")
        if len(held_out["pixels"]):
            score = model.evaluate(Plain(held_out, options.batch), verbose=0, return_dict=True)
            line += f", validation {score['hit']:.3f}"
        save_state(model, folder, epoch + 1, run_settings(options))
        print(f"{line}; {(time.monotonic() - start) / 60:.1f} minutes, {left:.1f} left", flush=True)


# Checkpoint

def replace(path, write):
    """Let `write` fill a new file, then put it in the place of `path`, so that a stop leaves no half file."""
    new = path.with_name(f"new-{path.name}")
    write(new)
    new.replace(path)


def run_settings(options):
    """What a continued run must share with the run that it continues."""
    shared = ("schedule", "draws", "batch", "rate", "frozen", "teacher", "seed")
    return {name: getattr(options, name) for name in shared}


def save_state(model, folder, epochs, settings):
    """Write the weights, the optimizer's variables with the count of finished epochs, and the branches."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "state.weights.h5", model.save_weights)
    variables = {str(row): ops.convert_to_numpy(variable) for row, variable in enumerate(model.optimizer.variables)}
    replace(folder / "state.npz",
            lambda new: np.savez(new, epochs=epochs, settings=json.dumps(settings), **variables))
    save_branches(model, folder / "branches.npz")


def load_state(model, folder, settings):
    """Restore what save_state wrote; the count of finished epochs, 0 where nothing was saved."""
    if not (folder / "state.npz").exists():
        return 0
    with np.load(folder / "state.npz") as state:
        if (saved := json.loads(str(state["settings"]))) != settings:
            changed = ", ".join(name for name in settings if saved.get(name) != settings[name])
            raise SystemExit(f"{folder} holds a run with another {changed}; name another --checkpoint folder, "
                             f"perhaps with --start {folder / 'branches.npz'}.")
        try:
            model.load_weights(folder / "state.weights.h5")
        except ValueError:
            raise SystemExit(f"{folder} holds a run with other classes; name another --checkpoint folder.") from None
        for row, variable in enumerate(model.optimizer.variables):
            variable.assign(state[str(row)])
        return int(state["epochs"])


# Folding

def folded_branch(kernel, norm):
    """A bias-free kernel (h, w, in, out) followed by batch normalisation, as kernel and bias (out,)."""
    gamma, beta, mean, variance = (ops.convert_to_numpy(row) for row in norm)
    scale = gamma / np.sqrt(variance + NORM_EPSILON)
    return kernel * scale, beta - mean * scale


def folded_layer(layer):
    """The one 3x3 kernel (3, 3, in, out) and bias (out,) equal to a layer's branches."""
    kernels = [ops.convert_to_numpy(kernel) for kernel in layer.kernels]
    kernels.append(np.eye(kernels[0].shape[2], dtype="float32")[None, None])  # of the identity, where there is one
    (kernel, bias), *points = [folded_branch(*branch) for branch in zip(kernels, layer.norms.values())]
    for point, point_bias in points:
        kernel[1, 1] += point[0, 0]
        bias = bias + point_bias
    return kernel, bias


def for_preprocessed_input(kernel, bias):
    """The first layer for what vgg19.preprocess_input gives of a grey picture, instead of (grey - 115.2) / 64.

    Only the sum over the three equal channels counts. It is shared out so that the Caffe means weigh up to
    exactly 115.2: zero padding then means the same grey to both networks, and the fold is exact at borders too.
    """
    apart = CAFFE_MEAN - CAFFE_MEAN.mean()
    share = 1 / 3 + apart * (GREY_MEAN - CAFFE_MEAN.mean()) / np.sum(apart**2)
    return kernel.sum(axis=2, keepdims=True) * share[:, None] / GREY_SCALE, bias


def folded(base):
    """The plain keras.applications VGG19 that equals a branched base."""
    plain = keras.applications.VGG19(include_top=False, weights=None)
    for layer in branched_layers(base):
        weights = folded_layer(layer)
        if layer.name == "block1_conv1":
            weights = for_preprocessed_input(*weights)
        plain.get_layer(layer.name).set_weights(weights)
    return plain


def check_fold(model, plain, pictures):
    """Refuse a folded network whose features differ from the branched one's, in float32, on grey pictures."""
    base = branched_base("float32", branched_layers(model)[0].points)
    for layer, trained in zip(branched_layers(base), branched_layers(model)):
        layer.set_weights(trained.get_weights())
    grey = resized(pictures, FOLD_PIXELS).astype("float32")
    expected = base.predict(network_input(grey), verbose=0)
    given = keras.applications.vgg19.preprocess_input(np.repeat(grey[..., None], 3, axis=-1))
    difference = np.abs(plain.predict(given, verbose=0) - expected).max()
    scale = np.abs(expected).max()
    print(f"fold check: largest difference {difference:.2e}, largest feature {scale:.2e}")
    if not difference < FOLD_TOLERANCE * scale:
        raise SystemExit("The folded network differs from the trained one; no weights file was written.")


def narrow(path, dtype):
    """Rewrite a weights file with its arrays in a smaller type; HDF5 frees no space in place."""
    wide = path.rename(path.with_suffix(".wide"))
    with h5py.File(wide) as source, h5py.File(path, "w") as target:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                target[name] = item[()].astype(dtype)
            else:
                target.require_group(name).attrs.update(item.attrs)

        source.visititems(copy)
    wide.unlink()


def write_folded(model, pictures, path):
    """Fold the model, check it, and write the plain VGG19 weights in float16."""
    plain = folded(model)
    check_fold(model, plain, pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain.save_weights(path)
    narrow(path, "float16")
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


# Command line

def parse_schedule(text):
    """'80:6,112:3' as the pixels of every epoch, in order."""
    try:
        stages = [[int(number) for number in stage.split(":")] for stage in text.split(",")]
        sizes = [pixels for pixels, epochs in stages for _ in range(epochs)]
    except ValueError:
        raise SystemExit(f"The schedule '{text}' is not of the form pixels:epochs,pixels:epochs.") from None
    if min(pixels for pixels, _ in stages) < 32:
        raise SystemExit("VGG19 needs pictures of at least 32 pixels.")
    return sizes


def argument_parser(description):
    """The parser of what a training run takes."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("data", help="folder of class folders, or .npz with pixels (N, S, S), targets (N, C) "
                                     "and optionally part (N,), draw (N,), boxes (N, 4) and without (C,)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("model_weights/vgg19_base.weights.h5"),
                        help="weights file to write (%(default)s)")
    parser.add_argument("--start", default="none", help="branches .npz to start from; or a plain .weights.h5, "
                                                        "trained on without the points' branches; or none")
    parser.add_argument("--frozen", type=int, default=0, help="blocks that do not learn (%(default)s)")
    parser.add_argument("--schedule", default="80:6,112:3", help="pixels:epochs of each stage (%(default)s)")
    parser.add_argument("--draws", type=int, default=4000, help="training pictures an epoch (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="highest learning rate (%(default)s)")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder of the state ('pretraining' beside --out)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--dtype", default="mixed_bfloat16", help="Keras dtype policy of training (%(default)s)")
    parser.set_defaults(teacher=None)  # cross_validate.py takes none: it would have seen the fold
    return parser


def checked(parser, ending):
    """The parsed arguments; ends the program with a sentence where they contradict each other."""
    options = parser.parse_args()
    if not options.out.name.endswith(ending):
        parser.error(f"--out must end in {ending}.")
    if not 1 <= options.batch <= options.draws:
        parser.error("--draws must be at least --batch, and both positive.")
    options.checkpoint = options.checkpoint or options.out.parent / "pretraining"
    return options


def read_teacher(path, classes):
    """The teacher in a file of train_teacher.py, which needs PyTorch; None for no path."""
    if not path:
        return None
    try:
        from train_teacher import Teacher
    except ImportError as error:
        raise SystemExit(f"--teacher needs {error.name}; train_teacher.py says how to install it.") from None
    teacher = Teacher(path)
    if teacher.classes != classes:
        raise SystemExit(f"{path} knows {teacher.classes} classes, the pictures have {classes}; train it on these.")
    return teacher


def started(options, training, sizes, features=0):
    """A compiled classifier of the training part's classes that starts from options.start."""
    classes, some = training["targets"].shape[1], training["pixels"][::len(training["pixels"]) // 64 + 1]
    if options.start.endswith(".weights.h5"):
        model = classifier(branched_base(options.dtype, points=False, frozen=options.frozen), classes, features)
        load_folded(model, options.start, resized(some, sizes[0]))
    elif options.start == "none":
        model = classifier(branched_base(options.dtype, frozen=options.frozen), classes, features)
    else:
        try:
            with np.load(options.start) as arrays:
                points = any(name.endswith("conv1x1") for name in arrays)
                model = classifier(branched_base(options.dtype, points, options.frozen), classes, features)
                load_branches(model, arrays)
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"{options.start} cannot be read as the branches of VGG19: {error}.") from None
    compile_for(model, classes, options.rate, len(sizes) * (options.draws // options.batch))
    return model


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--teacher", help="network of train_teacher.py to learn from as well")
    options = checked(parser, ".weights.h5")
    keras.utils.set_random_seed(options.seed)
    sizes = parse_schedule(options.schedule)
    training, validation = load_pictures(options.data, round(MARGIN * max(sizes, default=FOLD_PIXELS)))
    teacher = read_teacher(options.teacher, training["targets"].shape[1])
    model = started(options, training, sizes, teacher.features if teacher else 0)
    finished = load_state(model, options.checkpoint, run_settings(options))
    print(f"{len(training['pixels'])} training and {len(validation['pixels'])} validation pictures, "
          f"{training['targets'].shape[1]} classes; {finished} of {len(sizes)} epochs done", flush=True)
    train(model, training, validation, sizes, options, options.checkpoint, finished, teacher)
    write_folded(model, training["pixels"][:8], options.out)


if __name__ == "__main__":
    main()

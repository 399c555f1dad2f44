#!/usr/bin/env python3
"""Pretrain the VGG19 base on greyscale pictures and fold it into a plain Keras weights file.

A plain 19-layer VGG hardly trains without a good start. This script trains it with RepVGG branches: every
layer is ReLU(BN(3x3 convolution) + BN(1x1 convolution) + BN(input)). At inference each branch is linear, so at
the end the three are added into one 3x3 convolution with a bias, and the result is exactly VGG19:

    python pretrain_base.py pictures/ --schedule 80:6,112:3
    keras.applications.VGG19(include_top=False, weights="vgg19_base.weights.h5")

The same command continues an interrupted run. Any Keras backend will do (KERAS_BACKEND=tensorflow, jax, torch).

Sources: Simonyan & Zisserman 2015, "Very deep convolutional networks for large-scale image recognition";
Ding et al. 2021, "RepVGG: making VGG-style ConvNets great again"; Goyal et al. 2017 (warm-up).
"""

import argparse
import json
import pathlib
import time

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
ROTATION = 20.0  # degrees, either way
SCALE = (0.8, 1.2)
SHIFT = 0.08  # of the picture's side, either way
MIRROR_SHARE = 0.5
COARSE_SHARE, COARSE_SCALE = 0.3, (0.35, 0.9)  # resolution loss: reduced to this share of the side and back
GAMMA = (0.6, 1.6)
CONTRAST, GAIN = (0.7, 1.3), (0.8, 1.2)
INVERTED_SHARE = 0.1
NOISE = 0.06  # largest standard deviation, of the full grey range
ERASED_SHARE, ERASED_SIDE = 0.5, (0.1, 0.35)  # a box of one grey, of the picture's side
PROGRESS_STEPS = 50


# Pictures

def load_pictures(path, pixels):
    """Training and validation parts, each a dict of pixels (N, S, S) uint8, targets (N, C) and draw (N,)."""
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
    rows = {name: part == name for name in ("train", "validation")}
    if not draw[rows["train"]].sum() > 0:
        raise SystemExit(f"{path} holds no training picture that could be drawn.")
    if not arrays["targets"][rows["train"] | rows["validation"]].any(axis=1).all():
        raise SystemExit(f"{path} holds a picture without any target.")
    return [{"pixels": arrays["pixels"][chosen], "targets": arrays["targets"][chosen].astype("float32"),
             "draw": draw[chosen]} for chosen in rows.values()]


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
            grey[row] = picture.convert("L").resize((pixels, pixels), Image.Resampling.BILINEAR)
    return {"pixels": grey, "targets": np.eye(len(classes), dtype=np.uint8)[[label for _, label in found]]}


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

def warped(picture, pixels, rng):
    """One picture (S, S) uint8 rotated, scaled, shifted, perhaps mirrored and coarsened, as (pixels, pixels)."""
    side = len(picture)
    angle = np.radians(rng.uniform(-ROTATION, ROTATION))
    step = side / pixels / rng.uniform(*SCALE)
    turn = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if rng.random() < MIRROR_SHARE:
        turn[:, 0] *= -1
    offset = side * (0.5 + rng.uniform(-SHIFT, SHIFT, 2)) - turn.sum(axis=1) * pixels / 2
    affine = (*turn[0], offset[0], *turn[1], offset[1])
    image = Image.fromarray(picture).transform(
        (pixels, pixels), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    if rng.random() < COARSE_SHARE:
        coarse = round(pixels * rng.uniform(*COARSE_SCALE))
        for side in (coarse, pixels):
            image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def recoloured(grey, rng):
    """Grey values (N, S, S) uint8 with other gamma, contrast, gain, polarity, noise and one erased box, float32."""
    def each(bounds):
        return rng.uniform(*bounds, (len(grey), 1, 1)).astype("float32")

    grey = (grey.astype("float32") / 255) ** each(GAMMA)
    mean = grey.mean(axis=(1, 2), keepdims=True)
    grey = (mean + (grey - mean) * each(CONTRAST)) * each(GAIN)
    grey = np.where(each((0, 1)) < INVERTED_SHARE, 1 - grey, grey)
    grey += each((0, NOISE)) * rng.standard_normal(grey.shape, dtype="float32")
    pixels = grey.shape[1]
    for row in np.flatnonzero(rng.random(len(grey)) < ERASED_SHARE):
        height, width = (pixels * rng.uniform(*ERASED_SIDE, 2)).astype(int)
        top, left = rng.integers(pixels - height), rng.integers(pixels - width)
        grey[row, top:top + height, left:left + width] = rng.random()
    return 255 * np.clip(grey, 0, 1)


class Draws(keras.utils.PyDataset):
    """One epoch of augmented training batches, drawn by weight; the same for the same seed and epoch."""

    def __init__(self, part, pixels, draws, batch, seed):
        super().__init__()
        self.part, self.pixels, self.batch, self.seed = part, pixels, batch, seed
        rng = np.random.default_rng(seed)
        self.rows = rng.choice(len(part["draw"]), draws, p=part["draw"] / part["draw"].sum())

    def __len__(self):
        return len(self.rows) // self.batch

    def __getitem__(self, index):
        rng = np.random.default_rng([*self.seed, index])
        rows = self.rows[index * self.batch:(index + 1) * self.batch]
        grey = np.stack([warped(self.part["pixels"][row], self.pixels, rng) for row in rows])
        return network_input(recoloured(grey, rng)), self.part["targets"][rows]


class Plain(keras.utils.PyDataset):
    """Every picture of a part once, in order and unchanged."""

    def __init__(self, part, batch):
        super().__init__()
        self.part, self.batch = part, batch

    def __len__(self):
        return -(-len(self.part["pixels"]) // self.batch)

    def __getitem__(self, index):
        rows = slice(index * self.batch, (index + 1) * self.batch)
        return network_input(self.part["pixels"][rows]), self.part["targets"][rows]


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
    """ReLU(BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x)), the last where input and output have as many channels."""

    def __init__(self, filters, **options):
        super().__init__(**options)
        self.filters = filters

    def build(self, shape):
        channels = shape[-1]
        branches = ["bn3x3", "bn1x1"] + ["bnid"] * (channels == self.filters)
        self.kernels = [self.add_weight(name=f"kernel{size}x{size}", shape=(size, size, channels, self.filters),
                                        initializer="he_normal") for size in (3, 1)]
        self.norms = {branch: [self.add_weight(name=f"{branch}_{row}", shape=(self.filters,), initializer=start,
                                               trainable=row in ("gamma", "beta"), autocast=False)
                               for row, start in (("gamma", "ones"), ("beta", "zeros"),
                                                  ("mean", "zeros"), ("variance", "ones"))]
                      for branch in branches}

    def call(self, x, training=False):
        maps = [ops.conv(x, kernel, padding="same", data_format="channels_last") for kernel in self.kernels] + [x]
        total, bias = 0, 0
        for values, (gamma, beta, *moving) in zip(maps, self.norms.values()):
            mean, variance = self.moments(values, moving) if training else moving
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


def branched_base(dtype):
    """VGG19 without its top, of branched layers under the names of keras.applications; any input size."""
    inputs = x = keras.Input((None, None, 3))
    for block, (convolutions, filters) in enumerate(BLOCKS, start=1):
        for convolution in range(1, convolutions + 1):
            x = BranchedConvolution(filters, name=f"block{block}_conv{convolution}", dtype=dtype)(x)
        x = keras.layers.MaxPooling2D(2, name=f"block{block}_pool", dtype=dtype)(x)
    return keras.Model(inputs, x, name="branched_vgg19")


def classifier(base, classes):
    """The base with global average pooling, dropout and one float32 logit a class."""
    x = keras.layers.GlobalAveragePooling2D(dtype="float32")(base.output)
    x = keras.layers.Dropout(DROPOUT, dtype="float32")(x)
    return keras.Model(base.input, keras.layers.Dense(classes, name="logits", dtype="float32")(x))


def branched_layers(model):
    """The sixteen branched layers of a model, first to last."""
    return [layer for layer in model.layers if isinstance(layer, BranchedConvolution)]


def save_branches(model, path):
    """Write the branches of every layer as an .npz file that --start reads."""
    replace(path, lambda new: np.savez(new, **{f"{layer.name}/{name}": array for layer in branched_layers(model)
                                               for name, array in layer.branches().items()}))


def load_branches(model, path):
    """Set the branches of every layer from an .npz file."""
    try:
        with np.load(path) as arrays:
            for layer in branched_layers(model):
                for name, kernel in zip(("conv3x3", "conv1x1"), layer.kernels):
                    kernel.assign(arrays[f"{layer.name}/{name}"].astype("float32"))
                for name, rows in layer.norms.items():
                    for variable, row in zip(rows, arrays[f"{layer.name}/{name}"]):
                        variable.assign(row.astype("float32"))
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as the branches of VGG19: {error}.") from None


# Training

def set_loss(targets, logits):
    """Minus the log of the probability (N,) that the class is one of the targets."""
    allowed = ops.where(targets > 0, logits, -1e9)
    return ops.logsumexp(logits, axis=-1) - ops.logsumexp(allowed, axis=-1)


def hit(targets, logits):
    """1 where the likeliest class is one of the targets, else 0 (N,)."""
    return ops.take_along_axis(targets, ops.argmax(logits, axis=-1)[:, None], axis=-1)[:, 0]


def compile_for(model, rate, steps):
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
    model.compile(optimizer, loss=set_loss, metrics=[hit], jit_compile=jit)


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


def train(model, training, validation, sizes, options, folder, finished):
    """Train the epochs of `sizes` (pixels of each epoch) that are not finished; save the state after each."""
    stage = None
    for epoch, pixels in list(enumerate(sizes))[finished:]:
        if pixels != stage:
            stage = pixels
            drawn = training | {"pixels": resized(training["pixels"], round(pixels * MARGIN))}
            held_out = validation | {"pixels": resized(validation["pixels"], pixels)}
        start = time.monotonic()
        draws = Draws(drawn, pixels, options.draws, options.batch, (options.seed, epoch))
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
    return {name: getattr(options, name) for name in ("schedule", "draws", "batch", "rate", "seed")}


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
    kernels.append(np.eye(kernels[0].shape[2], dtype="float32")[None, None])
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
    base = branched_base("float32")
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


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="folder of class folders, or .npz with pixels (N, S, S), targets (N, C) "
                                     "and optionally part (N,) and draw (N,)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("model_weights/vgg19_base.weights.h5"),
                        help="weights file to write (%(default)s)")
    parser.add_argument("--start", default="none", help="branches .npz to start from, or none (%(default)s)")
    parser.add_argument("--schedule", default="80:6,112:3", help="pixels:epochs of each stage (%(default)s)")
    parser.add_argument("--draws", type=int, default=4000, help="training pictures an epoch (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="highest learning rate (%(default)s)")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder of the state ('pretraining' beside --out)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--dtype", default="mixed_bfloat16", help="Keras dtype policy of training (%(default)s)")
    options = parser.parse_args()
    if not options.out.name.endswith(".weights.h5"):
        parser.error("--out must end in .weights.h5.")
    if not 1 <= options.batch <= options.draws:
        parser.error("--draws must be at least --batch, and both positive.")
    options.checkpoint = options.checkpoint or options.out.parent / "pretraining"
    return options


def main():
    options = parse_arguments()
    keras.utils.set_random_seed(options.seed)
    sizes = parse_schedule(options.schedule)
    training, validation = load_pictures(options.data, round(MARGIN * max(sizes, default=FOLD_PIXELS)))
    base = branched_base(options.dtype)
    model = classifier(base, training["targets"].shape[1])
    if options.start != "none":
        load_branches(base, options.start)
    compile_for(model, options.rate, len(sizes) * (options.draws // options.batch))
    finished = load_state(model, options.checkpoint, run_settings(options))
    print(f"{len(training['pixels'])} training and {len(validation['pixels'])} validation pictures, "
          f"{training['targets'].shape[1]} classes; {finished} of {len(sizes)} epochs done", flush=True)
    train(model, training, validation, sizes, options, options.checkpoint, finished)
    write_folded(base, training["pixels"][:8], options.out)


if __name__ == "__main__":
    main()

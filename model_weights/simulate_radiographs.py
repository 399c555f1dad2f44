"""Simulates radiographs from CT volumes, as pictures for the gate of Brainmodel.ipynb to be fitted against.

    python model_weights/simulate_radiographs.py VOLUMES SLICES

VOLUMES holds `part/subject.nii.gz` CT volumes in Hounsfield units; the pictures go into SLICES beside those of
slice_volumes.py, with the label `radiographs`. A pixel is the attenuation along its ray (parallel beams, from the
front or from the side), shown as digital detectors show it: cut, windowed, sharpened, graded, inverted, tilted.
"""

import csv
import pathlib
import sys

import click
import nibabel
import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import app


def projections(volume):
    """Line integrals of attenuation through a volume (x, y, z) in Hounsfield units, 0 to 255, upright, isotropic.

    From the front and from the side. What is mostly air weighs less: the couch and the blanket are to fade.
    """
    volume = nibabel.as_closest_canonical(volume)
    values, spacing = np.asarray(volume.dataobj, np.float32), volume.header.get_zooms()
    attenuation = np.clip(values / 1000 + 1, 0, 2.5) * np.where(values < -300, 0.6, 1)
    for axis, across in ((1, 0), (0, 1)):
        rays = attenuation.sum(axis)[:, ::-1].T
        pixels = app.as_pixels(rays, 0, np.percentile(rays, 99.8))
        yield app.square(pixels, float(spacing[2]), float(spacing[across]))


def cut(rays, random):
    """A part of rays (H, W) from head to foot, and mostly without the air at the sides; 512 pixels at most."""
    top, bottom = random.uniform(0, 0.3), random.uniform(0.7, 1)
    rays = rays[int(top * len(rays)) : int(bottom * len(rays))]
    body = np.flatnonzero((rays > 40).mean(0) > 0.3)
    if len(body) > 20 and random.random() < 0.7:
        left, right = (np.ptp(body) * random.uniform(-0.05, 0.12, 2)).astype(int)
        rays = rays[:, max(0, body[0] + left) : body[-1] - right]
    picture = Image.fromarray(rays)
    return np.asarray(ImageOps.contain(picture, (512, 512), Image.Resampling.BICUBIC), np.float32) / 255


def shown(rays, random):
    """Rays (H, W), 0 to 1, as uint8 pixels of a radiograph."""
    if random.random() < 0.7:  # equalised
        rays = rays - random.uniform(0.3, 0.8) * ndimage.gaussian_filter(rays, random.uniform(0.03, 0.15) * len(rays))
    if random.random() < 0.6:  # sharpened
        rays = rays + random.uniform(0.5, 3) * (rays - ndimage.gaussian_filter(rays, random.uniform(1, 4)))
    black = random.choice((0, random.uniform(0, 20)))
    white = random.choice((random.uniform(65, 98), random.uniform(98, 100)))
    low, high = np.percentile(rays, (black, white))
    rays = ((rays - low) / max(high - low, 1e-6)).clip(0, 1) ** random.uniform(0.5, 1.8)
    rays = rays + random.normal(0, random.uniform(0, 0.03), rays.shape)
    pixels = app.as_pixels(rays, 0, 1)
    if random.random() < 0.25:
        pixels = 255 - pixels
    if random.random() < 0.4:
        pixels = np.pad(pixels, int(0.05 * len(pixels)), constant_values=random.choice((0, 0, 255)))
    return Image.fromarray(pixels).rotate(random.choice((0, random.uniform(-6, 6))), fillcolor=int(pixels[0, 0]))


@click.command()
@click.argument("volumes", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.argument("slices", type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.option("--count", default=60, help="Radiographs of a volume.")
def main(volumes, slices, count):
    """Add radiographs simulated from the CT volumes under VOLUMES to SLICES."""
    slices.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    with open(slices / "manifest.csv", "a", newline="") as file:
        manifest = csv.writer(file)
        if not file.tell():
            manifest.writerow(("path", "label", "source", "patient_fold", "part"))
        for path in sorted(volumes.glob("*/*.nii*")):
            part, subject = path.parent.name, path.name.partition(".")[0]
            front, side = projections(nibabel.load(path))
            for n in range(count):
                name = f"{part} radiographs {subject} {n}.png"
                shown(cut(side if n % 4 == 3 else front, random), random).save(slices / name)
                manifest.writerow((name, "radiographs", "simulated", f"simulated {subject}", part))


if __name__ == "__main__":
    main()

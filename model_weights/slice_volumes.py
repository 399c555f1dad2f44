"""Cuts MRI volumes into the pictures that Brainmodel.ipynb trains on.

    python model_weights/slice_volumes.py VOLUMES SLICES

VOLUMES holds `part/label/subject/` folders (`train/no_tumor/anna/t1.nii.gz`) of NIfTI volumes or DICOM files. Every
file is read as the app reads it, a NIfTI volume in all three planes; SLICES gets the pictures and a manifest.csv in
which all slices of a subject are one patient fold.
"""

import csv
import pathlib
import sys

import click
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import app


def planes_of(path):
    """The scans of a file as lists, one a plane; a plane in which it is too thin is left out."""
    limits, series = app.LIMITS._replace(unpacked=10**11, scans=10**5), {}
    for plane in app.PLANES:
        try:
            scans = app.read_scans(path.read_bytes(), path.name, limits, plane)
        except app.UnreadableScan as reason:
            click.echo(f"{reason} ({plane})", err=True)
        else:
            series[scans[0].plane] = scans
    return list(series.values())


def thinned(series, rim, gap):
    """Yield scans `gap` mm apart or more, without the share `rim` of the series at either end."""
    first, last = series[0].position, series[-1].position
    place, end = first + rim * (last - first), last - rim * (last - first)
    for scan in series:
        if place <= scan.position <= end:
            yield scan
            place = scan.position + gap


@click.command()
@click.argument("volumes", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.argument("slices", type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.option("--rim", default=0.2, help="Share of a plane's slices left out at either end.")
@click.option("--gap", default=4.0, help="Millimetres from one slice to the next.")
def main(volumes, slices, rim, gap):
    """Cut the volumes under VOLUMES into pictures under SLICES."""
    slices.mkdir(parents=True)
    with open(slices / "manifest.csv", "w", newline="") as file:
        manifest = csv.writer(file)
        manifest.writerow(("path", "label", "source", "patient_fold", "part"))
        for path in sorted(path for path in volumes.glob("*/*/*/**/*") if path.is_file()):
            part, label, subject, *_ = place = path.relative_to(volumes).parts
            for series in planes_of(path):
                for scan in thinned(series, rim, gap):
                    name = f"{' '.join(place)} {scan.plane or 'slice'} {scan.slice}.png"
                    Image.fromarray(scan.pixels).save(slices / name)
                    manifest.writerow((name, label, volumes.name, subject, part))
            click.echo(f"{path.relative_to(volumes)} is cut")


if __name__ == "__main__":
    main()

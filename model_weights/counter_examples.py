"""Draws pictures that are no brain MRI, for the gate of Brainmodel.ipynb to be fitted against and measured on.

Each kind is a function from a random generator to uint8 pixels (H, W). They stand for what people send by mistake;
what is photographed comes from a folder of pictures.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORDS = ("patient", "scan", "report", "left", "right", "normal", "series", "contrast", "with", "of", "page", "figure")


def canvas(random, shade, low=180, high=640):
    """A plain picture of a random size and something to draw on it."""
    picture = Image.new("L", tuple(int(n) for n in random.integers(low, high, 2)), int(shade))
    return picture, ImageDraw.Draw(picture)


def sentence(random, words):
    return " ".join(random.choice(WORDS, words))


def points(random, size, low, high):
    """Some points (n, 2) as a list of tuples, as shares `low` to `high` of a picture's size."""
    return [tuple(point) for point in random.uniform(low, high, (int(random.integers(3, 9)), 2)) * size]


def document(random):
    """A page of text, black on white or white on black."""
    paper = random.choice([255, 245, 20])
    picture, draw = canvas(random, paper, 300)
    height = int(random.integers(10, 22))
    y = height * 2
    while y < picture.height - 2 * height:
        words = int(random.integers(2, 14))
        draw.text((height * 2, y), sentence(random, words), fill=int(255 - paper), font=ImageFont.load_default(height))
        y += int(height * random.uniform(1.2, 2.5))
    return np.asarray(picture)


def screenshot(random):
    """Windows, buttons and text of a program."""
    picture, draw = canvas(random, random.integers(30, 230), 300)
    for _ in range(random.integers(4, 14)):
        x, y = random.uniform(0, 0.8, 2) * picture.size
        box = (x, y, x + random.uniform(0.1, 0.6) * picture.width, y + random.uniform(0.04, 0.4) * picture.height)
        draw.rectangle(box, fill=int(random.integers(0, 255)), outline=int(random.integers(0, 255)))
        draw.text((x + 4, y + 4), sentence(random, 3), fill=int(random.integers(0, 255)),
                  font=ImageFont.load_default(int(random.integers(9, 18))))  # fmt: skip
    return np.asarray(picture)


def chart(random):
    """Bars or a line over two axes, with numbers beside them."""
    paper = random.choice([255, 0])
    picture, draw = canvas(random, paper, 250)
    ink, (w, h) = int(255 - paper), picture.size
    draw.line((0.12 * w, 0.05 * h, 0.12 * w, 0.88 * h, 0.95 * w, 0.88 * h), fill=ink, width=2)
    values = random.uniform(0.1, 0.8, int(random.integers(4, 16)))
    xs = np.linspace(0.16, 0.9, len(values))
    if random.random() < 0.5:
        for x, value in zip(xs, values):
            draw.rectangle((x * w, (0.88 - value) * h, (x + 0.5 / len(values)) * w, 0.88 * h), fill=ink // 2 + 60)
    else:
        draw.line([(x * w, (0.88 - value) * h) for x, value in zip(xs, values)], fill=ink, width=3)
    for n in range(5):
        draw.text((0.02 * w, (0.85 - 0.18 * n) * h), f"{20 * n}", fill=ink)
    return np.asarray(picture)


def noise(random):
    """White noise, fine or blurred, or with long waves."""
    values = random.normal(128, random.uniform(10, 80), (256, 256))
    if random.random() < 0.7:
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        values = np.asarray(picture.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 25))), float)
        values = (values - values.min()) / max(np.ptp(values), 1) * 255
    return values.clip(0, 255).astype(np.uint8)


def gradient(random):
    """A run of grey, straight or round."""
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    angle, (cx, cy) = random.uniform(0, 2 * np.pi), random.uniform(-0.5, 0.5, 2)
    if random.random() < 0.5:
        values = np.cos(angle) * x + np.sin(angle) * y
    else:
        values = -np.hypot(x - cx, (y - cy) * random.uniform(0.6, 1.6))
    values = (values - values.min()) / np.ptp(values)
    return (255 * values ** random.uniform(0.4, 2.5)).astype(np.uint8)


def logo(random):
    """A few large shapes and letters on a plain ground."""
    ground = int(random.choice([255, 0, 90]))
    picture, draw = canvas(random, ground, 200, 400)
    for _ in range(random.integers(1, 4)):
        shade = int((ground + random.integers(80, 255)) % 256)
        kind = random.integers(3)
        if kind == 0:
            draw.polygon(points(random, picture.size, 0.1, 0.9), fill=shade)
        elif kind == 1:
            x, y = random.uniform(0.1, 0.4, 2) * picture.size
            draw.ellipse((x, y, x + picture.width / 2, y + picture.height / 2), fill=shade)
        else:
            draw.text((picture.width * 0.1, picture.height * 0.3), sentence(random, 1), fill=shade,
                      font=ImageFont.load_default(int(random.integers(40, 110))))  # fmt: skip
    return np.asarray(picture)


def texture(random):
    """Stripes, checks or waves."""
    y, x = np.mgrid[0:256, 0:256]
    period, angle = random.uniform(6, 60), random.uniform(0, np.pi)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period)
    if random.random() < 0.5:
        wave = wave * np.sin((np.cos(angle) * y - np.sin(angle) * x) * 2 * np.pi / random.uniform(6, 60))
    if random.random() < 0.5:
        wave = np.sign(wave)
    return (127 + 120 * wave).astype(np.uint8)


def ellipse(draw, size, centre, radii, shade):
    """A filled ellipse, its centre and radii as shares of the picture."""
    (w, h), (cx, cy), (rx, ry) = size, centre, radii
    draw.ellipse(((cx - rx) * w, (cy - ry) * h, (cx + rx) * w, (cy + ry) * h), fill=int(shade))


def grained(picture, random):
    """The picture a little blurred, with grain, as from a scanner."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 3))), float)
    return (soft + random.normal(0, random.uniform(1, 8), soft.shape)).clip(0, 255).astype(np.uint8)


def chest(random):
    """A chest as an X-ray shows it: two dark lungs, ribs across, a bright middle."""
    picture, draw = canvas(random, random.integers(60, 170), 250, 500)
    for side in (-1, 1):
        centre, radii = (0.5 + side * random.uniform(0.17, 0.22), 0.5), (random.uniform(0.12, 0.17), 0.35)
        ellipse(draw, picture.size, centre, radii, random.integers(5, 50))
        for n in range(8):
            y = (0.18 + 0.08 * n) * picture.height
            x = (0.5 + side * 0.06) * picture.width
            reach = side * random.uniform(0.28, 0.36) * picture.width
            draw.line((x, y, x + reach, y + 0.06 * picture.height), fill=int(random.integers(80, 150)), width=5)
    draw.rectangle((0.46 * picture.width, 0, 0.54 * picture.width, picture.height), fill=int(random.integers(150, 235)))
    ellipse(draw, picture.size, (0.56, 0.62), (0.13, 0.16), random.integers(140, 220))
    return grained(picture, random)


def trunk(random):
    """A slice through a trunk as CT shows it: an oval, a spine, organs, on black."""
    picture, draw = canvas(random, 0, 250, 500)
    wide, high = random.uniform(0.4, 0.48), random.uniform(0.25, 0.35)
    ellipse(draw, picture.size, (0.5, 0.5), (wide, high), random.integers(60, 110))
    ellipse(draw, picture.size, (0.5, 0.5), (wide * 0.9, high * 0.88), random.integers(100, 150))
    for _ in range(random.integers(3, 9)):
        centre = (random.uniform(0.25, 0.75), random.uniform(0.35, 0.65))
        ellipse(draw, picture.size, centre, random.uniform(0.04, 0.16, 2), random.choice([5, 20, 120, 150, 175, 200]))
    ellipse(draw, picture.size, (0.5, 0.5 + high * 0.6), (0.05, 0.06), 250)
    return grained(picture, random)


def limb(random):
    """A slice through a leg or an arm: a round of muscle with one or two bones."""
    picture, draw = canvas(random, 0, 200, 400)
    for _ in range(random.integers(1, 3)):
        x = random.uniform(0.35, 0.65)
        r = random.uniform(0.15, 0.3)
        ellipse(draw, picture.size, (x, 0.5), (r, r), random.integers(150, 230))
        ellipse(draw, picture.size, (x, 0.5), (r * 0.88, r * 0.88), random.integers(60, 120))
        for _ in range(random.integers(1, 3)):
            centre = (x + random.uniform(-0.4, 0.4) * r, 0.5 + random.uniform(-0.4, 0.4) * r)
            ellipse(draw, picture.size, centre, (r * 0.25, r * 0.25), random.choice([20, 240]))
            ellipse(draw, picture.size, centre, (r * 0.15, r * 0.15), random.integers(20, 240))
    return grained(picture, random)


def head_ct(random):
    """A head as CT shows it: a thick white ring around an even grey."""
    picture, draw = canvas(random, 0, 250, 500)
    rx, ry = random.uniform(0.28, 0.38), random.uniform(0.36, 0.45)
    ellipse(draw, picture.size, (0.5, 0.5), (rx, ry), random.integers(60, 110))
    ellipse(draw, picture.size, (0.5, 0.5), (rx * 0.95, ry * 0.95), 255)
    ellipse(draw, picture.size, (0.5, 0.5), (rx * 0.84, ry * 0.86), random.integers(70, 130))
    for side in (-1, 1):
        ellipse(draw, picture.size, (0.5 + side * 0.05, 0.47), (0.025, 0.09), random.integers(30, 70))
    return grained(picture, random)


def fundus(random):
    """The back of an eye, turned to grey: a round on black, a bright disc, from which dark vessels branch."""
    picture, draw = canvas(random, 0, 250, 500)
    radius = random.uniform(0.42, 0.56) * picture.width  # of a wide one the edge of the picture cuts some off
    middle, side = np.array(picture.size) / 2, random.choice([-1, 1])
    disc = middle + (side * random.uniform(0, 0.65) * radius, random.uniform(-0.1, 0.1) * radius)
    shade, spot = random.integers(50, 170), disc - (side * 0.8 * radius, 0)
    circle(draw, middle, radius, shade)
    circle(draw, spot, 0.16 * radius, shade * random.uniform(0.5, 0.8))
    picture = picture.filter(ImageFilter.GaussianBlur(0.06 * radius))
    draw = ImageDraw.Draw(picture)
    circle(draw, disc, radius * random.uniform(0.1, 0.16), min(255, shade * random.uniform(1.3, 3)))
    for angle in np.pi * np.array([0.3, 0.5, 0.7, 1.3, 1.5, 1.7]):
        vessel(draw, random, disc, angle + random.normal(0, 0.2), 0.025 * radius, radius / 12, shade)
    y, x = np.indices(picture.size[::-1])
    from_disc, from_middle = (np.hypot(x - place[0], y - place[1]) / radius for place in (disc, middle))
    light = (1 - random.uniform(0, 0.7) * from_disc).clip(0) * (from_middle < 0.97)
    return grained(Image.fromarray((np.asarray(picture) * light).astype(np.uint8)), random)


def circle(draw, centre, radius, shade):
    """A filled circle, its centre and radius in pixels."""
    draw.ellipse((*(centre - radius), *(centre + radius)), fill=int(shade))


def vessel(draw, random, start, angle, width, step, shade):
    """A dark vessel that winds from a point and branches until it is thin."""
    while width > 0.6:
        end = start + step * np.array((np.cos(angle), np.sin(angle)))
        draw.line((*start, *end), fill=int(shade * 0.6), width=max(1, round(2 * width)))
        if random.random() < 0.25:
            vessel(draw, random, end, angle + random.choice([-1, 1]) * random.uniform(0.4, 1), 0.7 * width, step, shade)
        start, angle, width = end, angle + random.normal(0, 0.15), 0.92 * width


KINDS = {
    "documents": document, "screenshots": screenshot, "charts": chart, "noise": noise, "gradients": gradient,
    "logos": logo, "textures": texture, "drawn chests": chest, "drawn trunks": trunk, "drawn limbs": limb,
    "drawn heads as in CT": head_ct, "drawn eyes": fundus,
}  # fmt: skip

# The real kind that a drawn one stands for: who leaves one out of fitting leaves out both.
ALIKE = {
    "drawn chests": "radiographs", "drawn trunks": "body_ct", "drawn heads as in CT": "head_ct", "drawn eyes": "fundus",
}  # fmt: skip

"""Draws docs/banner.png, 21:9: the sun of the icon, the name, and six clips of the bundled model. Run it in this folder.

    python draw_banner.py
"""

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1470, 630
HORIZON = 372
# Sky and sea, from top to bottom; those of the icon.
SKY = [(38, 33, 84), (92, 62, 110), (243, 146, 90)]
SEA = [(186, 96, 92), (66, 46, 104), (24, 28, 74)]
SUN = (255, 226, 150)
CLIP = 192, 128
GAP = 16
FINE = 2  # drawn larger, so that edges are smooth


def gradient(colours: list[tuple[int, int, int]], width: int, height: int) -> Image.Image:
    """An image `width` x `height` whose rows go through `colours`."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for y in range(height):
        index, part = divmod(y / (height - 1) * (len(colours) - 1), 1)
        above, below = colours[int(index)], colours[min(int(index) + 1, len(colours) - 1)]
        draw.line((0, y, width, y), tuple(round(a + (b - a) * part) for a, b in zip(above, below, strict=True)))
    return image


def landscape() -> Image.Image:
    """The sun over the sea."""
    width, height, horizon = WIDTH * FINE, HEIGHT * FINE, HORIZON * FINE
    image = Image.new("RGB", (width, height))
    image.paste(gradient(SKY, width, horizon))
    draw = ImageDraw.Draw(image)
    x, y, radius = width - 280 * FINE, horizon - 60 * FINE, 150 * FINE
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=SUN)
    image.paste(gradient(SEA, width, height - horizon), (0, horizon))
    for i, half in enumerate((140, 104, 70)):
        top = horizon + (14 + 22 * i) * FINE
        draw.rounded_rectangle((x - half * FINE, top, x + half * FINE, top + 8 * FINE), 4 * FINE, fill=SUN)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def clips() -> list[Image.Image]:
    """One frame of each clip of demo.gif, which shows three in two rows."""
    with Image.open("demo.gif") as demo:
        demo.seek(18)
        frame = demo.convert("RGB")
    width, height = CLIP
    return [frame.crop((x, y, x + width, y + height)) for y in (0, height) for x in (0, width, 2 * width)]


def main() -> None:
    image = landscape()
    draw = ImageDraw.Draw(image)
    left = (WIDTH - 6 * CLIP[0] - 5 * GAP) // 2
    draw.text((left, 76), "Allegro Video", SUN, ImageFont.load_default(124))
    draw.text((left + 6, 226), "Text and images to video: native ComfyUI nodes,", "white", ImageFont.load_default(36))
    draw.text((left + 6, 274), "a command line and plain PyTorch", "white", ImageFont.load_default(36))
    shape = Image.new("L", (CLIP[0] * FINE, CLIP[1] * FINE))
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, shape.width - 1, shape.height - 1), 12 * FINE, fill=255)
    for i, clip in enumerate(clips()):
        image.paste(clip, (left + i * (CLIP[0] + GAP), HEIGHT - CLIP[1] - 40), shape.resize(CLIP))
    image.save("banner.png", optimize=True)


if __name__ == "__main__":
    main()

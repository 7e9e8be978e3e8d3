"""Pictures: grids of images, palettes, training curves."""

import numpy as np
from PIL import Image

from .clusters import nearest_color, to_grey_levels


_PICTURE_SIDE = 96  # pixels, at least, that each small image is enlarged to
_GAP = 4  # pixels between images


def image_grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of equally sized PIL images -> one picture on white, small images enlarged without smoothing."""
    width, height = rows[0][0].size
    scale = max(1, -(-_PICTURE_SIDE // max(width, height)))
    width, height = width * scale, height * scale
    columns = max(len(row) for row in rows)
    size = (columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP)
    picture = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST).convert("RGB")
            picture.paste(enlarged, (_GAP + j * (width + _GAP), _GAP + i * (height + _GAP)))
    return picture


def square_grid(images: list[Image.Image]) -> Image.Image:
    """As many columns as rows, or nearly."""
    columns = int(np.ceil(np.sqrt(len(images))))
    return image_grid([images[start : start + columns] for start in range(0, len(images), columns)])


def completions_picture(rows: list[list[Image.Image]]) -> Image.Image:
    """`image_grid` of rows [original, given part, completion, …] with the columns named above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n_columns = len(rows[0])
    figure, axes = plt.subplots(len(rows), n_columns, figsize=(n_columns, len(rows) + 0.3), squeeze=False)
    titles = ["original", "given", "completions"]
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    for row, line in zip(rows, axes, strict=True):
        for image, axis in zip(row, line, strict=True):
            axis.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
            axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return picture


def palette_picture(clusters: np.ndarray) -> Image.Image:
    """Above, the palette's K colours ordered by hue and lightness; below, a rainbow as the palette renders it."""
    import matplotlib.colors

    levels = to_grey_levels(clusters)
    hue, saturation, value = matplotlib.colors.rgb_to_hsv(levels / 255).T
    # Greys have no hue to speak of: they come first, by lightness.
    order = np.lexsort((value, np.where(saturation < 0.15, -1, np.floor(hue * 12))))
    columns = max(1, int(np.ceil(np.sqrt(2 * len(levels)))))
    swatches = np.full((-(-len(levels) // columns) * columns, 3), 255, np.uint8)
    swatches[: len(levels)] = levels[order]
    side = max(8, 512 // columns)
    swatches = swatches.reshape(-1, columns, 3).repeat(side, axis=0).repeat(side, axis=1)
    width = swatches.shape[1]
    lightness = np.linspace(0, 1, 64)[:, None]
    rainbow = np.stack(
        np.broadcast_arrays(
            np.linspace(0, 1, width)[None], np.minimum(1, 2 - 2 * lightness), np.minimum(1, 2 * lightness)
        ),
        axis=-1,
    )
    rainbow = np.rint(matplotlib.colors.hsv_to_rgb(rainbow) * 255).astype(np.uint8)
    rendered = levels[nearest_color(rainbow, clusters)]
    gap = np.full((_GAP, width, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([swatches, gap, rainbow, gap, rendered]))


def training_curve(log_history: list[dict], baselines: dict[str, float] | None = None):
    """Nats per pixel against images seen, of `Trainer`'s log history, with lines for the baselines; a PIL image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), dpi=120)
    for key, label in (("loss", "training"), ("eval_nats_per_pixel", "held out")):
        points = [(entry["images"], entry[key]) for entry in log_history if key in entry and "images" in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if key != "loss" else None)
    labels: dict[float, str] = {}
    for name, value in sorted((baselines or {}).items(), key=lambda item: item[1]):
        axis.axhline(value, color="grey", linewidth=0.7, linestyle="--")
        near = [other for other in labels if abs(other - value) < 0.03 * value]  # their labels would overlap
        at = near[0] if near else value
        labels[at] = (labels[at] + ", " if near else "") + name.replace("_", " ")
    for value, label in labels.items():
        axis.annotate(label, (1.01, value), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    axis.set_xlabel("images seen")
    axis.set_ylabel("nats per pixel")
    axis.legend()
    figure.tight_layout()
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return picture

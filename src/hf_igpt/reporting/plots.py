"""Pictures: grids of images, palettes, training curves, maps of surprise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..clusters import nearest_color, to_grey_levels
from ..data import read_image
from ..evaluation.records import Record, describe_model, own_file
from ..image_processing_imagegpt import AnyImageProcessor
from ..inputs_imagegpt import IGNORE_INDEX
from ..pixels_imagegpt import crop_to_proportions


CAPTIONS = {  # of the pictures in a run's folder
    "samples.png": "Images drawn by the model",
    "completions.png": "Images, the upper rows that were given, completions",
    "inpainted.png": "Images, the pixels that were given, and what was drawn in their holes",
    "masked.png": "Images, what the masked model saw of them, and what it made of that",
    "training.png": "The course of training",
    "confusion.png": "Classes of the test images, and what the model says",
    "probe/probe.png": "Validation accuracy of probes by layer",
    "score/surprise.png": "Surprise of each pixel, in nats",
    "score/histogram.png": "Nats per pixel of images",
    "palette.png": "The palette, and a rainbow drawn with it",
}
_PICTURE_SIDE = 96  # pixels, at least, that each small image is enlarged to
_GAP = 4  # pixels between images
_FRAMES = 41  # of an animation, at most
_HIDDEN = (230, 0, 160)  # colour of hidden pixels, which no photo is full of


def find_pictures(folder: str | Path, objective: str) -> dict[str, Path]:
    """The pictures in a run's folder, by their names in `CAPTIONS`.

    If none was drawn after training, the last of `samples/` stands for them; its name depends on the objective.
    """
    folder = Path(folder)
    found = {name: folder / name for name in CAPTIONS if (folder / name).is_file()}
    drawn = sorted(folder.glob("samples/step-*.png"))
    name = "masked.png" if objective == "masked" else "samples.png"
    if drawn and name not in found:
        found[name] = drawn[-1]
    return {name: found[name] for name in CAPTIONS if name in found}


def check_picture(folder: str | Path, file: Path) -> Path:
    """`file`, to be shown to others, if it is a picture of a run's folder; ValueError if it is none, or elsewhere by a link."""
    own_file(folder, file.relative_to(folder).as_posix())
    try:
        read_image({"bytes": None, "path": str(file)})
    except ValueError as error:
        raise ValueError(f"{file} is no picture: remove it ({error}).") from error
    return file


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


def drawing_frames(
    processor: AnyImageProcessor, tokens: np.ndarray, order: np.ndarray, columns: int | None = None
) -> list[Image.Image]:
    """Pictures of images appearing, each frame with a few more pixels; those not drawn yet are grey.

    columns: images in a row, by default as in `square_grid`. tokens, order: (n, N). order: 0 of pixels that are there from the beginning, of others 1, 2, … as they are drawn.
    """
    columns, frames = columns or int(np.ceil(np.sqrt(len(tokens)))), []
    for last in np.unique(np.linspace(0, order.max(), _FRAMES).round()):
        images = processor.decode(np.where(order <= last, tokens, IGNORE_INDEX), missing="grey")
        frames.append(image_grid([images[start : start + columns] for start in range(0, len(images), columns)]))
    return frames


def pictures_seen(processor: AnyImageProcessor, images: Sequence[Image.Image]) -> Image.Image:
    """What a model sees of images: each as it is, as it is cropped and resized, in the palette's colours, and as tokens.

    The window that is cropped before resizing is outlined. Tokens have their numbers on them where there is room.
    """
    from matplotlib.patches import Rectangle

    tokens = processor(list(images), return_tensors="np")["input_ids"]
    plain = {"do_color_quantize": False, "do_rescale": False, "do_normalize": False}
    grid, n_colors = processor.token_grid(), len(processor.palette)
    height, width = grid
    crops = processor.do_center_crop and processor.crop_size in (None, processor.size)
    titles = [
        "image",
        f"{'cropped and ' if processor.do_center_crop else ''}resized to {height}x{width}",
        f"nearest of {n_colors} colours",
        f"{height * width:,} tokens, 0 to {n_colors - 1}",
    ]
    wide, high = (max(1.8, 2.2 * side / max(grid)) for side in (width, height))  # inches
    size = (3 * wide + 3, len(images) * (high + 0.2) + 0.4)
    with _figure(len(images), 4, figsize=size, squeeze=False, layout="constrained") as (figure, axes):
        for image, row, decoded, line in zip(images, tokens, processor.decode(tokens), axes, strict=True):
            small = image.convert("RGB")
            small.thumbnail((512, 512))
            resized = np.asarray(processor(image, **plain)["pixel_values"][0]).transpose(1, 2, 0).astype(np.uint8)
            for axis, shown in zip(line, (small, resized, decoded), strict=False):
                axis.imshow(np.asarray(shown), interpolation="nearest")
            if crops:
                places = np.indices((small.height, small.width))  # (2, H, W): row and column of each pixel
                (top, bottom), (left, right) = (
                    (p.min(), p.max()) for p in np.asarray(crop_to_proportions(places, grid))
                )
                window = (left - 0.5, top - 0.5), right - left + 1, bottom - top + 1
                line[0].add_patch(Rectangle(*window, fill=False, edgecolor="cyan", linewidth=1.5))
            line[0].set_xlabel(f"{image.height}x{image.width} pixels", fontsize=7)
            line[3].imshow(row.reshape(grid), cmap="viridis", vmin=0, vmax=n_colors - 1, interpolation="nearest")
            line[3].set_xlabel(f"{', '.join(map(str, row[:4]))}, …", fontsize=7)
            for place, token in enumerate(row if max(grid) <= 12 else []):
                color = "black" if token > 0.6 * n_colors else "white"
                x, y = place % width, place // width
                line[3].text(x, y, str(token), color=color, fontsize=6, ha="center", va="center")
        for title, axis in zip(titles, axes[0], strict=True):
            axis.set_title(title, fontsize=8)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
        return _picture(figure)


def class_picture(names: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images of classes, a row for each, with its name in front."""
    width, height = rows[0][0].size
    size = (len(rows[0]) + 1.2, len(rows) * height / width)
    with _figure(len(rows), len(rows[0]), figsize=size, squeeze=False) as (figure, axes):
        for name, row, line in zip(names, rows, axes, strict=True):
            line[0].set_ylabel(name, rotation="horizontal", ha="right", va="center", fontsize=9)
            for image, axis in zip(row, line, strict=True):
                axis.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
        return _picture(figure, pad=0.3)


def completions_picture(rows: list[list[Image.Image]], titles: Sequence[str] = ("completions",)) -> Image.Image:
    """`image_grid` of rows [original, given part, completion, …] with the columns named above.

    titles: of groups of as many completions each; they stand above the first of a group.
    """
    n_columns, (width, height) = len(rows[0]), rows[0][0].size
    wide, high = (max(0.75, side / max(height, width)) for side in (width, height))  # inches, with room for titles
    step = (n_columns - 2) // len(titles)
    places = [
        column + max(0, (column - 2) // step) * (len(titles) > 1) for column in range(n_columns)
    ]  # gaps between groups
    widths = [wide if column in places else wide / 4 for column in range(places[-1] + 1)]
    grid = {"width_ratios": widths}
    with _figure(
        len(rows), len(widths), figsize=(sum(widths), len(rows) * high + 0.3), squeeze=False, gridspec_kw=grid
    ) as (
        figure,
        axes,
    ):
        for axis in axes.flat:
            axis.axis("off")
        above = {0: "original", 1: "given"} | {2 + step * number: title for number, title in enumerate(titles)}
        for column, title in above.items():
            axes[0][places[column]].set_title(title, fontsize=9)
        for row, line in zip(rows, axes, strict=True):
            for image, place in zip(row, places, strict=True):
                line[place].imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
        return _picture(figure, pad=0.3)


def picture_of_completions(
    processor: AnyImageProcessor,
    images: Sequence[Image.Image],
    completions: Sequence[Sequence[Image.Image]],
    rows: int | None = None,
    hidden: np.ndarray | None = None,
) -> list[list[Image.Image]]:
    """Rows of pictures for a grid: each image as the model sees it, its kept part, and its completions.

    What was kept: the upper `rows` (by default half of them), or the pixels that are not `hidden` (n, N).
    """
    tokens = processor(list(images), return_tensors="np")["input_ids"]
    height, width = processor.token_grid()
    if hidden is None:
        hidden = np.arange(height * width) >= width * (height // 2 if rows is None else rows)
    given = processor.decode(np.where(hidden, IGNORE_INDEX, tokens), missing="grey")
    return [[o, g, *c] for o, g, c in zip(processor.decode(tokens), given, completions, strict=True)]


def picture_of_masks(processor: AnyImageProcessor, tokens: Any, mask: Any, filled: Any) -> list[list[Image.Image]]:
    """Rows of pictures for a grid, two images in each: the image, what a masked model was shown, and what it made of it."""
    shown = []
    for image, hidden in zip(processor.decode(tokens), mask, strict=True):
        pixels = np.array(image)
        pixels[np.asarray(hidden).reshape(pixels.shape[:2])] = _HIDDEN
        shown.append(Image.fromarray(pixels))
    triples = list(zip(processor.decode(tokens), shown, processor.decode(filled), strict=True))
    return [[image for triple in triples[start : start + 2] for image in triple] for start in range(0, len(triples), 2)]


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


def training_curve(log_history: list[dict[str, Any]], baselines: dict[str, float] | None = None) -> Image.Image:
    """Nats per pixel against images seen, of `Trainer`'s log history, with lines for the baselines."""
    with _figure(figsize=(7, 4)) as (figure, axis):
        for key, label in (("loss", "training"), ("eval_nats_per_pixel", "held out")):
            points = [(entry["images"], entry[key]) for entry in log_history if key in entry and "images" in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if key != "loss" else None)
        labels: dict[float, str] = {}
        for name, value in sorted((baselines or {}).items(), key=lambda item: item[1]):
            axis.axhline(value, color="grey", linewidth=0.7, linestyle="--")
            near = [other for other in labels if abs(other - value) < 0.03 * value]  # their labels would overlap
            at = near[0] if near else value
            labels[at] = (labels[at] + ", " if near else "") + name
        for value, label in labels.items():
            axis.annotate(label, (1.01, value), xycoords=("axes fraction", "data"), fontsize=7, va="center")
        axis.set_xlabel("images seen")
        axis.set_ylabel("nats per pixel")
        axis.legend()
        return _picture(figure)


def accuracy_curve(log_history: list[dict[str, Any]]) -> Image.Image:
    """Validation accuracy, and below it both parts of the training loss, against images seen, of `Trainer`'s log history."""
    parts = {
        "loss": "loss",
        "classification_loss": "classification, nats per image",
        "generative_loss": "generative, nats per pixel",
    }
    with _figure(2, 1, figsize=(7, 6), sharex=True) as (figure, (above, below)):
        points = [(entry["images"], 100 * entry["eval_accuracy"]) for entry in log_history if "eval_accuracy" in entry]
        if points:
            above.plot(*zip(*points, strict=True), marker=".")
        above.set_ylabel("validation accuracy, %")
        for key, label in parts.items():
            points = [(entry["images"], entry[key]) for entry in log_history if key in entry and "images" in entry]
            if points:
                below.plot(*zip(*points, strict=True), label=label)
        below.set_xlabel("images seen")
        below.set_ylabel("training loss")
        below.legend()
        return _picture(figure)


def layer_curves(runs: dict[str, list[Record]]) -> Image.Image:
    """Validation accuracy of probes by layer, a line for each run, network and probe; levels for raw pixels.

    runs: records by the name of their run, which the legend shows if there are several.
    """
    curves: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    levels: dict[tuple[str, float], list[str]] = {}
    for run, records in runs.items():
        for record in records:
            if record.split != "validation":
                continue
            name = describe_model(replace(record, layers=None))
            if record.layers is not None:
                name += f", {record.images_seen:,} images seen" if record.images_seen is not None else ""
                style = "-" if record.baseline is None else "--"
                curves.setdefault((run, name, style), []).append((record.layers[0], 100 * record.value))
            else:
                levels.setdefault((name, 100 * record.value), []).append(run)  # of the same images: the same
    with _figure(figsize=(7, 4.5)) as (figure, axis):
        for (run, name, style), points in curves.items():
            label = f"{run}: {name}" if len(runs) > 1 else name
            axis.plot(*zip(*sorted(points), strict=True), marker=".", label=label, linestyle=style)
        for (name, value), of in levels.items():
            label = f"{', '.join(of)}: {name}" if len(levels) > 1 else name
            axis.axhline(value, color="grey", linestyle=":", label=label)
        axis.set_xlabel("layer: the input of block 0, 1, …, and last the final norm's output")
        axis.set_ylabel("validation accuracy, %")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # below: lines run everywhere
        return _picture(figure)


def loss_against_probe(runs: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Probe accuracy (0..1) against held-out nats per pixel of each run's checkpoints, in their order [V2 Figure 3]."""
    with _figure(figsize=(7, 4.5)) as (figure, axis):
        _percent_lines(axis, runs, marker="o")
        axis.invert_xaxis()  # training goes to the right, as in the paper
        axis.set_xlabel("held-out loss, nats per pixel")
        axis.set_ylabel("linear probe, test accuracy, %")
        axis.legend(fontsize=7)
        return _picture(figure)


def accuracy_bars(groups: dict[str, dict[str, float]]) -> Image.Image:
    """Accuracies (0..1) as bars: group -> name -> value, names in the same colour in every group [V2 Figure 4]."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / len(names)
    with _figure(figsize=(7, 4)) as (figure, axis):
        for i, name in enumerate(names):
            at = [(g + i * width, 100 * bars[name]) for g, bars in enumerate(groups.values()) if name in bars]
            drawn = axis.bar(*zip(*at, strict=True), width * 0.95, label=name)
            axis.bar_label(drawn, fmt="%.1f", fontsize=8)
        axis.set_xticks([g + width * (len(names) - 1) / 2 for g in range(len(groups))], list(groups))
        axis.set_ylabel("test accuracy, %")
        axis.margins(y=0.15)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(names))
        return _picture(figure)


def accuracy_courses(runs: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Validation accuracy (0..1) over epochs of several fine-tuning runs."""
    with _figure(figsize=(7, 4)) as (figure, axis):
        _percent_lines(axis, runs, marker=".")
        axis.set_xlabel("epochs")
        axis.set_ylabel("validation accuracy, %")
        axis.legend(fontsize=8)
        return _picture(figure)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, names: list[str]) -> Image.Image:
    """Counts of (class, predicted class), both (n,) integers into `names`, as a picture; shares without numbers over 20 classes."""
    from sklearn.metrics import ConfusionMatrixDisplay

    few = len(names) <= 20
    side = max(4, 0.55 * len(names) + 1.5) if few else 9
    with _figure(figsize=(side, side)) as (figure, axis):
        ConfusionMatrixDisplay.from_predictions(
            labels,
            predictions,
            labels=range(len(names)),
            display_labels=names if few else None,
            normalize=None if few else "true",
            include_values=few,
            xticks_rotation="vertical" if max(map(len, names)) > 2 else "horizontal",
            cmap="Blues",
            colorbar=not few,
            ax=axis,
        )
        if not few:
            axis.set_xticks([])
            axis.set_yticks([])
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        axis.set_title(f"{100 * np.mean(labels == predictions):.1f} % of {len(labels):,} images right")
        return _picture(figure)


def surprise_maps(images: Sequence[Image.Image], maps: np.ndarray, titles: Sequence[str]) -> Image.Image:
    """Images, each next to the map of its pixels' surprise, all on one colour scale.

    maps: (n, H, W), −log p of each pixel in nats; the scale ends where 1 pixel in 200 has more. titles: one above each pair,
    of one or more lines.
    """
    highest = float(np.quantile(maps, 0.995))
    pairs = min(len(images), 4)  # in a row
    n_rows = -(-len(images) // pairs)
    height, width = maps.shape[1:]
    wide, high = (1.35 * side / max(height, width) for side in (width, height))  # inches
    size = (pairs * (2 * wide + 0.3) + 0.7, n_rows * (high + 0.5) + 0.1)
    grid = {"width_ratios": [wide, wide, 0.15] * pairs}  # the third is the gap to the next pair
    with _figure(n_rows, 3 * pairs, figsize=size, squeeze=False, layout="constrained", gridspec_kw=grid) as (
        figure,
        axes,
    ):
        figure.get_layout_engine().set(wspace=0.01, w_pad=0.02, h_pad=0.07)
        for axis in axes.flat:
            axis.axis("off")
        for index, (image, surprise, title) in enumerate(zip(images, maps, titles, strict=True)):
            left, right = axes[index // pairs, 3 * (index % pairs) :][:2]
            left.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
            heat = right.imshow(surprise, cmap="inferno", vmin=0, vmax=highest, interpolation="nearest")
            left.set_title(title, fontsize=7, loc="left")
        extend = "max" if maps.max() > highest else "neither"
        figure.colorbar(heat, ax=axes, label="nats", extend=extend, aspect=12 * n_rows, pad=0.005)
        return _picture(figure)


def attention_maps(image: Image.Image, shares: np.ndarray, pixel: tuple[int, int], name: str) -> Image.Image:
    """An image with a pixel outlined, and what is looked at when that is predicted: maps by block, downwards, and by head.

    shares: (L, heads, 1 + N), of SOS and of each pixel, as `attention_of_tokens` returns them; the first column is the mean
    of the heads. pixel: its (row, column). Each map has its own scale, whose end is written above it beside the share of SOS;
    what a causal model cannot see is grey.
    """
    import matplotlib
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    (n_layer, n_head, _), (width, height), (row, column) = shares.shape, image.size, pixel
    has_sos = bool(shares[..., 0].any())
    n_seen = row * width + column if has_sos else height * width
    shares = np.concatenate([shares.mean(axis=1, keepdims=True), shares], axis=1)  # (L, 1 + heads, 1 + N)
    room = max(height, width)
    step, across = height + max(1, round(room / 5)), width + max(1, round(room / 8))
    mosaic = np.full((n_layer * step, (1 + n_head) * across, 3), 255, np.uint8)
    inch = (1.1 if n_head <= 8 else 0.8) / room  # of one pixel of a map
    wide, high = mosaic.shape[1] * inch, mosaic.shape[0] * inch
    size = (wide + 3, max(high + 0.8, 2.8))
    options = {"width_ratios": [2, wide]}
    with _figure(1, 2, figsize=size, layout="constrained", gridspec_kw=options) as (figure, (left, right)):
        left.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
        left.set_title(name, fontsize=8, loc="left")
        outlines = []
        for (block, at), sos in np.ndenumerate(shares[..., 0]):
            found, (top, start) = shares[block, at, 1:], (block * step + step - height, at * across)
            highest = found.max()
            colors = matplotlib.colormaps["inferno"](found / (highest or 1), bytes=True)[:, :3]
            colors[n_seen:] = 204
            mosaic[top : top + height, start : start + width] = colors.reshape(height, width, 3)
            words = f"{f'SOS {sos:.1%}, ' if has_sos else ''}max {highest:.1%}"
            right.text(start - 0.5, top - 0.6, words, fontsize=5, va="bottom")
            outlines.append(Rectangle((start + column - 0.5, top + row - 0.5), 1, 1))
        right.imshow(mosaic, interpolation="nearest")
        for axis, patches in ((left, [Rectangle((column - 0.5, row - 0.5), 1, 1)]), (right, outlines)):
            axis.add_collection(PatchCollection(patches, facecolor="none", edgecolor="cyan", linewidth=0.8))
            axis.tick_params(length=0, labelsize=7)
            axis.set_frame_on(False)
        left.set_xticks([])
        left.set_yticks([])
        names = ["mean", *(f"head {head}" for head in range(n_head))]
        right.set_xticks([at * across + (width - 1) / 2 for at in range(1 + n_head)], names)
        right.set_yticks(
            [block * step + step - (height + 1) / 2 for block in range(n_layer)],
            [f"block {block}" for block in range(n_layer)],
        )
        lines = [f"What is looked at when row {row}, column {column} (outlined) is predicted"]
        lines += ["Bright: much attention, on a scale from 0 to the max above each map"]
        lines += ["Grey: not seen, since it comes later"] if has_sos else []
        figure.suptitle("\n".join(lines), fontsize=8)
        return _picture(figure)


def histogram(
    sets: dict[str, np.ndarray], label: str, levels: dict[str, float] | None = None, title: str | None = None
) -> Image.Image:
    """How the values of each set, (n,) each, spread over the same bins, in percent of the set; its mean is a dashed line.

    sets: by their names, which the legend shows with n and mean. label: what the values are, of the horizontal axis.
    levels: values to draw a dotted line at.
    """
    values = np.concatenate(list(sets.values()))
    # The bins suit the narrowest set (Freedman and Diaconis' width), within reason.
    widths = [
        2 * (np.quantile(found, 0.75) - np.quantile(found, 0.25)) / len(found) ** (1 / 3) for found in sets.values()
    ]
    n_bins = np.ptp(values) / max(min(widths), 1e-9)
    edges = np.histogram_bin_edges(values, int(np.clip(n_bins, 10, 60)))
    with _figure(figsize=(7, 4.2), layout="constrained") as (figure, axis):
        for color, (name, found) in enumerate(sets.items()):
            axis.hist(
                found,
                edges,
                weights=np.full(len(found), 100 / len(found)),
                color=f"C{color}",
                alpha=0.6,
                label=f"{name}\n{len(found):,} image{'s' if len(found) > 1 else ''}, mean {found.mean():.3f}",
            )
            axis.axvline(found.mean(), color=f"C{color}", linestyle="--", linewidth=1)
        for name, level in (levels or {}).items():
            axis.axvline(level, color="grey", linestyle=":", linewidth=1, label=f"{name}: {level:.3f}")
        axis.set_xlabel(label)
        axis.set_ylabel("images of the set, %")
        figure.legend(loc="outside upper center", ncols=len(sets) + 1, fontsize=8, title=title, title_fontsize=9)
        return _picture(figure)


def _percent_lines(axis: Any, runs: dict[str, list[tuple[float, float]]], marker: str) -> None:
    """A line for each run through its points (x, accuracy in 0..1), in per cent."""
    for name, points in runs.items():
        at, accuracies = zip(*points, strict=True)
        axis.plot(at, [100 * accuracy for accuracy in accuracies], marker=marker, label=name)


@contextmanager
def _figure(*shape: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """matplotlib's (figure, axes), without a display, closed at the end. Texts are shown as they are: $ begins no formula."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"text.parse_math": False}):
        figure, axes = plt.subplots(*shape, dpi=120, **options)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def _picture(figure: Any, pad: float = 1.08) -> Image.Image:
    if figure.get_layout_engine() is None:
        figure.tight_layout(pad=pad)
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")

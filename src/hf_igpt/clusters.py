"""The colour palette: fit it, find the colour nearest to a pixel, turn tokens back into colours, read it from a file.

A palette is a float64 array (K, 3) of RGB colours in [-1, 1], the scale of OpenAI's `kmeans_centers.npy`: a grey level
v in 0..255 becomes v / 127.5 - 1. Tokens are row indices into the palette, 0..K-1. This is the only module that
computes a distance between colours.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .presets import MAX_COLORS


_CHUNK = 8192  # pixels per block of distances to all colours: 8192 x 512 x 8 bytes = 32 MiB
_LOOKUP = 32768  # pixels per block of look-ups, small enough for their codes to stay in the CPU's cache
# Cells of the colour cube, from coarse to fine: the side in grey levels, and the largest number of candidates that are
# compared at every colour of a cell. Any values give the same table; these build it fast.
_CELLS = ((32, 1), (8, 6), (4, MAX_COLORS))
_WORK = 32768  # distances per block while the table is built
# A generous bound on the rounding error of a squared distance between colours in [-1, 1]: a few times 12 x 2^-52.
_ROUNDING = 1e-12
_LARGEST_JSON = 100 * MAX_COLORS * 3  # bytes; a number and the space around it take fewer than 100
_PORTION = 20  # Lloyd iterations per update of the progress bar
_MAX_ITERATIONS = 1000


def check_palette(clusters: ArrayLike) -> np.ndarray:
    """Return `clusters` as a float64 array (K, 3), or raise ValueError.

    Accepts anything array-like (lists, numpy, torch) of numbers. Colours must be finite and lie in [-1, 1]; colours in 0..255
    are rejected rather than rescaled on a guess. Colours may repeat; the lowest index of equal rows is used.
    """
    try:
        palette = np.asarray(clusters)
    except (RuntimeError, TypeError, ValueError) as error:  # rows of different lengths, tensors that are elsewhere
        raise ValueError(f"A palette is an array of numbers, of shape (K, 3): {error}") from error
    if palette.dtype.kind not in "fiu":
        raise ValueError(f"A palette is an array of numbers, of shape (K, 3); found {palette.dtype}, {palette!r:.80}.")
    if palette.ndim != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= MAX_COLORS:
        raise ValueError(
            f"A palette has shape (K, 3) with 1 <= K <= {MAX_COLORS}, one RGB colour per row; found shape {palette.shape}."
        )
    palette = palette.astype(np.float64, copy=False)
    if not np.isfinite(palette).all() or palette.min() < -1 or palette.max() > 1:
        raise ValueError(
            f"Palette colours lie in [-1, 1]; found values from {palette.min():.4g} to {palette.max():.4g}. "
            "Colours in 0..255 become x / 127.5 - 1."
        )
    return palette


def to_unit_range(grey_levels: ArrayLike) -> np.ndarray:
    """Map grey levels 0..255, of any shape, to float64 in [-1, 1], the palette's scale."""
    return np.asarray(grey_levels, dtype=np.float64) / 127.5 - 1


def to_grey_levels(colors: ArrayLike) -> np.ndarray:
    """Map colours in [-1, 1], of any shape, to uint8 0..255, rounded to the nearest level [code run.py sample]."""
    return np.rint((np.asarray(colors, dtype=np.float64) + 1) * 127.5).astype(np.uint8)


def nearest_color(pixels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the index of the palette colour nearest to each pixel, in squared Euclidean distance.

    pixels: (..., 3), uint8 grey levels, or floats on the palette's scale; other shapes are a ValueError.
    clusters: (K, 3) from `check_palette`. Returns int64 (...), in 0..K-1.
    Distances are summed in float64 as (dR² + dG²) + dB², and ties go to the lowest index. Follows OpenAI's
    `color_quantize` (src/utils.py) without its rounding. Uint8 pixels are looked up in `lookup_table`, which is built on
    first use.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim < 1 or pixels.shape[-1] != 3:
        raise ValueError(f"Pixels have 3 channels in the last dimension; found shape {pixels.shape}.")
    if pixels.dtype != np.uint8:
        return _nearest_by_distance(pixels.reshape(-1, 3).astype(np.float64), clusters).reshape(pixels.shape[:-1])
    codes = np.zeros((*pixels.shape[:-1], 4), np.uint8)
    for channel in range(3):
        codes[..., 2 - channel] = pixels[..., channel]
    return nearest_color_of_codes(codes.view("<u4").reshape(-1), clusters).reshape(pixels.shape[:-1])


def nearest_color_of_codes(codes: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the index of the nearest palette colour for 8-bit colours that are packed into one number each.

    codes: (n,) uint32, R << 16 | G << 8 | B. Returns int64 (n,).
    """
    table = lookup_table(clusters)
    tokens = np.empty(len(codes), np.int64)
    for start in range(0, len(codes), _LOOKUP):
        tokens[start : start + _LOOKUP] = table.take(codes[start : start + _LOOKUP])
    return tokens


def lookup_table(clusters: np.ndarray) -> np.ndarray:
    """Return the nearest palette colour for each of the 2^24 colours: uint16 (2^24,), 32 MiB, read-only.

    The index is R << 16 | G << 8 | B. clusters: a palette (K, 3), float64; one that `check_palette` rejects is a
    ValueError. Every entry is the argmin of the float64 distances to all K colours, exactly, with ties going to the
    lowest index. The table is built once per palette, in a few tenths of a second for 512 colours.
    """
    clusters = np.asarray(clusters, dtype=np.float64)
    return _lookup_table(clusters.tobytes(), clusters.shape)


@lru_cache(maxsize=4)
def _lookup_table(palette: bytes, shape: tuple[int, ...]) -> np.ndarray:
    clusters = check_palette(np.frombuffer(palette).reshape(shape))
    # Only the first of equal colours can win. Below, candidates are rows of `colors`, which keeps the palette's order.
    rows = np.sort(np.unique(clusters, axis=0, return_index=True)[1])
    colors = clusters[rows]
    table = np.empty((256, 256, 256), np.uint16)
    # Each cell has candidates: the colours that may be nearest somewhere in it. The first cell is the whole cube, and
    # every colour is its candidate.
    corners, counts, candidates = np.zeros((1, 3), np.int64), np.array([len(rows)]), np.arange(len(rows))
    side = 256
    for smaller, few in _CELLS:
        corners, counts, candidates = _divide(corners, counts, candidates, side, smaller, colors)
        side = smaller
        settled = counts <= few
        _settle(table, corners[settled], counts[settled], candidates[np.repeat(settled, counts)], side, colors, rows)
        corners, candidates, counts = corners[~settled], candidates[np.repeat(~settled, counts)], counts[~settled]
        if not len(counts):
            break
    table.setflags(write=False)
    return table.reshape(-1)


def _group_cells(
    counts: np.ndarray, candidates: np.ndarray, distances_of: Callable[[int], int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield groups of cells with similar numbers of candidates: indices (C,), and candidates (C, m) padded with the last.

    distances_of(m) is the number of distances that a cell with m candidates holds in memory.
    """
    starts = np.cumsum(counts) - counts
    order = np.argsort(counts, kind="stable")
    begin = 0
    while begin < len(order):
        cells = order[begin : begin + max(1, _WORK // distances_of(counts[order[begin]]))]
        begin += len(cells)
        position = np.minimum(np.arange(counts[cells[-1]]), counts[cells][:, None] - 1)
        yield cells, candidates[starts[cells][:, None] + position]


def _divide(
    corners: np.ndarray, counts: np.ndarray, candidates: np.ndarray, side: int, smaller: int, colors: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide cells of `side` levels into cells of `smaller` levels, which keep the candidates that can win in them.

    In a box, d²(c) - d²(w) is linear for two colours c and w. Its minimum is at a corner, and lies |c - w|₁ times the
    box's width below its value at the centre. So c can beat w, the nearest colour at the centre, only if the difference
    at the centre is at most that.
    """
    n = side // smaller
    steps = np.arange(n) * smaller
    levels = to_unit_range(np.arange(256))
    width = to_unit_range(smaller - 1) - to_unit_range(0)  # from the first to the last level of a cell
    all_corners, all_counts, all_candidates = [], [], []
    for cells, found in _group_cells(counts, candidates, lambda m: m * n**3):
        first = corners[cells][:, :, None] + steps  # (C, 3, n)
        centers = (levels[first] + levels[first + smaller - 1]) / 2
        color = colors[found].transpose(2, 0, 1)[..., None, :]  # (3, C, 1, m)
        r, g, b = np.square(centers.transpose(1, 0, 2)[..., None] - color)  # each (C, n, m)
        distance = (r[:, :, None, None] + g[:, None, :, None] + b[:, None, None]).reshape(len(cells), n**3, -1)
        winner = distance.argmin(axis=-1)  # (C, n³)
        won = np.take_along_axis(distance, winner[..., None], axis=-1)
        winner = colors[np.take_along_axis(found, winner, axis=1)].transpose(2, 0, 1)[..., None]  # (3, C, n³, 1)
        apart = np.abs(color[0] - winner[0]) + np.abs(color[1] - winner[1]) + np.abs(color[2] - winner[2])
        can_win = distance - won <= apart * width + _ROUNDING  # (C, n³, m)
        can_win &= (np.arange(found.shape[1]) < counts[cells][:, None])[:, None]
        cell, _, which = can_win.nonzero()
        all_candidates.append(found[cell, which])
        all_counts.append(can_win.sum(axis=-1).reshape(-1))
        r, g, b = first.transpose(1, 0, 2)
        grid = np.broadcast_arrays(r[:, :, None, None], g[:, None, :, None], b[:, None, None])
        all_corners.append(np.stack(grid, axis=-1).reshape(-1, 3))
    return np.concatenate(all_corners), np.concatenate(all_counts), np.concatenate(all_candidates)


def _settle(
    table: np.ndarray,
    corners: np.ndarray,
    counts: np.ndarray,
    candidates: np.ndarray,
    side: int,
    colors: np.ndarray,
    rows: np.ndarray,
) -> None:
    """Write the nearest candidate for every colour of each cell into `table` (256, 256, 256)."""
    if not len(counts):
        return
    n = 256 // side
    table = table.reshape(n, side, n, side, n, side)
    levels = to_unit_range(np.arange(256))
    names = rows.astype(table.dtype)
    for cells, found in _group_cells(counts, candidates, lambda m: side**3):
        level = levels[corners[cells].T[:, None] + np.arange(side)[:, None]]  # (3, side, C)
        found = found.T  # (m, C), ascending
        tokens = np.empty((side, side, side, len(cells)), table.dtype)
        tokens[:] = names[found[0]]
        if len(found) > 1:
            best, distance, nearer = np.empty(tokens.shape), np.empty(tokens.shape), np.empty(tokens.shape, bool)
            _measure_distances(level, colors[found[0]], out=best)
            for candidate in found[1:]:
                _measure_distances(level, colors[candidate], out=distance)
                np.less(distance, best, out=nearer)
                np.minimum(distance, best, out=best)
                np.copyto(tokens, names[candidate], where=nearer)
        r, g, b = (corners[cells] // side).T
        table[r, :, g, :, b] = tokens.transpose(3, 0, 1, 2)


def _measure_distances(level: np.ndarray, color: np.ndarray, out: np.ndarray) -> None:
    """Write into `out` (side, side, side, C) the squared distances between all colours of C cells and one colour per cell.

    level: (3, side, C), the levels of each cell per channel. color: (C, 3).
    """
    r, g, b = np.square(level - color.T[:, None])  # each (side, C)
    np.add((r[:, None] + g)[:, :, None], b, out=out)


def _nearest_by_distance(pixels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    nearest = np.empty(len(pixels), dtype=np.int64)
    for start in range(0, len(pixels), _CHUNK):
        chunk = pixels[start : start + _CHUNK]
        distance = np.square(chunk[:, None, 0] - clusters[:, 0])  # (chunk, K)
        distance += np.square(chunk[:, None, 1] - clusters[:, 1])
        distance += np.square(chunk[:, None, 2] - clusters[:, 2])
        nearest[start : start + _CHUNK] = distance.argmin(axis=1)  # the first of equal distances
    return nearest


def colors_of(tokens: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the colours of `tokens` (...), integers in 0..K-1, as uint8 grey levels (..., 3).

    A token out of range is a ValueError.
    """
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= len(clusters)):
        raise ValueError(
            f"Tokens of a palette of {len(clusters)} colours lie in 0..{len(clusters) - 1}; "
            f"found {tokens.min()}..{tokens.max()}."
        )
    return to_grey_levels(clusters)[tokens]


def fit_palette(pixels: np.ndarray, n_colors: int, seed: int = 0, progress: bool = False) -> np.ndarray:
    """Fit `n_colors` colours to `pixels` (n, 3) uint8 by k-means in RGB [V2 3.2]; return a palette (n_colors, 3).

    Runs scikit-learn's k-means++ initialisation and full Lloyd iterations until no assignment changes, on the distinct
    colours weighted by their counts. The same pixels and seed give the same palette, and all its colours are distinct.
    Data with fewer than `n_colors` distinct colours are a ValueError. Fitting 512 colours to a million pixels takes about
    a minute; `progress` shows a bar.
    """
    try:
        from sklearn.cluster import KMeans, kmeans_plusplus
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("Fitting a palette needs scikit-learn: pip install scikit-learn") from error

    pixels = np.asarray(pixels)
    if pixels.ndim != 2 or pixels.shape[1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"Pixels are a uint8 array (n, 3); found {pixels.dtype} of shape {pixels.shape}.")
    if not 1 <= n_colors <= MAX_COLORS:
        raise ValueError(f"A palette has 1 to {MAX_COLORS} colours; {n_colors} were requested.")
    distinct, counts = np.unique(pixels, axis=0, return_counts=True)
    if len(distinct) < n_colors:
        raise ValueError(
            f"The data hold {len(distinct)} distinct colours, fewer than the {n_colors} requested: "
            f"request at most {len(distinct)}, or sample more pixels."
        )
    if len(distinct) == n_colors:
        return to_unit_range(distinct)
    colors, weights = distinct.astype(np.float32), counts.astype(np.float32)
    centers, _ = kmeans_plusplus(colors, n_colors, sample_weight=weights, random_state=seed)
    with tqdm(desc="Fitting the palette", unit="iteration", disable=None if progress else True) as bar:
        while True:
            # A few Lloyd iterations at a time, each run starting from the centres of the last, so that the bar can move.
            kmeans = KMeans(n_colors, init=centers, n_init=1, max_iter=_PORTION, tol=0, algorithm="lloyd")
            centers = kmeans.fit(colors, sample_weight=weights).cluster_centers_
            bar.update(kmeans.n_iter_)
            bar.set_postfix(rmse_grey_levels=f"{np.sqrt(kmeans.inertia_ / counts.sum() / 3):.4f}")
            if kmeans.n_iter_ < _PORTION or bar.n >= _MAX_ITERATIONS:
                break
    centers = centers.astype(np.float64)
    palette = np.clip(to_unit_range(centers), -1, 1)
    n_distinct = len(np.unique(palette, axis=0))
    if n_distinct < n_colors:
        raise ValueError(f"k-means found only {n_distinct} distinct colours, not {n_colors}: request fewer colours.")
    return palette


def distortion(pixels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Measure the quantisation error of `pixels` (..., 3) uint8: `rmse_grey_levels` over all channel values, and `psnr_db`."""
    restored = colors_of(nearest_color(pixels, clusters), clusters)
    rmse = float(np.sqrt(np.mean(np.square(restored.astype(np.float64) - pixels))))
    return {"rmse_grey_levels": rmse, "psnr_db": float("inf") if rmse == 0 else float(20 * np.log10(255 / rmse))}


def load_palette(path: str | Path) -> np.ndarray:
    """Read a palette (K, 3) from a `.npy` file (OpenAI's `kmeans_centers.npy`), a processor's JSON file, or its folder.

    A path that holds no valid palette is a ValueError.
    """
    path = Path(path)
    file = path / "preprocessor_config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"No palette at {file}: give a .npy file, a preprocessor_config.json or a folder that holds one."
        )
    if file.suffix not in (".npy", ".json"):
        raise ValueError(f"A palette is a .npy or .json file; found {file.name}.")
    try:
        if file.suffix == ".npy":  # mapped, so that nothing is read before its header is believed
            return np.array(check_palette(np.lib.format.open_memmap(file, mode="r")))
        if file.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"no palette of {MAX_COLORS} colours takes {file.stat().st_size:,} bytes")
        options = json.loads(file.read_text(encoding="utf-8"))
        clusters = options.get("clusters") if isinstance(options, dict) else None
        if clusters is None:
            raise ValueError("it has no `clusters`, and does not belong to an ImageGPT image processor with a palette")
        return check_palette(clusters)
    except Exception as error:  # of many types: what reads numpy's headers and deep JSON has errors of its own
        raise ValueError(f"{file} holds no palette: {error}") from error

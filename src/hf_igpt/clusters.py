"""The colour palette: fit it, find the nearest colour of a pixel, turn tokens back into colours, read it from a file.

A palette is a float64 array (K, 3) of RGB colours in [-1, 1], the scale of OpenAI's `kmeans_centers.npy`: a grey level
v in 0..255 stands at v / 127.5 - 1. Tokens are row numbers of the palette, 0..K-1. This is the only module that
computes a distance between colours.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np


MAX_COLORS = 65535  # tokens are stored as uint16, and one value of the lookup table means "not computed yet"
_CHUNK = 8192  # pixels whose distances to all colours are held at once: 8192 x 512 x 8 bytes = 32 MiB
_PORTION = 20  # of Lloyd's iterations
_MAX_ITERATIONS = 1000


def check_palette(clusters) -> np.ndarray:
    """Return `clusters` as a float64 array (K, 3), or raise ValueError.

    Accepts anything array-like (lists, numpy, torch). Colours must be finite and lie in [-1, 1]; colours in 0..255 are
    refused rather than guessed. Repeated colours are allowed: the lowest of equal rows is the one that is used.
    """
    palette = np.asarray(clusters, dtype=np.float64)
    if palette.ndim != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= MAX_COLORS:
        raise ValueError(
            f"A palette has shape (K, 3) with 1 <= K <= {MAX_COLORS}, one RGB colour per row; found shape {palette.shape}."
        )
    if not np.isfinite(palette).all() or palette.min() < -1 or palette.max() > 1:
        raise ValueError(
            f"Palette colours lie in [-1, 1]; found values from {palette.min():.4g} to {palette.max():.4g}. "
            "Colours in 0..255 become x / 127.5 - 1."
        )
    return palette


def to_unit_range(grey_levels) -> np.ndarray:
    """Grey levels 0..255, any shape -> float64 in [-1, 1], the palette's scale."""
    return np.asarray(grey_levels, dtype=np.float64) / 127.5 - 1


def to_grey_levels(colors) -> np.ndarray:
    """Colours in [-1, 1], any shape -> uint8 0..255, rounded to the nearest level [code run.py sample]."""
    return np.rint((np.asarray(colors, dtype=np.float64) + 1) * 127.5).astype(np.uint8)


def nearest_color(pixels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Index of the palette colour nearest to each pixel, in squared Euclidean distance.

    pixels: (..., 3), uint8 grey levels, or floats on the palette's scale. clusters: (K, 3) from `check_palette`.
    Returns int64 (...), in 0..K-1. Distances are summed in float64 as (dR² + dG²) + dB²; of equally near colours the
    lowest index wins. Follows OpenAI's `color_quantize` (src/utils.py) without its rounding. Uint8 pixels are looked up
    in a table of the 2^24 colours that is filled as colours occur and kept per palette.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim < 1 or pixels.shape[-1] != 3:
        raise ValueError(f"Pixels have 3 channels in the last dimension; found shape {pixels.shape}.")
    if pixels.dtype != np.uint8:
        return _nearest_by_distance(pixels.reshape(-1, 3).astype(np.float64), clusters).reshape(pixels.shape[:-1])
    table = _lookup_table(clusters.tobytes())
    code = pixels.astype(np.uint32)
    code = (code[..., 0] << 16) | (code[..., 1] << 8) | code[..., 2]
    found = table[code]  # token + 1, or 0 where the colour has not occurred before
    if not found.all():
        new = np.unique(code[found == 0])
        colors = np.stack([new >> 16, (new >> 8) & 255, new & 255], axis=-1)
        table[new] = _nearest_by_distance(to_unit_range(colors), clusters) + 1
        found = table[code]
    return found.astype(np.int64) - 1


@lru_cache(maxsize=4)
def _lookup_table(palette_bytes: bytes) -> np.ndarray:
    return np.zeros(2**24, dtype=np.uint16)


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
    """Tokens (...) in 0..K-1 -> their colours (..., 3) as uint8 grey levels."""
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= len(clusters)):
        raise ValueError(
            f"Tokens of a palette of {len(clusters)} colours lie in 0..{len(clusters) - 1}; "
            f"found {tokens.min()}..{tokens.max()}."
        )
    return to_grey_levels(clusters)[tokens]


def fit_palette(pixels: np.ndarray, n_colors: int, seed: int = 0, progress: bool = False) -> np.ndarray:
    """Fit `n_colors` colours to `pixels` (n, 3) uint8 by k-means in RGB [V2 3.2]; returns a palette (n_colors, 3).

    scikit-learn's k-means++ start and full Lloyd iterations until no assignment changes, on the distinct colours
    weighted by their counts. Seeded: the same pixels and seed give the same palette. All colours are distinct;
    fewer distinct colours in the data than asked for is a ValueError. 512 colours of a million pixels take about a
    minute; `progress` shows a bar.
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
        raise ValueError(f"A palette has 1 to {MAX_COLORS} colours; {n_colors} were asked for.")
    distinct, counts = np.unique(pixels, axis=0, return_counts=True)
    if len(distinct) < n_colors:
        raise ValueError(
            f"The data hold {len(distinct)} distinct colours, fewer than the {n_colors} asked for: "
            f"ask for at most {len(distinct)}, or sample more pixels."
        )
    if len(distinct) == n_colors:
        return to_unit_range(distinct)
    colors, weights = distinct.astype(np.float32), counts.astype(np.float32)
    centers, _ = kmeans_plusplus(colors, n_colors, sample_weight=weights, random_state=seed)
    with tqdm(desc="Fitting the palette", unit="iteration", disable=None if progress else True) as bar:
        while True:
            # Lloyd's iterations in portions, each from where the last one ended, for the sake of the bar.
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
        raise ValueError(f"k-means found only {n_distinct} distinct colours of {n_colors}: ask for fewer colours.")
    return palette


def distortion(pixels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """What quantising `pixels` (..., 3) uint8 loses: `rmse_grey_levels` over all channel values, and `psnr_db`."""
    restored = colors_of(nearest_color(pixels, clusters), clusters)
    rmse = float(np.sqrt(np.mean(np.square(restored.astype(np.float64) - pixels))))
    return {"rmse_grey_levels": rmse, "psnr_db": float("inf") if rmse == 0 else float(20 * np.log10(255 / rmse))}


def load_palette(path: str | Path) -> np.ndarray:
    """Read a palette from a `.npy` file (OpenAI's `kmeans_centers.npy`), a processor's JSON, or a processor's folder."""
    path = Path(path)
    file = path / "preprocessor_config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"No palette at {file}: give a .npy file, a preprocessor_config.json or a folder that holds one."
        )
    if file.suffix == ".npy":
        return check_palette(np.load(file, allow_pickle=False))
    if file.suffix == ".json":
        clusters = json.loads(file.read_text()).get("clusters")
        if clusters is None:
            raise ValueError(f"{file} has no `clusters`: it is no ImageGPT image processor, or one without a palette.")
        return check_palette(clusters)
    raise ValueError(f"A palette is read from .npy or .json; found {file.name}.")

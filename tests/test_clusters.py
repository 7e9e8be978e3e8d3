"""The palette: exactness of the nearest colour, the fit, and reading files."""

import json
import os
import pickle
import struct

import numpy as np
import pytest

from hf_igpt.clusters import (
    check_palette,
    colors_of,
    distortion,
    fit_palette,
    load_palette,
    lookup_table,
    nearest_color,
    to_grey_levels,
    to_unit_range,
)


def brute_force(pixels, palette):
    """The lowest index of the smallest float64 distance, one pixel at a time."""
    nearest = []
    for r, g, b in to_unit_range(pixels.reshape(-1, 3)):
        distances = [(r - c[0]) ** 2 + (g - c[1]) ** 2 + (b - c[2]) ** 2 for c in palette]
        nearest.append(min(range(len(palette)), key=lambda i: (distances[i], i)))
    return np.reshape(nearest, pixels.shape[:-1])


@pytest.mark.parametrize("kind", ["random", "greys", "duplicates", "one", "float32"])
def test_nearest_color_is_brute_force(kind, palette):
    rng = np.random.default_rng(1)
    if kind == "greys":
        palette = np.repeat(np.linspace(-1, 1, 33)[:, None], 3, axis=1)
    if kind == "duplicates":
        palette = np.concatenate([palette[:20], palette[:20]])
    if kind == "one":
        palette = palette[:1]
    if kind == "float32":
        palette = palette.astype(np.float32).astype(np.float64)
    pixels = rng.integers(0, 256, (40, 25, 3), dtype=np.uint8)
    expected = brute_force(pixels, palette)
    assert np.array_equal(nearest_color(pixels, palette), expected)
    assert np.array_equal(nearest_color(to_unit_range(pixels), palette), expected)  # the path of floats
    assert nearest_color(pixels, palette).dtype == np.int64


def degenerate_palette(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    line = np.linspace(-1, 1, n)
    sphere = rng.normal(size=(n, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    return {
        "anywhere": rng.uniform(-1, 1, (n, 3)),
        "levels": to_unit_range(rng.integers(0, 256, (n, 3))),  # many colours are equally near to two of these
        "line": np.stack([line, 0.5 * line, -0.3 * line], axis=1),
        "shuffled greys": np.repeat(to_unit_range(rng.permutation(n) % 256)[:, None], 3, axis=1),
        "sphere": sphere,
        "small sphere": 0.3 + 1e-2 * sphere,
        "point": 0.3 + 1e-10 * sphere,
        "corner": np.clip(1 + 0.02 * sphere, -1, 1),
        "duplicates": rng.uniform(-1, 1, (5, 3))[rng.integers(0, 5, n)],
        "one": rng.uniform(-1, 1, (1, 3)),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "anywhere",
        "levels",
        "line",
        "shuffled greys",
        "sphere",
        "small sphere",
        "point",
        "corner",
        "duplicates",
        "one",
    ],
)
def test_the_table_is_brute_force(kind):
    """All colours of some planes of red, 65,536 each, for 512 colours; for 24 the distances of the whole cube."""

    def planes(reds, palette):
        levels = to_unit_range(np.arange(256))
        for red in reds:
            best, nearest = np.full((256, 256), np.inf), np.zeros((256, 256), np.int64)
            for k, (r, g, b) in enumerate(palette):
                distance = ((levels[red] - r) ** 2 + (levels - g) ** 2)[:, None] + (levels - b) ** 2
                nearer = distance < best
                best[nearer], nearest[nearer] = distance[nearer], k
            yield red, nearest

    for n_colors, reds in ((512, (0, 95, 160, 255)), (24, range(256)) if kind == "levels" else (24, (3,))):
        palette = degenerate_palette(kind, n_colors)
        table = lookup_table(palette).reshape(256, 256, 256)
        for red, nearest in planes(reds, palette):
            assert np.array_equal(table[red], nearest), f"{kind}, {n_colors} colours, red {red}"


def test_the_table_is_built_once_and_kept_small(palette):
    table = lookup_table(palette)
    assert table.nbytes <= 32 * 2**20 and not table.flags.writeable
    assert np.shares_memory(lookup_table(palette.copy()), table)


def test_palettes_of_any_type_of_number(palette):
    pixels = np.random.default_rng(5).integers(0, 256, (100, 3), dtype=np.uint8)
    expected = nearest_color(pixels, palette)
    for other in (palette.astype(">f8"), np.asfortranarray(palette), np.repeat(palette, 2, axis=0)[::2]):
        assert np.array_equal(nearest_color(pixels, other), expected)
    corners = np.array([[-1, -1, -1], [1, 1, 1]])
    assert nearest_color(np.array([[0, 0, 0], [255, 255, 255]], np.uint8), corners).tolist() == [0, 1]


def test_pixels_of_any_layout(palette):
    pixels = np.random.default_rng(4).integers(
        0, 256, (3, 70, 200, 3), dtype=np.uint8
    )  # more than are looked up at once
    expected = nearest_color(pixels.reshape(-1, 3), palette)
    assert np.array_equal(expected[:500], brute_force(pixels.reshape(-1, 3)[:500], palette))
    channels_first = np.ascontiguousarray(np.moveaxis(pixels, -1, 1))
    assert np.array_equal(nearest_color(np.moveaxis(channels_first, 1, -1), palette).reshape(-1), expected)
    assert np.array_equal(nearest_color(pixels[:, ::-1], palette), nearest_color(pixels, palette)[:, ::-1])
    assert nearest_color(np.zeros((0, 3), np.uint8), palette).shape == (0,)
    assert nearest_color(pixels[0, 0, 0], palette).shape == ()


def test_ties_go_to_the_lowest_index():
    palette = to_unit_range(np.array([[255, 255, 255], [10, 0, 0], [0, 10, 0], [10, 0, 0]]))
    assert nearest_color(np.array([[0, 0, 0], [10, 0, 0]], dtype=np.uint8), palette).tolist() == [1, 1]


def test_tables_of_palettes_do_not_mix(palette):
    pixels = np.random.default_rng(2).integers(0, 256, (500, 3), dtype=np.uint8)
    for colors in (palette, palette[::-1].copy(), palette[:7]):
        assert np.array_equal(nearest_color(pixels, colors), brute_force(pixels, colors))


def test_colors_of_inverts_the_quantisation(palette):
    tokens = np.arange(len(palette))
    levels = colors_of(tokens, palette)
    assert levels.dtype == np.uint8
    assert np.array_equal(nearest_color(levels, palette), tokens)
    assert np.array_equal(to_grey_levels(to_unit_range(np.arange(256))), np.arange(256))


def test_fit_is_seeded_distinct_and_near_optimal():
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 3), dtype=np.uint8)
    fitted = fit_palette(pixels, 32, seed=1)
    assert fitted.shape == (32, 3) and len(np.unique(fitted, axis=0)) == 32
    assert np.array_equal(fitted, fit_palette(pixels, 32, seed=1))
    # Lloyd has converged: each colour is the mean of its own pixels.
    own = nearest_color(to_unit_range(pixels), fitted)
    means = np.stack([to_unit_range(pixels)[own == k].mean(axis=0) for k in range(32)])
    assert np.abs(means - fitted).max() < 1e-4
    random_colors = to_unit_range(pixels[:32])
    assert distortion(pixels, fitted)["psnr_db"] > distortion(pixels, random_colors)["psnr_db"] + 1


def test_fit_of_as_many_colors_as_there_are_is_lossless():
    pixels = np.repeat(np.arange(0, 256, 15, dtype=np.uint8)[:, None], 3, axis=1)
    assert distortion(pixels, fit_palette(pixels, len(pixels)))["rmse_grey_levels"] == 0


def test_fewer_colors_in_the_data_than_asked():
    pixels = np.repeat(np.arange(5, dtype=np.uint8)[:, None], 3, axis=1)
    with pytest.raises(ValueError, match="5 distinct colours, fewer than the 6 requested"):
        fit_palette(pixels, 6)


def test_distortion_by_hand():
    palette = to_unit_range(np.array([[0, 0, 0], [200, 200, 200]]))
    found = distortion(np.array([[0, 0, 3], [200, 200, 200]], dtype=np.uint8), palette)
    assert found["rmse_grey_levels"] == pytest.approx(np.sqrt(9 / 6))
    assert found["psnr_db"] == pytest.approx(20 * np.log10(255 / np.sqrt(1.5)))


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 4)), np.zeros(3), np.zeros((0, 3)), np.full((2, 3), 128.0), [[np.nan] * 3]]
)
def test_bad_palettes(bad):
    with pytest.raises(ValueError, match=r"shape|\[-1, 1\]"):
        check_palette(bad)


def test_load_palette(tmp_path, palette):
    openai = palette.astype(np.float32)  # as kmeans_centers.npy
    np.save(tmp_path / "kmeans_centers.npy", openai)
    assert np.array_equal(load_palette(tmp_path / "kmeans_centers.npy"), openai.astype(np.float64))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"clusters": palette.tolist()}))
    assert np.array_equal(load_palette(tmp_path), palette)
    assert np.array_equal(load_palette(tmp_path / "preprocessor_config.json"), palette)
    (tmp_path / "empty.json").write_text("{}")
    for bad in ("empty.json", "missing.npy", "nothing"):
        with pytest.raises(ValueError, match="palette|clusters"):
            load_palette(tmp_path / bad)


class Spy:
    """Whoever unpickles it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def npy(shape, kind="<f8", data=b"\0" * 48):
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


HOSTILE = {
    "empty.npy": b"",
    "none.npy": npy((0, 3)),
    "scalar.npy": npy(()),
    "terabytes.npy": npy((10**12, 3)),
    "more than there is.npy": npy((10**30, 3)),
    "negative.npy": npy((-1, 3)),
    "objects.npy": npy((2, 3), "|O"),
    "text.npy": npy((2, 3), "<U2"),
    "complex.npy": npy((2, 3), "<c8"),
    "dates.npy": npy((2, 3), "<M8[s]"),
    "truths.npy": npy((2, 3), "?"),
    "no shape.npy": npy("x"),
    "an endless header.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"x",
    "a deep header.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
    "an archive.npy": b"PK\x03\x04",
    "empty.json": b"",
    "a list.json": b"[]",
    "deep.json": b"[" * 100_000,
    "deep colours.json": b'{"clusters": ' + b"[" * 900 + b"]" * 900 + b"}",
    "not text.json": b"\xff\xfe",
    "words.json": b'{"clusters": "red"}',
    "numbers as words.json": b'{"clusters": [["0.1", "0", "0"]]}',
    "nan.json": b'{"clusters": [[NaN, 0, 0]]}',
    "infinite.json": b'{"clusters": [[1e999, 0, 0]]}',
    "null.json": b'{"clusters": [[null, 0, 0]]}',
    "ragged.json": b'{"clusters": [[0, 0, 0], [0]]}',
    "two channels.json": b'{"clusters": [[0, 0]]}',
    "a mapping.json": b'{"clusters": {"red": 1}}',
    "a long number.json": b'{"clusters": [[' + b"9" * 5000 + b", 0, 0]]}",
    "palette.pkl": pickle.dumps([[0, 0, 0]]),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of the sizes here
@pytest.mark.parametrize("name", HOSTILE)
def test_files_of_no_palette_are_named(name, tmp_path):
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=name):
        load_palette(tmp_path / name)


@pytest.mark.parametrize("name", ["pickled.npy", "objects.npy", "palette.pkl"])
def test_no_palette_is_unpickled(name, tmp_path):
    spy = Spy(tmp_path / "run")
    if name == "objects.npy":
        np.save(tmp_path / name, np.array([[spy] * 3]), allow_pickle=True)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(spy))
    with pytest.raises(ValueError, match=name):
        load_palette(tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_a_json_file_of_no_palettes_size_is_not_read(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**10)  # of holes
    with pytest.raises(ValueError, match=r"large\.json .*no palette of 65535 colours takes 10,000,000,000 bytes"):
        load_palette(tmp_path / "large.json")


def test_tokens_out_of_the_palette(palette):
    with pytest.raises(ValueError, match=r"0\.\.63; found 0\.\.64"):
        colors_of(np.array([0, 64]), palette)

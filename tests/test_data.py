"""Sources, splits, columns, cached tokens, augmentation, unreadable images. All data are made here."""

import errno
import io
import shutil
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from hf_igpt import ImageGPTImageProcessorPil, data
from hf_igpt.clusters import nearest_color
from hf_igpt.commands.arguments import ClustersArguments, PlanArguments
from hf_igpt.data import (
    DataArguments,
    ImageTokens,
    TrainingImages,
    collate_classified,
    collate_tokens,
    digits,
    drop_unreadable,
    find_image_files,
    load_images,
    load_labelled_images,
    named_images,
    random_crop,
    read_image,
    repeat_stream,
    sample_pixels,
    stream_tokens,
    token_array,
    tokenize,
)
from hf_igpt.training.arguments import FinetuningArguments, PretrainingArguments


def picture(seed, size=(12, 10)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def rows_of(dataset, indices=None, name="input_ids"):
    """One column of the rows of an `ImageTokens`, stacked."""
    return np.stack([row[name] for row in dataset.__getitems__(range(len(dataset)) if indices is None else indices)])


@pytest.fixture
def processor(palette):
    return ImageGPTImageProcessorPil(clusters=palette, size=8, do_center_crop=True)


@pytest.fixture
def folder(tmp_path):
    """40 images of two classes, in subfolders."""
    for i in range(40):
        target = tmp_path / "images" / ("cat" if i % 2 else "dog") / f"{i:02}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(target)
    return tmp_path / "images"


@pytest.fixture
def parquet(tmp_path):
    """30 images in a parquet file without any metadata of `datasets`."""
    import pandas

    cells = []
    for i in range(30):
        buffer = io.BytesIO()
        picture(i).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
    (tmp_path / "parquet").mkdir()
    pandas.DataFrame({"img": cells, "labels": [i % 3 for i in range(30)]}).to_parquet(
        tmp_path / "parquet" / "part.parquet"
    )
    return tmp_path / "parquet"


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    dataset = digits()
    assert len(dataset) == 1797 and dataset.features["label"].num_classes == 10
    scan = np.asarray(read_image(dataset[5]["image"]))
    assert scan.shape == (8, 8, 3) and np.array_equal(scan[..., 0], np.rint(load_digits().images[5] * 255 / 16))


def test_default_split_of_the_digits_is_seeded():
    first, again, other = (load_images(DataArguments(), seed=seed) for seed in (1, 1, 2))
    assert (len(first["train"]), len(first["validation"])) == (1438, 359)
    assert first["train"]["label"][:50] == again["train"]["label"][:50] != other["train"]["label"][:50]


def test_image_folder(folder):
    splits = load_images(DataArguments(train_dir=str(folder), train_val_split=0.1))
    assert (len(splits["train"]), len(splits["validation"])) == (36, 4)
    assert splits["train"].features["label"].names == ["cat", "dog"]
    splits = load_images(DataArguments(train_dir=str(folder / "cat"), validation_dir=str(folder / "dog")))
    assert (len(splits["train"]), len(splits["validation"])) == (20, 20)
    splits = load_images(DataArguments(train_dir=str(folder), max_train_samples=7, max_eval_samples=1))
    assert (len(splits["train"]), len(splits["validation"])) == (7, 1)  # 4 % of 40 held out


def test_parquet_and_guessed_columns(parquet):
    for place in (parquet, parquet / "part.parquet", parquet / "*.parquet"):
        splits = load_images(DataArguments(train_dir=str(place), train_val_split=0.2))
        assert set(splits["train"].column_names) == {"image", "label"} and len(splits["train"]) == 24
        assert read_image(splits["train"][0]["image"]).size == (12, 10)


def test_parquet_folder_with_named_splits(parquet):
    (parquet / "part.parquet").rename(parquet / "train-00000-of-00001.parquet")
    datasets.Dataset.from_parquet(str(parquet / "*.parquet")).select(range(5)).to_parquet(
        parquet / "validation-00000.parquet"
    )
    splits = load_images(DataArguments(train_dir=str(parquet)))
    assert (len(splits["train"]), len(splits["validation"])) == (30, 5)


def test_dataset_by_name(folder, tmp_path):
    """What `load_dataset` takes by name: here a folder with a train and a validation split."""
    for split in ("train", "validation"):
        (tmp_path / "named" / split).mkdir(parents=True)
        for i in range(6):
            picture(i).save(tmp_path / "named" / split / f"{i}.png")
    splits = load_images(DataArguments(dataset_name=str(tmp_path / "named")))
    assert (len(splits["train"]), len(splits["validation"])) == (6, 6)


def test_chosen_columns(tmp_path):
    rows = {"photo": [picture(i) for i in range(4)], "thumb": [picture(i + 9) for i in range(4)], "kind": [0, 1, 2, 3]}
    datasets.Dataset.from_dict(rows).cast_column("thumb", datasets.Image()).to_parquet(tmp_path / "p.parquet")
    arguments = DataArguments(
        train_dir=str(tmp_path), image_column_name="thumb", label_column_name="kind", train_val_split=0.25
    )
    row = load_images(arguments)["train"][0]
    assert np.array_equal(np.asarray(read_image(row["image"])), np.asarray(picture(row["label"] + 9)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column_name": "picture"}, "picture is not in the dataset; its columns are image, label"),
        ({"label_column_name": "kind"}, "--label_column_name kind"),
        ({"dataset_name": "x"}, "not both"),
        ({"on_bad_image": "Skip"}, "on_bad_image is error or skip"),
        ({"train_val_split": 1.5}, "between 0 and 1"),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_images(DataArguments(train_dir=str(folder), **options))


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path, tmp_path / "empty", tmp_path / "nowhere", tmp_path / "none.parquet"):
        with pytest.raises(ValueError, match="No images could be loaded"):
            load_images(DataArguments(train_dir=str(place)))


@pytest.mark.parametrize("name", ["photos [2020]", "a*b", "what?", "{x}", "!not#%20"])
@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_look_like_patterns(tmp_path, name, streaming):
    """And nothing of the folder beside it, which the name would match as a pattern."""
    sizes = {"streaming": streaming, "max_eval_samples": 2 if streaming else None, "train_val_split": 0.34}
    for place in (tmp_path / name, tmp_path / "a and b"):
        make_folder(place, [f"{i} [x].png" for i in range(6)])
        files = [str(path) for path in sorted(place.iterdir())]
        table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
        (tmp_path / "tables" / place.name).mkdir(parents=True)
        table.to_parquet(tmp_path / "tables" / place.name / "part.parquet")
    tables = tmp_path / "tables" / name
    for place in (tmp_path / name, tables, tables / "part.parquet"):
        splits = load_images(DataArguments(train_dir=str(place), **sizes))
        assert len(splits["validation"]) == 2 and len(list(splits["train"])) == 4


def test_patterns_of_parquet_files(parquet):
    shutil.copy(parquet / "part.parquet", parquet / "more.parquet")
    splits = load_images(DataArguments(train_dir=str(parquet / "*.parquet")))
    assert len(splits["train"]) + len(splits["validation"]) == 60


def test_what_is_no_source_is_refused_with_what_is(folder, tmp_path):
    shutil.make_archive(str(tmp_path / "photos"), "zip", folder)
    (tmp_path / "labels.csv").write_text("a,b")
    table = datasets.Dataset.from_dict({"image": [1, 2]})
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved splits")
    make_folder(tmp_path / "linked", ["dog/1.png", "dog/2.png"])
    (tmp_path / "linked" / "cat").symlink_to(folder / "cat")
    make_folder(tmp_path / "a::b", ["1.png", "2.png"])
    for place, message in {
        "photos.zip": "photos.zip is not a parquet file.*unpack an archive",
        "images/cat/01.png": "01.png is not a parquet file. Name the folder of images",
        "images/cat/*.png": "01.png is not a parquet file. Name the folder of images",
        "labels.csv": "labels.csv is not a parquet file",
        "none/*.parquet": "there is no such file or folder",
        "saved": "save_to_disk wrote this folder: write parquet files with to_parquet",
        "saved splits": "save_to_disk wrote this folder",
        "linked": "cat is a link to a folder: put the folder itself there",
        "a::b": "rename the folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_images(DataArguments(train_dir=str(tmp_path / place)))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_images(DataArguments(train_dir=""))


def test_files_that_systems_leave_are_no_images(folder, tmp_path):
    (folder / "cat" / "._01.png").write_bytes(b"\0\5\26\7")
    make_folder(folder, [".thumbnails/1.png", "__MACOSX/1.png"])
    assert len(find_image_files(folder)) == 40 == len(named_images([str(folder)]))
    splits = load_images(DataArguments(train_dir=str(folder)))
    assert len(splits["train"]) + len(splits["validation"]) == 40
    only = tmp_path / "only"
    only.mkdir()
    (only / "._01.png").write_bytes(b"\0\5\26\7")
    with pytest.raises(ValueError, match="the folder holds no image files"):
        load_images(DataArguments(train_dir=str(only)))


def test_files_that_datasets_passes_over_are_counted(folder, capsys):
    picture(0).save(folder / "cat" / "x.qoi")
    load_images(DataArguments(train_dir=str(folder)))
    assert "1 files of" in (said := capsys.readouterr().out) and "x.qoi" in said


def test_one_limit_of_pixels(folder, processor, monkeypatch):
    images = load_images(DataArguments(train_dir=str(folder)))["train"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match=r"Image size \(120 pixels\).*At most 50 are read.*--on_bad_image skip"):
        tokenize(images, processor)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 119)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="12 x 10 = 120 pixels. At most 119"),
    ):
        tokenize(images, processor)
    with pytest.raises(ValueError, match="10 x 12 = 120 pixels"):
        read_image(np.zeros((10, 12, 3), np.uint8))


def test_tokens_are_the_processors_and_small(folder, processor, palette):
    images = load_images(DataArguments(train_dir=str(folder)))["train"]
    tokens = tokenize(images, processor)
    assert tokens.features["input_ids"] == datasets.List(datasets.Value("uint8"), length=64)
    expected = [processor(read_image(cell))["input_ids"][0] for cell in images["image"]]
    assert np.array_equal(token_array(tokens), expected) and token_array(tokens).dtype == np.uint16
    assert tokens["label"] == images["label"]
    many = ImageGPTImageProcessorPil(clusters=np.concatenate([palette] * 5), size=8)
    assert tokenize(images, many).features["input_ids"].feature.dtype == "uint16"
    assert np.array_equal(token_array(tokenize(images, processor, num_proc=2)), expected)


def test_tokens_are_cached_on_disk(folder, processor, palette, monkeypatch):
    arguments = DataArguments(train_dir=str(folder))
    first = tokenize(load_images(arguments)["train"], processor)
    assert first.cache_files
    monkeypatch.setattr(ImageGPTImageProcessorPil, "__call__", lambda *args, **kwargs: pytest.fail("tokenised again"))
    again = tokenize(load_images(arguments)["train"], ImageGPTImageProcessorPil.from_dict(processor.to_dict()))
    assert np.array_equal(token_array(first), token_array(again))
    options = {"clusters": palette, "size": 8, "do_center_crop": True}
    for other in ({"clusters": palette[::-1]}, {"size": 4}, {"resample": 0}, {"do_center_crop": False}):
        with pytest.raises(BaseException, match="tokenised again"):
            tokenize(load_images(arguments)["train"], ImageGPTImageProcessorPil(**(options | other)))


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("work", ["tokens", "readable"])
def test_a_damaged_cache_is_made_anew(work, num_proc, folder, processor, tmp_path, capsys):
    """Cut at every message of the file, and elsewhere: never fewer images, never an error."""
    arguments = DataArguments(train_dir=str(folder), data_cache_dir=str(tmp_path))

    def done():
        images = load_images(arguments)["train"]
        return tokenize(images, processor, num_proc=num_proc) if work == "tokens" else drop_unreadable(images, num_proc)

    load_images(arguments)
    of_splits = set(tmp_path.rglob("cache-*.arrow"))
    expected = done()
    cache = min(set(tmp_path.rglob("cache-*.arrow")) - of_splits)
    whole = cache.read_bytes()
    starts = [place for place in range(0, len(whole), 8) if whole[place : place + 4] == b"\xff" * 4]  # of messages
    assert len(starts) >= 3
    for place in (0, 1, len(whole) // 2, *starts[1:]):
        cache.unlink()  # which leaves what is mapped above
        cache.write_bytes(whole[:place])
        capsys.readouterr()
        again = done()
        assert len(again) == len(expected)
        if work == "tokens":
            assert np.array_equal(token_array(again), token_array(expected))
        if place < starts[-1]:
            assert "is damaged" in capsys.readouterr().out and cache.stat().st_size == len(whole)
    cache.unlink()
    cache.write_bytes(bytes(len(whole)))
    assert len(done()) == len(expected)


def test_a_full_disk_is_no_damaged_cache(folder, processor, monkeypatch):
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "map", full)
    images = load_images(DataArguments(train_dir=str(folder)))["train"]
    with pytest.raises(OSError, match="No space left"):
        tokenize(images, processor)
    assert len(calls) == 1


@pytest.mark.parametrize("held", [1, 250, 10**6])
def test_photos_are_held_in_portions(folder, processor, monkeypatch, held):
    """As many as have so many pixels, 12x10 each: one, three, all. Tokens, pixels and reasons are the same."""
    broken = sorted(folder.rglob("*.png"))[4]
    broken.write_bytes(b"no image")
    images = load_images(DataArguments(train_dir=str(folder), train_val_split=0.1))["train"]
    expected = token_array(tokenize(images, processor, "skip"))
    pixels = sample_pixels(images, 500, 8, on_bad_image="skip")
    sizes, call = [], ImageGPTImageProcessorPil.__call__
    monkeypatch.setattr(data.images, "HELD_PIXELS", held)
    monkeypatch.setattr(data.tokens, "_CACHE_VERSION", f"held {held}")
    monkeypatch.setattr(
        ImageGPTImageProcessorPil,
        "__call__",
        lambda self, images, **options: sizes.append(len(images)) or call(self, images, **options),
    )
    assert np.array_equal(token_array(tokenize(images, processor, "skip")), expected)
    assert sum(sizes) == len(expected) and (max(sizes) > 3 if held > 250 else max(sizes) == -(-held // 120))
    assert np.array_equal(sample_pixels(images, 500, 8, on_bad_image="skip"), pixels)
    assert len(drop_unreadable(images)) == len(expected)


@pytest.mark.parametrize("kind", ["folder", "paths"])
def test_changed_images_are_tokenised_anew(folder, processor, tmp_path, kind):
    files = sorted(str(path) for path in folder.rglob("*.png"))
    place = folder
    if kind == "paths":
        place = tmp_path / "table.parquet"
        datasets.Dataset.from_dict({"image": files}).to_parquet(place)
    arguments = DataArguments(train_dir=str(place))
    before = token_array(tokenize(load_images(arguments)["train"], processor))
    for file in files:
        picture(99, size=(13, 10)).save(file)
    assert len(drop_unreadable(load_images(arguments)["train"])) == len(before)
    after = token_array(tokenize(load_images(arguments)["train"], processor))
    assert not np.array_equal(before, after) and (after == after[0]).all()


@pytest.mark.parametrize("kind", ["bytes", "paths", "arrays", "channels first", "greys", "nothing"])
def test_kinds_of_image_columns(tmp_path, processor, kind):
    import pyarrow

    images = [picture(i) for i in range(6)]
    encoded = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        encoded.append((tmp_path / f"{i}.png").read_bytes())
    columns = {
        "bytes": pyarrow.array(encoded, pyarrow.large_binary()),
        "paths": pyarrow.array([str(tmp_path / f"{i}.png") for i in range(6)], pyarrow.large_string()),
        "arrays": [np.asarray(image).tolist() for image in images],
        "channels first": [np.asarray(image).transpose(2, 0, 1).tolist() for image in images],
        "greys": [np.asarray(image.convert("L")).tolist() for image in images],
        "nothing": [None if i else encoded[0] for i in range(6)],
    }
    pyarrow.parquet.write_table(pyarrow.table({"image": columns[kind]}), tmp_path / "table.parquet")
    split = load_images(DataArguments(train_dir=str(tmp_path / "table.parquet"), train_val_split=0.17))["train"]
    if kind == "nothing":
        with pytest.raises(ValueError, match=r"Image \d cannot be read"):
            tokenize(split, processor)
        return
    expected = processor([image.convert("L") if kind == "greys" else image for image in images])["input_ids"]
    found = token_array(tokenize(split, processor))
    assert len(found) == 5 and {tuple(row) for row in found} <= {tuple(row) for row in expected}
    cropped = ImageTokens(split, processor, random_crop=True)
    assert cropped[0]["input_ids"].shape == (64,)


def test_float_arrays_are_refused(tmp_path, processor):
    datasets.Dataset.from_dict({"image": np.random.rand(4, 8, 8).tolist()}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match="grey levels 0..255; found an array of float"):
        tokenize(load_images(DataArguments(train_dir=str(tmp_path), train_val_split=0.3))["train"], processor)


def test_sampled_pixels_come_from_all_images(folder):
    images = load_images(DataArguments(train_dir=str(folder)))["train"]
    everything = sample_pixels(images, 10**6, image_size=8)
    assert everything.shape == (len(images) * 64, 3) and everything.dtype == np.uint8
    some = sample_pixels(images, 200, image_size=8, seed=1)
    assert some.shape == (200, 3)
    assert np.array_equal(some, sample_pixels(images, 200, image_size=8, seed=1))
    assert {tuple(p) for p in some} <= {tuple(p) for p in everything}


def make_folder(place, files):
    for name in files:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(place / name)
    return DataArguments(train_dir=str(place))


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        (("train", "test"), ()),
        (("train", "test"), (".ipynb_checkpoints/a/1.png", "__MACOSX/a/1.png")),
        (("train", "dev"), ()),
        (("training", "testing"), ()),
        (("Train", "Test"), ()),
        (("TRAIN", "Valid"), ()),
    ],
)
def test_folders_of_splits_are_splits(tmp_path, names, extra):
    """Whatever their names' case, and beside what systems leave behind: test images are never trained on."""
    files = [f"{names[0]}/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(8)]
    files += [f"{names[1]}/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)]
    args = make_folder(tmp_path / "photos", [*files, *extra])
    splits = load_labelled_images(args)
    found = {name: [Path(cell["path"]).parts[-3] for cell in split["image"]] for name, split in splits.items()}
    assert set(found["train"]) | set(found["validation"]) == {names[0]} and set(found["test"]) == {names[1]}
    assert len(found["train"]) + len(found["validation"]) == 16 and len(found["test"]) == 6
    assert splits["train"].features["label"].names == ["cat", "dog"]


def test_folders_of_splits_without_classes(tmp_path):
    args = make_folder(tmp_path / "photos", [f"{name}/{i}.png" for name in ("train", "val") for i in range(4)])
    splits = load_images(args)
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "validation": 4}
    assert "label" not in splits["train"].features


def test_classes_may_have_the_names_of_splits(tmp_path):
    args = make_folder(tmp_path / "photos", [f"{name}/{i}.png" for name in ("train", "plane", "car") for i in range(9)])
    assert load_labelled_images(args)["train"].features["label"].names == ["car", "plane", "train"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train", "test", "cats"), "test/, train/ are splits, but cats is none and lies next to them"),
        (("train", "training", "test"), "train/ and training/ are both the train split"),
    ],
)
def test_folders_that_may_be_either_are_refused(tmp_path, names, message):
    args = make_folder(tmp_path / "photos", [f"{name}/a/{i}.png" for name in names for i in range(3)])
    with pytest.raises(ValueError, match=message):
        load_images(args)


def test_a_sorted_stream_does_not_hold_out_one_class(tmp_path):
    images = digits().sort("label").cast_column("image", datasets.Image(decode=False))
    images.to_parquet(tmp_path / "train.parquet")
    arguments = DataArguments(train_dir=str(tmp_path), streaming=True, max_eval_samples=20)
    with pytest.raises(ValueError, match="The first 20 images of the stream.*are all of the class '0'"):
        load_images(arguments)


def test_one_seed_everywhere():
    """What scripts hold out is what `load_images` and `load_labelled_images` hold out by default."""
    held_out = [cell["bytes"] for cell in load_images(DataArguments())["validation"]["image"]]
    tested = [cell["bytes"] for cell in load_labelled_images(DataArguments())["test"]["image"]]
    assert (
        held_out == tested == [cell["bytes"] for cell in load_images(DataArguments(), seed=42)["validation"]["image"]]
    )
    assert PretrainingArguments().seed == ClustersArguments().seed == FinetuningArguments().seed == 42


def test_epochs_flip_anew_and_alike_everywhere(folder, processor):
    tokens = tokenize(load_images(DataArguments(train_dir=str(folder)))["train"], processor)
    plain = rows_of(ImageTokens(tokens, processor))
    mirrored = plain.reshape(-1, 8, 8)[:, :, ::-1].reshape(plain.shape)
    flips = []
    for epoch in range(4):
        dataset = ImageTokens(tokens, processor, random_flip=True, seed=3)
        dataset.begin_epoch(epoch)
        rows = rows_of(dataset)
        assert np.array_equal(rows[7], dataset[7]["input_ids"])
        flipped = (rows == mirrored).all(axis=1)
        assert (flipped | (rows == plain).all(axis=1)).all()
        flips.append(flipped)
    assert 0.3 < np.mean(flips) < 0.7
    assert len({tuple(row) for row in np.array(flips).tolist()}) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_loaders_draw_for_the_epoch_that_was_begun(folder, processor, num_workers, persistent):
    """With workers that live for all epochs too, and if accelerate's loader counts otherwise."""
    tokens = tokenize(load_images(DataArguments(train_dir=str(folder)))["train"], processor)
    dataset = ImageTokens(tokens, processor, random_flip=True, masked=True, seed=3)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=4,
        collate_fn=collate_tokens,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
    )
    loaders = [loader, prepare_data_loader(loader, num_processes=1, process_index=0)]
    for epoch in (0, 1, 5, 1):
        dataset.begin_epoch(epoch)
        expected = collate_tokens(dataset.__getitems__(range(len(dataset))))
        for one in loaders:
            batches = list(one)
            for name, values in expected.items():
                assert torch.equal(torch.cat([batch[name] for batch in batches]), values)


def test_random_crop_is_the_papers():
    rng = np.random.default_rng(0)
    gradient = Image.fromarray(np.broadcast_to(np.arange(0, 240, dtype=np.uint8), (480, 240)).copy()).convert("RGB")
    widths = []
    for _ in range(50):
        crop = np.asarray(random_crop(gradient, rng)).astype(float)
        assert crop.shape == (224, 224, 3)
        widths.append(crop[0, -1, 0] - crop[0, 0, 0])  # grey levels across: 240 · 224 / shorter side
    assert 240 * 224 / 384 - 3 < min(widths) < max(widths) < 240 * 224 / 256 + 3
    assert max(widths) - min(widths) > 30


def test_random_crops_have_the_grids_proportions():
    rng = np.random.default_rng
    assert random_crop(picture(0, (300, 260)), rng(1), (32, 16)).size == (112, 224)
    assert random_crop(picture(0, (30, 300)), rng(1), (4, 32)).size == (224, 28)
    for grid in ((1, 1), (32, 32)):
        square, found = random_crop(picture(1), rng(2)), random_crop(picture(1), rng(2), grid)
        assert found.size == (224, 224) and square.tobytes() == found.tobytes()


def test_random_crops_are_drawn_anew_each_epoch(folder, processor):
    images = load_images(DataArguments(train_dir=str(folder)))["train"]
    rows = []
    for epoch in (0, 1, 0):
        dataset = ImageTokens(images, processor, random_crop=True, seed=1)
        dataset.begin_epoch(epoch)
        rows.append(rows_of(dataset, [0, 5]))
    assert rows[0].shape == (2, 64) and not np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


def test_streaming(parquet, processor, palette):
    arguments = DataArguments(train_dir=str(parquet), streaming=True, max_eval_samples=5, random_flip=True)
    splits = load_images(arguments)
    assert len(splits["validation"]) == 5
    rows = list(stream_tokens(splits["train"], processor, arguments))
    assert len(rows) == 25 and set(rows[0]) == {"input_ids"}
    batch = collate_tokens(rows[:3])["labels"]
    assert batch.shape == (3, 64) and batch.dtype == torch.int64
    expected = {tuple(np.sort(processor(picture(i))["input_ids"][0])) for i in range(5, 30)}
    assert {tuple(sorted(row["input_ids"])) for row in rows} == expected
    assert sample_pixels(splits["train"], 100, 8).shape == (100, 3)


@pytest.fixture
def files(tmp_path):
    """A folder of 4 parquet files of 6 digits each, and one of 5 for validation."""
    shards = [digits().select(range(6 * i, 6 * i + 6)) for i in range(4)]
    (tmp_path / "files").mkdir()
    for name, rows in [
        *((f"train-{i}", shard) for i, shard in enumerate(shards)),
        ("validation-0", digits().select(range(24, 29))),
    ]:
        rows.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "files" / f"{name}.parquet")
    return str(tmp_path / "files")


def seen(stream, num_workers=0):
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers)
    return [row["image"]["bytes"] for row in loader]


@pytest.mark.parametrize("options", [{}, {"max_train_samples": 21}, {"num_processes": 3}])
def test_processes_share_a_stream(files, options):
    """By whole files, of a stream that is cut by images, and where there are files that do not divide evenly."""
    n, limit = options.get("num_processes", 2), options.get("max_train_samples", 24)
    arguments = DataArguments(train_dir=files, streaming=True, max_train_samples=options.get("max_train_samples"))
    everything = [cell["bytes"] for cell in digits().select(range(limit))["image"]]
    shares = [load_images(arguments, process=i, num_processes=n)["train"] for i in range(n)]
    assert [share.num_shards for share in shares] == [2 if not options else 4] * n
    found = [seen(share) for share in shares]
    assert [len(rows) for rows in found] == [limit // n + (i < limit % n) for i in range(n)]
    assert sorted(chain(*found)) == sorted(everything)
    if limit == 24:  # the workers of a process share out its share
        assert sorted(chain(*(seen(share, num_workers=2) for share in shares))) == sorted(everything)


def test_held_out_images_of_a_stream_stay_held_out(files):
    (Path(files) / "validation-0.parquet").unlink()
    arguments = DataArguments(train_dir=files, streaming=True, max_eval_samples=5)
    rest = [cell["bytes"] for cell in digits().select(range(5, 24))["image"]]
    for workers in (0, 1):
        shares = [load_images(arguments, process=i, num_processes=2, num_workers=workers)["train"] for i in range(2)]
        assert sorted(chain(*(seen(share, workers) for share in shares))) == sorted(rest)
    with pytest.raises(ValueError, match="only one worker can read a stream"):
        load_images(arguments, num_workers=2)


def test_passes_of_a_stream_have_different_orders(parquet, monkeypatch):
    monkeypatch.setattr(data.tokens, "SHUFFLE_BUFFER", 20)
    arguments = DataArguments(train_dir=str(parquet), streaming=True, max_eval_samples=20)
    rows = [row["image"]["bytes"] for row in repeat_stream(load_images(arguments)["train"], seed=3).take(60)]
    assert len(set(rows)) == 10
    assert len({tuple(rows[i : i + 10]) for i in range(0, 60, 10)}) == 6


def test_masks_hide_15_percent_anew_each_epoch(folder, parquet, processor):
    tokens = tokenize(load_images(DataArguments(train_dir=str(folder)))["train"], processor)
    masks = []
    for epoch in range(6):
        dataset = ImageTokens(tokens, processor, masked=True, seed=3)
        dataset.begin_epoch(epoch)
        masks.append(rows_of(dataset, name="bool_masked_pos"))
        assert np.array_equal(masks[-1][4], dataset[4]["bool_masked_pos"])
    masks = np.stack(masks)  # (epochs, images, N)
    assert abs(masks.mean() - 0.15) < 0.02 and not (masks[0] == masks[1]).all()
    assert masks.mean(axis=(0, 1)).max() < 0.35 and masks.sum(axis=2).std() > 1  # each pixel by itself
    batch = collate_tokens(dataset.__getitems__([0, 1, 2]))
    assert batch["bool_masked_pos"].dtype == torch.bool and batch["labels"].shape == (3, 64)
    arguments = DataArguments(train_dir=str(parquet), streaming=True, max_eval_samples=5)
    rows = list(stream_tokens(load_images(arguments)["train"], processor, arguments, masked=True))
    assert 0.1 < np.mean([row["bool_masked_pos"] for row in rows]) < 0.2
    assert collate_tokens(rows)["bool_masked_pos"].shape == (25, 64)


def test_pad_crops_move_images_within_a_reflected_border(folder, processor):
    tokens = tokenize(load_images(DataArguments(train_dir=str(folder)))["train"], processor)
    grids = token_array(tokens).reshape(-1, 8, 8)
    moved = rows_of(ImageTokens(tokens, processor, pad_crop=True)).reshape(-1, 8, 8)
    shifts = set()
    for grid, found in zip(grids, moved, strict=True):
        rows = np.concatenate([grid[1:2], grid, grid[-2:-1]])  # a border of 1 pixel at 8x8, as 4 at 32x32
        padded = np.concatenate([rows[:, 1:2], rows, rows[:, -2:-1]], axis=1)
        places = [(i, j) for i in range(3) for j in range(3) if (padded[i : i + 8, j : j + 8] == found).all()]
        assert places
        shifts.add(places[0])
    assert len(shifts) >= 6
    with pytest.raises(ValueError, match="--pad_crop"):
        DataArguments(pad_crop=True, random_crop=True)


@pytest.mark.parametrize("grid", [(16, 4), (4, 16)])
def test_flips_and_crops_of_images_that_are_not_square(grid, folder, palette):
    processor = ImageGPTImageProcessorPil(clusters=palette, size=grid, do_center_crop=True)
    images = load_images(DataArguments(train_dir=str(folder)))["train"]
    tokens = tokenize(images, processor)
    plain = rows_of(ImageTokens(tokens, processor)).reshape(-1, *grid)
    flipped = rows_of(ImageTokens(tokens, processor, random_flip=True)).reshape(-1, *grid)
    mirrored = [(a == b[:, ::-1]).all() for a, b in zip(flipped, plain, strict=True)]
    kept = [(a == b).all() for a, b in zip(flipped, plain, strict=True)]
    assert any(mirrored) and any(kept) and all(np.logical_or(mirrored, kept))
    for found, image in zip(rows_of(ImageTokens(tokens, processor, pad_crop=True)), plain, strict=True):
        padded, found = np.pad(image, 1, mode="reflect"), found.reshape(grid)  # 4 of 32 pixels, of the shorter side
        windows = [padded[i : i + grid[0], j : j + grid[1]] for i in range(3) for j in range(3)]
        assert any(np.array_equal(window, found) for window in windows)
    assert rows_of(ImageTokens(images, processor, random_crop=True), range(2)).shape == (2, 64)
    args = DataArguments(train_dir=str(folder), random_crop=True, random_flip=True)
    stream = images.cast_column("image", datasets.Image(decode=False)).to_iterable_dataset()
    (row,) = stream_tokens(stream, processor, args).take(1)
    assert len(row["input_ids"]) == 64


@pytest.mark.parametrize(
    ("given", "kept"),
    [(32, 32), ("32", 32), ("32x32", 32), ("32x16", "32x16"), ((16, 32), "16x32"), ([8, 8], 8), ("1x4096", "1x4096")],
)
def test_image_sizes(given, kept):
    for kind in (DataArguments, PlanArguments):
        assert kind(image_size=given).image_size == kept


@pytest.mark.parametrize(
    "given", ["0x4", "32x", "x", "axb", "4097", "8x16x3", "32 16", "-8", "8.0", 32.5, True, (), ""]
)
def test_image_sizes_that_are_none(given):
    for kind in (DataArguments, PlanArguments):
        with pytest.raises(ValueError, match="--image_size is a whole number from 1 to 4096, or two of them, height x"):
            kind(image_size=given)


def test_a_processor_of_as_many_pixels_in_another_shape_is_refused(tmp_path, palette):
    ImageGPTImageProcessorPil(clusters=palette, size=(8, 4)).save_pretrained(tmp_path)
    same = data.load_processor(str(tmp_path), DataArguments(image_size="8x4"))
    other = data.load_processor(str(tmp_path), DataArguments(image_size="16x4"))
    assert (same.token_grid(), other.token_grid()) == ((8, 4), (16, 4))
    for wrong in ("4x8", "16x2"):
        with pytest.raises(ValueError, match=r"--image_size .* makes images of 8x4, which have as many pixels"):
            data.load_processor(str(tmp_path), DataArguments(image_size=wrong))


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labelled_digits():
    splits = load_labelled_images(DataArguments(), seed=3)
    sizes = {name: len(split) for name, split in splits.items()}
    assert sizes == {"train": 1294, "validation": 144, "test": 359}
    held_out = load_images(DataArguments(), seed=3)["validation"]
    assert held_out["image"] == splits["test"]["image"]  # what a model pretrained with this seed has not seen
    assert np.bincount(splits["validation"]["label"]).min() >= 12  # classes in their proportions
    cells = [cell["bytes"] for split in splits.values() for cell in split["image"]]
    assert len(cells) == 1797


def test_labelled_folders(folder, processor):
    splits = load_labelled_images(DataArguments(train_dir=str(folder), train_val_split=0.2))
    assert {name: len(split) for name, split in splits.items()} == {"train": 29, "validation": 3, "test": 8}
    assert splits["train"].features["label"].names == ["cat", "dog"]
    batch = collate_classified(ImageTokens(tokenize(splits["test"], processor), processor).__getitems__([0, 1]))
    assert batch["input_ids"].shape == (2, 64) and batch["labels"].tolist() == splits["test"]["label"][:2]
    held_out = folder.parent / "held out"
    arguments = DataArguments(train_dir=str(folder), validation_dir=str(held_out), max_train_samples=9)
    shutil.copytree(folder / "dog", held_out)
    with pytest.raises(ValueError, match="--validation_dir have no labels"):
        load_labelled_images(arguments)
    shutil.rmtree(held_out)
    shutil.copytree(folder, held_out)
    splits = load_labelled_images(arguments)
    assert len(splits["test"]) == 40 and len(splits["train"]) == 9
    (held_out / "cat").rename(held_out / "elk")
    with pytest.raises(ValueError, match="test split has a class 'elk'"):
        load_labelled_images(arguments)


def labelled(place, labels, split="train"):
    rows = {"image": [picture(i) for i in range(len(labels))], "label": labels}
    place.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows).to_parquet(place / f"{split}.parquet")


def test_labels_of_any_kind_become_classes(tmp_path):
    labelled(tmp_path, [7, 3] * 12)
    labelled(tmp_path, [3, 7, 7], "validation")
    labelled(tmp_path, [-1, -1], "test")  # withheld
    splits = load_labelled_images(DataArguments(train_dir=str(tmp_path)))
    assert splits["train"].features["label"].names == ["3", "7"]
    assert splits["test"]["label"] == [0, 1, 1] and len(splits["train"]) == 22 and len(splits["validation"]) == 2
    labelled(tmp_path, [-1, 3], "test")  # withheld from the first alone: not a test split without labels
    with pytest.raises(ValueError, match="Image 0 of the test split has no label"):
        load_labelled_images(DataArguments(train_dir=str(tmp_path)))
    labelled(tmp_path, ["b", "a"] * 12)
    labelled(tmp_path, ["a", "b"], "validation")
    labelled(tmp_path, ["b", "b", "a"], "test")
    splits = load_labelled_images(DataArguments(train_dir=str(tmp_path)))
    assert splits["test"]["label"] == [1, 1, 0] and splits["validation"]["label"] == [0, 1]
    assert len(splits["train"]) == 24


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (None, None, "have no labels: name their column by --label_column_name"),
        ([1] * 20, None, "1 class; classification requires at least 2"),
        ([0, 1, None, 1], None, r"Image \d of the (train|test) split has no label"),
        ([0, 1] * 5, [0, 2], "test split has a class '2'"),
        ([0.5, 0.7] * 5, None, "classes are integers or strings"),
    ],
)
def test_labels_that_are_refused(tmp_path, train, test, message):
    if train is None:
        tmp_path.joinpath("train.parquet").unlink(missing_ok=True)
        datasets.Dataset.from_dict({"image": [picture(i) for i in range(9)]}).to_parquet(tmp_path / "train.parquet")
    else:
        labelled(tmp_path, train)
    if test is not None:
        labelled(tmp_path, test, "test")
    with pytest.raises(ValueError, match=message):
        load_labelled_images(DataArguments(train_dir=str(tmp_path), train_val_split=0.2))


@pytest.fixture
def spoilt(folder):
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG nothing")
    (folder / "dog" / "empty.jpg").write_bytes(b"")
    return folder


def test_a_bad_image_stops_with_its_path(spoilt, processor):
    images = load_images(DataArguments(train_dir=str(spoilt)), seed=1)["train"]
    for use in (lambda: tokenize(images, processor), lambda: sample_pixels(images, 100, 8)):
        with pytest.raises(ValueError, match=r"(broken\.png|empty\.jpg).*--on_bad_image skip"):
            use()


def test_bad_images_left_out_are_counted_and_named(spoilt, processor, capsys):
    images = load_images(DataArguments(train_dir=str(spoilt), train_val_split=0.03), seed=1)["train"]
    assert len(images) == 41
    assert len(tokenize(images, processor, on_bad_image="skip")) == 39
    said = capsys.readouterr()
    said = said.out + said.err
    assert "Left out 2 of 41" in said and "broken.png" in said and "empty.jpg" in said
    assert len(drop_unreadable(images)) == 39
    assert sample_pixels(images, 10**6, 8, on_bad_image="skip").shape == (39 * 64, 3)


@pytest.mark.parametrize("crops", [False, True])
def test_bad_images_are_reported_once(spoilt, crops, capsys):
    """By a run, which reads them for the palette and again for the tokens."""
    arguments = DataArguments(
        train_dir=str(spoilt), on_bad_image="skip", image_size=8, random_crop=crops, train_val_split=0.03
    )
    images = TrainingImages(arguments, 1, num_colors=4, progress=False)
    images.training_rows(False), images.rows("validation", False)
    said = "".join(capsys.readouterr())
    assert [said.count(name) for name in ("broken.png", "empty.jpg")] == [1, 1]
    images.fit_palette(4)  # as run_clusters.py, which makes no tokens
    said = "".join(capsys.readouterr())
    assert said.count("Left out") == 1


def test_only_bad_images(tmp_path, processor):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    images = load_images(DataArguments(train_dir=str(tmp_path)))["train"]
    with pytest.raises(ValueError, match="None of the 2 images can be read"):
        tokenize(images, processor, on_bad_image="skip")


def test_exif_orientation_is_obeyed():
    upright = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    buffer = io.BytesIO()
    upright.save(buffer, "PNG", exif=exif)
    assert read_image({"bytes": buffer.getvalue(), "path": None}).size == upright.size[::-1]


def test_tokens_of_a_mirrored_image_are_mirrored(processor, palette):
    image = picture(1, size=(8, 8))
    mirrored = processor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))["input_ids"].reshape(8, 8)
    assert np.array_equal(mirrored[:, ::-1].ravel(), processor(image)["input_ids"][0])
    assert np.array_equal(processor(image)["input_ids"][0], nearest_color(np.asarray(image), palette).ravel())


def test_folders_named_as_splits_are_splits(tmp_path):
    for split, count in (("train", 20), ("test", 5)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 10 * i).save(tmp_path / split / label / f"{i}.png")
    splits = load_labelled_images(DataArguments(train_dir=str(tmp_path)))
    assert {split: len(images) for split, images in splits.items()} == {"train": 36, "validation": 4, "test": 10}
    assert splits["test"].features["label"].names == ["cat", "dog"]
    assert all("/test/" in cell["path"] for cell in splits["test"]["image"])

"""Random inputs, most of them broken, for everything that reads what others have made.

    python fuzz.py KIND SEED START STOP      # what `fuzz` runs in a child, which a crash or a full memory may end

Allowed are a ValueError, a TypeError with which Python itself answers a wrong signature, and a result that is the same twice. The
inputs are drawn by numpy, input i of a kind from (seed, i) alone, so each failure is repeated by its number.
"""

import io
import json
import math
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


Rng = np.random.Generator
FIXTURES = Path(__file__).parent.parent / "fixtures"
SECONDS = 20  # for one input
HOSTILE = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 255, 10**6, 10**9, 2**63, 10**30, 0.0, -0.5, 0.5, 1e-300, 1e300),
    *(math.nan, math.inf, -math.inf, "", "a", "1", "NaN", "gelu", "../../x", "\0", "<script>|\n", "é" * 300),
    *(
        [],
        [1],
        [[]],
        [0.5] * 3,
        [0, 0, 0],
        ["a"] * 3,
        {},
        {"height": 4, "width": 4},
        {"height": -1},
        {"shortest_edge": 4},
    ),
    *([[1, 2], [3]], {"a": {"b": []}}, [None], [math.nan] * 3),
)
SIGNATURE = re.compile(r"unexpected keyword argument|missing \d+ required|takes .* positional argument")


def pick(rng: Rng, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def spoil(data: bytes, rng: Rng) -> bytes:
    """Bytes of which some are changed, lost, doubled or added."""
    spoiled = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(max(1, len(spoiled))))
        match int(rng.integers(5)):
            case 0 if spoiled:
                spoiled[at % len(spoiled)] ^= 1 << int(rng.integers(8))
            case 1:
                del spoiled[at:]
            case 2:
                spoiled[at:at] = rng.bytes(int(rng.integers(1, 40)))
            case 3:
                del spoiled[at : at + int(rng.integers(1, 40))]
            case _:
                spoiled[at : at + 4] = pick(rng, (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
    return bytes(spoiled)


def spoil_json(value: Any, rng: Rng, depth: int = 0) -> Any:
    """A JSON value of which some parts are hostile."""
    if depth and rng.random() < 0.25:
        return pick(rng, HOSTILE)
    if isinstance(value, dict):
        kept = {key: spoil_json(item, rng, depth + 1) for key, item in value.items() if rng.random() > 0.1}
        return kept | ({pick(rng, ("x", "", "model", "value")): pick(rng, HOSTILE)} if rng.random() < 0.2 else {})
    if isinstance(value, list):
        return [spoil_json(item, rng, depth + 1) for item in value]
    return value


def spoil_text(value: Any, rng: Rng) -> bytes:
    """A JSON file that is hostile in its values or in its text."""
    if rng.random() < 0.05:
        return b"[" * 100_000
    data = json.dumps(spoil_json(value, rng)).encode()
    return spoil(data, rng) if rng.random() < 0.3 else data


# -- kinds: a function of the random numbers, which gives what is compared ------------------------------------------------


def draw_image(rng: Rng) -> Any:
    from PIL import Image

    modes = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I I;16 F".split()
    mode, size = pick(rng, modes), (int(rng.integers(1, 24)), int(rng.integers(1, 24)))
    if mode == "F":
        return Image.fromarray((rng.standard_normal(size[::-1]) * pick(rng, (1, 100, 1e6))).astype(np.float32))
    if mode in ("I", "I;16"):
        top = pick(rng, (2, 256, 65536))
        return Image.fromarray(rng.integers(0, top, size[::-1]).astype(np.int32 if mode == "I" else np.uint16))
    image = Image.frombytes(mode, size, rng.bytes(len(Image.new(mode, size).tobytes())))
    if mode == "P":
        image.putpalette(rng.bytes(768))
    if mode in ("L", "P", "RGB") and rng.random() < 0.3:
        image.info["transparency"] = (1, 2, 3) if mode == "RGB" else 1
    return image


def processor() -> Any:
    from hf_igpt import ImageGPTImageProcessorPil

    palette = np.random.default_rng(0).uniform(-1, 1, (16, 3))
    return ImageGPTImageProcessorPil(clusters=palette, size={"height": 6, "width": 6})


def images(rng: Rng, folder: Path) -> Any:
    """An image of any mode; as a file it must give the same tokens."""
    from hf_igpt.data import read_image

    image, process = draw_image(rng), processor()
    found = process(image)["input_ids"]
    if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        file = folder / "image.png"
        image.save(file)
        for other in (str(file), read_image({"path": str(file)}), read_image({"bytes": file.read_bytes()})):
            if not np.array_equal(found, process(other)["input_ids"]):
                raise AssertionError(f"a PNG of mode {image.mode} has other tokens as a {type(other).__name__}")
    return found


def files(rng: Rng, folder: Path) -> Any:
    """An image file with spoiled bytes."""
    from hf_igpt.data import read_image

    image, buffer = draw_image(rng), io.BytesIO()
    kind = pick(rng, ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "PCX", "DDS"))
    (image if kind == "PNG" and image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")).save(
        buffer, kind
    )
    (folder / "image").write_bytes(spoil(buffer.getvalue(), rng))
    found = processor()(str(folder / "image"))["input_ids"]
    read = processor()(read_image({"path": str(folder / "image")}))["input_ids"]
    if not np.array_equal(found, read):
        raise AssertionError(f"a spoiled {kind} has other tokens by its path than read")
    return found


def arrays(rng: Rng, folder: Path) -> Any:
    """An array of any type and shape, with any options."""
    import torch

    shape = [int(side) for side in rng.integers(0, 9, int(rng.integers(0, 6)))]
    if rng.random() < 0.6:
        shape = [int(side) for side in rng.integers(1, 20, 3)]
        shape[pick(rng, (0, 2))] = int(pick(rng, (1, 3, 3, 3, 4)))
    dtype = pick(rng, "uint8 int8 uint16 int32 int64 float16 float32 float64 bool complex64 object U3".split())
    values = rng.standard_normal(shape) * pick(rng, (1, 100, 1e5)) + pick(rng, (0, 128))
    with np.errstate(all="ignore"):
        array = np.asarray(values).astype(dtype)
    if array.dtype.kind == "f" and array.size and rng.random() < 0.3:
        array.flat[0] = pick(rng, (math.nan, math.inf))
    value: Any = array
    if array.dtype.kind in "fiub" and rng.random() < 0.3:
        value = torch.from_numpy(array)
    elif rng.random() < 0.2:
        value = pick(rng, ([array], [array, array], array.tolist(), [[array]], (array,), {"image": array}))
    options = {
        name: pick(rng, choices)
        for name, choices in {
            "do_resize": (True, False),
            "do_rescale": (True, False),
            "do_normalize": (True, False),
            "do_convert_rgb": (True, False),
            "do_center_crop": (True, False),
            "do_color_quantize": (True, False),
            "input_data_format": ("channels_first", "channels_last", "none", "x"),
            "return_tensors": ("pt", "np", "x"),
            "resample": (0, 2, 3, 99),
            "size": ({"height": 4, "width": 4}, 0, -1, {"height": 0, "width": 3}, 3),
        }.items()
        if rng.random() < 0.15
    }
    found = processor()(value, **options)
    return {name: np.asarray(item) for name, item in found.items()}


def configs(rng: Rng, folder: Path) -> Any:
    """A config.json; if it is of a small model, the model must run."""
    import torch

    from hf_igpt import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForMaskedImageModeling

    config = ImageGPTConfig.from_preset("tiny", n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=5).to_dict()
    for name in rng.choice(sorted(config), int(rng.integers(1, 4)), replace=False):
        config[str(name)] = pick(rng, HOSTILE)
    (folder / "config.json").write_text(json.dumps(config))
    made = ImageGPTConfig.from_pretrained(folder)
    again = ImageGPTConfig.from_dict(made.to_dict())
    if again.to_dict() != made.to_dict() and "nan" not in str(made.to_dict()):
        raise AssertionError("a configuration is another one after saving")
    kind = ImageGPTForMaskedImageModeling if made.objective == "masked" else ImageGPTForCausalImageModeling
    torch.manual_seed(0)
    model = kind(made).eval()
    tokens = torch.zeros(1, min(16, made.n_positions), dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=tokens).logits.numpy()


def processors(rng: Rng, folder: Path) -> Any:
    """A preprocessor_config.json, and an image by it."""
    from PIL import Image

    from hf_igpt.data.prepare import read_processor

    options = processor().to_dict()
    for name in rng.choice(sorted(options), int(rng.integers(1, 4)), replace=False):
        options[str(name)] = pick(rng, HOSTILE)
    data = json.dumps(options).encode()
    (folder / "preprocessor_config.json").write_bytes(spoil(data, rng) if rng.random() < 0.2 else data)
    process = read_processor(str(folder))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8))
    return {name: np.asarray(item) for name, item in process(image).items()}


def palettes(rng: Rng, folder: Path) -> Any:
    """A palette's file."""
    from hf_igpt.clusters import load_palette, nearest_color

    palette = rng.uniform(-1, 1, (int(rng.integers(0, 20)), int(pick(rng, (3, 3, 3, 2, 4)))))
    if rng.random() < 0.5:
        file, buffer = folder / "palette.npy", io.BytesIO()
        np.save(buffer, palette.astype(pick(rng, "f4 f8 i8 u1 f2 c8 U4 >f4".split())), allow_pickle=False)
        data = buffer.getvalue()
        if rng.random() < 0.2:
            data = data.replace(b"(", pick(rng, (b"(999999999, ", b"(-1, ", b"((", b"")), 1)
        file.write_bytes(spoil(data, rng) if rng.random() < 0.6 else data)
    else:
        file = folder / "palette.json"
        file.write_bytes(spoil_text({"clusters": palette.tolist()}, rng))
    found = load_palette(file)
    return found, nearest_color(np.zeros((2, 3), np.uint8), found)


def records(rng: Rng, folder: Path) -> Any:
    """A records.json, and the table of it."""
    from hf_igpt.evaluation.records import Record, markdown_table, read_records, write_records

    known = Record(
        task="generation", metric="nats_per_pixel", value=1.5, unit="nats/pixel", split="test", n=3, image_size=(4, 4)
    )
    write_records(folder / "records.json", [known])
    rows = json.loads((folder / "records.json").read_text())
    if rng.random() < 0.3:  # the first format
        rows = [
            {"model": "Image GPT tiny, 1,000 parameters", "data": "digits, 8x8, 16 colours", "metric": "nats_per_pixel"}
        ]
        rows[0] |= {"value": 1.5, "unit": "nats/pixel", "split": "test", "n": 3, "settings": {"layer": 2}, "seed": 1}
    (folder / "records.json").write_bytes(spoil_text(rows, rng))
    found = read_records(folder / "records.json")
    table = markdown_table(found)
    if "<s" in table or table.count("\n") != len(found) + 1:
        raise AssertionError("text of records goes into a table as it is")
    return table


def runs(rng: Rng, folder: Path) -> Any:
    """A run.json, as it is looked at before anything else when a run is started again."""
    from hf_igpt.training.arguments import PretrainingArguments
    from hf_igpt.training.resuming import find_checkpoint, release_folder

    run = {"identity": {"seed": 1, "images": "x"}, "recipe": {"size": "tiny"}, "arguments": {"seed": 1, "max_steps": 3}}
    (folder / "run" / "checkpoint-2").mkdir(parents=True, exist_ok=True)
    (folder / "run" / "run.json").write_bytes(spoil_text(run, rng))
    (folder / "run" / "checkpoint-2" / "trainer_state.json").write_bytes(
        spoil_text({"global_step": 2, "log_history": []}, rng)
    )
    args = PretrainingArguments(output_dir=str(folder / "run"), use_cpu=True)
    try:
        return find_checkpoint(args)
    finally:
        release_folder(folder / "run", args)


def indexes(rng: Rng, folder: Path) -> Any:
    """A TensorFlow checkpoint's files."""
    from hf_igpt.publishing.conversion import from_openai, read_openai

    for file in (FIXTURES / "openai-ar").iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(
            spoil(data, rng) if rng.random() < (0.6 if file.suffix == ".index" else 0.2) else data
        )
    _, state = from_openai(read_openai(folder / "model.ckpt-1000"))
    return {name: np.asarray(tensor) for name, tensor in state.items()}


def variables(rng: Rng, folder: Path) -> Any:
    """Variables of a checkpoint, some of other shapes, lost or added."""
    from hf_igpt.publishing.conversion import from_openai, to_openai

    with np.load(FIXTURES / "openai-ar.npz") as file:
        known = {name.removeprefix("model/"): file[name] for name in file.files if name.startswith("model/")}
    for name in rng.choice(sorted(known), int(rng.integers(0, 3)), replace=False):
        shape = [int(side) for side in rng.integers(0, 5, int(rng.integers(0, 4)))]
        known[str(name)] = pick(
            rng, (np.zeros(shape), np.full(known[str(name)].shape, np.nan), np.atleast_1d(known[str(name)])[:1])
        )
    if rng.random() < 0.3:
        known.pop(str(rng.choice(sorted(known))))
    if rng.random() < 0.2:
        known[pick(rng, ("x", "h99/ln_1/g", "h-1/ln_1/g", ""))] = np.zeros(3)
    config, state = from_openai(known)
    return {name: np.asarray(value) for name, value in to_openai(config, state).items()}


def recipes(rng: Rng, folder: Path) -> Any:
    """A file of flags."""
    from hf_igpt.commands.cli import read_recipe

    (folder / "recipe.yaml").write_bytes(spoil_text({"max_steps": 3, "size": "tiny", "random_flip": True}, rng))
    return read_recipe(folder / "recipe.yaml", {"max_steps", "size", "random_flip"})


KINDS: dict[str, tuple[Callable[[Rng, Path], Any], int]] = {  # and how many of each in a whole soak
    "images": (images, 3000),
    "files": (files, 4000),
    "arrays": (arrays, 4000),
    "configs": (configs, 2500),
    "processors": (processors, 2000),
    "palettes": (palettes, 2500),
    "records": (records, 2000),
    "runs": (runs, 700),
    "indexes": (indexes, 800),
    "variables": (variables, 800),
    "recipes": (recipes, 700),
}


# -- in the child, and beside it -----------------------------------------------------------------------------------------


def comparable(value: Any) -> Any:
    """A value whose parts that are arrays are bytes, so that a NaN equals itself."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {name: comparable(item) for name, item in value.items()}
    return [comparable(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def attempt(kind: str, seed: int, index: int, folder: Path) -> tuple[str, str]:
    """The outcome of one input, and what was wrong."""
    results = []
    for _ in range(2):
        rng = np.random.default_rng([seed, index, list(KINDS).index(kind)])
        try:
            signal.alarm(SECONDS)
            results.append(("equal", comparable(KINDS[kind][0](rng, folder))))
        except ValueError as error:
            results.append(("refused", type(error).__name__))
        except AssertionError as error:
            return "silent", str(error)
        except BaseException as error:
            if isinstance(error, TypeError) and SIGNATURE.search(str(error)):
                results.append(("refused", "TypeError"))
                continue
            ours = [
                f"{Path(at.filename).name}:{at.lineno}"
                for at in traceback.extract_tb(error.__traceback__)
                if "hf_igpt" in at.filename
            ]
            return (
                "traceback",
                f"{type(error).__name__} at {ours[-1] if ours else 'no line of ours'}: {str(error)[:200]}",
            )
        finally:
            signal.alarm(0)
    return ("silent", "another result the second time") if results[0] != results[1] else (results[0][0], "")


def main() -> None:
    kind, seed, start, stop = sys.argv[1], *map(int, sys.argv[2:5])

    def too_long(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_long)
    warnings.simplefilter("ignore")
    folder = Path("input")
    with open("found", "a", buffering=1) as found:
        for index in range(start, stop):
            folder.mkdir(exist_ok=True)
            found.write(f"{index}\n")  # in case it is the last
            outcome, said = attempt(kind, seed, index, folder)
            found.write(json.dumps([index, outcome, said]) + "\n")


def fuzz(trials: Any, folder: Path, seed: int, times: float, kinds: list[str] | None = None) -> Iterator[Any]:
    """Each kind's share of inputs, in children that begin again after a crash."""
    from outcomes import Count

    for kind in kinds or KINDS:
        count, start = Count("fuzzing", kind, allowed=("equal", "refused")), time.monotonic()
        place, done, number = folder / kind, 0, max(1, round(KINDS[kind][1] * times))
        place.mkdir(parents=True)
        while done < number:
            limits = {"RLIMIT_AS": 16 * 2**30}
            trial = trials.run(place, __file__, kind, seed, done, number, limits=limits)
            lines = (place / "found").read_text().splitlines()
            (place / "found").unlink()
            for line in lines:
                if line.startswith("["):
                    index, outcome, said = json.loads(line)
                    count.add(outcome, f"{kind} {seed} {index}", said)
                    done = index + 1
            if trial.status:
                if done < number:
                    count.add(
                        "traceback",
                        f"{kind} {seed} {done}",
                        f"ended the process ({trial.status}): {trial.last_line[:200]}",
                    )
                done += 1
        count.seconds = round(time.monotonic() - start, 1)
        yield count


if __name__ == "__main__":
    main()

"""`scripts/run_sample.py`: draw images with a trained model, from nothing, or completing the upper rows of given images."""

import time
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..configuration_imagegpt import ImageGPTConfig
from ..evaluation.held_out import select_held_out
from ..evaluation.records import save_picture
from ..generation_imagegpt import complete, sample
from ..modeling_imagegpt import ImageGPTForCausalImageModeling
from ..reporting import plots
from .arguments import SampleArguments
from .cli import find_device
from .folders import check_model_exists, folder_beside, load_trained


def draw(args: SampleArguments, data_args: data.DataArguments) -> list[Path]:
    """Write `samples.png` and `completions.png` as the arguments ask; returns their paths."""
    if args.rows is not None and not (args.images or args.num_held_out):
        raise ValueError("--rows applies to images that are completed: name them with --images or --num_held_out.")
    check_model_exists(args.model_name_or_path)
    folder = folder_beside(args.model_name_or_path, args.output_dir)
    device = find_device(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if ImageGPTConfig.from_pretrained(args.model_name_or_path).objective != "causal":
        raise ValueError(
            f"{args.model_name_or_path} is a masked model, which draws hidden pixels given the others and no whole images: draw "
            "with a causal one, or call `hf_igpt.generation_imagegpt.fill_in`."
        )
    remedy = "Draw with the model it was made from."
    model = load_trained(ImageGPTForCausalImageModeling, args.model_name_or_path, remedy, dtype=dtype)
    processor = data.processor_of(args.model_name_or_path, model.config)
    height = processor.token_grid()[0]
    if args.rows is not None and args.rows > height:
        raise ValueError(f"--rows is at most {height}, the image's height; found {args.rows}.")
    model.to(device)
    given = [data.read_image({"bytes": None, "path": str(file)}) for file in data.named_images(args.images)]
    if args.num_held_out:
        cells, _ = select_held_out(args.model_name_or_path, data_args, args.num_held_out, args.split_seed)
        print(f"Completing {len(cells)} held-out images of {data_args.name()}")
        given += [data.read_image(cell) for cell in cells]
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(args, name) for name in ("seed", "temperature", "top_k", "top_p", "batch_size")}
    written = []
    num_images = args.num_images or (0 if given else 16)
    if num_images:
        start = time.perf_counter()
        pictures: Any = sample(model, processor, num_images, **options)
        print(f"Drew {num_images} images, {(time.perf_counter() - start) / num_images * 1000:.0f} ms each")
        written.append(folder / "samples.png")
        save_picture(plots.square_grid(pictures), written[-1])
    if given:
        completions: Any = complete(model, processor, given, args.rows, args.num_completions, **options)
        written.append(folder / "completions.png")
        rows = plots.picture_of_completions(processor, given, completions, args.rows)
        save_picture(plots.completions_picture(rows), written[-1])
    for path in written:
        print(f"Wrote {path}")
    return written

"""Draw images with a trained model: from nothing, or completing the upper rows of given images."""

import time
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..evaluation.held_out import select_held_out
from ..generation_imagegpt import complete, sample
from ..modeling_imagegpt import ImageGPTForCausalImageModeling
from ..reporting import plots
from .arguments import SampleArguments
from .cli import find_device
from .folders import folder_beside


def draw(args: SampleArguments, data_args: data.DataArguments) -> list[Path]:
    """Write `samples.png` and `completions.png` as the arguments ask; returns their paths."""
    if args.rows is not None and not (args.images or args.num_held_out):
        raise ValueError("--rows is of images to complete: give them with --images or --num_held_out.")
    folder = folder_beside(args.model_name_or_path, args.output_dir)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = ImageGPTForCausalImageModeling.from_pretrained(args.model_name_or_path, dtype=dtype)
    processor = data.processor_of(args.model_name_or_path, model.config)
    model.to(find_device(args.device))  # type: ignore[arg-type]  # its decorator hides the signature
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
        plots.square_grid(pictures).save(written[-1])
    if given:
        completions: Any = complete(model, processor, given, args.rows, args.num_completions, **options)
        written.append(folder / "completions.png")
        rows = plots.picture_of_completions(processor, given, completions, args.rows)
        plots.completions_picture(rows).save(written[-1])
    for path in written:
        print(f"Wrote {path}")
    return written

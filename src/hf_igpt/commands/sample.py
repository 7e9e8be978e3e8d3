"""`scripts/run_sample.py`: draw images with a trained model, from nothing, or completing given images."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import data
from ..configuration_imagegpt import ImageGPTConfig
from ..evaluation.held_out import select_held_out
from ..evaluation.records import save_animation, save_picture
from ..generation_imagegpt import complete, draw_rounds, find_hidden, inpaint_tokens, sample
from ..inputs_imagegpt import class_names, find_classes
from ..modeling_imagegpt import GENERATIVE_MODELS
from ..reporting import plots
from .arguments import SampleArguments
from .cli import find_device
from .folders import check_model_exists, folder_beside, load_trained


def draw(args: SampleArguments, data_args: data.DataArguments) -> list[Path]:
    """Write `samples.png`, and `completions.png` or `inpainted.png`, as the arguments ask; returns their paths.

    With `gif` each has a GIF of the same name beside it, and with `seen` there is `seen.png`.
    """
    asked = [name for name in ("rows", "mask", "box") if getattr(args, name) is not None]
    of_given = asked + ["seen"] * args.seen
    if of_given and not (args.images or args.num_held_out):
        raise ValueError(
            f"--{of_given[0]} applies to images that are completed: name them with --images or --num_held_out."
        )
    if len(asked) > 1:
        raise ValueError(f"--{asked[0]} and --{asked[1]} each say what is drawn: give one of them.")
    if args.guidance != 1 and (args.mask or args.box):
        raise ValueError("Holes are filled without --guidance: leave it out.")
    if args.guidance != 1 and not args.classes:
        raise ValueError("--guidance strengthens --classes: give these too.")
    mask: Any = args.mask if args.box is None else args.box
    check_model_exists(args.model_name_or_path)
    folder = folder_beside(args.model_name_or_path, args.output_dir)
    device = find_device(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config = ImageGPTConfig.from_pretrained(args.model_name_or_path)
    objective = config.objective
    classes = find_classes(config, args.classes) if args.classes else None
    if objective != "causal" and (mask is None or args.num_images):
        raise ValueError(
            f"{args.model_name_or_path} is a masked model, which draws hidden pixels given the others and no whole images: draw "
            "with a causal one, or give --images with --mask or --box, which say what is hidden."
        )
    remedy = "Draw with the model it was made from."
    model = load_trained(GENERATIVE_MODELS[objective], args.model_name_or_path, remedy, dtype=dtype)
    processor = data.processor_of(args.model_name_or_path, model.config)
    height = processor.token_grid()[0]
    if args.rows is not None and args.rows > height:
        raise ValueError(f"--rows is at most {height}, the image's height; found {args.rows}.")
    model.to(device)
    given = [data.read_image({"bytes": None, "path": str(file)}) for file in data.named_images(args.images)]
    if args.num_held_out:
        held_out, _ = select_held_out(args.model_name_or_path, data_args, args.num_held_out, args.split_seed)
        print(f"Completing {len(held_out)} held-out images of {data_args.name()}")
        given += [data.read_image(cell) for cell in held_out[data.IMAGE]]
    hidden = None if mask is None else np.stack([find_hidden(processor, mask, image.size).ravel() for image in given])
    if given and classes and len(classes) not in (1, len(given)):
        raise ValueError(f"--classes: give one class, or one for each of {len(given)} images; found {len(classes)}.")
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("seed", "temperature", "top_k", "top_p", "batch_size")
    }
    options["classes"] = classes
    guidance: dict[str, Any] = {"guidance": args.guidance}
    written = []
    num_images = args.num_images or (0 if given else 8 if classes else 16)
    if num_images:
        start = time.perf_counter()
        tokens: Any = sample(model, processor, num_images, **options, **guidance, return_tokens=True)
        print(f"Drew {len(tokens)} images, {(time.perf_counter() - start) / len(tokens) * 1000:.0f} ms each")
        written.append(folder / "samples.png")
        pictures = processor.decode(tokens)
        if classes:
            names = [class_names(config)[number] for number in classes]
            by_class = [pictures[start : start + num_images] for start in range(0, len(pictures), num_images)]
            save_picture(plots.class_picture(names, by_class), written[-1])
        else:
            save_picture(plots.square_grid(pictures), written[-1])
        if args.gif:
            order = np.broadcast_to(np.arange(1, tokens.shape[1] + 1), tokens.shape)
            written.append(folder / "samples.gif")
            columns = num_images if classes else None
            save_animation(plots.drawing_frames(processor, tokens.numpy(), order, columns), written[-1])
    if given and args.seen:
        written.append(folder / "seen.png")
        save_picture(plots.pictures_seen(processor, given), written[-1])
    drawn: Any
    titles = ["completions"]
    if hidden is not None:
        tokens = processor(given, return_tensors="pt")["input_ids"]
        counts = args.particles if objective == "causal" else args.particles[:1]  # a masked model has none
        parts = []
        for particles in counts:
            start = time.perf_counter()
            options |= {"particles": particles, "steps": args.steps}
            part, nats = inpaint_tokens(model, tokens, torch.from_numpy(hidden), args.num_completions, **options)
            parts.append(part)
            seconds = (time.perf_counter() - start) / (len(given) * args.num_completions)
            print(f"Filled a hole in {len(given)} images {args.num_completions} times, {seconds:.2f} s each")
            if nats is not None:
                known = ", ".join(f"{-value:.3f}" for value in nats.tolist())
                print(
                    f"Surprise of the known pixels, nats per pixel, estimated by {name_particles(particles)}: {known}"
                )
        drawn = torch.cat(parts, dim=1)
        if len(counts) > 1:
            titles = [name_particles(count) for count in counts]
        written.append(folder / "inpainted.png")
    elif given:
        tokens = processor(given, return_tensors="pt")["input_ids"]
        options |= {"tokens": tokens, "return_tokens": True} | guidance
        drawn = complete(model, processor, None, args.rows, args.num_completions, **options)
        kept = (height // 2 if args.rows is None else args.rows) * processor.token_grid()[1]
        hidden = np.broadcast_to(np.arange(tokens.shape[1]) >= kept, tokens.shape)
        written.append(folder / "completions.png")
    if hidden is not None:
        rows = plots.picture_of_completions(processor, given, [processor.decode(row) for row in drawn], hidden=hidden)
        save_picture(plots.completions_picture(rows, titles), written[-1])
        if args.gif:  # in each row the image itself, and what was made of it
            order = np.stack([find_order(mask, args, objective, drawn.shape[1]) for mask in hidden])
            order = np.concatenate([np.zeros_like(order[:, :1]), order], axis=1).reshape(-1, order.shape[2])
            shown = torch.cat([tokens[:, None], drawn], dim=1).flatten(0, 1).numpy()
            written.append(written[-1].with_suffix(".gif"))
            save_animation(plots.drawing_frames(processor, shown, order, 1 + drawn.shape[1]), written[-1])
    for path in written:
        print(f"Wrote {path}")
    return written


def name_particles(count: int) -> str:
    """ "1 particle", or "64 particles"."""
    return f"{count} particle{'s' if count > 1 else ''}"


def find_order(hidden: np.ndarray, args: SampleArguments, objective: str, count: int) -> np.ndarray:
    """When each pixel of the `count` completions of one image is drawn, (count, N): 0 if it is known, else from 1 on."""
    mask = torch.from_numpy(hidden.copy()).expand(count, -1)
    if objective == "masked":
        rounds = draw_rounds(mask, args.steps, torch.Generator().manual_seed(args.seed))  # as `fill_in` draws them
        return rounds.numpy() + 1
    return np.where(mask, mask.cumsum(1), 0)

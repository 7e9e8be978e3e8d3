"""Drawing images: `sample()` from nothing, `complete()` from the upper rows of given images."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from . import data, plots
from .cache_imagegpt import drawing_cache
from .evaluation import device_of, held_out_images
from .modeling_imagegpt import ImageGPTForCausalImageModeling, check_tokens


_HIDDEN = (230, 0, 160)  # colour of hidden pixels in pictures, which no photo is full of


def sample(
    model,
    processor,
    num_images: int,
    *,
    seed: int | None = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
    return_tokens: bool = False,
):
    """Draw `num_images` images unconditionally. Returns a list of PIL images, or tokens (num_images, N) int64.

    model: an `ImageGPTForCausalImageModeling`; processor: the one it was trained with. Defaults are the paper's
    sampling: temperature 1, nothing truncated [code run.py sample]. seed: the same seed, machine and batch size give
    the same images, and torch's own random state is left as it was; None draws from that state.
    """
    if num_images < 1:
        raise ValueError(f"num_images is at least 1; found {num_images}.")
    prompts = torch.empty((num_images, 0), dtype=torch.long)
    tokens = _continue(model, processor, prompts, seed, temperature, top_k, top_p, batch_size, progress)
    return tokens if return_tokens else processor.decode(tokens)


def complete(
    model,
    processor,
    images=None,
    rows: int | None = None,
    num_completions: int = 1,
    *,
    tokens: torch.Tensor | None = None,
    seed: int | None = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
    return_tokens: bool = False,
):
    """Keep the upper `rows` rows of each image (None: half of them, 0: nothing) and draw the rest.

    images: what the processor takes; or `tokens` (n, N) instead. Returns for each image a list of `num_completions` PIL
    images, or tokens (n, num_completions, N). The kept pixels are the image's own, exactly. Other arguments as `sample`.
    """
    if (images is None) == (tokens is None):
        raise ValueError("Pass either `images` or `tokens`, and not both.")
    height, width = processor.token_grid()
    rows = height // 2 if rows is None else rows
    if not 0 <= rows <= height:
        raise ValueError(f"rows is between 0 and the image's height, {height}; found {rows}.")
    if num_completions < 1:
        raise ValueError(f"num_completions is at least 1; found {num_completions}.")
    processor.check_fits(model.config)
    if tokens is None:
        tokens = processor(images, return_tensors="pt")["input_ids"]
    tokens = torch.as_tensor(tokens).cpu()
    tokens = tokens if tokens.is_floating_point() else tokens.long()
    if len(tokens) == 0 or tokens.ndim != 2 or tokens.shape[1] != height * width:
        raise ValueError(f"Tokens of images have shape (n, {height * width}), n >= 1; found {tuple(tokens.shape)}.")
    check_tokens(tokens, model.config.vocab_size - 1, "tokens", model.config)
    prompts = tokens[:, : rows * width].long().repeat_interleave(num_completions, dim=0)
    drawn = _continue(model, processor, prompts, seed, temperature, top_k, top_p, batch_size, progress)
    if return_tokens:
        return drawn.view(len(tokens), num_completions, -1)
    pictures = processor.decode(drawn)
    return [pictures[start : start + num_completions] for start in range(0, len(pictures), num_completions)]


def picture_of_completions(processor, images, completions, rows: int | None = None) -> list[list[Image.Image]]:
    """Rows of pictures for a grid: each image as the model sees it, its kept part, and its completions."""
    tokens = processor(images, return_tensors="pt")["input_ids"]
    height, width = processor.token_grid()
    rows = height // 2 if rows is None else rows
    originals = processor.decode(tokens)
    halves = processor.decode(tokens[:, : rows * width], missing="grey")
    return [[o, h, *c] for o, h, c in zip(originals, halves, completions, strict=True)]


@torch.no_grad()
def fill_in(model, tokens: torch.Tensor, mask: torch.Tensor, *, seed: int | None = 0) -> torch.Tensor:
    """Tokens (B, N) with the hidden pixels drawn from what a masked model says of each, given all that are not hidden.

    mask: (B, N), True where a pixel is hidden. Each is drawn by itself: no two hidden pixels know of each other. seed: the
    same seed and machine give the same pixels; None draws from torch's own random state.
    """
    training = model.training
    model.eval()
    try:
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        chances = model(input_ids=tokens, bool_masked_pos=mask).logits.float().softmax(dim=-1)  # (B, N, K)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(chances.flatten(0, 1).cpu(), 1, generator=generator).view_as(mask)
    finally:
        model.train(training)
    return torch.where(mask.cpu(), drawn, tokens.cpu())


def picture_of_masks(processor, tokens, mask, filled) -> list[list[Image.Image]]:
    """Rows of pictures for a grid, two images in each: the image, what a masked model was shown, and what it made of it."""
    shown = []
    for image, hidden in zip(processor.decode(tokens), mask, strict=True):
        pixels = np.array(image)
        pixels[np.asarray(hidden).reshape(pixels.shape[:2])] = _HIDDEN
        shown.append(Image.fromarray(pixels))
    triples = list(zip(processor.decode(tokens), shown, processor.decode(filled), strict=True))
    return [[image for triple in triples[start : start + 2] for image in triple] for start in range(0, len(triples), 2)]


class _Progress(StoppingCriteria):
    """Moves a bar by the pixels drawn; never stops."""

    def __init__(self, bar):
        self.bar = bar

    def __call__(self, input_ids, scores, **kwargs):
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def _continue(model, processor, prompts, seed, temperature, top_k, top_p, batch_size, progress) -> torch.Tensor:
    """Prompts (n, T) of pixels, without SOS -> whole images (n, N), on the CPU."""
    processor.check_fits(model.config)
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"Sampling needs temperature > 0, 0 < top_p <= 1, top_k >= 0; found {temperature}, {top_p}, {top_k}."
        )
    n_pixels = model.config.n_positions
    n_missing = n_pixels - prompts.shape[1]
    if n_missing == 0:
        return prompts
    training = model.training
    model.eval()
    finished = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices, enabled=seed is not None),
            tqdm(
                total=len(prompts) * n_missing,
                desc="Drawing",
                unit="pixel",
                disable=None if progress else True,
                leave=False,
            ) as bar,
        ):
            if seed is not None:
                torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size].to(model.device)
                tokens = model.generate(
                    torch.nn.functional.pad(batch, (1, 0), value=model.config.sos_token_id),
                    do_sample=True,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    max_length=n_pixels + 1,
                    use_cache=True,
                    cache_implementation=drawing_cache(model),
                    stopping_criteria=StoppingCriteriaList([_Progress(bar)]),
                )
                finished.append(tokens[:, 1:].cpu())
    finally:
        model.train(training)
    return torch.cat(finished)


@dataclass
class SampleArguments:
    """What to draw, with which model."""

    model_name_or_path: str = field(metadata={"help": "Trained model with its image processor: folder or Hub name."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the pictures go. Default: the model's folder."}
    )
    num_images: int = field(
        default=0, metadata={"help": "Images drawn from nothing. Default: 16 if nothing is completed."}
    )
    images: list[str] = field(default_factory=list, metadata={"help": "Image files to complete, or folders of them."})
    num_held_out: int = field(
        default=0, metadata={"help": "Complete this many held-out images of the dataset (the digits by default)."}
    )
    rows: int | None = field(default=None, metadata={"help": "Upper rows kept of each image. Default: half of them."})
    num_completions: int = field(default=5, metadata={"help": "Completions of each image."})
    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature (paper: 1)."})
    top_k: int = field(default=0, metadata={"help": "Draw among this many likeliest colours only; 0: all (paper)."})
    top_p: float = field(default=1.0, metadata={"help": "Draw among the likeliest colours of this total probability."})
    seed: int = field(default=42, metadata={"help": "Seed of the drawing."})
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the held-out split. Default: the one the model was trained with."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images drawn at once."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, … Default: an accelerator if there is one."})
    bf16: bool = field(
        default=False, metadata={"help": "Weights and cache in bfloat16: faster on GPUs, and other pictures of a seed."}
    )


def draw(args: SampleArguments, data_args) -> list[Path]:
    """Write `samples.png` and `completions.png` as the arguments ask; returns their paths."""
    if args.rows is not None and not (args.images or args.num_held_out):
        raise ValueError("--rows is of images to complete: give them with --images or --num_held_out.")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = ImageGPTForCausalImageModeling.from_pretrained(args.model_name_or_path, dtype=dtype)
    processor = data.processor_of(args.model_name_or_path, model.config)
    model.to(device_of(args.device))
    given = [data.read_image({"bytes": None, "path": str(file)}) for file in data.named_images(args.images)]
    if args.num_held_out:
        cells, _ = held_out_images(args.model_name_or_path, data_args, args.num_held_out, args.split_seed)
        print(f"Completing {len(cells)} held-out images of {data_args.name()}")
        given += [data.read_image(cell) for cell in cells]
    folder = Path(args.output_dir or args.model_name_or_path)
    if args.output_dir is None and not folder.is_dir():
        raise ValueError("Give --output_dir: the model is on the Hub, so there is no folder of its own to write to.")
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(args, name) for name in ("seed", "temperature", "top_k", "top_p", "batch_size")}
    written = []
    num_images = args.num_images or (0 if given else 16)
    if num_images:
        start = time.perf_counter()
        pictures = sample(model, processor, num_images, **options)
        print(f"Drew {num_images} images, {(time.perf_counter() - start) / num_images * 1000:.0f} ms each")
        written.append(folder / "samples.png")
        plots.square_grid(pictures).save(written[-1])
    if given:
        completions = complete(model, processor, given, args.rows, args.num_completions, **options)
        written.append(folder / "completions.png")
        rows = picture_of_completions(processor, given, completions, args.rows)
        plots.completions_picture(rows).save(written[-1])
    for path in written:
        print(f"Wrote {path}")
    return written

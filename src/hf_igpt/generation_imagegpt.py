"""Drawing images: `sample()` draws whole images, `complete()` continues the upper rows of images, `fill_in()` hidden pixels."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .cache_imagegpt import drawing_cache
from .features_imagegpt import evaluation_mode
from .image_processing_imagegpt import AnyImageProcessor
from .inputs_imagegpt import as_tokens, check_tokens
from .modeling_imagegpt import ImageGPTForCausalImageModeling, ImageGPTForMaskedImageModeling
from .pixels_imagegpt import AnyImage


def sample(
    model: ImageGPTForCausalImageModeling,
    processor: AnyImageProcessor,
    num_images: int,
    *,
    seed: int | None = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
    return_tokens: bool = False,
) -> list[Image.Image] | torch.Tensor:
    """Draw `num_images` images unconditionally. Return a list of PIL images, or tokens (num_images, N) int64.

    processor: the one that the model was trained with. The defaults are the paper's sampling: temperature 1, without
    truncation [code run.py sample]. seed: the same seed, machine and batch size give the same images, and torch's own
    random state is restored afterwards; None draws from that state. batch_size: images drawn at a time. Invalid options,
    and a processor that does not fit the model, are a ValueError.
    """
    if num_images < 1:
        raise ValueError(f"num_images is at least 1; found {num_images}.")
    prompts = torch.empty((num_images, 0), dtype=torch.long)
    tokens = _continue(model, processor, prompts, seed, temperature, top_k, top_p, batch_size, progress)
    return tokens if return_tokens else processor.decode(tokens)


def complete(
    model: ImageGPTForCausalImageModeling,
    processor: AnyImageProcessor,
    images: str | AnyImage | Sequence[str | AnyImage] | None = None,
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
    **generate_kwargs: Any,
) -> list[list[Image.Image]] | torch.Tensor:
    """Keep the upper `rows` rows of each image (None: half of them, 0: none) and draw the rest.

    images: anything the processor accepts; or pass `tokens` (n, N). Returns a list of `num_completions` PIL images for
    each image, or tokens (n, num_completions, N) int64. The kept pixels are exactly the image's own. `generate_kwargs` are
    further options of `generate`; the other arguments are those of `sample`. Invalid arguments are a ValueError.
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
        tokens = processor(images, return_tensors="pt")["input_ids"]  # type: ignore[arg-type]  # takes paths too
    tokens = as_tokens(tokens).cpu()
    if len(tokens) == 0 or tokens.ndim != 2 or tokens.shape[1] != height * width:
        raise ValueError(f"Tokens of images have shape (n, {height * width}), n >= 1; found {tuple(tokens.shape)}.")
    check_tokens(tokens, model.config.vocab_size - 1, "tokens", model.config)
    prompts = tokens[:, : rows * width].long().repeat_interleave(num_completions, dim=0)
    drawn = _continue(
        model, processor, prompts, seed, temperature, top_k, top_p, batch_size, progress, **generate_kwargs
    )
    if return_tokens:
        return drawn.view(len(tokens), num_completions, -1)
    pictures = processor.decode(drawn)
    return [pictures[start : start + num_completions] for start in range(0, len(pictures), num_completions)]


@torch.no_grad()
def fill_in(
    model: ImageGPTForMaskedImageModeling, tokens: torch.Tensor, mask: torch.Tensor, *, seed: int | None = 0
) -> torch.Tensor:
    """Draw the hidden pixels of `tokens` (B, N) from a masked model's predictions given all other pixels; return (B, N).

    mask: (B, N), True where a pixel is hidden. Hidden pixels are drawn independently of each other. seed: the same seed and
    machine give the same pixels; None draws from torch's own random state. The result is on the CPU.
    """
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    with evaluation_mode(model):
        chances = model(input_ids=tokens, bool_masked_pos=mask).logits.float().softmax(dim=-1)  # (B, N, K)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(chances.flatten(0, 1).cpu(), 1, generator=generator).view_as(mask)
    return torch.where(mask.cpu(), drawn, tokens.cpu())


class _Progress(StoppingCriteria):
    """Advances a progress bar by the pixels drawn, and never stops generation."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


_DRAWING = threading.RLock()  # one thread draws at a time: `generate` draws from torch's random state, which all share


@contextmanager
def _neutral_defaults(model: ImageGPTForCausalImageModeling) -> Iterator[None]:
    """Within it `generate` takes nothing from the checkpoint's generation_config.json, which may truncate or search."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig(bos_token_id=model.config.sos_token_id)
    try:
        yield
    finally:
        model.generation_config = defaults


@torch.no_grad()
def _continue(
    model: ImageGPTForCausalImageModeling,
    processor: AnyImageProcessor,
    prompts: torch.Tensor,
    seed: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int,
    progress: bool,
    **generate_kwargs: Any,
) -> torch.Tensor:
    """Continue `prompts` (n, T), pixels without SOS, to the tokens of whole images (n, N), on the CPU."""
    processor.check_fits(model.config)
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"Sampling needs temperature > 0, 0 < top_p <= 1, top_k >= 0; found {temperature}, {top_p}, {top_k}."
        )
    decided = {"max_length", "max_new_tokens", "num_return_sequences"} & set(generate_kwargs)
    if decided:
        raise ValueError(
            f"{', '.join(sorted(decided))}: images are drawn as a whole, and num_completions says how many of each."
        )
    n_pixels = model.config.n_positions
    n_missing = n_pixels - prompts.shape[1]
    if n_missing == 0:
        return prompts
    finished = []
    devices = [model.device] if model.device.type == "cuda" else []
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_length": n_pixels + 1,
        "use_cache": True,
    }
    if drawing_cache(model) is not None and not generate_kwargs:  # a static cache does not support every option
        options["cache_implementation"] = drawing_cache(model)
    with (
        _DRAWING,
        evaluation_mode(model),
        _neutral_defaults(model),
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
                stopping_criteria=StoppingCriteriaList([_Progress(bar)]),
                **options | generate_kwargs,
            )
            finished.append(tokens[:, 1:].cpu())
    return torch.cat(finished)

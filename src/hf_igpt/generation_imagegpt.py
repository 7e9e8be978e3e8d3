"""Drawing images: `sample()` from nothing, `complete()` from the upper rows of given images, `fill_in()` hidden pixels."""

import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from .cache_imagegpt import drawing_cache
from .features_imagegpt import evaluation_mode
from .inputs_imagegpt import check_tokens


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
    **generate_kwargs,
):
    """Keep the upper `rows` rows of each image (None: half of them, 0: nothing) and draw the rest.

    images: what the processor takes; or `tokens` (n, N) instead. Returns for each image a list of `num_completions` PIL
    images, or tokens (n, num_completions, N). The kept pixels are the image's own, exactly. `generate_kwargs` are further
    options of `generate`. Other arguments as in `sample`.
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
    drawn = _continue(
        model, processor, prompts, seed, temperature, top_k, top_p, batch_size, progress, **generate_kwargs
    )
    if return_tokens:
        return drawn.view(len(tokens), num_completions, -1)
    pictures = processor.decode(drawn)
    return [pictures[start : start + num_completions] for start in range(0, len(pictures), num_completions)]


@torch.no_grad()
def fill_in(model, tokens: torch.Tensor, mask: torch.Tensor, *, seed: int | None = 0) -> torch.Tensor:
    """Tokens (B, N) with the hidden pixels drawn from what a masked model says of each, given all that are not hidden.

    mask: (B, N), True where a pixel is hidden. Each is drawn by itself: no two hidden pixels know of each other. seed: the
    same seed and machine give the same pixels; None draws from torch's own random state.
    """
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    with evaluation_mode(model):
        chances = model(input_ids=tokens, bool_masked_pos=mask).logits.float().softmax(dim=-1)  # (B, N, K)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(chances.flatten(0, 1).cpu(), 1, generator=generator).view_as(mask)
    return torch.where(mask.cpu(), drawn, tokens.cpu())


class _Progress(StoppingCriteria):
    """Moves a bar by the pixels drawn; never stops."""

    def __init__(self, bar):
        self.bar = bar

    def __call__(self, input_ids, scores, **kwargs):
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def _continue(
    model, processor, prompts, seed, temperature, top_k, top_p, batch_size, progress, **generate_kwargs
) -> torch.Tensor:
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
    finished = []
    devices = [model.device] if model.device.type == "cuda" else []
    options = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_length": n_pixels + 1,
        "use_cache": True,
    }
    if drawing_cache(model) is not None and not generate_kwargs:  # not every option goes with a static cache
        options["cache_implementation"] = drawing_cache(model)
    with (
        evaluation_mode(model),
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

"""Drawing images: `sample()` draws whole images, `complete()` continues upper rows, `inpaint()` fills any hole.

A causal model fills a hole by sequential Monte Carlo, so that what comes after the hole shapes it too; a masked model reveals
hidden pixels in rounds (`fill_in()`).
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .cache_imagegpt import add_room, drawing_cache
from .features_imagegpt import evaluation_mode
from .image_processing_imagegpt import AnyImageProcessor
from .inputs_imagegpt import as_tokens, check_tokens, find_classes
from .modeling_imagegpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForMaskedImageModeling,
    ImageGPTPreTrainedModel,
)
from .pixels_imagegpt import AnyImage, ImageSource, crop_to_proportions, open_image, size_of
from .presets import INPAINTING_PARTICLES, INPAINTING_ROUNDS


Classes: TypeAlias = str | int | Sequence[str | int]  # names, as in the model's `config.id2label`, or numbers
MaskSource: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor | Sequence[float]
_CHUNK_LOGITS = 2**25  # at most, while known pixels are read


def sample(
    model: ImageGPTForCausalImageModeling,
    processor: AnyImageProcessor,
    num_images: int,
    *,
    classes: Classes | None = None,
    guidance: float = 1.0,
    seed: int | None = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
    scale: int = 1,
    return_tokens: bool = False,
) -> list[Image.Image] | torch.Tensor:
    """Draw `num_images` images, or as many of each of `classes`. Return a list of PIL images, or tokens (n, N) int64.

    processor: the one that the model was trained with. classes: for a model that was trained with classes, one or several,
    whose images follow one another; None: of no class. guidance: how much more typical of its class an image is to be than
    the model says, s of classifier-free guidance: logits are l + (s − 1) (l − l_∅), where l_∅ are those of no class, at the
    price of variety and of twice the work; 1: none. The defaults are the paper's sampling: temperature 1, without
    truncation [code run.py sample]. seed: the same seed, machine and batch size give the same images, and torch's own
    random state is restored afterwards; None draws from that state. batch_size: images drawn at a time. scale: the side, in
    pixels of the result, of the square that each token becomes. Invalid options, and a processor that does not fit the
    model, are a ValueError.
    """
    check_count("num_images", num_images)
    _check_model(model, processor)
    numbers = None
    if classes is not None:
        numbers = torch.tensor(find_classes(model.config, classes)).repeat_interleave(num_images)
    prompts = torch.empty((num_images if numbers is None else len(numbers), 0), dtype=torch.long)
    tokens = _continue(
        model, prompts, seed, temperature, top_k, top_p, batch_size, progress, classes=numbers, guidance=guidance
    )
    return tokens if return_tokens else processor.decode(tokens, scale=scale)


def complete(
    model: ImageGPTForCausalImageModeling,
    processor: AnyImageProcessor,
    images: str | AnyImage | Sequence[str | AnyImage] | None = None,
    rows: int | Sequence[int] | None = None,
    num_completions: int = 1,
    *,
    tokens: torch.Tensor | None = None,
    classes: Classes | None = None,
    guidance: float = 1.0,
    seed: int | None = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
    scale: int = 1,
    return_tokens: bool = False,
    **generate_kwargs: Any,
) -> list[list[Image.Image]] | torch.Tensor:
    """Keep the upper `rows` rows of each image (None: half of them, 0: none) and draw the rest.

    images: anything the processor accepts; or pass `tokens` (n, N). rows: one number, or one for each image. Images of as many
    rows are drawn together, from the same seed for each number of rows: what is drawn for an image depends on these images
    and their order, and not on those of other numbers of rows. Returns a list of `num_completions` PIL images for each
    image, or tokens (n, num_completions, N) int64. The kept pixels are exactly the image's own. classes: what the images are
    of, one class for all or one for each; None: no class. `generate_kwargs` are further options of `generate`; the other
    arguments are those of `sample`. Invalid arguments are a ValueError.
    """
    if (images is None) == (tokens is None):
        raise ValueError("Pass either `images` or `tokens`: one of them, and not both.")
    _check_model(model, processor)
    height, width = processor.token_grid()
    kept = read_rows(rows, height)
    check_count("num_completions", num_completions)
    if tokens is None:
        tokens = processor(images, return_tensors="pt")["input_ids"]  # type: ignore[arg-type]  # takes paths too
    tokens = as_tokens(tokens).cpu()
    if len(tokens) == 0 or tokens.ndim != 2 or tokens.shape[1] != height * width:
        raise ValueError(f"Tokens of images have shape (n, {height * width}), n >= 1; found {tuple(tokens.shape)}.")
    check_tokens(tokens, model.config.vocab_size - 1, "tokens", model.config)
    if kept.ndim and len(kept) != len(tokens):
        raise ValueError(f"rows is one number, or one for each of {len(tokens)} images; found {len(kept)} numbers.")
    numbers = _class_of_each(model, classes, len(tokens))
    drawn = torch.empty((len(tokens), num_completions, tokens.shape[1]), dtype=torch.long)
    for count in np.unique(kept).tolist():
        of_count = torch.from_numpy(np.broadcast_to(kept, len(tokens)) == count)
        prompts = tokens[of_count, : count * width].long().repeat_interleave(num_completions, dim=0)
        found = _continue(
            model,
            prompts,
            seed,
            temperature,
            top_k,
            top_p,
            batch_size,
            progress,
            classes=None if numbers is None else numbers[of_count].repeat_interleave(num_completions),
            guidance=guidance,
            **generate_kwargs,
        )
        drawn[of_count] = found.view(-1, num_completions, tokens.shape[1])
    return drawn if return_tokens else [processor.decode(row, scale=scale) for row in drawn]


def read_rows(rows: Any, height: int) -> np.ndarray:
    """Return how many rows are kept, () or (n,) int64: half of `height` for None. What is no such number is a ValueError."""
    numbers = np.asarray(height // 2 if rows is None else rows)
    if numbers.ndim > 1 or numbers.dtype.kind not in "iu" or not ((numbers >= 0) & (numbers <= height)).all():
        raise ValueError(
            f"rows is between 0 and the image's height, {height}; found {rows!r}. It is a whole number, or one for each image."
        )
    return numbers.astype(np.int64)


def inpaint(
    model: ImageGPTForCausalImageModeling | ImageGPTForMaskedImageModeling,
    processor: AnyImageProcessor,
    images: ImageSource | Sequence[ImageSource],
    mask: MaskSource,
    num_completions: int = 1,
    *,
    classes: Classes | None = None,
    particles: int = INPAINTING_PARTICLES,
    steps: int = INPAINTING_ROUNDS,
    seed: int | None = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
    scale: int = 1,
) -> list[list[Image.Image]]:
    """Draw the hidden pixels of each image anew: a list of `num_completions` PIL images for each of `images`.

    images: anything the processor accepts. mask: which pixels are hidden, as in `find_hidden`. Known pixels are kept exactly.
    There is no guidance here: holes are drawn by what the model believes. The other arguments are those of `inpaint_tokens`.
    Invalid arguments are a ValueError.
    """
    _check_model(model, processor)
    fetched: Any = processor.fetch_images(images)
    if isinstance(fetched, Image.Image) or (not isinstance(fetched, list) and fetched.ndim <= 3):
        fetched = [fetched]
    hidden = np.stack([find_hidden(processor, mask, size_of(image)).ravel() for image in fetched])
    tokens = processor(fetched, return_tensors="pt")["input_ids"]
    drawn, _ = inpaint_tokens(
        model,
        tokens,
        torch.from_numpy(hidden),
        num_completions,
        classes=classes,
        particles=particles,
        steps=steps,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
        progress=progress,
    )
    return [processor.decode(row, scale=scale) for row in drawn]


def find_hidden(processor: AnyImageProcessor, mask: MaskSource, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return which pixels of the model's image a mask hides, (H, W) bool: those of which any part is hidden.

    mask: a picture, or the path of one, whose light pixels (from 128) are hidden; an array (height, width) of booleans, of
    integers other than 0, or of floats from 0.5; or a box (left, top, right, bottom) in fractions of the image. A picture or
    an array has the image's size or the model's; the former is cropped as the image is. size: the image's (width, height), if
    there is one. A mask of another shape, and one that hides nothing or all, is a ValueError.
    """
    grid = processor.token_grid()
    whole = grid if size is None else size[::-1]
    if isinstance(mask, (str, os.PathLike, Image.Image)):
        try:
            mask = open_image(mask)
        except ValueError as error:
            raise ValueError(f"The mask {mask} cannot be read: {error}") from error
    if isinstance(mask, Image.Image):
        hides = np.asarray(mask.convert("L")) >= 128
    elif isinstance(mask, (np.ndarray, torch.Tensor)):
        array = mask.cpu().numpy() if torch.is_tensor(mask) else mask
        hides = array >= 0.5 if array.dtype.kind == "f" else array != 0
    else:
        hides = _hide_box(mask, whole)
    if hides.shape != grid:
        if hides.shape != whole:
            sizes = f"{grid[0]}x{grid[1]}" + ("" if whole == grid else f" or {whole[0]}x{whole[1]}")
            raise ValueError(f"The mask has shape {hides.shape}; the image has {sizes} pixels (height x width).")
        if processor.do_center_crop:
            if processor.crop_size not in (None, processor.size):
                raise ValueError(f"This processor crops after resizing: give a mask of {grid[0]}x{grid[1]} pixels.")
            hides = np.asarray(crop_to_proportions(hides, grid))
        hides = _shrink(hides, grid)
    if hides.all() or not hides.any():
        what = (
            "all pixels: `sample` draws whole images" if hides.any() else "nothing: its light pixels are what is drawn"
        )
        raise ValueError(f"The mask hides {what}.")
    return hides


def _hide_box(box: Any, shape: tuple[int, int]) -> np.ndarray:
    """Return a mask of `shape` that hides the pixels touched by `box`, (left, top, right, bottom) in fractions."""
    if np.shape(box) != (4,) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(
            "A mask is a picture, an array or a box. A box is (left, top, right, bottom) in fractions of the image's width and "
            f"height, 0 <= left < right <= 1 and 0 <= top < bottom <= 1; found {box!r}."
        )
    height, width = shape
    hides = np.zeros(shape, dtype=bool)
    rows = slice(math.floor(box[1] * height), math.ceil(box[3] * height))
    hides[rows, math.floor(box[0] * width) : math.ceil(box[2] * width)] = True
    return hides


def _shrink(hides: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return which cells of a grid that is laid over `hides` (height, width) overlap a hidden pixel."""
    for axis, cells in enumerate(grid):
        length = hides.shape[axis]
        starts = [index * length // cells for index in range(cells)]
        ends = [-(-(index + 1) * length // cells) for index in range(cells)]
        parts = [hides.take(range(*span), axis).any(axis) for span in zip(starts, ends, strict=True)]
        hides = np.stack(parts, axis)
    return hides


@torch.no_grad()
def inpaint_tokens(
    model: ImageGPTForCausalImageModeling | ImageGPTForMaskedImageModeling,
    tokens: torch.Tensor,
    hidden: torch.Tensor,
    num_completions: int = 1,
    *,
    classes: Classes | None = None,
    particles: int = INPAINTING_PARTICLES,
    steps: int = INPAINTING_ROUNDS,
    seed: int | None = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw the pixels of images `tokens` (B, N) that `hidden` (B, N) marks: tokens (B, num_completions, N) int64, on the CPU.

    A causal model draws `particles` images together for each completion, pixel by pixel. Where pixels are known, each image
    is weighted by the probability that the model gives to them, and images are resampled by their weights once these differ
    so much that the effective number of images is below half. One of the images is drawn by the weights at the end: with many
    particles, from the model's posterior given all known pixels. One particle is the usual shortcut of clamping, in which a
    hole does not know what comes after it. The second result is the estimated log-probability of the known pixels, in nats
    per known pixel (B,); None if all hidden pixels come last, where this is `complete`, and no particles are needed.

    A masked model reveals the hidden pixels in `steps` rounds of a random order, as in `fill_in`; nothing is truncated, and
    the second result is None.

    classes: what the images are of, for a model that was trained with classes, as in `complete`. batch_size: images drawn
    at a time, particles of a completion always together. seed, temperature, top_k, top_p: as in
    `sample`. Invalid arguments are a ValueError.
    """
    check_tokens(tokens := as_tokens(tokens), model.config.vocab_size - 1, "tokens", model.config)
    if hidden.shape != tokens.shape or hidden.dtype != torch.bool or tokens.shape[1] != model.config.n_positions:
        raise ValueError(
            f"Tokens and hidden pixels (bool) have shape (B, {model.config.n_positions}); found {tuple(tokens.shape)} and "
            f"{hidden.dtype} {tuple(hidden.shape)}."
        )
    for name, count in {"num_completions": num_completions, "particles": particles, "steps": steps}.items():
        check_count(name, count)
    _check_sampling(temperature, top_k, top_p)
    numbers = _class_of_each(model, classes, len(tokens))
    if isinstance(model, ImageGPTForMaskedImageModeling):
        rows = [
            fill_in(model, row.expand(num_completions, -1), mask.expand(num_completions, -1), steps=steps, seed=seed)
            for row, mask in zip(tokens, hidden, strict=True)
        ]
        return torch.stack(rows), None
    last = len(hidden[0]) - int(hidden[0].sum())
    if hidden[:, last:].all() and hidden.sum() == hidden[:, last:].numel():
        prompts = tokens[:, :last].repeat_interleave(num_completions, dim=0)
        each = None if numbers is None else numbers.repeat_interleave(num_completions)
        drawn = _continue(model, prompts, seed, temperature, top_k, top_p, batch_size, progress, classes=each)
        return drawn.view(len(tokens), num_completions, -1), None
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    at_once = max(1, batch_size // particles)
    groups = [min(at_once, num_completions - start) for start in range(0, num_completions, at_once)]
    results, chances = [], []
    with (
        evaluation_mode(model),
        tqdm(
            total=tokens.numel() * len(groups),
            desc="Drawing",
            unit="pixel",
            disable=None if progress else True,
            leave=False,
        ) as bar,
    ):
        # The token that stands first: SOS, or that of the class.
        starts = [model.config.sos_token_id] * len(tokens)
        if numbers is not None:
            starts = (numbers + model.config.vocab_size).tolist()
        for row, mask, start in zip(tokens, hidden, starts, strict=True):
            generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
            parts = [
                _draw_posterior(model, row, mask.tolist(), start, count, particles, warpers, generator, bar)
                for count in groups
            ]
            results.append(torch.cat([filled for filled, _ in parts]).cpu())
            evidence = torch.cat([evidence for _, evidence in parts])
            chances.append((evidence.logsumexp(0) - math.log(num_completions)) / (~mask).sum())
    return torch.stack(results), torch.stack(chances).cpu()


def _draw_posterior(
    model: ImageGPTForCausalImageModeling,
    tokens: torch.Tensor,
    hidden: list[bool],
    start: int,
    groups: int,
    particles: int,
    warpers: LogitsProcessorList,
    generator: torch.Generator | None,
    bar: tqdm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill one image, `tokens` (N,) after the token `start`, `groups` times, each by `particles` of its own.

    Returns the images (groups, N), and the estimates of the log-probability of all known pixels (groups,).
    """
    n_pixels, device = len(hidden), model.device
    first, last_known = hidden.index(True), n_pixels - 1 - hidden[::-1].index(False)
    rows = tokens.to(device)[None]  # (1, N), and (groups · particles, N) from the first hidden pixel on
    pending = rows.new_full((1, 1), start)  # the last pixel that is decided, which is not yet read
    log_weights = torch.zeros(1, 1, dtype=torch.float64, device=device)  # (groups, particles) likewise, since resampled
    evidence = torch.zeros(1, dtype=torch.float64, device=device)
    cache = DynamicCache(config=model.config)
    add_room(cache, n_pixels)

    def read(inputs: torch.Tensor) -> torch.Tensor:
        bar.update(inputs.shape[1])
        return model(input_ids=inputs, past_key_values=cache, use_cache=True).logits.float()

    def keep(chosen: torch.Tensor) -> None:
        nonlocal rows, pending
        rows, pending = rows[chosen], pending[chosen]
        cache.reorder_cache(chosen)  # type: ignore[arg-type]  # an annotation that no int64 tensor has

    def choose_one() -> torch.Tensor:
        firsts = torch.arange(len(log_weights), device=device)[:, None] * log_weights.shape[1]
        return (firsts + _resample(log_weights, 1, generator)).flatten()

    place = 0
    while place < n_pixels:
        if place == first and first < last_known:
            keep(torch.zeros(groups * particles, dtype=torch.long, device=device))
            log_weights, evidence = log_weights.new_zeros(groups, particles), evidence.expand(groups)
        if hidden[place]:
            if place == last_known + 1:  # what is to come changes no weight
                keep(choose_one())
            logits: Any = warpers(rows[:, :place], read(pending)[:, -1])  # type: ignore[arg-type]  # likewise
            pending = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            rows[:, place : place + 1] = pending
            place += 1
            continue
        end = next((index for index in range(place, n_pixels) if hidden[index]), n_pixels)
        end = min(end, place + max(1, _CHUNK_LOGITS // (len(rows) * model.config.vocab_size)))
        known = rows[:, place:end]
        chances = read(torch.cat([pending, known[:, :-1]], dim=1)).log_softmax(dim=-1)
        chances = chances.gather(-1, known[..., None]).double().sum(dim=(1, 2)).view_as(log_weights)
        evidence = evidence + (log_weights + chances).logsumexp(1) - log_weights.logsumexp(1)
        log_weights, pending, place = log_weights + chances, known[:, -1:], end
        effective = 1 / log_weights.softmax(1).square().sum(1)  # how many particles the weights leave
        poor = effective < log_weights.shape[1] / 2
        if place < last_known and poor.any():
            everyone = torch.arange(particles, device=device).expand(groups, -1)
            chosen = torch.where(poor[:, None], _resample(log_weights, particles, generator), everyone)
            keep((torch.arange(groups, device=device)[:, None] * particles + chosen).flatten())
            log_weights = log_weights.masked_fill(poor[:, None], 0)
    return (rows if hidden[-1] else rows[choose_one()]), evidence


def _resample(log_weights: torch.Tensor, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draw `count` indices for each row of weights (G, P), in proportion to them, systematically: (G, count)."""
    offsets = torch.rand(len(log_weights), 1, generator=generator, dtype=torch.float64, device=log_weights.device)
    points = (torch.arange(count, dtype=torch.float64, device=log_weights.device) + offsets) / count
    edges = log_weights.softmax(1).cumsum(1)
    return torch.searchsorted(edges / edges[:, -1:], points, right=True).clamp(max=log_weights.shape[1] - 1)


@torch.no_grad()
def fill_in(
    model: ImageGPTForMaskedImageModeling,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    *,
    steps: int = 1,
    seed: int | None = 0,
) -> torch.Tensor:
    """Draw the hidden pixels of `tokens` (B, N) from a masked model's predictions; return (B, N), on the CPU.

    mask: (B, N), True where a pixel is hidden. They are revealed in `steps` rounds, in a random order for each image: those
    of one round are drawn independently of each other, given all known and revealed pixels. With as many rounds as there are
    hidden pixels they are drawn one by one. seed: the same seed and machine give the same pixels; None draws from torch's
    own random state.
    """
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rounds = draw_rounds(mask.cpu(), steps, generator)
    for step in range(steps):
        reveals = (rounds == step).to(mask.device)
        if not reveals.any():
            continue
        with evaluation_mode(model):
            chances = model(input_ids=tokens, bool_masked_pos=mask).logits.float().softmax(dim=-1)  # (B, N, K)
        drawn = torch.multinomial(chances.flatten(0, 1).cpu(), 1, generator=generator).view(mask.shape)
        tokens = torch.where(reveals, drawn.to(tokens.device), tokens)
        mask = mask & ~reveals
    return tokens.cpu()


def draw_rounds(mask: torch.Tensor, steps: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw in which round `fill_in` reveals each hidden pixel of `mask` (B, N): 0..steps-1, as evenly as can be; -1 if known."""
    rounds = torch.zeros(mask.shape, dtype=torch.long)
    if steps > 1:
        shuffled = torch.rand(mask.shape, generator=generator).masked_fill(~mask, 2).argsort(dim=1).argsort(dim=1)
        rounds = shuffled * steps // mask.sum(dim=1, keepdim=True).clamp(min=1)
    return rounds.masked_fill(~mask, -1)


class _Progress(StoppingCriteria):
    """Advances a progress bar by the pixels drawn, and never stops generation."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _class_of_each(model: ImageGPTPreTrainedModel, classes: Classes | None, n_images: int) -> torch.Tensor | None:
    """Return the number of the class of each of `n_images` images (n,); `classes` are one for all, or one for each."""
    if classes is None:
        return None
    found = torch.tensor(find_classes(model.config, classes))
    if len(found) not in (1, n_images):
        raise ValueError(f"Give one class, or one for each image; found {len(found)} for {n_images}.")
    return found.expand(n_images)


def check_count(name: str, count: Any) -> None:
    """Raise ValueError unless `count`, an argument called `name`, is a whole number of at least 1."""
    if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{name} is at least 1, a whole number; found {count!r}.")


def _check_model(model: Any, processor: Any) -> None:
    """Raise ValueError unless these are a model and its processor, rather than their names, or the one for the other."""
    if not isinstance(model, torch.nn.Module) or not hasattr(processor, "check_fits"):
        raise ValueError(
            "The first argument is a model, and the second its image processor, both loaded by `from_pretrained`; found "
            f"{type(model).__name__} and {type(processor).__name__}."
        )
    processor.check_fits(model.config)


def _check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if not (temperature > 0 and 0 < top_p <= 1 and top_k >= 0):
        raise ValueError(
            f"Sampling needs temperature > 0, 0 < top_p <= 1, top_k >= 0; found {temperature}, {top_p}, {top_k}."
        )


_DRAWING = threading.RLock()  # one thread draws at a time: `generate` draws from torch's random state, which all share


def draw_seed() -> int:
    """Draw an integer from torch's random state as a `DataLoader` does, but not while another thread draws images."""
    with _DRAWING:
        return int(torch.empty((), dtype=torch.int64).random_())


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
    prompts: torch.Tensor,
    seed: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int,
    progress: bool,
    *,
    classes: torch.Tensor | None = None,
    guidance: float = 1.0,
    **generate_kwargs: Any,
) -> torch.Tensor:
    """Continue `prompts` (n, T), pixels without SOS, to the tokens of whole images (n, N) of `classes` (n,), on the CPU."""
    _check_sampling(temperature, top_k, top_p)
    if not (isinstance(guidance, (int, float)) and 1 <= guidance < math.inf):
        raise ValueError(f"guidance is a number of at least 1, which is none, and finite; found {guidance!r}.")
    if guidance != 1 and classes is None:
        raise ValueError("guidance is for images of classes: name them by classes=…, or leave guidance out.")
    decided = {"max_length", "max_new_tokens", "num_return_sequences", "class_labels", "guidance_scale"} & set(
        generate_kwargs
    )
    if decided:
        raise ValueError(
            f"{', '.join(sorted(decided))}: images are drawn as a whole, and num_completions says how many of each, classes and "
            "guidance of what."
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
        "guidance_scale": guidance,
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
            labels = None if classes is None else classes[start : start + batch_size].to(model.device)
            tokens = model.generate(
                torch.nn.functional.pad(batch, (1, 0), value=model.config.sos_token_id),
                class_labels=labels,
                stopping_criteria=StoppingCriteriaList([_Progress(bar)]),
                **options | generate_kwargs,
            )
            finished.append(tokens[:, 1:].cpu())
    return torch.cat(finished)

"""Ours against transformers' own ImageGPT, and against what the work needs at least, side by side in one run.

    python benchmarks/run.py --suite all --output records.json        # 2 CPU cores: 15 minutes; a line of table per stage
    python benchmarks/run.py --suite train --device cuda              # one H100: S and M, bfloat16, with Trainer

Both have the same weights and the same data, made here. Their outputs are compared before anything is timed; then they
take turns, and medians count: on a shared machine ratios say more than seconds. The limit is a bare version of the work that
cannot be left out: matrix products, PIL's resize, the decoding of files. Peak memory is what a call adds to what is held before it.
"""

import gc
import io
import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.imagegpt import ImageGPTImageProcessorPil as TheirProcessor
from transformers.models.imagegpt import configuration_imagegpt as their_configuration
from transformers.models.imagegpt import modeling_imagegpt as their_modeling

from hf_igpt import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTImageProcessorPil, clusters, data
from hf_igpt.cache_imagegpt import drawing_cache
from hf_igpt.commands.cli import run_script
from hf_igpt.evaluation.records import Record, read_records, write_records
from hf_igpt.features_imagegpt import features_of_tokens
from hf_igpt.presets import N_COLORS
from hf_igpt.training.costs import training_flops
from hf_igpt.training.trainer import ImageGPTTrainer


OURS, THEIRS, LIMIT = "hf_igpt", "transformers", "limit"
SUITES = ("train", "generate", "features", "tokenize")
PEAK_TFLOPS = {"H100": 990, "H200": 990}  # bfloat16, dense, as their data sheets say
_TURN = 0.1  # seconds
_POOL = 8  # batches of images that are tokenised one after another
PEAK_BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second, likewise


@dataclass
class BenchmarkArguments:
    """What is timed, and on what."""

    suite: str = field(default="all", metadata={"help": "What is timed.", "choices": [*SUITES, "all"]})
    device: str = field(default="cpu", metadata={"help": "Of the model's suites.", "choices": ["cpu", "cuda"]})
    output: str | None = field(
        default=None, metadata={"help": "JSON file for the records, those of other suites kept."}
    )
    repeats: int = field(default=5, metadata={"help": "Turns of each contender; their median counts."})
    compile: bool = field(default=True, metadata={"help": "Also time compiled models."})
    n_layer: int = field(default=8, metadata={"help": "Layers of the model, on a CPU."})
    n_embd: int = field(default=256, metadata={"help": "Its width."})
    n_head: int = field(default=4, metadata={"help": "Its heads."})
    image_size: int = field(default=32, metadata={"help": "Pixels of a side."})
    n_images: int = field(default=64, metadata={"help": "Images that are tokenised at once."})
    n_files: int = field(default=10_000, metadata={"help": "JPEG files of a folder that is tokenised."})
    n_pixels: int = field(default=1_000_000, metadata={"help": "Pixels that a palette is fitted to."})
    max_tokens: int | None = field(default=None, metadata={"help": "Pixels drawn of each image. Default: all."})

    def __post_init__(self):
        for name in ("repeats", "n_layer", "n_embd", "n_head", "image_size", "n_images", "n_files", "n_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is at least 1; found {getattr(self, name)}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no GPU that torch can use; leave it out.")


# -- timing ------------------------------------------------------------------------------------------------------------


def take_turns(contenders: dict[str, Callable], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of a call of each contender, `repeats` times in turns after one call each to warm up.

    What is short is called again and again for `_TURN` seconds, and the mean counts: the first call after another's turn
    finds its data gone from the processor's caches, which is not how the next of many batches finds it.
    """
    calls, seconds = {}, {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            if repeat:
                seconds[name].append(_seconds(run, calls[name], device))
            else:
                calls[name] = math.ceil(_TURN / _seconds(run, 1, device))
    return seconds


def peak_memory(run: Callable, device: str = "cpu") -> float:
    """MiB that PyTorch's allocator holds at the peak of a call of `run`, beyond what it holds before."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(allocations, key=lambda event: event.start_ns())])
    return float(held.max(initial=0)) / 2**20


def _seconds(run: Callable, calls: int = 1, device: str = "cpu") -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Stage:
    """What belongs to all records of one stage. n counts images."""

    name: str
    n: int
    data: str
    settings: dict

    def records(self, seconds: dict[str, list[float]], memory: dict[str, float] | None = None) -> list[Record]:
        made = [self.record("seconds", statistics.median(times), "s", name, times) for name, times in seconds.items()]
        made += [self.record("peak_memory", mib, "MiB", name) for name, mib in (memory or {}).items()]
        print(table(made).splitlines()[-1], flush=True)
        return made

    def record(self, metric, value, unit, model, times=None) -> Record:
        spread = {} if times is None else {"fastest": min(times), "slowest": max(times), "repeats": len(times)}
        threads = {"threads": torch.get_num_threads()}
        settings = {"stage": self.name} | self.settings | threads | spread
        return Record(metric, value, unit, "made here", self.n, 0, model, self.data, settings=settings)


def table(records: list[Record], summary: bool = False) -> str:
    """Records as a Markdown table: for each stage, and each of ours in it, times and ratios: against theirs of the same
    kind where it was run, compiled against compiled, else against theirs as it is.

    summary: only stages that transformers has too; of images that become tokens, those given many at once.
    """
    if summary:
        both = {record.stage for record in records if record.system == THEIRS}
        both = {stage for stage in both if "tokens of" not in stage or not stage.endswith(", 1 at once")}
        records = [record for record in records if record.stage in both]
    lines = ["| stage | hf_igpt | transformers | times faster | limit / hf_igpt | memory / theirs |", "|---" * 6 + "|"]
    for stage in dict.fromkeys(record.stage for record in records):
        own = [record for record in records if record.stage == stage]
        times = {(record.system, record.variant): record.value for record in own if record.metric == "seconds"}
        memory = {(record.system, record.variant): record.value for record in own if record.metric == "peak_memory"}
        limit = times.get((LIMIT, None))
        for system, variant in times:
            if system != OURS:
                continue
            opponent = (THEIRS, variant if (THEIRS, variant) in times else None)
            ours, theirs = times[system, variant], times.get(opponent)
            what = stage + (f", {variant}" if variant else "")
            held = memory.get((system, variant)), memory.get(opponent)
            cells = [
                what,
                _time(ours),
                "" if theirs is None else _time(theirs),
                "" if theirs is None else f"{theirs / ours:.{2 if theirs < 10 * ours else 0}f}",
                "" if limit is None else f"{limit / ours:.2f}",
                "" if None in held else f"{held[0] / held[1]:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


# -- models ------------------------------------------------------------------------------------------------------------


def models(device: str, n_colors: int = N_COLORS, **shape):
    """Ours and transformers' ImageGPT with the same random weights, without dropout."""
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ours = ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=n_colors + 1, **none, **shape))
    theirs = their_modeling.ImageGPTForCausalImageModeling(
        their_configuration.ImageGPTConfig(vocab_size=n_colors + 1, **none, **shape)
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)  # theirs has buffers of masks
    return ours.to(device), theirs.to(device)


def _shape(args: BenchmarkArguments) -> dict:
    n_positions = args.image_size**2
    return {"n_layer": args.n_layer, "n_embd": args.n_embd, "n_head": args.n_head, "n_positions": n_positions}


def _tokens(config, count: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size - 1, (count, config.n_positions), generator=generator).to(device)


def _after_sos(tokens, config):
    return torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=config.sos_token_id)


def _same(what: str, ours, theirs, tolerance: float = 1e-4):
    """Nothing is timed that does not do the same."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    difference = float((ours - theirs).abs().max())
    limit = tolerance * max(1.0, float(theirs.abs().max()))
    if not difference <= limit:
        raise ValueError(f"{what} differ by {difference:.3g}, more than {limit:.3g}: these timings would mean nothing.")


def _matrix_products(model, batch_size: int, length: int, keys: int, *, backward: bool = False, head: bool = True):
    """The bare matrix products of all weights with `batch_size` x `length` rows, and of attention to `keys` positions."""
    config, device = model.config, model.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = [weight for weight in model.transformer.h.parameters() if weight.ndim == 2]  # [in, out]
    weights = [weight.detach().to(dtype) for weight in weights + [model.lm_head.weight.t()] * head]
    rows = {n: torch.randn(batch_size * length, n, device=device, dtype=dtype) for w in weights for n in w.shape}
    heads, size = batch_size * config.n_head, config.n_embd // config.n_head
    query = torch.randn(heads, length, size, device=device, dtype=dtype)
    key, chance = query.new_empty(heads, keys, size).normal_(), query.new_empty(heads, length, keys).normal_()

    @torch.no_grad()
    def run():
        for weight in weights:
            inputs, outputs = (rows[n] for n in weight.shape)
            inputs @ weight
            if backward:
                outputs @ weight.t()
                inputs.t() @ outputs
        for _ in range(config.n_layer * (3 if backward else 1)):
            query @ key.transpose(1, 2)
            chance @ key

    return run


def _causal_products(model, batch_size: int, **options) -> Callable:
    """`_matrix_products` of whole images, attention to half of all positions: a kernel skips what is masked."""
    n_positions = model.config.n_positions
    return _matrix_products(model, batch_size, n_positions, n_positions // 2, **options)


# -- training ----------------------------------------------------------------------------------------------------------


def train(args: BenchmarkArguments) -> list[Record]:
    if args.device == "cuda":
        return [record for size in ("s", "m") for record in train_with_trainer(args, size)]
    batch_size, bf16 = 4, torch.autocast("cpu", torch.bfloat16)
    ours, theirs = models("cpu", **_shape(args))
    tokens = _tokens(ours.config, batch_size, "cpu")
    inputs = _after_sos(tokens, ours.config)

    def their_loss():
        logits = theirs(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def step(model, loss, context=nullcontext()):  # noqa: B008
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # 0: all steps do the same

        def run():
            optimizer.zero_grad()
            with context:
                found = loss()
            found.backward()
            optimizer.step()
            return found

        return run

    def check(tolerance=1e-4, **contenders):
        """All contenders' losses and gradients are those of transformers as it is."""
        expected = plain[THEIRS]()
        gradients = [parameter.grad.clone() for parameter in theirs.parameters()]
        for name, run in contenders.items():
            _same(f"Losses of {name}", run(), expected, tolerance)
            model = theirs if name.startswith(THEIRS) else ours
            for (parameter, one), other in zip(model.named_parameters(), gradients, strict=True):
                _same(f"Gradients of {name}, {parameter},", one.grad, other, tolerance)

    def their_loss_compiled():
        logits = their_compiled(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    plain = {THEIRS: step(theirs, their_loss), OURS: step(ours, lambda: ours(labels=tokens).loss)}
    contenders = dict(plain)
    check(**{OURS: plain[OURS]})
    if args.compile:
        compiled, their_compiled = torch.compile(ours, fullgraph=True), torch.compile(theirs)
        contenders[f"{THEIRS} compiled"] = step(theirs, their_loss_compiled)
        contenders[f"{OURS} compiled"] = step(ours, lambda: compiled(labels=tokens).loss)
        contenders[f"{OURS} compiled bf16"] = step(ours, lambda: compiled(labels=tokens).loss, bf16)
        check(**{name: run for name, run in contenders.items() if name.endswith("compiled")})
        check(0.05, **{name: run for name, run in contenders.items() if name.endswith("bf16")})
    memory = {name: peak_memory(run) for name, run in contenders.items() if "bf16" not in name}
    contenders[LIMIT] = _causal_products(ours, batch_size, backward=True)
    stage = Stage("training step", batch_size, "random tokens", _shape(args) | {"batch size": batch_size})
    records = stage.records(take_turns(contenders, args.repeats), memory)
    for model in (ours, theirs):
        model.gradient_checkpointing_enable()
    checkpointing = Stage("training step, gradient checkpointing", batch_size, "random tokens", stage.settings)
    check(**{OURS: plain[OURS]})
    memory = {name: peak_memory(run) for name, run in plain.items()}
    return records + checkpointing.records(take_turns(plain, args.repeats), memory)


class _Timer(TrainerCallback):
    """Seconds of the steps after the first `warm_up`."""

    def __init__(self, warm_up: int):
        self.warm_up, self.start, self.seconds = warm_up, None, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.warm_up, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.start, self.seconds = (
                (now, None) if state.global_step == self.warm_up else (self.start, now - self.start)
            )


def trainer_seconds(
    kind, model, config, batch_size: int, micro_batch: int, steps: int, folder: str, fields, compiled: bool = True
):
    """Seconds that a step of `batch_size` images takes in `Trainer`, end to end, from uint16 tokens in a memory map."""
    path = Path(folder) / "tokens.npy"
    if not path.exists():
        np.save(path, _tokens(config, 4 * batch_size, "cpu").numpy().astype(np.uint16))
    rows = np.load(path, mmap_mode="r")
    on_gpu = model.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch_size // micro_batch,
        max_steps=steps,
        bf16=on_gpu,
        torch_compile=compiled,
        use_cpu=not on_gpu,
        dataloader_num_workers=4 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    timer = _Timer(steps // 3)

    def collate(batch):
        tokens = torch.from_numpy(np.stack(batch)).long()
        return dict.fromkeys(fields, tokens)

    kind(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[timer]).train()
    return timer.seconds / (steps - steps // 3)


def train_with_trainer(args: BenchmarkArguments, size: str, batch_size: int = 128, steps: int = 30, config=None):
    """`Trainer` end to end. Theirs in its fastest working setting: compiled or not, the largest micro-batch that fits."""
    config = config or ImageGPTConfig.from_preset(size)
    shape = {name: getattr(config, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
    n_colors = config.vocab_size - 1
    ours, theirs = models(args.device, n_colors, **shape)
    tokens = _tokens(config, 2, args.device)
    with torch.no_grad():
        inputs = _after_sos(tokens, config)
        _same("Logits", ours(input_ids=inputs).logits, theirs(input_ids=inputs).logits, 1e-3)

    def fastest(kind, model, fields):
        found = []
        for compiled in (True, False) if args.compile else (False,):
            micro_batch = batch_size
            while micro_batch:
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        seconds = trainer_seconds(
                            kind, model, config, batch_size, micro_batch, steps, folder, fields, compiled
                        )
                    found.append((seconds, micro_batch, compiled))
                    break
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    micro_batch //= 2
            torch._dynamo.reset()
        return min(found)

    seconds, micro_batch, compiled = fastest(ImageGPTTrainer, ours, ("labels",))
    their_seconds, their_micro_batch, their_compiled = fastest(Trainer, theirs, ("input_ids", "labels"))
    flops = training_flops(config, batch_size)
    settings = {
        "batch size": batch_size,
        "size": size,
        "image size": math.isqrt(config.n_positions),
        "precision": "bfloat16 autocast" if args.device == "cuda" else "float32",
        "micro-batch": micro_batch,
        "compiled": compiled,
        "their micro-batch": their_micro_batch,
        "their compilation": their_compiled,
    }
    stage = Stage(f"Trainer, {size}", batch_size, "random tokens", settings)
    times = {OURS: [seconds], THEIRS: [their_seconds]}
    peak = _of_this_gpu(PEAK_TFLOPS)
    if peak:
        times[LIMIT] = [flops / (peak * 1e12)]
    records = stage.records(times)
    records.append(stage.record("images_per_second", batch_size / seconds, "images/s", OURS))
    records.append(stage.record("tflops_per_second", flops / seconds / 1e12, "TFLOP/s", OURS))
    return records


def _of_this_gpu(figures: dict[str, float]) -> float | None:
    if not torch.cuda.is_available():
        return None
    return next((value for name, value in figures.items() if name in torch.cuda.get_device_name()), None)


# -- generation --------------------------------------------------------------------------------------------------------


def generate(args: BenchmarkArguments) -> list[Record]:
    on_gpu = args.device == "cuda"
    shape = _shape(args)
    if on_gpu:
        preset = ImageGPTConfig.from_preset("s", image_size=args.image_size)
        shape = {name: getattr(preset, name) for name in shape}
    ours, theirs = (model.eval() for model in models(args.device, initializer_range=0.2, **shape))
    sos, length = ours.config.sos_token_id, ours.config.n_positions + 1

    def draw(model, batch_size, new_tokens, **options):
        torch.manual_seed(1)
        prompt = torch.full((batch_size, 1), sos, device=args.device)
        return model.generate(prompt, max_length=1 + new_tokens, **({"do_sample": True, "top_k": 0} | options))

    few = min(64, length - 1)
    greedy = draw(theirs, 2, few, do_sample=False)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        if not torch.equal(draw(ours, 2, few, do_sample=False, **options), greedy):
            raise ValueError(
                f"Greedy tokens differ from transformers' with {options}: these timings would mean nothing."
            )
    if on_gpu:
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    records = []
    for batch_size in (1, 64) if on_gpu else (1, 16):
        new_tokens = args.max_tokens or length - 1
        contenders = {
            THEIRS: partial(draw, theirs, batch_size, new_tokens),
            OURS: partial(draw, ours, batch_size, new_tokens, cache_implementation=drawing_cache(ours)),
        }
        settings = shape | {"batch size": batch_size, "tokens": new_tokens}
        stage = Stage(f"whole images, {batch_size} at once", batch_size, "random weights", settings)
        seconds = take_turns(contenders, min(3, args.repeats), args.device)
        bandwidth = _of_this_gpu(PEAK_BANDWIDTH)
        if bandwidth:  # weights and half a cache, in bfloat16, read once for each token
            weights = 2 * sum(
                p.numel() for name, p in ours.named_parameters() if "wte" not in name and "wpe" not in name
            )
            cache = 2 * 2 * shape["n_layer"] * shape["n_embd"] * batch_size * new_tokens / 2
            seconds[LIMIT] = [new_tokens * (weights + cache) / bandwidth]
        else:
            one = take_turns({LIMIT: _matrix_products(ours, batch_size, 1, new_tokens // 2)}, args.repeats)
            seconds[LIMIT] = [new_tokens * time for time in one[LIMIT]]
        records += stage.records(seconds)
    return records


# -- features ----------------------------------------------------------------------------------------------------------


def features(args: BenchmarkArguments) -> list[Record]:
    batch_size = 16
    ours, theirs = (model.eval() for model in models(args.device, **_shape(args)))
    tokens = _tokens(ours.config, batch_size, args.device)
    inputs = _after_sos(tokens, ours.config)

    @torch.no_grad()
    def their_features():
        hidden = theirs.transformer(input_ids=inputs, output_hidden_states=True, use_cache=False).hidden_states
        blocks = theirs.transformer.h
        found = [block.ln_1(states).mean(dim=1) for block, states in zip(blocks, hidden[:-1], strict=True)]
        return torch.stack([*found, hidden[-1].mean(dim=1)])

    def our_features():
        return torch.stack(list(features_of_tokens(ours, tokens).values()))

    _same("Features", our_features(), their_features())
    contenders = {THEIRS: their_features, OURS: our_features}
    memory = {name: peak_memory(run, args.device) for name, run in contenders.items()}
    contenders[LIMIT] = _causal_products(ours, batch_size, head=False)
    stage = Stage("features of all layers", batch_size, "random tokens", _shape(args) | {"batch size": batch_size})
    return stage.records(take_turns(contenders, args.repeats, args.device), memory)


# -- tokens ------------------------------------------------------------------------------------------------------------


def photos(count: int, width: int = 224, height: int = 224) -> list[Image.Image]:
    """Windows of two photographs that scikit-learn brings along, each in colours of its own, so that no two are alike."""
    rng = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    made = []
    for _ in range(count):
        source = sources[rng.integers(len(sources))]
        scale = rng.uniform(0.5, 1) * min(source.width / width, source.height / height)
        left, top = rng.uniform(0, (source.width - scale * width, source.height - scale * height))
        window = source.resize((width, height), 3, box=(left, top, left + scale * width, top + scale * height))
        colors = np.asarray(window) * rng.uniform(0.6, 1.2, 3)
        made.append(Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8)))
    return made


def tokenize(args: BenchmarkArguments) -> list[Record]:
    """One thread for the processors, as for both; two processes where that is what is timed."""
    images = photos(_POOL * args.n_images)
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images[: args.n_images]])
    rng = np.random.default_rng(0)
    palette = clusters.to_unit_range(pixels[rng.permutation(len(pixels))[:N_COLORS]]) + rng.uniform(
        -1e-3, 1e-3, (N_COLORS, 3)
    )
    palette = np.clip(palette, -1, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        records = _processors(args, images, palette) + _tables(args, palette)
    finally:
        torch.set_num_threads(threads)
    return records + _batches(args, palette) + _palette_fit(args) + _folder(args, palette)


def _processors(args, images, palette):
    side = {"height": args.image_size, "width": args.image_size}
    ours, theirs = (kind(clusters=palette, size=side) for kind in (ImageGPTImageProcessorPil, TheirProcessor))
    small = [image.resize((args.image_size, args.image_size), 2) for image in images]
    square = f"{args.image_size}x{args.image_size}"
    records = []
    for what, everything, limit in (
        (f"{square} PIL images", small, None),
        (f"{square} arrays", [np.asarray(image) for image in small], None),
        ("224x224 PIL photos", images, lambda batch: [image.resize((args.image_size,) * 2, 2) for image in batch]),
    ):
        for count in dict.fromkeys((args.n_images, 1)):
            batches = [everything[start : start + count] for start in range(0, len(everything), count)]
            found, expected = (
                np.asarray(processor(batches[0], return_tensors="pt")["input_ids"]) for processor in (ours, theirs)
            )
            _equally_near(found, expected, palette, batches[0], args.image_size)
            runs = {THEIRS: partial(theirs, return_tensors="pt")}
            runs |= {OURS: partial(ours, return_tensors="pt")} | ({LIMIT: limit} if limit else {})
            seconds = take_turns(
                {name: _on_one_after_another(run, batches) for name, run in runs.items()}, args.repeats
            )
            stage = Stage(f"tokens of {what}, {count} at once", count, "windows of photographs", {"batch size": count})
            records += stage.records(seconds)
    return records


def _on_one_after_another(run: Callable, batches: list) -> Callable:
    """Calls of `run`, each on the next batch, round and round: what a table holds for one batch is not at hand for the next."""
    following = itertools.cycle(batches)
    return lambda: run(next(following))


def _equally_near(found, expected, palette, images, image_size):
    """Tokens equal transformers', but where the two distances are equal up to its rounding."""
    pixels = np.stack(
        [np.asarray(image if isinstance(image, np.ndarray) else image.resize((image_size,) * 2, 2)) for image in images]
    )
    pixels = clusters.to_unit_range(pixels.reshape(len(images), -1, 3))
    ours, theirs = (np.square(pixels - palette[tokens]).sum(axis=-1) for tokens in (found, expected))
    _same("Distances of colours", torch.from_numpy(ours), torch.from_numpy(theirs), 1e-6)


def _tables(args, palette):
    line = np.linspace(-1, 1, N_COLORS)
    kinds = {
        "of images": palette,
        "on a line": np.stack([line, 0.5 * line, -0.3 * line], axis=1),
        "greys": np.repeat(line[:, None], 3, axis=1),
    }
    records = []
    for name, colors in kinds.items():

        def build(colors=colors):
            clusters._lookup_table.cache_clear()
            clusters.lookup_table(colors)

        stage = Stage(f"table of nearest colours, 512 colours {name}", 0, "2^24 colours", {"colors": N_COLORS})
        records += stage.records(take_turns({OURS: build}, args.repeats))
    return records


def _batches(args, palette):
    """Batches of training from the token cache, in random order, against reading them from a memory map."""
    rng = np.random.default_rng(0)
    batch_size, n_tokens = 128, args.image_size**2
    tokens = rng.integers(0, len(palette), (16 * batch_size, n_tokens), dtype=np.uint16)
    column = datasets.List(datasets.Value("uint16"), length=n_tokens)
    processor = ImageGPTImageProcessorPil(clusters=palette, size=args.image_size)
    with tempfile.TemporaryDirectory() as folder:
        table_ = datasets.Features({data.TOKENS: column})
        datasets.Dataset.from_dict({data.TOKENS: tokens}, features=table_).save_to_disk(folder)
        np.save(f"{folder}/tokens.npy", tokens)
        dataset, mapped = datasets.load_from_disk(folder), np.load(f"{folder}/tokens.npy", mmap_mode="r")

        def read(rows, indices):
            return data.collate_tokens(rows.__getitems__(indices))

        records = []
        for what, options in (("", {}), (" and mirrored", {"random_flip": True})):
            rows = data.ImageTokens(dataset, processor, **options)
            contenders = {
                OURS: lambda: read(rows, rng.permutation(len(tokens))[:batch_size].tolist()),  # noqa: B023
                LIMIT: lambda: torch.from_numpy(mapped[rng.permutation(len(tokens))[:batch_size]]).long(),
            }
            stage = Stage(f"batches of 128 read{what}", batch_size, "random tokens", {"batch size": batch_size})
            records += stage.records(take_turns(contenders, args.repeats))
        return records


def _palette_fit(args):
    """Pixels of two photographs that scikit-learn brings along, doubled in size; its own call stops before convergence."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    photographs = [image.resize((2 * image.width, 2 * image.height), 3) for image in photographs]
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in photographs])
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))[: args.n_pixels]]
    n_colors = min(N_COLORS, len(pixels) // 8)
    theirs = KMeans(n_colors, n_init=1, random_state=0)
    seconds = {LIMIT: [_seconds(lambda: theirs.fit(pixels.astype(np.float32)))]}
    palettes = {}
    seconds[OURS] = [_seconds(lambda: palettes.update({OURS: clusters.fit_palette(pixels, n_colors)}))]
    palettes[THEIRS] = clusters.to_unit_range(theirs.cluster_centers_)
    missed = {name: clusters.distortion(pixels, palette)["rmse_grey_levels"] for name, palette in palettes.items()}
    if missed[OURS] > 1.01 * missed[THEIRS]:
        raise ValueError(f"Our palette is {missed[OURS]:.3g} grey levels off, scikit-learn's {missed[THEIRS]:.3g}.")
    return Stage("palette of 512 colours", 0, f"{len(pixels):,} pixels", {"colors": n_colors}).records(seconds)


def _decode(paths: list[str], image_size: int):
    for path in paths:
        Image.open(path).resize((image_size,) * 2, 2)


def _tokenize_photos(palette, image_size: int, barrier, seconds):
    torch.set_num_threads(1)
    processor = ImageGPTImageProcessorPil(clusters=palette, size=image_size)
    images = photos(32)
    processor(images)
    barrier.wait()
    start = time.perf_counter()
    for _ in range(200):
        processor(images)
    seconds.put((time.perf_counter() - start) / 200)


def _folder(args, palette):
    """A folder of JPEG files to a cache of tokens with two processes, against decoding and resizing alone."""
    processor = data.InstalledProcessor(clusters=palette, size=args.image_size)
    clusters.lookup_table(palette)  # a stage of its own
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        encoded = []
        for image in photos(min(50, args.n_files), 500, 375):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=95)
            encoded.append(buffer.getvalue())
        paths = [f"{folder}/images/{index:06}.jpg" for index in range(args.n_files)]
        Path(folder, "images").mkdir()
        for index, path in enumerate(paths):
            Path(path).write_bytes(encoded[index % len(encoded)])

        def tokens(repeat):
            arguments = data.DataArguments(train_dir=f"{folder}/images", data_cache_dir=f"{folder}/cache{repeat}")
            images = data.load_images(arguments)["train"]
            start = time.perf_counter()
            data.tokenize(images, processor, num_proc=2)
            return (time.perf_counter() - start) / len(images) * args.n_files

        with context.Pool(2) as pool:
            pool.starmap(_decode, [(paths[:1], args.image_size)] * 2)  # imports
            parts = [(paths[start::2], args.image_size) for start in range(2)]
            seconds = {OURS: [], LIMIT: []}
            for repeat in range(min(3, args.repeats)):
                seconds[LIMIT].append(_seconds(lambda: pool.starmap(_decode, parts, chunksize=1)))
                seconds[OURS].append(tokens(repeat))
    records = Stage(
        "folder of JPEGs to tokens, 2 processes", args.n_files, "500x375 JPEGs", {"files": args.n_files}
    ).records(seconds)
    alone, together = (_throughput(context, count, palette, args.image_size) for count in (1, 2))
    stage = Stage("photos tokenised by 2 processes, against 1", 64, "windows of photographs", {})
    return records + stage.records({OURS: [1 / together], LIMIT: [1 / (2 * alone)]})


def _throughput(context, n_processes: int, palette, image_size: int) -> float:
    """Images a second of processes that tokenise photos at the same time."""
    barrier, seconds = context.Barrier(n_processes), context.Queue()
    arguments = (palette, image_size, barrier, seconds)
    processes = [context.Process(target=_tokenize_photos, args=arguments) for _ in range(n_processes)]
    for process in processes:
        process.start()
    found = [seconds.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(32 / second for second in found)


# ----------------------------------------------------------------------------------------------------------------------


def run(args: BenchmarkArguments) -> list[Record]:
    """Run the suites and print their table; with `--output`, write records after each, keeping those of other stages."""
    transformers.logging.set_verbosity_error()
    path = None if args.output is None else Path(args.output)
    before = read_records(path) if path is not None and path.exists() else []
    if path is not None:
        write_records(path, before)  # a place that cannot be written to is said now
    suites = {"train": train, "generate": generate, "features": features, "tokenize": tokenize}
    records = []
    for name in SUITES:
        if args.suite in (name, "all"):
            records += suites[name](args)
            if path is not None:
                run_now = {record.settings["stage"] for record in records}
                write_records(path, [one for one in before if one.settings.get("stage") not in run_now] + records)
    print("\n" + table(records))
    if path is not None:
        print(f"\nWrote {path}")
    return records


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_script(run, BenchmarkArguments, description=__doc__)

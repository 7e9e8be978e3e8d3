"""Which runs may be resumed, and where they were: checkpoints, what must be the same, who owns a folder, what has ended."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainerCallback

from ..configuration_imagegpt import ImageGPTConfig
from ..data import TrainingImages
from ..evaluation.records import RECORDS, RUN, read_run
from .arguments import ModelArguments, RecipeArguments
from .callbacks import log_main
from .checkpoints import find_damage, is_sealed, list_checkpoints, read_state
from .trainer import ImageGPTTrainer


FOREIGN = (".log", ".out", ".partial")  # ends of names of files that others leave in a run's folder
LOCK = ".lock"  # in a run's folder, held by the run that writes to it
# Arguments that may change when a run is resumed: none of them changes what is trained, or they are compared otherwise.
FREE = (
    *("output_dir", "resume_from_checkpoint", "run_name", "report_to", "disable_tqdm", "num_samples", "milestones"),
    *("use_cpu", "tf32", "debug", "project", "eval_on_start", "gradient_accumulation_steps", "gradient_checkpointing"),
    *(
        "log_",
        "logging_",
        "eval_steps",
        "eval_delay",
        "eval_strategy",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "hub_",
        "push_to_hub",
        "per_device_",
        "dataloader_num_workers",
        "do_",
    ),
    *("dataloader_p", "torch_compile", "torch_empty_cache_steps", "include_", "trackio_"),
    *("ddp_", "fsdp", "deepspeed", "accelerator_config", "local_rank", "skip_memory_metrics"),
    *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "save_on_each_node", "world_size"),
    *("full_determinism", "use_cache", "num_masks", "restore_callback", "gradient_checkp"),
)
LENGTH = ("max_steps", "num_train_epochs", "max_minutes", "warmup_")
# Of a stream these decide which images are read when.
OF_STREAMS = ("dataloader_num_workers", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
OWNED: dict[Path, tuple[FileLock, object]] = {}  # the folders of this process's runs, and the arguments of each


def find_checkpoint(args: RecipeArguments) -> str | None:
    """Find the checkpoint to resume from, if any. A folder with other contents than an unfinished run is a ValueError."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file.")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if RECORDS in names:
        raise ValueError(
            f"{folder} holds a finished run: give another --output_dir, and --model_name_or_path {folder} to train its model "
            "further."
        )
    names = {name for name in names if not name.startswith(".") and not name.endswith(FOREIGN)}
    if names and RUN not in names:
        raise ValueError(
            f"{folder} holds other files ({', '.join(sorted(names)[:5])}), and no {RUN} of an unfinished run: give an empty or "
            "a new --output_dir."
        )
    if RUN in names:
        read_identity(folder)
        if args.should_save:
            own_folder(folder, args)
    if args.resume_from_checkpoint not in (None, False, True, "False", "false", "True", "true"):
        checkpoint = Path(args.resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise ValueError(f"There is no checkpoint at {checkpoint}.")
        damage = find_damage_or_best(checkpoint, args.load_best_model_at_end)
        if damage is not None:
            raise ValueError(f"{damage}: give another --resume_from_checkpoint.")
        return str(checkpoint)
    last = find_last(folder, args.load_best_model_at_end)
    if str(args.resume_from_checkpoint).lower() == "true" and last is None:
        raise ValueError(f"--resume_from_checkpoint: there is no checkpoint in {folder}.")
    return last


def find_last(folder: Path, with_best: bool) -> str | None:
    """Find the last checkpoint of a run that is whole; None if none was ever written to its end.

    with_best: the best checkpoint that it refers to must be whole too. Those that are not whole are passed over, and named.
    All of them damaged is a ValueError.
    """
    damages = []
    for checkpoint in list_checkpoints(folder):
        damage = find_damage_or_best(checkpoint, with_best)
        if damage is None:
            return str(checkpoint)
        log_main(f"Passing over {checkpoint.name}: {damage}.")
        damages += [damage] if is_sealed(checkpoint) else []
    if damages:
        raise ValueError(
            f"No checkpoint in {folder} can be continued: {'; '.join(damages)}. Bring the files back, or give another "
            "--output_dir."
        )
    return None


def find_damage_or_best(checkpoint: Path, with_best: bool) -> str | None:
    """As `find_damage`; with_best: also say so if the best checkpoint that it refers to is damaged or missing."""
    damage = find_damage(checkpoint)
    if damage is None and with_best:
        best = read_state(checkpoint).best_model_checkpoint
        place = find_best(checkpoint, best)
        if best and place is None:
            return f"the best checkpoint, {best}, is not there"
        if place and place.resolve() != checkpoint.resolve():  # which is whole, and large
            return find_damage(place)
    return damage


def find_best(checkpoint: Path, best: str | None) -> Path | None:
    """Where the best checkpoint lies that a checkpoint refers to as `best`: there, or beside it if the run has moved."""
    places = [Path(best), checkpoint.parent / Path(best).name] if best else []
    return next((place for place in places if place.is_dir()), None)


def read_identity(folder: Path) -> dict[str, Any]:
    """Read the identity of the run in `folder`. If there is no run, or none that can be continued: ValueError."""
    if not (folder / RUN).is_file():
        raise ValueError(
            f"There is no {folder / RUN}, which records how the checkpoints were trained: give another --output_dir."
        )
    run = read_run(folder)
    identity = run.get("identity")
    if identity is None:
        raise ValueError(f"{folder} holds a model whose run cannot be continued: give another --output_dir.")
    if not isinstance(identity, dict) or not isinstance(run.get("arguments"), dict):
        raise ValueError(
            f"The run in {folder} was started by an older version of hf_igpt, which did not record its arguments, and cannot "
            "be resumed: finish it with that version, or give another --output_dir."
        )
    return identity


def collect_identity(model_args: ModelArguments, images: TrainingImages, args: RecipeArguments) -> dict[str, Any]:
    """Return the arguments that must not change when a run resumes: images, splits, palette, initial weights, seed."""
    values = model_args.identity() | images.identity() | {"seed": args.seed}
    return json.loads(json.dumps(values, default=str, sort_keys=True))  # in the form in which it is read from a file


def check_same_run(checkpoint: str, config: ImageGPTConfig, identity: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint has another model, seed, data or palette: held-out images must stay held out."""
    was = read_identity(Path(checkpoint).parent)
    for name, value in identity.items():
        if name != "images" and was.get(name) != value:
            raise ValueError(
                f"{checkpoint} was trained with --{name} {was.get(name)}, not {value}: give that value, or another --output_dir."
            )
    images, images_then = identity["images"], was.get("images", {})
    if any(images[part] != images_then[part] for part in images.keys() & images_then.keys()):
        raise ValueError(
            f"The images are not those that {checkpoint} was trained on: files were added, removed or replaced, so that images "
            "held out now may have been trained on, or labels are others. Restore them, or begin another run from its weights: "
            f"--model_name_or_path {checkpoint} and another --output_dir."
        )
    then, now = (describe_config(each) for each in (ImageGPTConfig.from_pretrained(checkpoint), config))
    first = ("--class_conditional", "--objective")  # others follow from these
    for name in sorted(then.keys() | now.keys(), key=lambda name: (name not in first, name)):
        if then.get(name) != now.get(name):
            raise ValueError(
                f"{checkpoint} has {name} = {then.get(name)}, this run {now.get(name)}: give another --output_dir."
            )


def check_same_tokens(checkpoint: str, images: TrainingImages) -> None:
    """ValueError if tokens are not those that a checkpoint was trained on, as after files were replaced by others of their size."""
    was = read_run(Path(checkpoint).parent).get("tokens")
    was = was if isinstance(was, dict) else {}  # of a run that an older version began
    changed = [split for split, found in images.hash_tokens().items() if was.get(split, found) != found]
    if changed:
        raise ValueError(
            f"The images ({' and '.join(changed)}) are not those that {checkpoint} was trained on: what they show, or how it is "
            "read, has changed. Bring them back, or give another --output_dir."
        )


def describe_config(config: ImageGPTConfig) -> dict[str, Any]:
    """The fields of a configuration that are not its class's defaults, under the names of flags where there are any."""
    fields = config.to_diff_dict()
    follow = ("is_causal", "reorder_and_upcast_attn")
    for name in ("architectures", "dtype", "transformers_version", "objective", "sos_inputs", *follow):
        fields.pop(name, None)
    inputs = "sos" if config.sos_inputs else "raw"
    flags = {"--objective": config.objective, "--classifier_inputs": inputs}
    return fields | flags | {"--class_conditional": config.n_class_tokens > 0}


def check_same_arguments(checkpoint: str, args: RecipeArguments, is_stream: bool) -> None:
    """ValueError if resolved arguments are others than those a checkpoint was trained with, but for those in `FREE`.

    A run in another folder, which has a `run.json` of its own, may also be longer or shorter. Of a stream, the number of
    processes and workers, and how a step is shared out, must be the same too.
    """
    free = FREE if Path(checkpoint).resolve().parent == Path(args.output_dir).resolve() else FREE + LENGTH
    was = read_run(Path(checkpoint).parent).get("arguments", {})
    now = json.loads(json.dumps(arguments_of(args), default=str))
    differing = {name for name, value in now.items() if name in was and was[name] != value}
    counting = {name for name in differing if not name.startswith(free) or (is_stream and name in OF_STREAMS)}
    if "load_best_model_at_end" in counting:  # it follows from these
        counting |= differing & {"eval_strategy", "save_strategy"}
    changed = [f"--{name} {was[name]}, not {now[name]}" for name in now if name in counting]
    if changed:
        raise ValueError(
            f"{checkpoint} was trained with {'; '.join(changed)}: repeat that, or give another --output_dir."
        )


def arguments_of(args: RecipeArguments) -> dict[str, Any]:
    """The resolved arguments, without secrets, and what a step is made of however it is shared out."""
    resolved = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    resolved = {name: value for name, value in resolved.items() if not name.endswith("_token")}
    return resolved | {"images_per_step": args.images_per_step(), "world_size": args.world_size}


def own_folder(folder: Path, owner: object) -> None:
    """Lock a run's folder until `release_folder`, or until this process ends. ValueError: another run holds it.

    owner: the run's arguments; the same run may call this again.
    """
    lock = FileLock(folder / LOCK, is_singleton=True)
    held = OWNED.get(folder.resolve())
    try:
        if held is None:
            lock.acquire(timeout=0)
    except Timeout:
        held = lock, None
    if held is not None and held[1] is not owner:
        raise ValueError(f"Another run is writing to {folder}: wait for it, stop it, or give another --output_dir.")
    OWNED[folder.resolve()] = lock, owner  # a lock that nothing refers to is released


def release_folder(folder: Path, owner: object) -> None:
    """Let others write to a folder, if `owner` holds it."""
    lock, holder = OWNED.get(folder.resolve(), (None, None))
    if lock is not None and holder is owner:
        del OWNED[folder.resolve()]
        (folder / LOCK).unlink(missing_ok=True)
        lock.release(force=True)


def releasing_folder(run: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a run, whose last argument is its arguments: its folder is released however it ends."""

    @wraps(run)
    def releasing(*args: Any) -> Any:
        try:
            return run(*args)
        finally:
            release_folder(Path(args[-1].output_dir), args[-1])

    return releasing


def is_finished(checkpoint: str, trainer: ImageGPTTrainer) -> bool:
    """Whether nothing is left but to measure: the steps are done, or this run had ended early or by the clock.

    A checkpoint that is past the end of another run, or that cannot be continued exactly, is a ValueError.
    """
    args: Any = trainer.args
    state: Any = read_state(Path(checkpoint))
    total = args.max_steps
    if total <= 0:
        total = math.ceil(args.num_train_epochs * args.steps_per_epoch(len(trainer.train_dataset)))
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    is_this_run = Path(checkpoint).resolve().parent == Path(args.output_dir).resolve()
    if state.global_step > total and not is_this_run:
        raise ValueError(
            f"{checkpoint} has been trained for {state.global_step} steps, more than the {total} of this run: give more "
            "--max_steps or --num_train_epochs, or an earlier checkpoint."
        )
    if state.global_step >= total or (is_this_run and control.get("should_training_stop", False)):
        return True
    for part in ("optimizer*", "scheduler.pt"):
        if not list(Path(checkpoint).glob(part)):
            raise ValueError(
                f"{checkpoint} has no {part.strip('*').removesuffix('.pt')} state (--save_only_model?): it cannot be continued "
                "exactly. Begin another run from its weights with --model_name_or_path."
            )
    return False


def load_finished(trainer: ImageGPTTrainer, checkpoint: str) -> None:
    """Bring the trainer to where it was when training ended: the state of the last checkpoint, the weights of the best."""
    state = read_state(Path(checkpoint))
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    source = find_best(Path(checkpoint), best) or checkpoint
    trainer.state = state
    state.is_world_process_zero = trainer.is_world_process_zero()
    state.is_local_process_zero = trainer.is_local_process_zero()
    weights = type(trainer.model).from_pretrained(source).state_dict()
    trainer.model.load_state_dict(weights)
    if trainer.clock:
        trainer.clock.on_train_begin(trainer.args, trainer.state, trainer.control)


class LoadedShards(Exception):
    """Training has loaded everything and would now begin."""


class LeaveBeforeTraining(TrainerCallback):
    """Raises `LoadedShards` when all others are ready to train."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise LoadedShards


def load_finished_shards(trainer: ImageGPTTrainer, checkpoint: str) -> None:
    """As `load_finished`, for a run whose weights are shared out: `train` alone loads these, and is left before its first step."""
    leave = LeaveBeforeTraining()
    trainer.add_callback(leave)
    with suppress(LoadedShards):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.remove_callback(leave)
    trainer.is_in_train = False
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        trainer._load_best_model()
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)

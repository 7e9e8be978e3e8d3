"""Runs that were killed, whose files are then damaged, or which are started again with other arguments."""

import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kills import Scenario, contents, differences, last_checkpoint, prepare, resumed_step, whole_checkpoints
from outcomes import Count
from safetensors.torch import load_file, save_file
from trials import Trials


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_state(path: Path, change: Callable[[dict], object]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


OF_ANY_FILE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut to its half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped in the middle": flip,
}
LN = "transformer.ln_f.weight"
OF_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "model.safetensors without a tensor": lambda c: edit_tensors(c / "model.safetensors", lambda t: t.pop(LN)),
    "model.safetensors with a NaN": lambda c: edit_tensors(
        c / "model.safetensors", lambda t: t[LN][0].fill_(torch.nan)
    ),
    "model.safetensors of another step": lambda c: edit_tensors(c / "model.safetensors", lambda t: t[LN].add_(0.1)),
    "model.safetensors with a tensor cut": lambda c: edit_tensors(
        c / "model.safetensors", lambda t: t.update({LN: t[LN][:3].clone()})
    ),
    "optimizer.pt with a NaN": lambda c: edit_state(
        c / "optimizer.pt", lambda s: s["state"][0]["exp_avg"].view(-1)[0].fill_(torch.nan)
    ),
    "optimizer.pt without a parameter's state": lambda c: edit_state(c / "optimizer.pt", lambda s: s["state"].pop(0)),
    "optimizer.pt with another step": lambda c: edit_state(c / "optimizer.pt", lambda s: s["state"][0]["step"].add_(5)),
    "scheduler.pt of another step": lambda c: edit_state(c / "scheduler.pt", lambda s: s.update(last_epoch=1)),
    "trainer_state.json: {}": lambda c: (c / "trainer_state.json").write_text("{}"),
    "trainer_state.json: null": lambda c: (c / "trainer_state.json").write_text("null"),
    "trainer_state.json: another step": lambda c: edit_json(
        c / "trainer_state.json", lambda s: s.update(global_step=3)
    ),
    "trainer_state.json: no log": lambda c: edit_json(c / "trainer_state.json", lambda s: s.update(log_history=[])),
    "trainer_state.json: no best model": lambda c: edit_json(
        c / "trainer_state.json", lambda s: s.update(best_model_checkpoint=None, best_metric=None)
    ),
    "config.json: another epsilon": lambda c: edit_json(c / "config.json", lambda s: s.update(layer_norm_epsilon=0.1)),
    "nothing in it": lambda c: [path.unlink() for path in c.iterdir()],
}
OF_RUNS: dict[str, Callable[[Path], object]] = {
    "run.json: {}": lambda run: (run / "run.json").write_text("{}"),
    "run.json: null": lambda run: (run / "run.json").write_text("null"),
    "run.json: []": lambda run: (run / "run.json").write_text("[]"),
    "run.json without identity": lambda run: edit_json(run / "run.json", lambda r: r.pop("identity")),
    "run.json without arguments": lambda run: edit_json(run / "run.json", lambda r: r.pop("arguments")),
    "run.json with arguments: null": lambda run: edit_json(run / "run.json", lambda r: r.update(arguments=None)),
    "model.safetensors cut in all checkpoints": lambda run: [
        OF_ANY_FILE["cut to its half"](path) for path in run.glob("*/model.safetensors")
    ],
    "optimizer.pt emptied in all checkpoints": lambda run: [
        path.write_bytes(b"") for path in run.glob("*/optimizer.pt")
    ],
}
# Files of no concern, or left by a kill: these must not block, nor change anything.
BESIDE: dict[str, Callable[[Path], object]] = {
    "checkpoint-abc/": lambda run: (run / "checkpoint-abc").mkdir(),
    "checkpoint-abc/trainer_state.json": lambda run: shutil.copytree(last_checkpoint(run), run / "checkpoint-abc"),
    "checkpoint-99, a file": lambda run: (run / "checkpoint-99").write_text(""),
    "checkpoint-99/, empty": lambda run: (run / "checkpoint-99").mkdir(),
    "checkpoint-99/ without weights": lambda run: shutil.copytree(
        last_checkpoint(run), run / "checkpoint-99", ignore=lambda *_: ["model.safetensors"]
    ),
    ".DS_Store": lambda run: (run / ".DS_Store").write_bytes(b"\0\0\0\1Bud1"),
    "nohup.out": lambda run: (run / "nohup.out").write_text("said"),
    "run.json.partial": lambda run: (run / "run.json.partial").write_text("{"),
    "records.json.partial": lambda run: (run / "records.json.partial").write_text("["),
    "._run.json": lambda run: (run / "._run.json").write_bytes(b"\0"),
    "a lock that nobody holds": lambda run: (run / ".lock").write_text(""),
    "palette.png deleted": lambda run: (run / "palette.png").unlink(),
}


def some_of(everything: list[Any], share: float) -> list[Any]:
    """A share of a list in its order, the same each time, at least one."""
    n = max(1, round(min(1, share) * len(everything)))
    return [everything[i] for i in sorted(np.random.default_rng(0).permutation(len(everything))[:n])]


def interrupted(trials: Trials, name: str, folder: Path) -> Scenario:
    """A scenario, with a run in `folder / "killed"` that was killed when it had two checkpoints and wrote on a third."""
    prepare(folder)
    scenario = Scenario(trials, name, folder)
    steps = list(dict.fromkeys(re.findall(r"run/checkpoint-(\d+)", "\n".join(scenario.events))))
    at = next(n for n, event in enumerate(scenario.events, 1) if f"checkpoint-{steps[2]}" in event)
    scenario.run(folder / "killed", fault={"kill": at})
    assert sorted(whole_checkpoints(folder / "killed" / "run", scenario.checkpoints)) == [int(s) for s in steps[:2]]
    return scenario


def damages(run: Path) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """What can be damaged in a copy of a killed run: the kind, words, and a function that does it."""
    newest = last_checkpoint(run)
    for path in sorted(newest.iterdir()):
        for words, damage in OF_ANY_FILE.items():
            yield "a checkpoint's file", f"{path.name} {words}", lambda damage=damage, path=path: damage(path)
    for words, damage in OF_CHECKPOINTS.items():
        yield "a checkpoint's contents", words, lambda damage=damage: damage(newest)
    for path in (run / "run.json", run / "preprocessor_config.json"):
        for words, damage in OF_ANY_FILE.items():
            yield "a run's file", f"{path.name} {words}", lambda damage=damage, path=path: damage(path)
    for words, damage in OF_RUNS.items():
        yield "a run's file", words, lambda damage=damage: damage(run)
    for words, damage in BESIDE.items():
        yield "files of no concern", words, lambda damage=damage: damage(run)


def damaged_checkpoints(trials: Trials, folder: Path, names: list[str], share: float = 1.0) -> Iterator[Count]:
    """Each damage, or a random `share` of them, of a killed run of each scenario, which is then started again.

    It must go on from the checkpoint before, and say so, or refuse; what is of no concern must change nothing.
    """
    for name in names:
        scenario = interrupted(trials, name, folder / re.sub(r"\W+", "-", name))
        counts: dict[str, Count] = {}
        start = time.monotonic()
        steps = sorted(whole_checkpoints(scenario.folder / "killed" / "run", scenario.checkpoints))
        for kind, words, _ in some_of(list(damages(scenario.folder / "killed" / "run")), share):
            place = scenario.new_folder()
            shutil.copytree(scenario.folder / "killed", place)
            next(do for _, same, do in damages(place / "run") if same == words)()
            allowed = ("equal",) if kind == "files of no concern" else ("equal", "refused")
            count = counts.setdefault(kind, Count("damaged runs", f"{name}: {kind}", allowed=allowed))
            again = scenario.run(place)
            outcome, said = scenario.judge(place, again, steps if allowed == ("equal",) else [])
            if (
                outcome == "equal"
                and resumed_step(again.said) < steps[-1]
                and f"checkpoint-{steps[-1]}" not in again.said
            ):
                outcome, said = (
                    "lost",
                    f"continued from {resumed_step(again.said)} without a word of checkpoint-{steps[-1]}",
                )
            count.add(outcome, words, said)
            shutil.rmtree(place)
        for count in counts.values():
            count.seconds = round(
                (time.monotonic() - start) * count.injected / sum(c.injected for c in counts.values()), 1
            )
            yield count
        shutil.rmtree(scenario.folder)


# -- changed arguments -------------------------------------------------------------------------------------------------

# Each is refused by a sentence that names it, or the end is the same: the weights, the optimiser's state and the records.
# After "~", weights within 1e-5: sums in another order.
CHANGES = {
    "causal, flips": """
        --learning_rate 0.1 | --weight_decay 0.5 | --adam_beta1 0.5 | --adam_beta2 0.5 | --adam_epsilon 0.001
        --lr_scheduler_type linear | --lr_scheduler_type constant | --warmup_steps 3 | --warmup_epochs 2
        --per_device_train_batch_size 8 | --per_device_train_batch_size 20 | ~ --gradient_accumulation_steps 2
        ~ --gradient_accumulation_steps 2 --per_device_train_batch_size 8
        --bf16 True | --max_grad_norm 0.1 | --max_grad_norm 0 | --data_seed 5 | --seed 2 | --max_steps 8 | --max_steps 5
        --max_steps 3 | --num_train_epochs 7 | --optim sgd | --optim adafactor | --optim_args weight_decay=0.1
        --max_minutes 5 | --no_load_best_model_at_end | --eval_strategy no | --eval_strategy epoch
        --metric_for_best_model loss | --metric_for_best_model bits_per_pixel | --greater_is_better True
        --dataloader_drop_last True | --neftune_noise_alpha 5 | --train_sampling_strategy sequential
        --ignore_data_skip True | --no_average_tokens_across_devices | --lr_scheduler_kwargs {"num_cycles":2}
        --size xs | --image_size 8 | --num_colors 8 | --objective masked | --center_crop True | --random_flip False
        --config_overrides n_layer=2,n_embd=16,n_head=1 | --config_overrides n_layer=1,n_embd=32,n_head=1
        --config_overrides n_layer=1,n_embd=16,n_head=2 | --config_overrides n_layer=1,n_embd=16,n_head=1,resid_pdrop=0.1
        --pad_crop True --random_flip False | --max_train_samples 30 | --max_eval_samples 4 | --train_val_split 0.5
        --image_processor_name ../greys.npy | --train_dir ../photos | --model_name_or_path ../whole/run
        --save_steps 3 --eval_steps 3 | --save_steps 1 --eval_steps 1 | --logging_steps 2 | --save_total_limit 1
        --num_samples 0 | --num_samples 2 | --milestones 1 | --milestones 0.2 | --dataloader_num_workers 1
        --per_device_eval_batch_size 3 | ~ --attn_implementation eager | --use_cache False | --save_only_model True
        --logging_nan_inf_filter False | --no_logging_nan_inf_filter | --torch_empty_cache_steps 1
        --dataloader_persistent_workers True --dataloader_num_workers 1 | --eval_delay 5 | --logging_first_step True
        --save_strategy epoch --eval_strategy epoch | --auto_find_batch_size True | --eval_accumulation_steps 1
        --remove_unused_columns True | --include_num_input_tokens_seen all | --restore_callback_states_from_checkpoint True
    """,
    "fine-tuning, early stopping": """
        --generative_loss_weight 0.5 | --generative_loss_weight 0 | --classifier_inputs raw | --early_stopping_patience 1
        --early_stopping_patience 5 | --early_stopping_patience 0 | --num_masks 3 | --metric_for_best_model loss
        --num_train_epochs 3 | --num_train_epochs 20 | --max_steps 4 | --learning_rate 0.01 | --warmup_steps 2
        --lr_scheduler_type cosine | --max_train_samples 30 | --seed 3 | --objective masked
        --restore_callback_states_from_checkpoint False
    """,
    "stream": """
        --dataloader_num_workers 1 | --per_device_train_batch_size 8 --gradient_accumulation_steps 2
        --validation_dir ../train.parquet | --train_dir ../valid.parquet | --streaming False | --random_flip False
        --max_steps 4 | --ignore_data_skip True
    """,
}
COMPARED = re.compile(r"(model\.safetensors|records\.json|.*/optimizer\.pt)$")


def changes_of(name: str) -> list[str]:
    return [change.strip() for line in CHANGES[name].split("\n") for change in line.split("|") if change.strip()]


def changed_arguments(trials: Trials, folder: Path, names: list[str], share: float = 1.0) -> Iterator[Count]:
    """Each change, or a random `share` of them, on a killed run of each scenario that is started again with it."""
    for name in names:
        scenario = interrupted(trials, name, folder / re.sub(r"\W+", "-", name))
        count, start = Count("changed arguments", name, allowed=("equal", "refused")), time.monotonic()
        for change in some_of(changes_of(name), share):
            place = scenario.new_folder()
            shutil.copytree(scenario.folder / "killed", place)
            again = scenario.run(place, *shlex.split(change.removeprefix("~"), posix="{" not in change))
            outcome, said = scenario.judge(place, again, [])
            flags = [flag.removeprefix("no_") for flag in re.findall(r"--(\w+)", change)]
            if outcome == "refused":
                named = [*flags, *re.findall(r"(\w+)=", change), "images"]
                if not any(flag in said for flag in named):
                    outcome, said = "traceback", f"does not name the argument: {said}"
            elif outcome == "silent":
                said = differing_results(scenario, place / "run", 1e-5 if change.startswith("~") else 0)
                outcome = "silent" if said else "equal"
            count.add(outcome, change, said)
            shutil.rmtree(place)
        count.seconds = round(time.monotonic() - start, 1)
        yield count
        shutil.rmtree(scenario.folder)


def differing_results(scenario: Scenario, run: Path, tolerance: float) -> str:
    """Which results of a run differ from the undisturbed one's, in words, or "". With a tolerance, only its weights."""
    if tolerance:
        one, other = (
            load_file(scenario.folder / "whole" / "run" / "model.safetensors"),
            load_file(run / "model.safetensors"),
        )
        distance = max((tensor - other[name]).abs().max().item() for name, tensor in one.items())
        return f"weights differ by {distance:.2g}" if distance > tolerance else ""
    results = [
        {name: value for name, value in found.items() if COMPARED.match(name)}
        for found in (scenario.checkpoints | scenario.expected, contents(run))
    ]
    expected = {name: value for name, value in results[0].items() if name in results[1] or "/" not in name}
    return differences(expected, results[1], left=False)  # which checkpoints are kept may change, not what is in them

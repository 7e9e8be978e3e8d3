"""What `test_several_processes.py` runs under torchrun: the steps named on the command line, in every process.

    torchrun --nproc_per_node=2 tests/processes.py JOBS.json

JOBS.json is a list of [name, keyword arguments]; each name is a function here.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hf_igpt import ImageGPTForCausalImageModeling
from hf_igpt.commands import pretrain as command
from hf_igpt.data import DataArguments, TrainingImages
from hf_igpt.training.arguments import ModelArguments, PretrainingArguments
from hf_igpt.training.trainer import ImageGPTTrainer


def launch_settings(config_file) -> dict[str, str]:
    """The environment that `accelerate launch --config_file` gives the processes it starts with FSDP or DDP."""
    flags = ["--config_file", str(config_file), "--main_process_ip", "localhost", "--main_process_port", "0", "x.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    environment = prepare_multi_gpu_env(arguments)
    return {name: environment[name] for name in environment if name.startswith(("ACCELERATE_", "FSDP_"))}


def allow_fsdp_on_cpus():
    """Accelerate takes FSDP's plugin on accelerators alone; everything that follows works on CPUs with gloo as well."""
    plain = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_plugin


def pretrain(folder, model, images, environment=None, record=False, **options):
    """A run; with `record`, what this process trains on, (step, tokens, masks) of each, goes to folder/seen-RANK.pt."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED", "FSDP_")):
            del os.environ[name]
    os.environ.update(environment or {})
    seen, compute_loss = [], ImageGPTTrainer.compute_loss

    def recording(self, model, inputs, *args, **kwargs):
        seen.append((self.state.global_step, inputs["labels"].clone(), inputs.get("bool_masked_pos")))
        return compute_loss(self, model, inputs, *args, **kwargs)

    if record:
        ImageGPTTrainer.compute_loss = recording
    arguments = PretrainingArguments(output_dir=folder, use_cpu=True, disable_tqdm=True, **options)
    try:
        command.pretrain(ModelArguments(**model), DataArguments(**images), arguments)
    finally:
        ImageGPTTrainer.compute_loss = compute_loss
    if record:
        torch.save(seen, Path(folder) / f"seen-{arguments.process_index}.pt")


def refuse(report, **images):
    """What each process says of images that cannot be loaded goes to report-RANK; all of them go on."""
    try:
        TrainingImages(DataArguments(**images), seed=0)
    except ValueError as error:
        Path(f"{report}-{PartialState().process_index}").write_text(str(error))
    PartialState().wait_for_everyone()


def interrupt(folder, step, to):
    """A run that stopped after the checkpoint of `step`, copied `to` another folder."""
    if PartialState().is_main_process:
        shutil.copytree(Path(folder) / f"checkpoint-{step}", Path(to) / f"checkpoint-{step}")
        for begun in ("palette.png", "run.json"):
            shutil.copy(Path(folder) / begun, to)
    PartialState().wait_for_everyone()


def load_sharded(source, report):
    """FSDP by transformers' own loader: how the model differs from the whole one."""
    whole = ImageGPTForCausalImageModeling.from_pretrained(source)
    tokens = torch.arange(4 * 64).reshape(4, 64) * 7 % 16
    expected = whole(labels=tokens)
    expected.loss.backward()
    model = ImageGPTForCausalImageModeling.from_pretrained(source, distributed_config=DistributedConfig(fsdp_size=2))
    with torch.no_grad():
        logits = (model(labels=tokens).logits - expected.logits).abs().max().item()
    model(labels=tokens).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    gradients = [(gradients[name] - parameter.grad).abs().max().item() for name, parameter in whole.named_parameters()]
    shapes = {
        name: list(parameter.to_local().shape)
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }
    model.save_pretrained(f"{report}-model")
    if PartialState().is_main_process:
        Path(report).write_text(json.dumps({"logits": logits, "gradients": max(gradients), "shapes": shapes}))


if __name__ == "__main__":
    allow_fsdp_on_cpus()
    # Trainer, until 5.17 at least, resumes to the device "cpu:0", which torch does not know as a place to load to.
    torch.serialization.register_package(
        100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )
    PartialState(cpu=True)  # starts the process group
    for job, keywords in json.loads(Path(sys.argv[1]).read_text()):
        globals()[job](**keywords)
    torch.distributed.destroy_process_group()

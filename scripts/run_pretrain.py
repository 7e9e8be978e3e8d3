"""Pretrain an Image GPT on images, without labels.

    python scripts/run_pretrain.py                                       # the digits, 2 CPU cores, about 2 minutes
    accelerate launch scripts/run_pretrain.py --size s --dataset_name ILSVRC/imagenet-1k --random_crop --bf16 \\
        --output_dir igpt-s                                              # the paper's iGPT-S: 8 GPUs, days
    python scripts/run_pretrain.py recipe.json                           # or a .json/.yaml file of flags

Without arguments: held-out loss at most 1.30 nats/pixel (left-and-up trigram: 1.61). Writes the model, its image
processor, samples, a curve and records to --output_dir; an interrupted run continues when it is started again.
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.cli import run_script
from hf_igpt.data.arguments import DataArguments
from hf_igpt.training.arguments import ModelArguments, PretrainingArguments


if __name__ == "__main__":
    run_script(
        "hf_igpt.commands.pretrain:pretrain", ModelArguments, DataArguments, PretrainingArguments, description=__doc__
    )

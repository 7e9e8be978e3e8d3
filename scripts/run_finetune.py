"""Fine-tune a pretrained Image GPT to classify labelled images, by the joint loss L_CLF + L_GEN.

    python scripts/run_finetune.py --model_name_or_path outputs/pretrain --learning_rate 1e-3    # the digits
    python scripts/run_finetune.py --model_name_or_path igpt-l --dataset_name uoft-cs/cifar10 --pad_crop --random_flip --bf16
    python scripts/run_finetune.py --output_dir outputs/scratch               # from random weights, to compare with

Writes the classifier of the best validation accuracy, a confusion matrix, curves and records to --output_dir.
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.cli import run_script
from hf_igpt.data.arguments import DataArguments
from hf_igpt.training.arguments import FinetuningArguments, ModelArguments


if __name__ == "__main__":
    run_script(
        "hf_igpt.commands.finetune:finetune", ModelArguments, DataArguments, FinetuningArguments, description=__doc__
    )

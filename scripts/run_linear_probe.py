"""Probe features: how well a linear classifier reads classes off every layer of models that never saw a label.

    python scripts/run_linear_probe.py --model_name_or_path outputs/pretrain                              # the digits
    python scripts/run_linear_probe.py --model_name_or_path igpt-s --dataset_name uoft-cs/cifar10 --labels_per_class 4 25 400

Writes probe.json and the curve of accuracy by layer, probe.png, to the model's folder or --output_dir.
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.arguments import ProbeArguments
from hf_igpt.commands.cli import run_script
from hf_igpt.data.arguments import DataArguments


if __name__ == "__main__":
    run_script("hf_igpt.commands.probe:probe", ProbeArguments, DataArguments, description=__doc__)

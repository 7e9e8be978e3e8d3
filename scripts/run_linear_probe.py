"""Probe features: how well a linear classifier reads classes off every layer of models that never saw a label.

    python scripts/run_linear_probe.py --model_name_or_path outputs/pretrain                              # the digits
    python scripts/run_linear_probe.py --model_name_or_path igpt-s --dataset_name uoft-cs/cifar10 --labels_per_class 4 25 400

Writes probe.json and the curve of accuracy by layer, probe.png, to the model's folder or --output_dir.
"""

from hf_igpt.commands.cli import run_script
from hf_igpt.commands.probe import ProbeArguments, probe
from hf_igpt.data import DataArguments


if __name__ == "__main__":
    run_script(probe, ProbeArguments, DataArguments, description=__doc__)

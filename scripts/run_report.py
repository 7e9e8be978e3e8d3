"""Gather what runs measured into one page: the paper's figures, its numbers and ours, pictures.

    python scripts/run_report.py outputs/pretrain outputs/finetune
    python scripts/run_report.py outputs/ --output_dir report --probe_milestones

Seconds, unless milestones are probed first. Writes report.md and its pictures to --output_dir.
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.arguments import ReportArguments
from hf_igpt.commands.cli import run_script
from hf_igpt.data.arguments import DataArguments


if __name__ == "__main__":
    run_script("hf_igpt.commands.report:report", ReportArguments, DataArguments, description=__doc__, first="folders")

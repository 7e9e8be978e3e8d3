"""Gather what runs measured into one page: figures of the paper, tables beside its own, pictures.

    python scripts/run_report.py outputs/pretrain outputs/finetune
    python scripts/run_report.py outputs/ --output_dir report --probe_milestones

Seconds, unless milestones are probed first. Writes report.md and its pictures to --output_dir.
"""

from hf_igpt.commands.cli import run_script
from hf_igpt.commands.report import ReportArguments, report
from hf_igpt.data import DataArguments


if __name__ == "__main__":
    run_script(report, ReportArguments, DataArguments, description=__doc__, first="folders")

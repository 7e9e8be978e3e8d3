"""`scripts/run_report.py`: gather what was measured in several runs, and compare it with the paper."""

from pathlib import Path

from ..data import DataArguments
from ..evaluation.records import MILESTONES, PROBE
from ..reporting.reports import find_runs, write_report
from .arguments import ProbeArguments, ReportArguments
from .probe import probe


def report(args: ReportArguments, data_args: DataArguments) -> Path:
    """Gather the records below some folders into `report.md`, with figures and pictures; returns its path.

    Folders without records are a ValueError before anything is written.
    """
    find_runs(args.folders)  # nothing is probed if there is no run
    if args.probe_milestones:
        places = [path for folder in args.folders for path in sorted(Path(folder).rglob(f"{MILESTONES}/step-*"))]
        names = [str(path) for path in places if not (path / "probe" / PROBE).is_file()]
        if names:
            probe(ProbeArguments(names, baselines=False, knn=False), data_args)
    page, runs = write_report(args.folders, args.output_dir)
    print(f"Wrote {page}: {sum(len(run.records) for run in runs)} records of {len(runs)} runs")
    return page

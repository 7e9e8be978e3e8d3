"""Time this package beside transformers' own ImageGPT, and beside the least that the work takes, in one run.

    python benchmarks/run.py --suite all --output records.json        # 2 CPU cores: 15 minutes
    python benchmarks/run.py --suite train --device cuda              # one H100: S and M, bfloat16, with Trainer

Both models have the same weights and the same data, made here. Their outputs are compared before anything is timed. Then
they take turns, and medians count: on a shared machine ratios say more than seconds. The limit is a bare version of the
work that cannot be left out: matrix products, PIL's resize, the decoding of files. Peak memory is what a call adds to what
is held before it.
"""

import os
from pathlib import Path

import transformers

from arguments import SUITES, BenchmarkArguments
from features import time_features
from generate import time_generation
from hf_igpt.commands.cli import run_script
from hf_igpt.evaluation.records import Record, read_records, write_records
from table import format_table
from tokenize_images import time_tokenization
from train import time_training


FUNCTIONS = {
    "train": time_training,
    "generate": time_generation,
    "features": time_features,
    "tokenize": time_tokenization,
}


def run_suites(args: BenchmarkArguments) -> list[Record]:
    """Run the suites and print their table; with `--output`, write records after each, keeping those of other stages."""
    transformers.logging.set_verbosity_error()
    path = None if args.output is None else Path(args.output)
    before = read_records(path) if path is not None and path.exists() else []
    if path is not None:
        write_records(path, before)  # raises now when this place cannot be written to
    records: list[Record] = []
    for suite in SUITES if args.suite == "all" else [args.suite]:
        for stage in FUNCTIONS[suite](args):
            print("\n".join(format_table(stage).splitlines()[2:]), flush=True)
            records += stage
        if path is not None:
            new = {record.stage for record in records}
            write_records(path, [record for record in before if record.stage not in new] + records)
    print("\n" + format_table(records))
    if path is not None:
        print(f"\nWrote {path}")
    return records


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_script(run_suites, BenchmarkArguments, description=__doc__)

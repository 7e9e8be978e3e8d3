"""Plan training before a machine is paid for: memory of each device, steps and hours of the paper's recipes.

    python scripts/run_plan.py --size xl --devices 64 --bf16 --memory_gib 79 --tflops 395.6   # sharded, 261 hours
    python scripts/run_plan.py --size s m l --devices 8 --bf16 --images 1.23e6 --tflops 300

That is the paper's iGPT-XL on 64 H100s at 40 % of their peak. Any machine, seconds, no GPU and no data. Hours are of an assumed or a measured throughput (--records): docs/scaling.md
says how both are counted.
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.arguments import PlanArguments
from hf_igpt.commands.cli import run_script


if __name__ == "__main__":
    run_script("hf_igpt.commands.plan:plan", PlanArguments, description=__doc__)

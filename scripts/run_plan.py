"""Plan training before a machine is paid for: memory of each device, steps, hours and cost of the paper's recipes.

    python scripts/run_plan.py --size xl --devices 64 --bf16 --memory_gib 79 --peak_tflops 989 --utilization 0.4 \\
        --cost_per_device_hour 2.5                       # the paper's iGPT-XL on 64 H100s: sharded, 261 hours
    python scripts/run_plan.py --size s m l --devices 8 --bf16 --images 1.23e6 --tflops 300

Any machine, seconds, no GPU and no data. Hours are of an assumed or a measured throughput (--records): docs/scaling.md
says how both are counted.
"""

from hf_igpt.commands.cli import run_script
from hf_igpt.planning import PlanArguments, plan


if __name__ == "__main__":
    run_script(plan, PlanArguments, description=__doc__)

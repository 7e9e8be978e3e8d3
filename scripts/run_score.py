"""Score images by a trained causal Image GPT: nats per pixel of each, and which of its pixels were surprising.

    python scripts/run_score.py --model_name_or_path outputs/pretrain --num_held_out 359                 # held-out digits
    python scripts/run_score.py --model_name_or_path outputs/pretrain --images photos/ cat.png --compare drawings/

Seconds for small models. Writes scores.csv, score.json, surprise.png (images beside maps of their pixels' surprise) and
histogram.png to score/ in the model's folder or --output_dir. With --compare, also how well nats per pixel tells images of
another kind from those scored (AUROC).
"""

from hf_igpt.commands.cli import run_script
from hf_igpt.commands.score import ScoreArguments, score
from hf_igpt.data import DataArguments


if __name__ == "__main__":
    run_script(score, ScoreArguments, DataArguments, description=__doc__)

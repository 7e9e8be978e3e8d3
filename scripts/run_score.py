"""Score images by a trained causal Image GPT: nats per pixel of each, and which of its pixels were surprising.

    python scripts/run_score.py --model_name_or_path outputs/pretrain --num_held_out 359                 # held-out digits
    python scripts/run_score.py --model_name_or_path outputs/pretrain --images photos/ cat.png --compare drawings/
    python scripts/run_score.py --model_name_or_path outputs/pretrain --num_held_out 9 --attention 4 3          # row, column

Seconds for small models. Writes scores.csv, score.json, surprise.png (images next to maps of their pixels' surprise) and
histogram.png to score/ in the model's folder or --output_dir. With --attention also attention-1.png and so on: what that pixel
looks at in each image of surprise.png, by block and head, computed eagerly while the model's own attention stays. With --compare, also how well nats per pixel tells images of
another kind from those scored (AUROC).
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.arguments import ScoreArguments
from hf_igpt.commands.cli import run_script
from hf_igpt.data.arguments import DataArguments


if __name__ == "__main__":
    run_script("hf_igpt.commands.score:score", ScoreArguments, DataArguments, description=__doc__)

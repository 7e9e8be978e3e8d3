"""Draw images with a trained Image GPT: from nothing, or completing the upper rows of given images.

    python scripts/run_sample.py --model_name_or_path outputs/pretrain --num_images 16
    python scripts/run_sample.py --model_name_or_path outputs/pretrain --images cat.png dog.png --rows 4
    python scripts/run_sample.py --model_name_or_path outputs/pretrain --num_held_out 6      # held-out digits
    python scripts/run_sample.py --model_name_or_path outputs/pretrain --num_held_out 6 --box 0.25 0.25 0.75 0.75

Seconds for small models; a hole takes as long as --particles whole images. Writes samples.png, and completions.png or
inpainted.png (original, given part, completions) to --output_dir; with --gif also films of the drawing, with --seen what the model
sees of given images.
Temperature 1 and nothing truncated, as in the paper, unless told otherwise.
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.arguments import SampleArguments
from hf_igpt.commands.cli import run_script
from hf_igpt.data.arguments import DataArguments


if __name__ == "__main__":
    run_script("hf_igpt.commands.sample:draw", SampleArguments, DataArguments, description=__doc__)

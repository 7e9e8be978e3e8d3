"""Convert a checkpoint of OpenAI's TensorFlow code (iGPT-S, M, L; autoregressive or BERT) to a folder that from_pretrained loads.

    python scripts/run_convert.py --checkpoint models/model.ckpt-1000000 --output_dir igpt-s --palette kmeans_centers.npy

Seconds for S, a minute for L, on a CPU. All sizes come from the file. Needs TensorFlow: pip install "hf_igpt[openai]".
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.arguments import ConvertArguments
from hf_igpt.commands.cli import run_script


if __name__ == "__main__":
    run_script("hf_igpt.commands.convert:convert", ConvertArguments, description=__doc__)

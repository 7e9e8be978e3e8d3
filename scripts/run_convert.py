"""Convert a checkpoint of OpenAI's TensorFlow code (iGPT-S, M, L; autoregressive or BERT) to a folder of ours.

    python scripts/run_convert.py --checkpoint models/model.ckpt-1000000 --output_dir igpt-s --palette kmeans_centers.npy

Seconds for S, a minute for L, on a CPU. All sizes come from the file. Needs TensorFlow: pip install "hf_igpt[openai]".
"""

from hf_igpt.commands.cli import run_script
from hf_igpt.commands.convert import ConvertArguments, convert


if __name__ == "__main__":
    run_script(convert, ConvertArguments, description=__doc__)

"""Publish a model on the Hugging Face Hub: weights, image processor, code, and a card made from its records.

    hf auth login
    python scripts/run_publish.py --model outputs/pretrain --repo_id my-name/igpt-digits --private
    python scripts/run_publish.py --model outputs/pretrain --repo_id my-name/igpt-digits --local_only outputs/repository

Everything is checked first and pushed in one commit; --local_only pushes nothing. Prints three ways to load the result.
"""

import os


os.environ["HF_IGPT_REGISTER"] = "later"  # so that --help loads no model

from hf_igpt.commands.arguments import PublishArguments
from hf_igpt.commands.cli import run_script


if __name__ == "__main__":
    run_script("hf_igpt.commands.publish:publish", PublishArguments, description=__doc__)

"""Publish a model on the Hugging Face Hub: weights, image processor, code, and a card made from its records.

    hf auth login
    python scripts/run_publish.py --model outputs/pretrain --repo_id my-name/igpt-digits --private
    python scripts/run_publish.py --model outputs/pretrain --repo_id my-name/igpt-digits --local_only outputs/repository

Everything is checked first and pushed in one commit; --local_only pushes nothing. Prints three ways to load the result.
"""

from hf_igpt.commands.cli import run_script
from hf_igpt.commands.publish import PublishArguments, publish


if __name__ == "__main__":
    run_script(publish, PublishArguments, description=__doc__)

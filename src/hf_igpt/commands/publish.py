"""`scripts/run_publish.py`: validate a model's folder and publish it on the Hub, or write what would be published."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..configuration_imagegpt import ImageGPTConfig
from ..publishing.cards import auto_class
from ..publishing.hub import push, write_repository
from .arguments import PublishArguments
from .folders import check_new


def publish(args: PublishArguments) -> str:
    """Validate a model's folder and push it as a whole repository in one commit, or write it to `local_only`.

    Returns the address, or the folder. What is wrong with the folder is a ValueError before anything is written or sent;
    an interrupted push leaves the repository as it was.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo_id):
        raise ValueError(f"--repo_id is organisation/name; found {args.repo_id}.")
    if args.local_only is not None:
        target = Path(args.local_only)
        check_new(target, "--local_only")
        write_repository(args.model, target, args.repo_id, args.license, args.bfloat16, args.code)
        where = str(target)
    else:
        HfApi().whoami()  # raises before any work if there is no token
        check_visibility(args.repo_id, args.private)
        options: dict[str, Any] = {"private": args.private, "revision": args.revision}
        options |= {"bfloat16": args.bfloat16, "code": args.code}
        where = push(args.model, args.repo_id, licence=args.license, **options)
    print(f"{'Wrote' if args.local_only else 'Published'} {where}\n")
    print(describe_loading(ImageGPTConfig.from_pretrained(args.model), args.local_only or args.repo_id, args.code))
    return where


def check_visibility(repo_id: str, private: bool) -> None:
    """ValueError if a repository that is to be private exists and is public."""
    api = HfApi()
    if private and api.repo_exists(repo_id) and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or give another --repo_id.")


def describe_loading(config: ImageGPTConfig, name: str, code: bool = True) -> str:
    """The ways to load a published model, one on each line. code: whether it holds its code."""
    head = auto_class(config)
    plain = f'AutoModel.from_pretrained("{name}")' if config.fits_transformers else "refuses with a sentence"
    remote = f'{head}.from_pretrained("{name}", trust_remote_code=True)' if code else "none"
    return "\n".join(
        [
            f"transformers alone:      {plain}",
            f"code in the repository:  {remote}",
            f'with the package:        import hf_igpt; {head}.from_pretrained("{name}")',
        ]
    )

"""A published repository: weights, configuration, processor, code and card; written to a folder, pushed in one commit.

Three ways to load one: plain transformers (its own ImageGPT reads the same files); `trust_remote_code=True` (the modules
below, from the repository); `import hf_igpt`.
"""

import json
import re
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .. import modeling_imagegpt
from ..configuration_imagegpt import ImageGPTConfig
from ..evaluation.records import RECORDS, RUN, own_file, read_json, read_records, read_run, whole_folder
from ..image_processing_imagegpt import AnyImageProcessor, InstalledProcessor
from ..reporting import plots
from .cards import render_card


CODE = (
    "presets.py",
    "clusters.py",
    "pixels_imagegpt.py",
    "image_processing_imagegpt.py",
    "configuration_imagegpt.py",
    "inputs_imagegpt.py",
    "layers_imagegpt.py",
    "cache_imagegpt.py",
    "modeling_imagegpt.py",
    "features_imagegpt.py",
    "generation_imagegpt.py",
    "pipelines_imagegpt.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_imagegpt.ImageGPTConfig",
    "AutoModel": "modeling_imagegpt.ImageGPTModel",
    "AutoModelForCausalLM": "modeling_imagegpt.ImageGPTForCausalImageModeling",
    "AutoModelForMaskedImageModeling": "modeling_imagegpt.ImageGPTForMaskedImageModeling",
    "AutoModelForImageClassification": "modeling_imagegpt.ImageGPTForImageClassification",
}
# As a dictionary: with a single string, pipelines of transformers ask a question on the terminal.
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_imagegpt.ImageGPTImageProcessor",
        "pil": "image_processing_imagegpt.ImageGPTImageProcessorPil",
    }
}
CUSTOM_PIPELINES = {
    "image-completion": {
        "impl": "pipelines_imagegpt.ImageCompletionPipeline",
        "pt": ["AutoModelForCausalLM"],
        "type": "image",
    }
}
WEIGHTS = "model*.safetensors*"  # one file, or shards and their index
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
# What an earlier commit may hold that a new one does not; other files there are their owner's, and stay.
PICTURES = ("samples.png", "completions.png", "inpainted.png", "masked.png", "training.png", "confusion.png")
REPLACED = (
    WEIGHTS,
    "pytorch_model*",
    "training_args.bin",
    "generation_config.json",
    RECORDS,
    *PICTURES,
    *CODE,
)
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def push(
    model_dir: str | Path,
    repo_id: str,
    *,
    licence: str = "apache-2.0",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Publish with hf_igpt",
    bfloat16: bool = False,
    code: bool = True,
) -> str:
    """Push the folder of a model as a repository, in one commit; returns its address. bfloat16, code: as in `write_repository`."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="hf_igpt-") as staged:
        repository = write_repository(model_dir, Path(staged) / "repository", repo_id, licence, bfloat16, code)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # Not `upload_folder`, which makes several commits if an upload is large or slow.
        api.create_commit(
            repo_id,
            plan_commit(api.list_repo_files(repo_id, revision=revision), repository),
            commit_message=message,
            revision=revision,
        )
    return str(url)


def plan_commit(old: list[str], folder: Path) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add all files in `folder`, and delete what an earlier commit by this function may have left."""
    new = {file.name: file for file in folder.iterdir()}
    stale = [name for name in old if name not in new and any(fnmatch(name, pattern) for pattern in REPLACED)]
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in sorted(new.items())]
    return operations + [CommitOperationDelete(path_in_repo=name) for name in stale]


def write_repository(
    model_dir: str | Path,
    folder: str | Path,
    repo_id: str,
    licence: str = "apache-2.0",
    bfloat16: bool = False,
    code: bool = True,
) -> Path:
    """Write everything that a published repository holds to `folder`, which appears whole or not at all.

    bfloat16: round the weights, which halves their size; the configuration still names the type they had, as which they are
    loaded. code: whether it holds the code too, for those who have not installed this package.
    """
    model_dir, folder = Path(model_dir), Path(folder)
    copied = [file for pattern in (WEIGHTS, "generation_config.json", RECORDS) for file in model_dir.glob(pattern)]
    for name in (CONFIG, PROCESSOR, RUN, *(file.name for file in copied)):
        own_file(model_dir, name)
    config, processor = check_model(model_dir)
    run = read_run(model_dir)
    with whole_folder(folder) as staged:
        for file in copied:
            if bfloat16 and file.suffix == ".safetensors":
                rounded = {name: weight.bfloat16() for name, weight in load_file(file).items()}
                save_file(rounded, staged / file.name, metadata={"format": "pt"})
            else:
                shutil.copy(file, staged)
        if code:
            add_code(staged, config, processor)
        config.save_pretrained(staged)
        processor.save_pretrained(staged)
        plots.palette_picture(processor.palette).save(staged / "palette.png")
        copy_pictures(model_dir, staged, config.objective)
        recipe = run.get("recipe", {}) | ({"weights are stored as": "bfloat16, rounded"} if bfloat16 else {})
        (staged / RUN).write_text(json.dumps({"recipe": recipe}, indent=1) + "\n")
        (staged / "README.md").write_text(card_of_repository(staged, repo_id, licence, code))
        check_for_secrets(staged, model_dir)
    return folder


def card_of_repository(folder: Path, repo_id: str, licence: str = "apache-2.0", code: bool = True) -> str:
    """The card of what else is in a repository's folder."""
    config, processor = ImageGPTConfig.from_pretrained(folder), InstalledProcessor.from_pretrained(folder)
    recipe = read_run(folder).get("recipe", {})
    records = read_records(folder / RECORDS) if (folder / RECORDS).is_file() else []
    found = plots.find_pictures(folder, config.objective)
    pictures = {plots.CAPTIONS[name]: name for name in found if name in PICTURES}
    grid, crops = processor.token_grid(), bool(processor.do_center_crop)
    return render_card(repo_id, config, grid, crops, recipe, records, pictures, licence, code=code)


def add_code(folder: Path, config: ImageGPTConfig, processor: AnyImageProcessor) -> None:
    """Copy the code to a folder, and name it in the configuration and the processor that are to be saved there."""
    for name in CODE:
        shutil.copy(Path(__file__).parent.parent / name, folder)
    config.auto_map = AUTO_MAP
    draws = "ImageGPTForCausalImageModeling" in (config.architectures or []) or config.generative_loss_weight > 0
    if config.objective == "causal" and draws:
        config.custom_pipelines = CUSTOM_PIPELINES
    vars(processor)["auto_map"] = PROCESSOR_AUTO_MAP


def check_model(folder: str | Path) -> tuple[ImageGPTConfig, AnyImageProcessor]:
    """(configuration, image processor) of a folder whose parts belong together; else a ValueError naming the file.

    Each architecture that the configuration names must find all its weights there, and all must be finite.
    """
    folder = Path(folder)
    for name, remedy in (
        (CONFIG, "give the folder that run_pretrain.py or run_convert.py wrote"),
        (PROCESSOR, "save the image processor that the model was trained with there; run_convert.py takes --palette"),
    ):
        if not (folder / name).is_file():
            raise ValueError(f"There is no {folder / name}: {remedy}.")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"There are no weights {folder / 'model.safetensors'}: save the model by `save_pretrained`.")
    config = ImageGPTConfig.from_pretrained(folder)
    processor = InstalledProcessor.from_pretrained(folder)
    try:
        processor.check_fits(config)
    except ValueError as error:
        raise ValueError(f"{folder / PROCESSOR}: {error}") from error
    names = config.architectures or []
    if not names or any(name not in modeling_imagegpt.__all__ for name in names):
        raise ValueError(
            f"{folder / CONFIG} names the architectures {names}; Image GPT has {modeling_imagegpt.__all__}."
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index, dict, "the places of weights").get("weight_map")
        known = {file.name for file in files}
        if not isinstance(places, dict) or (strange := [place for place in places.values() if place not in known]):
            named = (
                f" names {strange[0]!r:.100}, which is no file beside it"
                if isinstance(places, dict)
                else " has no weight_map"
            )
            raise ValueError(f"{index}{named}: save the model by `save_pretrained`.")
    stored = {}
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - it is no dictionary
                    tensor = weights.get_tensor(name)
                    if not torch.isfinite(tensor).all():
                        raise ValueError(f"{file}: {name} is not finite; the training diverged.")
                    stored[name] = tuple(tensor.shape)
        except Exception as error:
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"{file} cannot be read; it is damaged or cut short: {error}") from error
    for name in names:
        with torch.device("meta"):
            expected = getattr(modeling_imagegpt, name)(config).state_dict()
        for key, tensor in expected.items():
            if stored.get(key) != tuple(tensor.shape):
                raise ValueError(
                    f"{folder / CONFIG} says {name}, whose {key} has shape {tuple(tensor.shape)}; the weights have "
                    f"{stored.get(key, 'no such tensor')}."
                )
    return config, processor


def copy_pictures(source: Path, target: Path, objective: str) -> None:
    """Copy to `target` the pictures that a card shows."""
    for name, file in plots.find_pictures(source, objective).items():
        if name in PICTURES:
            shutil.copy(plots.check_picture(source, file), target / name)


def check_for_secrets(folder: Path, model_dir: Path) -> None:
    """ValueError if a text to be published holds an access token or a path of this machine."""
    private = {str(Path.home()), str(Path.cwd()), str(model_dir.resolve())} - {"/"}
    for file in [*folder.glob("*.md"), *folder.glob("*.json")]:
        text = file.read_text()
        if SECRET.search(text):
            raise ValueError(f"{file.name} would hold an access token (hf_…): remove it from the model's folder.")
        for path in private:
            if path in text:
                raise ValueError(f"{file.name} would hold the path {path}: remove it from the model's folder.")

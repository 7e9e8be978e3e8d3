"""`scripts/run_convert.py`: OpenAI's TensorFlow checkpoints as folders that `from_pretrained` loads."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..clusters import load_palette
from ..evaluation.records import RUN, whole_folder
from ..image_processing_imagegpt import ImageGPTImageProcessorPil
from ..modeling_imagegpt import ImageGPTForCausalImageModeling, ImageGPTForMaskedImageModeling
from ..publishing.conversion import from_openai, read_openai
from .arguments import ConvertArguments
from .folders import check_new


def convert(args: ConvertArguments) -> Path:
    """Write the checkpoint as a folder that `from_pretrained` loads, with its image processor if a palette is given."""
    folder = Path(args.output_dir)
    check_new(folder, "--output_dir")
    palette = None if args.palette is None else load_palette(args.palette)
    variables = read_openai(args.checkpoint)
    try:
        config, state = from_openai(variables)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from error
    image_size = round(config.n_positions**0.5)
    if palette is not None and len(palette) != config.vocab_size - 1:
        raise ValueError(f"{args.palette} has {len(palette)} colours, the model {config.vocab_size - 1}.")
    if palette is not None and image_size**2 != config.n_positions:
        raise ValueError(
            f"{config.n_positions} pixels are no square image: leave --palette out, and save a processor of their size."
        )
    head = ImageGPTForCausalImageModeling if config.objective == "causal" else ImageGPTForMaskedImageModeling
    config.architectures = [head.__name__] + (["ImageGPTForImageClassification"] if "score.weight" in state else [])
    with whole_folder(folder) as staged:
        config.save_pretrained(staged)
        weights = {name: weight.contiguous() for name, weight in state.items()}
        save_file(weights, staged / "model.safetensors", {"format": "pt"})
        if config.objective == "causal":
            with torch.device("meta"):
                ImageGPTForCausalImageModeling(config).generation_config.save_pretrained(staged)
        if palette is not None:
            ImageGPTImageProcessorPil(clusters=palette, size=image_size, do_center_crop=True).save_pretrained(staged)
        recipe = {"objective": config.objective, "converted from": Path(args.checkpoint).name}
        (staged / RUN).write_text(json.dumps({"recipe": recipe}, indent=1) + "\n")
    n_parameters = sum(weight.numel() for name, weight in state.items() if not name.endswith(".bias"))
    print(
        f"Wrote {n_parameters:,} parameters ({config.objective}, {config.n_layer} layers x {config.n_embd}) to {folder}"
    )
    return folder

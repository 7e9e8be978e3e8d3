"""The command line of the benchmarks."""

from dataclasses import dataclass, field

import torch


SUITES = ("train", "generate", "features", "tokenize")


@dataclass
class BenchmarkArguments:
    """What is timed, and on what."""

    suite: str = field(default="all", metadata={"help": "What is timed.", "choices": [*SUITES, "all"]})
    device: str = field(default="cpu", metadata={"help": "Device of the models.", "choices": ["cpu", "cuda"]})
    output: str | None = field(
        default=None, metadata={"help": "JSON file for the records; those of other suites are kept."}
    )
    repeats: int = field(default=5, metadata={"help": "Turns of each contender; their median counts."})
    compile: bool = field(default=True, metadata={"help": "Also time compiled models."})
    n_layer: int = field(default=8, metadata={"help": "Layers of the model, on a CPU."})
    n_embd: int = field(default=256, metadata={"help": "Its width."})
    n_head: int = field(default=4, metadata={"help": "Its heads."})
    image_size: int = field(default=32, metadata={"help": "Height and width of an image in pixels."})
    n_images: int = field(default=64, metadata={"help": "Images in a batch that is tokenized."})
    n_files: int = field(default=10_000, metadata={"help": "JPEG files in the folder that is tokenized."})
    n_pixels: int = field(default=1_000_000, metadata={"help": "Pixels that a palette is fitted to."})
    max_tokens: int | None = field(default=None, metadata={"help": "Pixels drawn per image. Default: all."})

    def __post_init__(self) -> None:
        for name in ("repeats", "n_layer", "n_embd", "n_head", "image_size", "n_images", "n_files", "n_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is at least 1; found {getattr(self, name)}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no GPU that torch can use; leave it out.")

"""The flags of the commands, but for those of training and of images.

Importing this module loads nothing heavy, so that flags can be printed at once.
"""

from dataclasses import dataclass, field

from ..data.arguments import IMAGE_SIZE_HELP, check_numbers, name_image_size, parse_image_size
from ..presets import (
    EVALUATION_MASKS,
    INPAINTING_PARTICLES,
    INPAINTING_ROUNDS,
    KNN_NEIGHBORS,
    MAX_COLORS,
    N_COLORS,
    PALETTE_PIXELS,
    PROBE_SGD_LEARNING_RATES,
    PROBE_SUBSETS,
    SEED,
    SIZES,
)


MOST = 1e15  # of anything that a plan counts


@dataclass
class ClustersArguments:
    """Which palette."""

    output_dir: str = field(
        default="outputs/palette", metadata={"help": "Where the processor and pictures are written."}
    )
    num_colors: int | None = field(
        default=None, metadata={"help": "Colours K. Default: 512 (paper 3.2); 16 for the digits."}
    )
    num_pixels: int = field(default=PALETTE_PIXELS, metadata={"help": "Pixels sampled, evenly from all images."})
    palette: str | None = field(
        default=None, metadata={"help": "Fit nothing: take this palette (.npy, .json or a processor's folder)."}
    )
    seed: int = field(default=SEED, metadata={"help": "Seed of the sampling, of k-means and of the held-out split."})

    def __post_init__(self) -> None:
        check_numbers(self, {f"from 1 to {MAX_COLORS}": ("num_colors",), "at least 1": ("num_pixels",)})


@dataclass
class SampleArguments:
    """What to draw, with which model."""

    model_name_or_path: str = field(metadata={"help": "Trained model with its image processor: folder or Hub name."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the pictures go. Default: the model's folder."}
    )
    num_images: int = field(
        default=0,
        metadata={
            "help": "Images drawn from nothing, of each class. Default: 16 if nothing is completed, 8 of a class."
        },
    )
    classes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Classes to draw, by name, with a model that was trained with --class_conditional; of images that are "
            "completed, one for all or one for each."
        },
    )
    guidance: float = field(
        default=1.0,
        metadata={"help": "Draw what is more typical of its class than the model says: 1.5 to 4, say; 1: no guidance."},
    )
    images: list[str] = field(default_factory=list, metadata={"help": "Image files to complete, or folders of them."})
    num_held_out: int = field(
        default=0, metadata={"help": "Complete this many held-out images of the dataset (the digits by default)."}
    )
    rows: int | None = field(default=None, metadata={"help": "Upper rows kept of each image. Default: half of them."})
    mask: str | None = field(
        default=None,
        metadata={
            "help": "Picture whose light pixels are drawn anew in each image; of the images' size or of the model's."
        },
    )
    box: list[float] | None = field(
        default=None,
        metadata={"help": "Box that is drawn anew in each image: left top right bottom, in fractions of it."},
    )
    num_completions: int = field(default=5, metadata={"help": "Completions of each image."})
    gif: bool = field(
        default=False,
        metadata={"help": "Also write a GIF of the images appearing pixel by pixel, beside each picture."},
    )
    seen: bool = field(
        default=False,
        metadata={
            "help": "Also write seen.png: what the model sees of the given images, resized, in its colours, as tokens."
        },
    )
    particles: list[int] = field(
        default_factory=lambda: [INPAINTING_PARTICLES],
        metadata={
            "help": "For --mask and --box: images drawn together for each completion; more fit their surroundings better. "
            "Several numbers are shown next to each other: with 1 the surroundings that come later do not matter."
        },
    )
    steps: int = field(
        default=INPAINTING_ROUNDS,
        metadata={"help": "For --mask and --box with a masked model: rounds in which hidden pixels are revealed."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature (paper: 1)."})
    top_k: int = field(default=0, metadata={"help": "Draw among this many likeliest colours only; 0: all (paper)."})
    top_p: float = field(default=1.0, metadata={"help": "Draw among the likeliest colours of this total probability."})
    seed: int = field(default=SEED, metadata={"help": "Seed of the drawing."})
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the held-out split. Default: the one the model was trained with."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images drawn in one batch."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, … Default: an accelerator if there is one."})
    bf16: bool = field(
        default=False,
        metadata={"help": "Weights and cache in bfloat16: faster on GPUs; a seed then draws other pictures."},
    )

    def __post_init__(self) -> None:
        ranges = {
            "at least 1": ("num_completions", "batch_size", "particles", "steps", "guidance"),
            "positive": ("temperature",),
            "above 0 and at most 1": ("top_p",),
        }
        check_numbers(self, ranges)


@dataclass
class ProbeArguments:
    """Which models, which layers, which probes."""

    model_name_or_path: list[str] = field(
        metadata={"help": "Trained models with their image processors: folders or Hub names."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where probe.json and probe.png go. Default: probe/ in the model's folder."}
    )
    milestones: bool = field(
        default=False, metadata={"help": "Probe the checkpoints in milestones/ of each model's folder as well."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Layers 0..L, negative ones from the end. Default: all."}
    )
    num_concatenated: int = field(
        default=1,
        metadata={"help": "Also probe this many layers around the best one together (paper, Table 2: 5)."},
    )
    probe: str = field(
        default="lbfgs",
        metadata={
            "help": "lbfgs: logistic regression by scikit-learn, as the paper's for small sets. sgd: its recipe for ImageNet.",
            "choices": ["lbfgs", "sgd"],
        },
    )
    standardize: bool = field(
        default=True, metadata={"help": "Bring each feature to mean 0 and deviation 1 of the training images."}
    )
    regularization: list[float] = field(
        default_factory=lambda: [1e-3, 1e-2, 1e-1, 1.0, 10.0],
        metadata={"help": "Values of scikit-learn's C, inverse strength, to choose from."},
    )
    max_iter: int = field(default=1000, metadata={"help": "Iterations of L-BFGS, at most."})
    sgd_learning_rates: list[float] = field(
        default_factory=lambda: list(PROBE_SGD_LEARNING_RATES),
        metadata={"help": "Learning rates of SGD to choose from (paper 4.2: 30, 10, 3, …)."},
    )
    sgd_steps: int = field(default=10_000, metadata={"help": "Steps of SGD (paper: 1,000,000)."})
    sgd_batch_size: int = field(default=256, metadata={"help": "Images per step of SGD; the paper states no number."})
    knn: bool = field(
        default=True, metadata={"help": f"Also classify by the {KNN_NEIGHBORS} nearest neighbours, by cosine."}
    )
    baselines: bool = field(default=True, metadata={"help": "Probe raw pixels and the untrained network as well."})
    labels_per_class: list[int] = field(
        default_factory=list,
        metadata={"help": "Also probe the best layer with this many labels of each class (paper, Table 4: 4 25 400)."},
    )
    num_subsets: int = field(default=PROBE_SUBSETS, metadata={"help": "Random subsets for each of these numbers."})
    num_masks: int = field(
        default=EVALUATION_MASKS,
        metadata={
            "help": "Masks drawn for each test image if the model is masked; the majority vote decides (paper 4.6)."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Images in a forward pass."})
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16 autocast."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, … Default: an accelerator if there is one."})
    seed: int = field(default=SEED, metadata={"help": "Seed of splits, subsets, masks and the untrained network."})

    def __post_init__(self) -> None:
        counts = (
            "num_concatenated",
            "max_iter",
            "sgd_steps",
            "sgd_batch_size",
            "num_subsets",
            "num_masks",
            "batch_size",
        )
        strengths = ("regularization", "sgd_learning_rates")
        ranges = {"at least 1": counts, "positive": (*strengths, "labels_per_class"), "any number": ("layers",)}
        check_numbers(self, ranges)
        for name in strengths:
            if not getattr(self, name):
                raise ValueError(f"--{name} are positive numbers; found none.")
        if self.probe not in ("lbfgs", "sgd"):
            raise ValueError(f"--probe is lbfgs or sgd; found {self.probe!r}.")


@dataclass
class ScoreArguments:
    """Which images to score, with which model."""

    model_name_or_path: str = field(
        metadata={"help": "Trained causal model with its image processor: folder or Hub name."}
    )
    images: list[str] = field(default_factory=list, metadata={"help": "Image files to score, or folders of them."})
    num_held_out: int = field(
        default=0, metadata={"help": "Score this many held-out images of the dataset (the digits by default)."}
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Image files or folders of another kind: how well does nats per pixel tell them apart?"},
    )
    by_class: bool = field(
        default=False,
        metadata={
            "help": "Also say of which class each image is, by which class makes it most likely, with a model that was trained "
            "with --class_conditional; as many forward passes as there are classes."
        },
    )
    num_maps: int = field(
        default=8, metadata={"help": "Images with a map of each pixel's surprise, least to most surprising."}
    )
    attention: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Row and column of a pixel, from 0: draw what it looks at, by block and head, for each image with a map."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where scores and pictures go. Default: score/ in the model's folder."}
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the held-out split. Default: the one the model was trained with."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images in a forward pass."})
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16 autocast."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, … Default: an accelerator if there is one."})

    def __post_init__(self) -> None:
        check_numbers(self, {"at least 1": ("num_maps", "batch_size")})
        if len(self.attention) not in (0, 2):
            raise ValueError(f"--attention is the row and the column of one pixel; found {self.attention}.")
        if not (self.images or self.num_held_out):
            raise ValueError("There is nothing to score: give --images or --num_held_out.")


@dataclass
class ReportArguments:
    """Which runs, and where to."""

    folders: list[str] = field(
        metadata={"help": "Folders of runs: pretraining, fine-tuning, probes, scores; what lies in them is found."}
    )
    output_dir: str = field(
        default="outputs/report", metadata={"help": "Where report.md and its pictures are written."}
    )
    probe_milestones: bool = field(
        default=False,
        metadata={"help": "First probe the milestones that were not probed yet, on the labelled images named here."},
    )


@dataclass
class PlanArguments:
    """What is to be trained, on what. None means the preset of --size."""

    size: list[str] = field(default_factory=lambda: ["s"], metadata={"help": f"Sizes to plan for: {', '.join(SIZES)}."})
    objective: str = field(
        default="causal",
        metadata={
            "help": "causal or masked: a causal model computes half of the attention.",
            "choices": ["causal", "masked"],
        },
    )
    image_size: int | str | None = field(
        default=None, metadata={"help": f"{IMAGE_SIZE_HELP} Default: of the paper's recipe, 64 for xl, else 32."}
    )
    num_colors: int = field(default=N_COLORS, metadata={"help": "Colours K of the palette."})
    images: float | None = field(
        default=None,
        metadata={"help": "Images in the dataset, 1.28e6 for example. Needed if the length is given in epochs."},
    )
    epochs: float | None = field(default=None, metadata={"help": "Epochs. Default: the preset's."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimiser steps. Default: the preset's."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Images in an optimiser step, over all devices. Default: the preset's."}
    )
    devices: int = field(default=1, metadata={"help": "Devices, one process each."})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Default: the fewest that --memory_gib holds, or 1."}
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast over float32 weights, as run_pretrain.py."})
    memory_gib: float | None = field(
        default=None, metadata={"help": "Memory of a device in GiB: says what fits. An H100 of 80 GB reports 79."}
    )
    tflops: float | None = field(
        default=None, metadata={"help": "Achieved TFLOP/s per device, including recomputation."}
    )
    records: str | None = field(
        default=None,
        metadata={"help": "Or a file of measured records: images_per_second of such a model, or tflops_per_second."},
    )
    output_json: str | None = field(default=None, metadata={"help": "File to which the plans are written too."})

    def __post_init__(self) -> None:
        for size in self.size:
            if size not in SIZES:
                raise ValueError(f"No preset {size!r}: the sizes are {', '.join(SIZES)}.")
        if self.image_size is not None:
            self.image_size = name_image_size(parse_image_size(self.image_size))
        counts = (
            "num_colors",
            "images",
            "max_steps",
            "batch_size",
            "devices",
            "gradient_accumulation_steps",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and not (1 <= value <= MOST and value == int(value)):
                raise ValueError(f"--{name} is a whole number from 1 to {MOST:g}; found {value:g}.")
        for name in ("epochs", "memory_gib", "tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST:
                raise ValueError(f"--{name} is positive, at most {MOST:g}; found {value:g}.")
        if self.num_colors > MAX_COLORS:
            raise ValueError(f"--num_colors is at most {MAX_COLORS}; found {self.num_colors}.")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("--epochs and --max_steps both say how long to train: give one of them.")
        if self.tflops is not None and self.records is not None:
            raise ValueError("One throughput is enough: give --tflops or --records.")


@dataclass
class ConvertArguments:
    """Which checkpoint, and where to."""

    checkpoint: str = field(metadata={"help": "TensorFlow checkpoint, without suffix: DIR/model.ckpt-1000000."})
    output_dir: str = field(metadata={"help": "A new or empty folder."})
    palette: str | None = field(
        default=None, metadata={"help": "kmeans_centers.npy, so that the image processor is written too."}
    )


@dataclass
class PublishArguments:
    """What to publish, and where."""

    model: str = field(metadata={"help": "Folder of a trained or converted model, with its image processor."})
    repo_id: str = field(metadata={"help": "Its name on the Hub: organisation/name."})
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    local_only: str | None = field(
        default=None, metadata={"help": "Write the repository to this new or empty folder and push nothing."}
    )
    bfloat16: bool = field(
        default=False,
        metadata={"help": "Round the weights to bfloat16, half the size; they are still loaded as the type they had."},
    )
    code: bool = field(
        default=True,
        metadata={"help": "Whether to include the code, for those who have not installed this package."},
    )
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, by its name on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to. Default: main."})

"""Every number of the paper, once, with its source. Other modules look numbers up here.

Sources: [V2] Chen et al., "Generative Pretraining from Pixels", ICML 2020, version 2; [code] github.com/openai/image-gpt
(`src/model.py`, `src/run.py`, `README.md`); [blog] openai.com/index/image-gpt. Numbers that the
paper does not state, and that we had to choose, are marked "ours".
"""

from dataclasses import dataclass, field


N_COLORS = 512  # K, the "9-bit colour palette" [V2 3.2]
SEED = 42  # ours, and the one that transformers' Trainer has: of splits, palettes, training and drawing
MAX_COLORS = 65535  # ours: tokens and SOS, which is K, are stored as uint16
MAX_SIDE = 4096  # ours: pixels, of an image that a processor makes; many more than any model here reads
PALETTE_PIXELS = 1_000_000  # ours: pixels sampled from all images to fit a palette
IMAGE_SIZE = 32  # H = W, the resolution of the released models [code run.py n_px]
MASK_PROBABILITY = 0.15  # [V2 2.1, code run.py bert_mask_prob]
HELD_OUT_FRACTION = 0.04  # of ImageNet's training split, for validation [V2 3.1]
LABELLED_HELD_OUT_FRACTION = 0.1  # of the training split of CIFAR-10, CIFAR-100 and STL-10 [V2 3.1]
EVALUATION_MASKS = 5  # masks drawn per image when a masked model classifies; the majority vote decides [V2 4.6]

ADAM_BETAS = (0.9, 0.95)  # [V2 A.1]
WEIGHT_DECAY = 0.0  # [V2 A.1]
WARMUP_EPOCHS = 1.0  # "one epoch", then cosine to 0 [V2 A.1]
WARMUP_FRACTION = (
    0.01  # as a fraction of training, if the length of an epoch is unknown: 1 of about 100 epochs [V2 A.1]
)

# Augmentation for pretraining on ImageNet [V2 3.1]
CROP_SHORTER_SIDE = (256, 384)  # pixels, drawn uniformly from the closed interval
CROP_SIZE = 224  # pixels
PAD_CROP_PIXELS = 4  # reflected border, then a random window, for CIFAR at 32x32 [V2 3.1]

# Initialisation [code src/model.py]: standard deviations of zero-mean normals; the logit matrices start at 0
INIT_POSITION_STD = 0.01  # wpe
INIT_EMBEDDING_STD = 0.02  # wte, sos
INIT_MLP_STD = 0.02  # c_fc and c_proj of the MLP; q, k, v use 1/sqrt(n_embd), attention's c_proj 1/sqrt(n_embd*n_layer)

FINETUNING_RATE = (
    0.1  # as a fraction of the learning rate of pretraining: "often an order of magnitude smaller" [V2 3.4]
)
FINETUNING_SCHEDULE = "constant"  # no cosine; the model with the best validation accuracy is kept [V2 3.4]
FINETUNING_EPOCHS = 20  # ours, at most; the paper states none
FINETUNING_PATIENCE = 5  # ours: evaluations without a better accuracy, after which training stops
GENERATIVE_LOSS_WEIGHT = 1.0  # weight of L_GEN, which is added to L_CLF [V2 2.3, code run.py]

PROBE_SGD_LEARNING_RATES = (30, 10, 3, 1, 0.3, 0.1)  # "30, 10, 3, ..." [V2 3.4]
PROBE_MOMENTUM = 0.9  # [V2 3.4]
PROBE_SUBSETS = 5  # random subsets of the labels that a few-label probe is fitted to [V2 Table 4]
CLASS_DROPOUT = 0.1  # of classes, for guidance (arXiv 2207.12598)
INPAINTING_PARTICLES = 64  # ours: images that are drawn together for one hole
INPAINTING_ROUNDS = 16  # ours: rounds in which a masked model reveals hidden pixels
KNN_NEIGHBORS, KNN_TEMPERATURE = 200, 0.07  # the usual settings in the field; the paper has no k-NN


@dataclass(frozen=True)
class Size:
    """A model size and the recipe for pretraining it.

    learning_rate: peak learning rates, keyed by (objective, image size). For other image sizes the nearest one is used.
    batch_size: images per optimiser step, over all processes. Exactly one of `max_steps` and `num_epochs` is set.
    """

    n_layer: int
    n_embd: int
    n_head: int
    learning_rate: dict[tuple[str, int], float] = field(default_factory=dict)
    batch_size: int = 128  # [V2 A.1]
    max_steps: int | None = None
    num_epochs: float | None = None

    def learning_rate_for(self, objective: str, image_size: float) -> float:
        """The learning rate for `objective` at the published image size that is nearest to `image_size` (pixels)."""
        rows = {size: rate for (name, size), rate in self.learning_rate.items() if name == objective}
        return rows[min(rows, key=lambda size: abs(size - image_size))]


SIZES: dict[str, Size] = {
    # Ours: small enough to train on a laptop's CPU in minutes.
    "tiny": Size(4, 128, 4, {("causal", 32): 1e-3, ("masked", 32): 1e-3}, batch_size=16, num_epochs=15),
    # Ours: the 10 M parameters, batch size and epochs of a well-known CIFAR-10 run (karpathy/minGPT, play_image.ipynb).
    "xs": Size(12, 256, 8, {("causal", 32): 3e-3, ("masked", 32): 3e-3}, num_epochs=16),
    # Shapes [code README]; learning rates [V2 Table 5]; steps [V2 A.1].
    "s": Size(24, 512, 8, {("causal", 32): 3e-3, ("masked", 32): 1e-2}, max_steps=1_000_000),
    "m": Size(36, 1024, 8, {("causal", 32): 3e-3, ("masked", 32): 3e-3}, max_steps=1_000_000),
    "l": Size(48, 1536, 16, {("causal", 32): 1e-3, ("causal", 48): 1e-2, ("masked", 32): 1e-3}, max_steps=1_000_000),
    # Width and depth [V2 2.2 and Table 2]; the head count is stated nowhere: 24 is ours (heads of 128, as in M).
    # BERT-style XL was not trained: its learning rate is AR's.
    "xl": Size(60, 3072, 24, {("causal", 64): 3e-4, ("masked", 64): 3e-4}, batch_size=64, max_steps=2_000_000),
}


@dataclass(frozen=True)
class Published:
    """A figure that OpenAI published: the result for `task` on `data`, after pretraining on ILSVRC-2012 at `image_size`."""

    size: str
    task: str  # "generation", "linear probe" or "fine-tuning"
    data: str
    value: float  # nats per pixel for generation, accuracy in 0..1 for the other tasks
    source: str
    objective: str = "causal"
    image_size: int = IMAGE_SIZE
    num_concatenated: int = 1  # layers whose features are probed together
    labels_per_class: int | None = None  # None: all


_README, _TABLE_1, _TABLE_2, _TABLE_3, _TABLE_4 = ("image-gpt's README", *(f"paper, Table {i}" for i in (1, 2, 3, 4)))
PUBLISHED = (
    # ILSVRC-2012's validation split at 32x32, centre crop, 1 M steps
    Published("s", "generation", "ILSVRC-2012", 2.0895, _README),
    Published("m", "generation", "ILSVRC-2012", 2.0614, _README),
    Published("l", "generation", "ILSVRC-2012", 2.0466, _README),
    Published("s", "linear probe", "ILSVRC-2012", 0.419, _TABLE_2),
    Published("m", "linear probe", "ILSVRC-2012", 0.545, _TABLE_2),
    Published("l", "linear probe", "ILSVRC-2012", 0.603, _TABLE_2),
    Published("l", "linear probe", "ILSVRC-2012", 0.652, _TABLE_2, image_size=48),
    Published("xl", "linear probe", "ILSVRC-2012", 0.687, _TABLE_2, image_size=64),
    Published("xl", "linear probe", "ILSVRC-2012", 0.720, _TABLE_2, image_size=64, num_concatenated=5),
    Published("l", "linear probe", "CIFAR-10", 0.963, _TABLE_1),
    Published("l", "linear probe", "CIFAR-100", 0.828, _TABLE_1),
    Published("l", "linear probe", "STL-10", 0.955, _TABLE_1),
    # Errors of 26.8 ± 1.5, 12.4 ± 0.6 and 5.7 ± 0.1 %
    Published("l", "linear probe", "CIFAR-10", 0.732, _TABLE_4, labels_per_class=4),
    Published("l", "linear probe", "CIFAR-10", 0.876, _TABLE_4, labels_per_class=25),
    Published("l", "linear probe", "CIFAR-10", 0.943, _TABLE_4, labels_per_class=400),
    Published("l", "fine-tuning", "CIFAR-10", 0.990, _TABLE_3),
    Published("l", "fine-tuning", "CIFAR-100", 0.885, _TABLE_3),
    Published("l", "fine-tuning", "ILSVRC-2012", 0.663, "paper, 4.5"),
    Published("l", "fine-tuning", "ILSVRC-2012", 0.726, "paper, 4.5", image_size=48),
    Published("l", "fine-tuning", "CIFAR-10", 0.986, "paper, 4.6", objective="masked"),
    Published("l", "fine-tuning", "ILSVRC-2012", 0.665, "paper, 4.6", objective="masked"),
)

TRAINING_V100_DAYS = {"l": 2500}  # "roughly" [blog]

# The embedded default: scikit-learn's digits, 8x8 scans with 17 grey levels.
DIGITS_IMAGE_SIZE = 8
DIGITS_N_COLORS = 16
DIGITS_HELD_OUT_FRACTION = 0.2

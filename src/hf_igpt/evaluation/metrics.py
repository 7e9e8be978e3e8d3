"""Metrics: accuracy, nats per pixel of images, and of each pixel."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import accuracy_score
from tqdm.auto import tqdm

from ..configuration_imagegpt import ImageGPTConfig
from ..features_imagegpt import evaluation_mode
from ..inputs_imagegpt import as_tokens, check_tokens
from ..modeling_imagegpt import ImageGPTForCausalImageModeling, masked_nats, pixel_nats


BITS_PER_NAT = 1 / np.log(2)


class Accuracy(evaluate.Metric):  # type: ignore[misc]  # which has no annotations
    """Share of `predictions` that are their `references`, both (n,) integers: `{"accuracy": …}` in 0..1.

    `evaluate`'s own would be fetched from the Hub at run time.
    """

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of predictions that are right.",
            citation="",
            inputs_description="predictions, references: integers",
            features=datasets.Features({"predictions": integer, "references": integer}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def accuracy(predictions: Any, labels: Any) -> float:
    """Share of `predictions` that are the `labels`, both (n,) integers, in 0..1."""
    return Accuracy(keep_in_memory=True).compute(predictions=predictions, references=labels)["accuracy"]


def nats_per_image(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean −log p of the pixels of each image, or of those in `mask`: (B, N, K) logits, (B, N) tokens -> (B,), nats per pixel."""
    return pixel_nats(logits, tokens).mean(dim=1) if mask is None else masked_nats(logits, tokens, mask)


def check_causal(config: ImageGPTConfig) -> None:
    """A masked model is a ValueError: it gives no likelihoods."""
    if config.objective != "causal":
        raise ValueError(
            "A masked model gives no likelihood of an image, only of hidden pixels given the others: score with a causal "
            "model, or take `model(labels=tokens, bool_masked_pos=mask).loss`, the nats per hidden pixel."
        )


@torch.no_grad()
def measure_surprise(
    model: ImageGPTForCausalImageModeling,
    tokens: Any,
    class_labels: torch.Tensor | None = None,
    *,
    batch_size: int = 64,
    bf16: bool = False,
    progress: bool = True,
) -> torch.Tensor:
    """−log p of every pixel given SOS and the pixels before it, (n, N) float32 in nats, on the CPU.

    model: an `ImageGPTForCausalImageModeling`; its training flag is left as it was. tokens: (n, N) of colours 0..K-1, torch,
    numpy or a column of a tokenised dataset. A row's mean is that image's nats per pixel, the mean of all `model(labels=
    tokens).loss`. class_labels: (n,) the class of each image, −1 for none, which is also the default, if the model was
    trained with classes. batch_size: images in a forward pass; bf16: run it in bfloat16 autocast, the logarithms stay float32.
    ValueErrors, before the first forward pass: a masked model, tokens of other shapes, colours the model does not have.
    """
    config, device = model.config, model.device
    check_causal(config)
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; found {batch_size}.")
    tokens = as_tokens(tokens)
    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] != config.n_positions:
        raise ValueError(f"Tokens of images have shape (n, {config.n_positions}), n >= 1; found {tuple(tokens.shape)}.")
    check_tokens(tokens, config.vocab_size - 1, "tokens", config)
    found = torch.empty(tokens.shape)
    bar = tqdm(total=len(tokens), desc="Scoring", unit="image", disable=None if progress else True)
    with evaluation_mode(model), bar:
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size].to(device)
            told = None if class_labels is None else class_labels[start : start + batch_size].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(labels=batch, class_labels=told).logits  # (B, N, K)
            found[start : start + len(batch)] = pixel_nats(logits, batch)
            bar.update(len(batch))
    return found


def measure_class_likelihoods(
    model: ImageGPTForCausalImageModeling,
    tokens: Any,
    *,
    batch_size: int = 64,
    bf16: bool = False,
    progress: bool = True,
) -> torch.Tensor:
    """log p(x | c) of every image x under every class c, (n, C) float64 in nats, on the CPU; C forward passes for each image.

    Its softmax over the classes is p(c | x) if all classes are equally likely beforehand: the model is a classifier, though it
    was never trained to be one. The arguments, and the ValueErrors, are those of `measure_surprise`; a model without classes
    is another.
    """
    if not model.config.n_class_tokens:
        raise ValueError("This model knows no classes: train one with --class_conditional.")
    found = []
    classes = range(model.config.n_class_tokens)
    for number in tqdm(classes, desc="Classes", unit="class", disable=None if progress else True):
        told = torch.full((len(tokens),), number)
        surprise = measure_surprise(model, tokens, told, batch_size=batch_size, bf16=bf16, progress=False)
        found.append(-surprise.double().sum(dim=1))
    return torch.stack(found, dim=1)


def majority_vote(predictions: np.ndarray, seed: int = 0) -> np.ndarray:
    """The class that most of several predictions name, ties drawn at random [V2 4.6]: (votes, n) integers -> (n,)."""
    predictions = np.asarray(predictions)
    counts = np.stack([(predictions == label).sum(axis=0) for label in range(predictions.max() + 1)], axis=1)
    best = counts == counts.max(axis=1, keepdims=True)  # (n, classes)
    return np.where(best, np.random.default_rng(seed).random(best.shape), -1).argmax(axis=1)

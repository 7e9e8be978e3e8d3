"""Probes: how well classes can be read off features by a linear classifier, and by nearest neighbours [V2 3.4, 4.2-4.4].

The protocol: fit on the training images, choose the layer and the regularisation on the validation images, fold these back
into training, and read the test images once, at the end. The same is done with what the features must beat: raw pixels, and
the same network untrained.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from ..clusters import colors_of, to_unit_range
from ..data import LABEL, TOKENS, token_array
from ..features_imagegpt import extract, layers_around
from ..modeling_imagegpt import ImageGPTModel
from ..presets import KNN_NEIGHBORS, KNN_TEMPERATURE, PROBE_MOMENTUM
from .feature_files import read_features, write_features
from .metrics import accuracy, majority_vote
from .records import UNITS, Record, fields_of_model


@dataclass
class Fit:
    """A classifier of features (n, D) -> classes (n,), the strength it was fitted with, and how it does on validation."""

    predict: Callable[[np.ndarray], np.ndarray]
    strength: float  # C of L-BFGS, the learning rate of SGD
    accuracy: float = float("nan")  # on validation images, once `best_of` has measured it
    converged: bool = True


def logistic_regressions(
    features: np.ndarray, labels: np.ndarray, strengths: Iterable[float], standardize: bool = True, max_iter: int = 1000
) -> Iterator[Fit]:
    """scikit-learn's multinomial logistic regression by L-BFGS, for each C of `strengths`, weakest first [V2 3.4].

    features: (n, D), labels: (n,) integers. standardize: bring each feature to mean 0 and deviation 1 of these images.
    Not `GridSearchCV`: warm starts along C take up to a third less time, and each fit says whether it converged.
    """
    scaler = StandardScaler() if standardize else "passthrough"
    model = make_pipeline(scaler, LogisticRegression(max_iter=max_iter, warm_start=True))
    for strength in sorted(strengths):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.set_params(logisticregression__C=strength).fit(features, labels)
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        yield Fit(copy.deepcopy(model).predict, strength, converged=converged)  # the next C continues with `model`


def sgd_regressions(
    features: np.ndarray,
    labels: np.ndarray,
    learning_rates: Iterable[float],
    standardize: bool = True,
    steps: int = 10_000,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Iterator[Fit]:
    """Logistic regression by the paper's recipe for large sets: SGD, momentum 0.9, cosine to 0, no weight decay [V2 3.4].

    One run for all learning rates together, on `device`, from zero weights. Arguments as `logistic_regressions`.
    """
    device, learning_rates = torch.device(device), sorted(learning_rates)
    scaler = StandardScaler().fit(features) if standardize else None
    scaled = features if scaler is None else scaler.transform(features)
    x = torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32)).to(device)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(device)
    n_classes = int(y.max()) + 1
    weights = torch.zeros(len(learning_rates), x.shape[1] + 1, n_classes, device=device)  # the last row is the bias
    velocity = torch.zeros_like(weights)
    rates = torch.tensor(learning_rates, dtype=torch.float32, device=device)[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc="SGD", unit="step", leave=False, disable=None):
        rows = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator).to(device)
        batch = torch.nn.functional.pad(x[rows], (0, 1), value=1.0)  # (B, D + 1)
        wrong = (batch @ weights).softmax(dim=-1)  # (rates, B, classes)
        wrong[:, torch.arange(len(rows), device=device), y[rows]] -= 1
        velocity = PROBE_MOMENTUM * velocity + batch.T @ wrong / len(rows)
        weights -= rates * 0.5 * (1 + np.cos(np.pi * step / steps)) * velocity
    finite = weights.isfinite().all(dim=(1, 2)).tolist()
    for rate, solution, converged in zip(learning_rates, weights.cpu().numpy(), finite, strict=True):

        def predict(found: np.ndarray, solution: np.ndarray = solution) -> np.ndarray:
            scores = (found if scaler is None else scaler.transform(found)) @ solution[:-1] + solution[-1]
            return scores.argmax(axis=1)

        yield Fit(predict, rate, converged=converged)


def nearest_neighbours(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier by the 200 nearest training images in cosine similarity, each voting with weight exp(similarity / 0.07)."""
    knn = KNeighborsClassifier(
        min(KNN_NEIGHBORS, len(features)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp(-distance / KNN_TEMPERATURE),  # distance: 1 - similarity
    )
    return knn.fit(features, labels).predict


def best_of(fits: Iterable[Fit], features: np.ndarray, labels: np.ndarray) -> Fit:
    """The fit that is most often right on validation images, the first of equals, with its `accuracy` filled in."""
    measured = []
    for fit in fits:
        fit.accuracy = accuracy(fit.predict(features), labels)
        measured.append(fit)
    return max(measured, key=lambda fit: fit.accuracy)


def balanced_subset(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows of a random subset with `per_class` images of every class."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)])


def few_label_regression(
    features: np.ndarray, labels: np.ndarray, strengths: Iterable[float], standardize: bool, max_iter: int, seed: int
) -> Fit:
    """Logistic regression on few images, C chosen by cross-validation within these alone (with one a class: the middle one).

    Not `LogisticRegressionCV`, which would scale over the folds that are left out; `GridSearchCV` takes longer.
    """
    strengths = sorted(strengths)
    folds = min(5, int(np.unique(labels, return_counts=True)[1].min()))
    strength = strengths[len(strengths) // 2]
    if folds > 1 and len(strengths) > 1:
        right = dict.fromkeys(strengths, 0)
        for fitted, left_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, labels):
            for fit in logistic_regressions(features[fitted], labels[fitted], strengths, standardize, max_iter):
                right[fit.strength] += np.sum(fit.predict(features[left_out]) == labels[left_out])
        strength = max(strengths, key=lambda strength: right[strength])
    return next(logistic_regressions(features, labels, [strength], standardize, max_iter))


# -- the whole protocol ------------------------------------------------------------------------------------------------


LOGISTIC_REGRESSION = {"lbfgs": "logistic regression", "sgd": "logistic regression by SGD"}  # in records, by --probe
NEAREST_NEIGHBOURS = f"{KNN_NEIGHBORS} nearest neighbours"  # likewise


@dataclass(kw_only=True)
class Protocol:
    """The options of a probe; `commands.arguments.ProbeArguments` explains each and gives defaults."""

    probe: str
    standardize: bool
    regularization: Sequence[float]
    max_iter: int
    sgd_learning_rates: Sequence[float]
    sgd_steps: int
    sgd_batch_size: int
    knn: bool
    baselines: bool
    labels_per_class: Sequence[int]
    num_subsets: int
    num_concatenated: int
    num_masks: int
    batch_size: int
    bf16: bool
    seed: int


class Probing:
    """The protocol for one network.

    model: the network. tokens: labelled images as tokens, by split. palette: (K, 3), for raw pixels. layers: those to choose
    from. about: what all records say, of the images too; trained: what those of the trained network say in addition.
    """

    def __init__(
        self,
        model: ImageGPTModel,
        tokens: Mapping[str, Dataset],
        palette: np.ndarray,
        layers: Sequence[int],
        options: Protocol,
        about: Mapping[str, Any],
        trained: Mapping[str, Any],
    ):
        self.model, self.tokens, self.palette, self.layers, self.options = model, tokens, palette, layers, options
        self.labels = {split: np.asarray(rows[LABEL]) for split, rows in tokens.items()}
        self.known = np.concatenate([self.labels["train"], self.labels["validation"]])
        self.about = {"seed": options.seed, **about}
        network = fields_of_model(model.config) | {"parameters": trained.get("parameters")}
        self.of_kind: dict[str | None, dict[str, Any]] = {  # baseline -> what records say of the network that is probed
            None: {**network, **trained},
            "untrained": network,
            "raw pixels": {},
        }

    def run(self) -> Iterator[Record]:
        """Records of validation images by layer; then those of test images, by the choices that were made."""
        options, config = self.options, self.model.config
        # If several layers are probed together, any may be a neighbour of the best one.
        kept = self.layers if options.num_concatenated == 1 else None
        with tempfile.TemporaryDirectory(prefix="hf_igpt-") as folder:
            features = Features(self.model, self.tokens, kept, Path(folder) / "trained", options)
            best, fit, neighbour = yield from self.choose_layer(features, None)
            together = layers_around(best, config.n_layer, options.num_concatenated)
            fit_together = fit if len(together) == 1 else self.choose(features, together)
            if options.baselines:
                torch.manual_seed(options.seed)
                untrained = ImageGPTModel._from_config(config).to(self.model.device)
                random = Features(untrained, self.tokens, self.layers, Path(folder) / "untrained", options)
                best_random, fit_random, _ = yield from self.choose_layer(random, "untrained")
                pixels = RawPixels(self.tokens, self.palette)
                fit_raw = self.choose(pixels, [])
                yield self.record(fit_raw.accuracy, "validation", "raw pixels", self.describe_fit(fit_raw))

            # Every choice is made. From here on the test images are read.
            draws = features.of_test(sorted({best, *together, *([] if neighbour is None else [neighbour])}))
            yield from self.test(features, draws, [best], fit, None)
            if len(together) > 1:
                yield from self.test(features, draws, together, fit_together, None)
            if neighbour is not None:
                predict = nearest_neighbours(features.known([neighbour]), self.known)
                votes = [predict(draw[neighbour]) for draw in draws]
                yield from self.record_votes(votes, None, self.describe_neighbours(neighbour), features.masked)
            for per_class in options.labels_per_class:
                yield self.test_few_labels(features, draws[0][best], per_class, best)
            if options.baselines:
                one_mask = random.of_test([best_random], num_masks=1)
                yield from self.test(random, one_mask, [best_random], fit_random, "untrained")
                yield from self.test(pixels, pixels.of_test([]), [], fit_raw, "raw pixels")

    def choose_layer(
        self, features: "Features", baseline: str | None
    ) -> Generator[Record, None, tuple[int, Fit, int | None]]:
        """Records of validation images; returns the best layer, its fit, and the neighbours' best layer if they are asked for."""
        fits: dict[int, Fit] = {}
        neighbours: dict[int, float] = {}
        for layer in self.layers:
            fit = fits[layer] = self.choose(features, [layer])
            yield self.record(fit.accuracy, "validation", baseline, self.describe_fit(fit, [layer]))
            if self.options.knn and baseline is None:
                predict = nearest_neighbours(features.of("train", [layer]), self.labels["train"])
                neighbours[layer] = accuracy(predict(features.of("validation", [layer])), self.labels["validation"])
                yield self.record(neighbours[layer], "validation", None, self.describe_neighbours(layer))
        best = max(fits, key=lambda layer: fits[layer].accuracy)
        return best, fits[best], max(neighbours, key=lambda layer: neighbours[layer]) if neighbours else None

    def choose(self, features: "Features | RawPixels", layers: Sequence[int]) -> Fit:
        """The fit to training images that does best on validation images."""
        fits = self.fit(features.of("train", layers), self.labels["train"])
        return best_of(fits, features.of("validation", layers), self.labels["validation"])

    def fit(self, features: np.ndarray, labels: np.ndarray, strengths: Sequence[float] | None = None) -> Iterator[Fit]:
        """A fit for each of `strengths`, by default those of the options."""
        options = self.options
        if options.probe == "sgd":
            device, rates = self.model.device, strengths or options.sgd_learning_rates
            how = (options.standardize, options.sgd_steps, options.sgd_batch_size, device, options.seed)
            return sgd_regressions(features, labels, rates, *how)
        strengths = strengths or options.regularization
        return logistic_regressions(features, labels, strengths, options.standardize, options.max_iter)

    def test(
        self,
        features: "Features | RawPixels",
        draws: Sequence[Mapping[int | None, np.ndarray]],
        layers: Sequence[int],
        fit: Fit,
        baseline: str | None,
    ) -> Iterator[Record]:
        """Fit again to all that is known, with the strength that was chosen, and read the test images."""
        (final,) = self.fit(features.known(layers), self.known, [fit.strength])
        # Without layers there is one array of features.
        votes = [final.predict(np.concatenate([draw[layer] for layer in layers or draw], axis=1)) for draw in draws]
        return self.record_votes(votes, baseline, self.describe_fit(final, layers), features.masked)

    def test_few_labels(self, features: "Features", test: np.ndarray, per_class: int, layer: int) -> Record:
        """The mean over random subsets with `per_class` labelled images of each class [V2 4.5, Table 4]."""
        options, accuracies, known = self.options, [], features.known([layer])
        for subset in range(options.num_subsets):
            rows = balanced_subset(self.known, per_class, options.seed + subset)
            how = (options.regularization, options.standardize, options.max_iter, options.seed)
            fit = few_label_regression(known[rows], self.known[rows], *how)
            accuracies.append(accuracy(fit.predict(test), self.labels["test"]))
        about = {
            "task": "linear probe",
            "probe": LOGISTIC_REGRESSION["lbfgs"],
            "layers": (layer,),
            "labels_per_class": per_class,
            "masks": 1 if features.masked else None,
            "deviation": float(np.std(accuracies, ddof=min(1, len(accuracies) - 1))),
            "details": {"subsets": len(accuracies)},
        }
        return self.record(float(np.mean(accuracies)), "test", None, about)

    def describe_fit(self, fit: Fit, layers: Sequence[int] = ()) -> dict[str, Any]:
        """What records say of a linear classifier."""
        details = {"C" if self.options.probe == "lbfgs" else "learning rate": fit.strength}
        details |= {"standardized": self.options.standardize} | ({} if fit.converged else {"converged": False})
        probe = LOGISTIC_REGRESSION[self.options.probe]
        return {"task": "linear probe", "probe": probe, "layers": tuple(layers) or None, "details": details}

    def describe_neighbours(self, layer: int) -> dict[str, Any]:
        """What records say of nearest neighbours."""
        return {"task": "nearest neighbours", "probe": NEAREST_NEIGHBOURS, "layers": (layer,)}

    def record_votes(
        self, votes: Sequence[np.ndarray], baseline: str | None, about: Mapping[str, Any], masked: bool
    ) -> Iterator[Record]:
        """Accuracy on the test images: of the majority of several masks' votes, and of the first mask's."""
        if len(votes) > 1:
            majority = majority_vote(np.stack(votes), self.options.seed)
            found = accuracy(majority, self.labels["test"])
            yield self.record(found, "test", baseline, {**about, "masks": len(votes)})
        found = accuracy(votes[0], self.labels["test"])
        yield self.record(found, "test", baseline, {**about, "masks": 1 if masked else None})

    def record(self, value: float, split: str, baseline: str | None, about: Mapping[str, Any]) -> Record:
        """An accuracy on the images of `split`. baseline: None, or what was probed instead of the network."""
        details = {**self.of_kind[baseline].get("details", {}), **about.get("details", {})}
        return Record(
            **(self.of_kind[baseline] | self.about | {**about, "details": details}),
            metric="accuracy",
            value=float(value),
            unit=UNITS["accuracy"],
            split=split,
            n=len(self.labels[split]),
            baseline=baseline,
        )


class Features:
    """Features of one network: of training and validation images on disk, by layer; of test images when they are asked for.

    folder: where they are written. layers: those to keep; None: all.
    """

    def __init__(
        self,
        model: ImageGPTModel,
        tokens: Mapping[str, Dataset],
        layers: Sequence[int] | None,
        folder: Path,
        options: Protocol,
    ):
        self.model, self.tokens, self.folder, self.protocol = model, tokens, folder, options
        self.masked = model.config.objective == "masked"
        self.options: dict[str, Any] = {"batch_size": options.batch_size, "bf16": options.bf16}
        for draw, split in enumerate(("train", "validation")):
            tqdm.write(f"Features of {len(tokens[split]):,} {split} images")
            seeded = {"mask_seed": options.seed + draw if self.masked else None}
            write_features(folder / split, model, read_column(tokens[split]), layers, **self.options, **seeded)

    def of(self, split: str, layers: Sequence[int]) -> np.ndarray:
        """(n, D) of one layer, or of several side by side."""
        return np.concatenate([read_features(self.folder / split, layer) for layer in layers], axis=1)

    def known(self, layers: Sequence[int]) -> np.ndarray:
        """Of training and validation images, for the last fit."""
        return np.concatenate([self.of("train", layers), self.of("validation", layers)])

    def of_test(self, layers: Sequence[int], num_masks: int | None = None) -> list[dict[int | None, np.ndarray]]:
        """By layer, once; for masked models once for each of `num_masks` masks, by default those of the options."""
        draws = range(num_masks or self.protocol.num_masks)
        seeds = [self.protocol.seed + 2 + draw for draw in draws] if self.masked else [None]
        column = read_column(self.tokens["test"])
        tqdm.write(f"Features of {len(column):,} test images")
        found = [extract(self.model, column, layers, mask_seed=seed, **self.options) for seed in seeds]
        return [{layer: features.numpy() for layer, features in draw.items()} for draw in found]


class RawPixels:
    """The colours of an image's tokens as features (n, 3 N) float32 in [-1, 1], called as `Features` are."""

    masked = False

    def __init__(self, tokens: Mapping[str, Dataset], palette: np.ndarray):
        self.tokens, self.palette = tokens, palette

    def of(self, split: str, layers: Sequence[int]) -> np.ndarray:
        """(n, 3 N); `layers` is empty."""
        colors = colors_of(token_array(self.tokens[split]), self.palette)
        return to_unit_range(colors).astype(np.float32).reshape(len(colors), -1)

    def known(self, layers: Sequence[int]) -> np.ndarray:
        """Of training and validation images, for the last fit."""
        return np.concatenate([self.of("train", layers), self.of("validation", layers)])

    def of_test(self, layers: Sequence[int]) -> list[dict[int | None, np.ndarray]]:
        """Once, under the name None."""
        return [{None: self.of("test", layers)}]


def read_column(tokens: Dataset) -> Any:
    """Rows of tokens that can be sliced without being read as a whole."""
    return tokens.with_format("numpy", columns=[TOKENS])[TOKENS]

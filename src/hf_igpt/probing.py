"""Probes: how well classes can be read off features by a linear classifier, and by nearest neighbours [V2 3.3, 4.2-4.4].

The protocol: fit on the training images, choose the layer and the regularisation on the validation images, fold these back
into training, and read the test images once, at the end. Beside the model stand what its features must beat: raw pixels,
and the same network untrained.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from . import clusters, data, evaluation, plots
from .configuration_imagegpt import ImageGPTConfig
from .evaluation import Record
from .feature_files import read_features, write_features
from .features_imagegpt import check_layers, extract, layers_around
from .modeling_imagegpt import ImageGPTModel
from .presets import (
    EVALUATION_MASKS,
    KNN_NEIGHBORS,
    KNN_TEMPERATURE,
    PROBE_MOMENTUM,
    PROBE_SGD_LEARNING_RATES,
    PROBE_SUBSETS,
)


PROBE = "probe.json"  # the records, beside a model or in a folder of their own
KNN = f"{KNN_NEIGHBORS} nearest neighbours"  # in records
MILESTONES = "milestones"  # of a run's folder: checkpoints at fractions of training


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
    sgd_batch_size: int = field(default=256, metadata={"help": "Images a step of SGD; the paper states none."})
    knn: bool = field(default=True, metadata={"help": f"Nearest neighbours beside: {KNN_NEIGHBORS}, by cosine."})
    baselines: bool = field(default=True, metadata={"help": "Probe raw pixels and the untrained network as well."})
    labels_per_class: list[int] = field(
        default_factory=list,
        metadata={"help": "Also probe the best layer with this many labels of each class (paper, Table 4: 4 25 400)."},
    )
    num_subsets: int = field(default=PROBE_SUBSETS, metadata={"help": "Random subsets for each of these numbers."})
    num_masks: int = field(
        default=EVALUATION_MASKS,
        metadata={"help": "Masks of each test image of a masked model; the majority decides (paper 4.6)."},
    )
    batch_size: int = field(default=64, metadata={"help": "Images in a forward pass."})
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16 autocast."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, … Default: an accelerator if there is one."})
    seed: int = field(default=42, metadata={"help": "Seed of splits, subsets, masks and the untrained network."})

    def __post_init__(self):
        positive = (
            "num_concatenated",
            "max_iter",
            "sgd_steps",
            "sgd_batch_size",
            "num_subsets",
            "num_masks",
            "batch_size",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is at least 1; found {getattr(self, name)}.")
        for name in ("regularization", "sgd_learning_rates", "labels_per_class"):
            values = getattr(self, name)
            if any(not value > 0 for value in values) or not (values or name == "labels_per_class"):
                raise ValueError(f"--{name} are positive numbers; found {values}.")
        if self.probe not in ("lbfgs", "sgd"):
            raise ValueError(f"--probe is lbfgs or sgd; found {self.probe!r}.")


# -- classifiers of features -------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """A classifier of features (n, D) -> classes (n,), the strength it was fitted with, and how it does on validation."""

    predict: Callable[[np.ndarray], np.ndarray]
    strength: float  # C of L-BFGS, the learning rate of SGD
    accuracy: float | None = None
    converged: bool = True


def logistic_regressions(
    features: np.ndarray, labels: np.ndarray, strengths: Iterable[float], standardize: bool = True, max_iter: int = 1000
) -> Iterator[Fit]:
    """scikit-learn's multinomial logistic regression by L-BFGS, for each C of `strengths`, weakest first [V2 4.2].

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
    """Logistic regression by the paper's recipe for large sets: SGD, momentum 0.9, cosine to 0, no weight decay [V2 4.2].

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

        def predict(found, solution=solution):
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
    best = None
    for fit in fits:
        fit.accuracy = evaluation.accuracy(fit.predict(features), labels)
        if best is None or fit.accuracy > best.accuracy:
            best = fit
    return best


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
        strength = max(strengths, key=right.get)
    return next(logistic_regressions(features, labels, [strength], standardize, max_iter))


# -- the whole protocol ------------------------------------------------------------------------------------------------


@dataclass
class _Subject:
    """A model to probe, and what records say of it."""

    name: str
    folder: Path
    config: ImageGPTConfig
    processor: object
    layers: list[int]
    about: dict


def probe(args: ProbeArguments, data_args: data.DataArguments) -> list[Record]:
    """Probe models on labelled images; writes `probe.json` and `probe.png` for each and returns all records.

    What is wrong with models, layers, labels or folders is a ValueError before any forward pass.
    """
    subjects = [_subject(name, args) for name in _names(args)]
    folders = [subject.folder for subject in subjects]
    if len(set(folders)) < len(folders):
        raise ValueError(
            f"Several models would be written to {max(folders, key=folders.count)}: leave --output_dir out."
        )
    seeds = {evaluation.split_seed(subject.name, data_args, args.seed) for subject in subjects}
    if len(seeds) > 1:
        raise ValueError(
            f"The models were trained on splits of different seeds, {sorted(seeds)}: probe them one by one."
        )
    splits = data.load_labelled_images(data_args, seed=seeds.pop())
    tokenizing = {"on_bad_image": data_args.on_bad_image, "num_proc": data_args.preprocessing_num_workers}
    tokens_of = [
        {split: data.tokenize(images, subject.processor, **tokenizing) for split, images in splits.items()}
        for subject in subjects
    ]
    names = splits["train"].features[data.LABEL].names
    _check_labels(tokens_of[0], names, args.labels_per_class)
    records = []
    for subject, tokens in zip(subjects, tokens_of, strict=True):
        data_name = evaluation.data_of(data_args.name(), subject.processor, f"{len(names)} classes")
        print(f"Probing {subject.name}")
        found = _Probing(subject, tokens, data_name, args).run()
        _say_tested(found)
        subject.folder.mkdir(parents=True, exist_ok=True)
        plots.layer_curves({subject.name: found}).save(subject.folder / "probe.png")
        evaluation.write_records(subject.folder / PROBE, found)
        print(f"Wrote {subject.folder / PROBE} and probe.png")
        records += found
    return records


def _check_labels(tokens: dict, names: list[str], labels_per_class: list[int]):
    train, validation = (np.asarray(tokens[split][data.LABEL]) for split in ("train", "validation"))
    if len(np.unique(train)) < 2:
        raise ValueError(
            f"All {len(train)} training images are of the class {names[train[0]]!r}; a probe needs 2 classes at least: raise "
            "--max_train_samples."
        )
    counts = np.bincount(np.concatenate([train, validation]), minlength=len(names))
    for per_class in labels_per_class:
        if per_class > counts.min():
            raise ValueError(
                f"--labels_per_class {per_class}: the class {names[counts.argmin()]!r} has {counts.min()} training images."
            )


def _names(args: ProbeArguments) -> list[str]:
    names = []
    for name in args.model_name_or_path:
        milestones = sorted(map(str, (Path(name) / MILESTONES).glob("step-*"))) if args.milestones else []
        if args.milestones and not milestones:
            raise ValueError(f"{name} has no milestones: train it with run_pretrain.py --milestones.")
        names += [name, *milestones]
    return names


def _subject(name: str, args: ProbeArguments) -> _Subject:
    local = Path(name).is_dir()
    if args.output_dir is None and not local:
        raise ValueError(f"Give --output_dir: {name} is on the Hub, so there is no folder of its own to write to.")
    config = ImageGPTConfig.from_pretrained(name)
    layers = sorted(set(check_layers(config, args.layers)))
    if args.num_concatenated > 1:
        layers_around(0, config.n_layer, args.num_concatenated)
    folder = Path(args.output_dir) if args.output_dir else Path(name) / "probe"
    if args.output_dir and len(_names(args)) > 1:
        folder = folder / Path(name).absolute().name
    if (folder / PROBE).exists():
        raise ValueError(f"{folder} holds {PROBE} already: give another --output_dir, or delete it.")
    processor = data.processor_of(name, config)
    about = {"objective": config.objective, "size": evaluation.size_of(config)}
    about["checkpoint"] = Path(name).absolute().name
    if local and (Path(name) / evaluation.RECORDS).is_file():
        pretrained = evaluation.read_records(Path(name) / evaluation.RECORDS)[0]
        about |= {key: pretrained.settings[key] for key in ("parameters", "images seen") if key in pretrained.settings}
        if pretrained.metric == "nats_per_pixel":
            about["pretraining nats per pixel"] = pretrained.value
        if "started from" in pretrained.settings:
            about["fine-tuned"] = True
    return _Subject(name, folder, config, processor, layers, about)


class _Probing:
    """The protocol for one model: `records` of validation images by layer, then of test images by the choices these made."""

    def __init__(self, subject: _Subject, tokens: dict, data_name: str, args: ProbeArguments):
        self.subject, self.tokens, self.data_name, self.args = subject, tokens, data_name, args
        self.labels = {split: np.asarray(rows[data.LABEL]) for split, rows in tokens.items()}
        self.known = np.concatenate([self.labels["train"], self.labels["validation"]])
        self.kind = {"lbfgs": "logistic regression", "sgd": "logistic regression by SGD"}[args.probe]
        config, about = subject.config, subject.about
        masked = "masked " if config.objective == "masked" else ""
        network = f"Image GPT {masked}{about['size'] or f'{config.n_layer} x {config.n_embd}'}"
        self.model = f"{network}, fine-tuned" if "fine-tuned" in about else network
        self.untrained = f"{network}, untrained"
        self.about = {  # what records say of the network that is probed
            "trained": about,
            "untrained": {key: about[key] for key in ("objective", "size", "parameters") if key in about},
            "raw pixels": {},
        }
        self.records: list[Record] = []

    def run(self) -> list[Record]:
        args, config = self.args, self.subject.config
        kept = (
            self.subject.layers if args.num_concatenated == 1 else None
        )  # None: all, as any may be the best one's neighbour
        with tempfile.TemporaryDirectory(prefix="hf_igpt-") as folder:
            trained = ImageGPTModel.from_pretrained(self.subject.name)
            features = _Features(trained, self.tokens, kept, Path(folder) / "trained", args)
            best, fit, neighbour = self.by_layer(features, self.model, "trained")
            together = layers_around(best, config.n_layer, args.num_concatenated)
            fit_together = fit if len(together) == 1 else self.chosen(features, together)
            if args.baselines:
                torch.manual_seed(args.seed)
                untrained = ImageGPTModel._from_config(config)
                random = _Features(untrained, self.tokens, self.subject.layers, Path(folder) / "untrained", args)
                best_random, fit_random, _ = self.by_layer(random, self.untrained, "untrained")
                pixels = _RawPixels(self.tokens, self.subject.processor.clusters)
                fit_raw = self.chosen(pixels, [])
                self.record(fit_raw.accuracy, "validation", "raw pixels", "raw pixels", self.about_fit(fit_raw))
                tqdm.write(f"  raw pixels: {100 * fit_raw.accuracy:.2f} %")

            # Every choice is made. From here on the test images are read.
            draws = features.of_test(sorted({best, *together, *([] if neighbour is None else [neighbour])}))
            self.test(features, draws, [best], fit, self.model, "trained")
            if len(together) > 1:
                self.test(features, draws, together, fit_together, self.model, "trained")
            if neighbour is not None:
                predict = nearest_neighbours(features.known([neighbour]), self.known)
                votes = [predict(draw[neighbour]) for draw in draws]
                self.record_votes(votes, self.model, "trained", {"layer": neighbour, "probe": KNN}, features.masked)
            for per_class in args.labels_per_class:
                self.few_labels(features, draws[0][best], per_class, best)
            if args.baselines:
                one_mask = random.of_test([best_random], num_masks=1)
                self.test(random, one_mask, [best_random], fit_random, self.untrained, "untrained")
                self.test(pixels, pixels.of_test([]), [], fit_raw, "raw pixels", "raw pixels")
        return self.records

    def by_layer(self, features: "_Features", model: str, of: str):
        """Validation accuracies; returns the best layer and its fit, and the best layer of the neighbours, if asked for."""
        fits, neighbours = {}, {}
        for layer in self.subject.layers:
            fit = fits[layer] = self.chosen(features, [layer])
            self.record(fit.accuracy, "validation", model, of, {"layer": layer} | self.about_fit(fit))
            line = f"  {model}, layer {layer:>2}: {100 * fit.accuracy:.2f} %"
            if self.args.knn and of == "trained":
                predict = nearest_neighbours(features.of("train", [layer]), self.labels["train"])
                found = evaluation.accuracy(predict(features.of("validation", [layer])), self.labels["validation"])
                self.record(found, "validation", model, of, {"layer": layer, "probe": KNN})
                neighbours[layer] = found
                line += f", neighbours {100 * found:.2f} %"
            tqdm.write(line)
        best = max(fits, key=lambda layer: fits[layer].accuracy)
        return best, fits[best], max(neighbours, key=neighbours.get) if neighbours else None

    def fits(self, features: np.ndarray, labels: np.ndarray, strengths=None) -> Iterator[Fit]:
        args = self.args
        if args.probe == "sgd":
            device, rates = evaluation.device_of(args.device), strengths or args.sgd_learning_rates
            options = (args.standardize, args.sgd_steps, args.sgd_batch_size, device, args.seed)
            return sgd_regressions(features, labels, rates, *options)
        return logistic_regressions(features, labels, strengths or args.regularization, args.standardize, args.max_iter)

    def chosen(self, features, layers: list[int]) -> Fit:
        fits = self.fits(features.of("train", layers), self.labels["train"])
        return best_of(fits, features.of("validation", layers), self.labels["validation"])

    def test(self, features, draws: list[dict], layers: list[int], fit: Fit, model: str, of: str):
        """Fit anew on all that is known, with the strength that was chosen, and read the test images."""
        (final,) = self.fits(features.known(layers), self.known, [fit.strength])
        votes = [final.predict(_together(draw, layers)) for draw in draws]
        where = {"layer": layers[0]} if len(layers) == 1 else {"layers": layers} if layers else {}
        self.record_votes(votes, model, of, where | self.about_fit(final), features.masked)

    def few_labels(self, features: "_Features", test: np.ndarray, per_class: int, layer: int):
        args, accuracies, known = self.args, [], features.known([layer])
        for subset in range(args.num_subsets):
            rows = balanced_subset(self.known, per_class, args.seed + subset)
            options = (args.regularization, args.standardize, args.max_iter, args.seed)
            fit = few_label_regression(known[rows], self.known[rows], *options)
            accuracies.append(evaluation.accuracy(fit.predict(test), self.labels["test"]))
        settings = {"layer": layer, "probe": "logistic regression", "labels per class": per_class}
        settings |= {"masks": 1} if features.masked else {}
        settings |= {
            "subsets": len(accuracies),
            "deviation": float(np.std(accuracies, ddof=min(1, len(accuracies) - 1))),
        }
        self.record(np.mean(accuracies), "test", self.model, "trained", settings)

    def about_fit(self, fit: Fit) -> dict:
        about = {"probe": self.kind, "C" if self.args.probe == "lbfgs" else "learning rate": fit.strength}
        about |= {"standardized": self.args.standardize}
        return about if fit.converged else about | {"converged": False}

    def record_votes(self, votes: list[np.ndarray], model: str, of: str, settings: dict, masked: bool):
        """Accuracy on the test images: of the majority of several masks' votes, and of the first mask's."""
        if len(votes) > 1:
            majority = evaluation.majority_vote(np.stack(votes), self.args.seed)
            found = evaluation.accuracy(majority, self.labels["test"])
            self.record(found, "test", model, of, settings | {"masks": len(votes)})
        found = evaluation.accuracy(votes[0], self.labels["test"])
        self.record(found, "test", model, of, settings | ({"masks": 1} if masked else {}))

    def record(self, value: float, split: str, model: str, of: str, settings: dict):
        parts = [model, settings["probe"]]
        if "layers" in settings:
            parts.insert(1, f"layers {settings['layers'][0]} to {settings['layers'][-1]}")
        elif "layer" in settings:
            parts.insert(1, f"layer {settings['layer']}")
        if "masks" in settings:
            parts.append(f"{settings['masks']} mask{'s' if settings['masks'] > 1 else ''}")
        if "labels per class" in settings:
            parts.append(f"{settings['labels per class']} labels per class")
        self.records.append(
            Record(
                metric="accuracy",
                value=float(value),
                unit="fraction",
                split=split,
                n=len(self.labels[split]),
                seed=self.args.seed,
                model=", ".join(parts),
                data=self.data_name,
                baseline=of != "trained",
                settings=self.about[of] | {"of": of} | settings,
            )
        )


class _Features:
    """Features of one network: of training and validation images on disk, by layer; of test images when they are asked for."""

    def __init__(self, model, tokens: dict, layers: list[int] | None, folder: Path, args: ProbeArguments):
        self.model, self.tokens, self.args, self.folder = (
            model.to(evaluation.device_of(args.device)),
            tokens,
            args,
            folder,
        )
        self.masked = model.config.objective == "masked"
        self.options = {"batch_size": args.batch_size, "bf16": args.bf16}
        for draw, split in enumerate(("train", "validation")):
            tqdm.write(f"Features of {len(tokens[split]):,} {split} images")
            options = self.options | {"mask_seed": args.seed + draw if self.masked else None}
            write_features(folder / split, model, _column(tokens[split]), layers, **options)

    def of(self, split: str, layers: list[int]) -> np.ndarray:
        """(n, D) of one layer, or of several together."""
        return np.concatenate([read_features(self.folder / split, layer) for layer in layers], axis=1)

    def known(self, layers: list[int]) -> np.ndarray:
        """Of training and validation images, for the last fit."""
        return np.concatenate([self.of("train", layers), self.of("validation", layers)])

    def of_test(self, layers: list[int], num_masks: int | None = None) -> list[dict[int, np.ndarray]]:
        """By layer, once, or for masked models once for each of `num_masks` masks, by default the arguments'."""
        draws = range(num_masks or self.args.num_masks)
        seeds = [self.args.seed + 2 + draw for draw in draws] if self.masked else [None]
        column = _column(self.tokens["test"])
        tqdm.write(f"Features of {len(column):,} test images")
        draws = [extract(self.model, column, layers, mask_seed=seed, **self.options) for seed in seeds]
        return [{layer: found.numpy() for layer, found in draw.items()} for draw in draws]


class _RawPixels:
    """The colours of an image's tokens as features (n, 3 N) float32 in [-1, 1], called as `_Features` are."""

    masked = False

    def __init__(self, tokens: dict, palette: np.ndarray):
        self.tokens, self.palette = tokens, palette

    def of(self, split: str, layers: list[int]) -> np.ndarray:
        colors = clusters.colors_of(data.token_array(self.tokens[split]), self.palette)
        return clusters.to_unit_range(colors).astype(np.float32).reshape(len(colors), -1)

    def known(self, layers: list[int]) -> np.ndarray:
        return np.concatenate([self.of("train", layers), self.of("validation", layers)])

    def of_test(self, layers: list[int]) -> list[dict]:
        return [{None: self.of("test", layers)}]


def _together(draw: dict, layers: list[int]) -> np.ndarray:
    """Test features of some layers side by side; of all there are where `layers` is empty."""
    return np.concatenate([draw[layer] for layer in layers or draw], axis=1)


def _column(tokens):
    """Rows of tokens that can be sliced without being read as a whole."""
    return tokens.with_format("numpy", columns=[data.TOKENS])[data.TOKENS]


def _say_tested(records: list[Record]):
    print("\nTest accuracy; layers and strengths were chosen on validation images:")
    for record in records:
        if record.split == "test":
            deviation = record.settings.get("deviation")
            plus = f" ± {100 * deviation:.2f}" if deviation else ""
            print(f"  {100 * record.value:6.2f}{plus} %  {record.model}")

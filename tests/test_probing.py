"""Probes: their classifiers against second implementations, and the whole protocol on the digits."""

import inspect
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from hf_igpt.probing import (
    KNN,
    Fit,
    ProbeArguments,
    balanced_subset,
    best_of,
    few_label_regression,
    logistic_regressions,
    nearest_neighbours,
    probe,
    sgd_regressions,
)
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_igpt import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForMaskedImageModeling,
    ImageGPTImageProcessorPil,
    ImageGPTModel,
    data,
    probing,
)
from hf_igpt.clusters import colors_of, to_unit_range
from hf_igpt.commands.cli import parse_arguments
from hf_igpt.data import DataArguments
from hf_igpt.evaluation.metrics import majority_vote
from hf_igpt.evaluation.records import Record, read_records, write_records
from hf_igpt.features_imagegpt import extract


# -- classifiers -------------------------------------------------------------------------------------------------------


def blobs(n, n_classes=4, width=12, spread=1.5, seed=0):
    """(n, width) float32 points around a centre for each class, of very different scales by feature, and their classes."""
    rng = np.random.default_rng(0)
    centers, scales = rng.normal(size=(n_classes, width)), 10.0 ** rng.integers(-2, 3, width)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    points = (centers[labels] + rng.normal(size=(n, width)) * spread) * scales + 5 * scales
    return points.astype(np.float32), labels


def agreement(one, other):
    return np.mean(np.asarray(one) == np.asarray(other))


@pytest.mark.parametrize("standardize", [True, False])
def test_logistic_regressions_are_scikit_learns(standardize):
    """Going on from the last C's solution changes where the search starts, not where it ends."""
    points, labels = blobs(200)
    if not standardize:
        points = points / points.std(axis=0)
    others, _ = blobs(1000, seed=1)
    others = others if standardize else others / blobs(200)[0].std(axis=0)
    fits = list(logistic_regressions(points, labels, iter([1.0, 0.01, 30.0]), standardize, 5000))
    assert [fit.strength for fit in fits] == [0.01, 1.0, 30.0] and all(fit.converged for fit in fits)
    for fit in fits:
        plain = LogisticRegression(C=fit.strength, max_iter=5000)
        plain = (make_pipeline(StandardScaler(), plain) if standardize else plain).fit(points, labels)
        assert agreement(fit.predict(others), plain.predict(others)) >= 0.995
    weakest = make_pipeline(StandardScaler(), LogisticRegression(C=0.01)) if standardize else LogisticRegression(C=0.01)
    assert np.array_equal(fits[0].predict(others), weakest.fit(points, labels).predict(others))
    assert agreement(fits[0].predict(others), fits[2].predict(others)) < 1  # the fits are not one and the same


def test_two_classes_and_classes_with_gaps():
    points, labels = blobs(120, n_classes=2, spread=0.5)
    (fit,) = logistic_regressions(points, labels * 7, [1.0])
    assert set(fit.predict(points)) == {0, 7} and agreement(fit.predict(points), labels * 7) > 0.95
    (fit,) = sgd_regressions(points, labels * 7, [0.1], steps=100)
    assert set(fit.predict(points)) == {0, 7} and agreement(fit.predict(points), labels * 7) > 0.95


def test_what_did_not_converge_says_so():
    (fit,) = logistic_regressions(*blobs(100), [10.0], max_iter=1)
    assert not fit.converged


def weights_of(fit):
    """(D + 1, classes) of a fit by SGD, the biases last."""
    return inspect.signature(fit.predict).parameters["solution"].default


@pytest.mark.parametrize("standardize", [True, False])
def test_sgd_is_torchs(standardize):
    """Each rate, though all run together, follows momentum 0.9 and a cosine to 0 of torch.optim on a linear layer."""
    points, labels = blobs(150)
    points = points.astype(np.float64)  # whatever comes in, float32 is computed in
    if not standardize:
        points = (points - points.mean(axis=0)) / points.std(axis=0)
    rates, steps, batch_size, seed = [0.5, 0.02], 60, 32, 5
    fits = list(sgd_regressions(points, labels, iter(rates), standardize, steps, batch_size, "cpu", seed))
    assert [fit.strength for fit in fits] == sorted(rates)
    inputs = (points - points.mean(axis=0)) / points.std(axis=0) if standardize else points
    inputs, targets = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)
    for fit in fits:
        linear = torch.nn.Linear(12, 4)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        optimizer = torch.optim.SGD(linear.parameters(), lr=fit.strength, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(len(inputs), (batch_size,), generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()
        expected = torch.cat([linear.weight.T, linear.bias[None]]).detach().numpy()
        assert np.abs(weights_of(fit) - expected).max() < 1e-4
        assert np.array_equal(fit.predict(points), linear(inputs).argmax(dim=1).numpy())


def test_sgd_comes_to_what_lbfgs_finds():
    (points, labels), (others, expected) = blobs(400, spread=0.8), blobs(1000, spread=0.8, seed=1)
    lbfgs = best_of(logistic_regressions(points, labels, [0.01, 0.1, 1.0, 10.0]), others, expected)
    sgd = best_of(sgd_regressions(points, labels, [1.0, 0.1, 0.01], steps=500), others, expected)
    assert lbfgs.accuracy > 0.9 and sgd.accuracy > lbfgs.accuracy - 0.02


def test_a_rate_that_diverges_says_so_and_spoils_no_other():
    points, labels = blobs(100)
    points = 1e18 * (points / points.std(axis=0))
    with np.errstate(all="ignore"):
        low, high = sgd_regressions(points, labels, [1e-38, 1e30], standardize=False, steps=20)
    assert low.converged and not high.converged
    assert np.array_equal(
        weights_of(low), weights_of(next(sgd_regressions(points, labels, [1e-38], standardize=False, steps=20)))
    )


@pytest.mark.parametrize("n_images", [300, 150])
def test_nearest_neighbours_are_the_naive_ones(n_images):
    """The nearest 200, or all where there are fewer, vote with exp(cosine / 0.07): the field's usual rule."""
    rng = np.random.default_rng(0)
    (points, labels), (others, _) = blobs(n_images, n_classes=5, spread=3.0), blobs(60, n_classes=5, seed=1)
    scales = rng.uniform(0.1, 10, (len(points), 1)).astype(np.float32)  # a length does not matter
    found = nearest_neighbours(points * scales, labels)(others)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (points.astype(float), others.astype(float))]
    expected = []
    for similarities in unit[1] @ unit[0].T:
        nearest = np.argsort(-similarities)[:200]
        votes = np.zeros(5)
        np.add.at(votes, labels[nearest], np.exp(similarities[nearest] / 0.07))
        expected.append(votes.argmax())
    assert np.array_equal(found, expected) and len(set(expected)) > 2


def test_the_best_fit_is_the_first_of_equals():
    answers = {"a": [0, 0, 0, 0], "b": [0, 1, 2, 0], "c": [0, 1, 2, 1], "d": [1, 1, 2, 3]}
    fits = [Fit(lambda _, found=found: np.array(found), name) for name, found in answers.items()]
    best = best_of(iter(fits), np.zeros((4, 1)), np.array([0, 1, 2, 3]))
    assert best is fits[1] and best.accuracy == 0.75  # c and d have as many
    assert [fit.accuracy for fit in fits] == [0.25, 0.75, 0.75, 0.75]


def test_balanced_subsets():
    labels = np.repeat([0, 1, 2, 5], [10, 3, 40, 7])
    rows = balanced_subset(labels, 3, seed=1)
    assert len(set(rows)) == 12 and dict(zip(*np.unique(labels[rows], return_counts=True), strict=True)) == {
        0: 3,
        1: 3,
        2: 3,
        5: 3,
    }
    assert np.array_equal(rows, balanced_subset(labels, 3, seed=1))
    assert not np.array_equal(rows, balanced_subset(labels, 3, seed=2))


@pytest.mark.parametrize("spread", [0.3, 6.0])
def test_few_labels_choose_their_strength_among_themselves(spread):
    points, labels = blobs(60, n_classes=3, spread=spread)
    strengths = [10.0, 1e-4, 0.1]
    folds = list(StratifiedKFold(5, shuffle=True, random_state=7).split(points, labels))
    right = {}
    for strength in sorted(strengths):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        right[strength] = sum(
            np.sum(model.fit(points[fitted], labels[fitted]).predict(points[out]) == labels[out])
            for fitted, out in folds
        )
    expected = max(right, key=right.get)
    assert len(set(right.values())) > 1
    fit = few_label_regression(points, labels, strengths, True, 1000, seed=7)
    assert fit.strength == expected
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=expected, max_iter=1000)).fit(points, labels)
    others, _ = blobs(500, n_classes=3, spread=spread, seed=1)
    assert np.array_equal(fit.predict(others), plain.predict(others))


def test_of_one_label_a_class_nothing_can_be_left_out():
    points, labels = blobs(60, n_classes=3)
    rows = balanced_subset(labels, 1, seed=0)
    assert few_label_regression(points[rows], labels[rows], [10.0, 0.1, 1.0], True, 1000, seed=0).strength == 1.0
    with_two = balanced_subset(labels, 2, seed=0)  # two folds
    assert few_label_regression(points[with_two], labels[with_two], [0.1, 1.0], True, 1000, seed=0).strength in (0.1, 1)


# -- the whole protocol ------------------------------------------------------------------------------------------------

SOME = {"max_train_samples": 150, "max_eval_samples": 80}
SEED = 42
N_LAYERS = 3  # 0, 1, 2 of two blocks


def save_model(folder, objective="causal", seed=SEED, **settings):
    """A small random model with its processor, and records that tell of its training."""
    torch.manual_seed(0)
    kind = ImageGPTForMaskedImageModeling if objective == "masked" else ImageGPTForCausalImageModeling
    randomized(kind(small_config(n_layer=2, objective=objective)), std=0.15).save_pretrained(folder)
    greys = to_unit_range(np.repeat(np.linspace(0, 255, 16)[:, None], 3, axis=1))
    ImageGPTImageProcessorPil(clusters=greys, size=8).save_pretrained(folder)
    settings = {"objective": objective, "parameters": 26_240, "images seen": 960} | settings
    of = {
        "split": "held out",
        "n": 359,
        "seed": seed,
        "model": "Image GPT",
        "data": "scikit-learn digits, 8x8, 16 colours",
    }
    write_records(folder / "records.json", [Record("nats_per_pixel", 2.5, "nats/pixel", settings=settings, **of)])
    return folder


@pytest.fixture(scope="module", autouse=True)
def _images_are_loaded_once():
    """The same splits for the same arguments, without drawing them again for every test."""
    load, kept = data.load_labelled_images, {}

    def load_once(args, seed):
        key = repr((args, seed))
        if key not in kept:
            kept[key] = load(args, seed)
        return dict(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_labelled_images", load_once)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {objective: save_model(root / objective, objective) for objective in ("causal", "masked")}


@pytest.fixture
def causal(models, tmp_path):
    """A copy of the causal model, to write into."""
    return shutil.copytree(models["causal"], tmp_path / "copied", ignore=shutil.ignore_patterns("probe"))


def run(*folders, images=None, **options):
    defaults = {"regularization": [0.01, 1.0], "max_iter": 200, "device": "cpu", "seed": SEED}
    return probe(ProbeArguments([str(folder) for folder in folders], **(defaults | options)), images_of(images))


def images_of(images):
    return DataArguments(**(SOME if images is None else images))


def known_and_test(folder):
    """Tokens (n, 64) and labels (n,) of each split of the digits, as the model of `folder` reads them."""
    splits = data.load_labelled_images(images_of(None), seed=SEED)
    processor = data.read_processor(str(folder))
    tokens = {name: data.token_array(data.tokenize(split, processor)) for name, split in splits.items()}
    return tokens, {name: np.asarray(split["label"]) for name, split in splits.items()}


def select(records, **settings):
    """Records by their split, their attribute `of` and other settings; None: the setting is not there."""
    split, of = settings.pop("split"), settings.pop("of", "trained")
    settings = {name.replace("_", " "): value for name, value in settings.items()}
    return [
        record
        for record in records
        if (record.split, record.settings["of"]) == (split, of)
        and all(record.settings.get(name) == value for name, value in settings.items())
    ]


def one(records, **settings):
    (record,) = select(records, **settings)
    return record


def refit(train, labels, strength):
    """Plain scikit-learn on two parts together."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))
    return model.fit(np.concatenate(train), np.concatenate(labels))


@pytest.fixture(scope="module")
def probed(models):
    """Records of a causal model with everything asked for, the model's folder, and the order in which things happened."""
    events = []
    with pytest.MonkeyPatch.context() as patch:

        def spied(function, event):
            def wrapper(*args, **kwargs):
                events.append(event(args))
                return function(*args, **kwargs)

            return wrapper

        test = known_and_test(models["causal"])[0]["test"]
        patch.setattr(probing._Probing, "record", spied(probing._Probing.record, lambda args: f"{args[2]} record"))

        def is_of_test(tokens):
            return np.array_equal(np.asarray(tokens), test)

        def features_of(args):
            return f"{'test' if is_of_test(args[1]) else 'other'} features"

        def written_of(args):
            return f"{'test' if is_of_test(args[2]) else 'other'} features"

        def pixels_of(args):
            return f"{'test' if is_of_test(args[0]['input_ids']) else 'other'} pixels"

        patch.setattr(probing, "extract", spied(probing.extract, features_of))
        patch.setattr(probing, "write_features", spied(probing.write_features, written_of))
        patch.setattr(data, "token_array", spied(data.token_array, pixels_of))
        options = {"num_concatenated": 2, "labels_per_class": [1, 4], "num_subsets": 3}
        records = run(models["causal"], **options)
    return records, models["causal"], events


def test_what_a_probe_leaves_behind(probed):
    records, folder, _ = probed
    assert read_records(folder / "probe" / "probe.json") == records
    assert {path.name for path in (folder / "probe").iterdir()} == {"probe.json", "probe.png"}
    assert Image.open(folder / "probe" / "probe.png").size == (840, 540)
    for record in records:
        assert (record.metric, record.unit, record.seed, record.n) == ("accuracy", "fraction", SEED, 80)
        assert record.data == "scikit-learn digits, 8x8, 16 colours, 10 classes"
        assert record.baseline == (record.settings["of"] != "trained") and 0 < record.value < 1
    assert len({(record.model, record.split) for record in records}) == len(records)  # no two have the same name
    assert str(folder.parent) not in (folder / "probe" / "probe.json").read_text()


def test_every_layer_has_its_validation_records(probed):
    records, _, _ = probed
    for of, probes in (("trained", ("logistic regression", KNN)), ("untrained", ("logistic regression",))):
        assert {record.settings["probe"] for record in select(records, split="validation", of=of)} == set(probes)
        for name in probes:
            found = select(records, split="validation", of=of, probe=name)
            assert [record.settings["layer"] for record in found] == list(range(N_LAYERS))
    assert len(select(records, split="validation", of="raw pixels")) == 1


def test_choices_are_of_validation_images(probed):
    """The tested layer, regularisation and neighbours' layer are those of the best validation record, the first of equals."""
    records, _, _ = probed
    for of, probes in (("trained", ("logistic regression", KNN)), ("untrained", ("logistic regression",))):
        for name in probes:
            validated = select(records, split="validation", of=of, probe=name)
            best = max(validated, key=lambda record: record.value)
            tested = [
                record
                for record in select(records, split="test", of=of, probe=name, labels_per_class=None)
                if "layer" in record.settings
            ]
            assert [record.settings["layer"] for record in tested] == [best.settings["layer"]]
            assert tested[0].settings.get("C") == best.settings.get("C")
    raw = [one(records, split=split, of="raw pixels").settings["C"] for split in ("validation", "test")]
    assert raw[0] == raw[1]


def test_test_images_are_read_once_after_all_choices(probed):
    _, _, events = probed
    assert max(i for i, event in enumerate(events) if event == "validation record") < min(
        i for i, event in enumerate(events) if event.startswith("test")
    )
    assert events.count("test features") == 2 and events.count("test pixels") == 1  # trained, untrained; raw
    assert "test record" in events and "other pixels" in events and "other features" in events


def test_validation_accuracies_are_scikit_learns(probed):
    """Fitted on training images alone. A warm start may move an image that lies on the boundary."""
    records, folder, _ = probed
    tokens, labels = known_and_test(folder)
    model = ImageGPTModel.from_pretrained(folder)
    train, validation = (extract(model, tokens[split]) for split in ("train", "validation"))
    for record in select(records, split="validation", probe="logistic regression"):
        layer = record.settings["layer"]
        found = {
            strength: refit([train[layer]], [labels["train"]], strength).score(validation[layer], labels["validation"])
            for strength in (0.01, 1.0)
        }
        assert abs(record.value - max(found.values())) <= 1 / 80 + 1e-9
        assert found[record.settings["C"]] >= max(found.values()) - 2 / 80 - 1e-9
    for record in select(records, split="validation", probe=KNN):
        layer = record.settings["layer"]
        predict = nearest_neighbours(train[layer].numpy(), labels["train"])
        assert record.value == agreement(predict(validation[layer].numpy()), labels["validation"])


def features_of_known_and_test(model, tokens):
    found = {split: extract(model, rows) for split, rows in tokens.items()}
    return [found["train"], found["validation"]], found["test"]


def test_test_accuracies_are_scikit_learns(probed):
    """Layer and C of the records, refitted on training and validation images, give the recorded accuracy."""
    records, folder, _ = probed
    tokens, labels = known_and_test(folder)
    known_labels = [labels["train"], labels["validation"]]
    known, test = features_of_known_and_test(ImageGPTModel.from_pretrained(folder), tokens)

    def accuracy(parts, tested, strength):
        return refit(parts, known_labels, strength).score(tested, labels["test"])

    for record in select(records, split="test", probe="logistic regression", labels_per_class=None):
        layers = record.settings.get("layers", [record.settings.get("layer")])
        parts = [np.concatenate([part[layer] for layer in layers], axis=1) for part in known]
        tested = np.concatenate([test[layer] for layer in layers], axis=1)
        assert record.value == accuracy(parts, tested, record.settings["C"])
    neighbours = one(records, split="test", probe=KNN)
    layer = neighbours.settings["layer"]
    predict = nearest_neighbours(np.concatenate([part[layer] for part in known]), np.concatenate(known_labels))
    assert neighbours.value == agreement(predict(test[layer].numpy()), labels["test"])

    torch.manual_seed(SEED)
    untrained = ImageGPTModel._from_config(ImageGPTConfig.from_pretrained(folder))
    known, test = features_of_known_and_test(untrained, tokens)
    record = one(records, split="test", of="untrained")
    layer = record.settings["layer"]
    assert record.value == accuracy([part[layer] for part in known], test[layer], record.settings["C"])

    palette = data.read_processor(str(folder)).clusters
    pixels = {split: colors_of(rows, palette).reshape(len(rows), 192) / 127.5 - 1 for split, rows in tokens.items()}
    record = one(records, split="test", of="raw pixels")
    plain = accuracy([pixels["train"], pixels["validation"]], pixels["test"], record.settings["C"])
    assert abs(record.value - plain) <= 1 / 80 + 1e-9  # float64 here, float32 there


def test_layers_together(probed):
    records, _, _ = probed
    best = one(records, split="test", probe="logistic regression", layers=None, labels_per_class=None).settings["layer"]
    together = [record for record in select(records, split="test") if "layers" in record.settings]
    assert len(together) == 1
    first = max(0, best - 1)
    assert together[0].settings["layers"] == [first, first + 1] and "layer" not in together[0].settings
    assert f"layers {first} to {first + 1}" in together[0].model


def test_few_labels_with_their_deviation(probed):
    records, folder, _ = probed
    tokens, labels = known_and_test(folder)
    best = one(records, split="test", probe="logistic regression", layers=None, labels_per_class=None).settings["layer"]
    parts, test = features_of_known_and_test(ImageGPTModel.from_pretrained(folder), tokens)
    features, known = (
        np.concatenate([part[best] for part in parts]),
        np.concatenate([labels["train"], labels["validation"]]),
    )
    for per_class in (1, 4):
        record = one(records, split="test", labels_per_class=per_class)
        accuracies = []
        for seed in (SEED, SEED + 1, SEED + 2):
            rows = balanced_subset(known, per_class, seed)
            assert len(rows) == 10 * per_class
            fit = few_label_regression(features[rows], known[rows], [0.01, 1.0], True, 200, SEED)
            accuracies.append(agreement(fit.predict(test[best].numpy()), labels["test"]))
        assert record.value == pytest.approx(np.mean(accuracies))
        assert record.settings["deviation"] == pytest.approx(np.sqrt(np.var(accuracies) * 3 / 2))
        assert record.settings["layer"] == best and record.settings["subsets"] == 3
        assert f"{per_class} labels per class" in record.model


def test_records_say_of_which_network_they_are(probed):
    """What was never trained has seen no images."""
    records, folder, _ = probed
    trained, untrained, raw = (one_of(records, of).settings for of in ("trained", "untrained", "raw pixels"))
    assert trained["images seen"] == 960 and trained["pretraining nats per pixel"] == 2.5
    assert (trained["objective"], trained["checkpoint"], trained["parameters"]) == ("causal", folder.name, 26_240)
    assert untrained["objective"] == "causal" and untrained["parameters"] == 26_240
    assert not {"images seen", "pretraining nats per pixel", "checkpoint"} & set(untrained)
    assert set(raw) == {"of", "probe", "C", "standardized"} | ({"converged"} & set(raw))


def one_of(records, of):
    return next(record for record in records if record.settings["of"] == of)


def test_a_number_does_not_depend_on_what_else_is_asked_for(probed, tmp_path):
    """Nor on when: the same seed gives the same subsets, untrained network and numbers again."""
    records, folder, _ = probed
    again = run(folder, labels_per_class=[4], num_subsets=3, knn=False, output_dir=str(tmp_path))
    expected = [
        record
        for record in records
        if KNN not in record.model and "layers" not in record.settings and record.settings.get("labels per class") != 1
    ]
    assert again == expected
    assert {path.name for path in tmp_path.iterdir()} == {"probe.json", "probe.png"}  # of one model: no folder in it


# -- masked models, other flags ----------------------------------------------------------------------------------------


def test_masked_models_vote_over_masks(models, capsys):
    """Hidden pixels in training, in validation and in the test; of five masks the majority decides, and one is recorded too."""
    records = run(models["masked"], labels_per_class=[4], num_subsets=2)
    folder = models["masked"]
    tokens, labels = known_and_test(folder)
    model = ImageGPTModel.from_pretrained(folder)
    masked = [extract(model, tokens[split], mask_seed=SEED + i) for i, split in enumerate(("train", "validation"))]
    known = np.concatenate([labels["train"], labels["validation"]])
    for name in ("logistic regression", KNN):
        five, single = (one(records, split="test", probe=name, masks=n, labels_per_class=None) for n in (5, 1))
        layer = five.settings["layer"]
        assert {**five.settings, "masks": 1} == single.settings
        assert "5 masks" in five.model and "1 mask" in single.model and "1 masks" not in single.model
        if name == KNN:
            predict = nearest_neighbours(np.concatenate([part[layer] for part in masked]), known)
        else:
            parts = [part[layer] for part in masked]
            predict = refit(parts, [labels["train"], labels["validation"]], five.settings["C"]).predict
        votes = [
            predict(extract(model, tokens["test"], layer, mask_seed=SEED + 2 + draw)[layer].numpy())
            for draw in range(5)
        ]
        assert len({tuple(vote) for vote in votes}) > 1
        assert five.value == agreement(majority_vote(np.stack(votes), SEED), labels["test"])
        assert single.value == agreement(votes[0], labels["test"])
    # What was read through one mask says so; pixels are not masked.
    assert [record.settings["masks"] for record in select(records, split="test", of="untrained")] == [1]
    assert one(records, split="test", labels_per_class=4).settings["masks"] == 1
    assert "masks" not in one(records, split="test", of="raw pixels").settings
    assert "Mind" not in capsys.readouterr().out


def test_one_mask_is_no_vote(models, tmp_path):
    options = {"baselines": False, "knn": False, "layers": [1], "output_dir": str(tmp_path)}
    records = run(models["masked"], num_masks=1, **options)
    assert [record.settings["masks"] for record in select(records, split="test")] == [1]


def test_sgd(models, tmp_path):
    options = {"probe": "sgd", "sgd_learning_rates": [0.1, 3.0], "sgd_steps": 50, "sgd_batch_size": 64}
    records = run(models["causal"], layers=[-1, 1, 1], knn=False, output_dir=str(tmp_path), **options)
    assert {record.settings["probe"] for record in records} == {"logistic regression by SGD"}
    assert [record.settings["layer"] for record in select(records, split="validation")] == [1, 2]
    tested = one(records, split="test")
    layer, rate = tested.settings["layer"], tested.settings["learning rate"]
    tokens, labels = known_and_test(models["causal"])
    known, test = features_of_known_and_test(ImageGPTModel.from_pretrained(models["causal"]), tokens)
    features = np.concatenate([part[layer] for part in known])
    (fit,) = sgd_regressions(
        features, np.concatenate([labels["train"], labels["validation"]]), [rate], True, 50, 64, "cpu", SEED
    )
    assert tested.value == agreement(fit.predict(test[layer].numpy()), labels["test"])
    assert (
        len(select(records, split="test", of="untrained")) == len(select(records, split="test", of="raw pixels")) == 1
    )


QUICK = {"layers": [1], "knn": False, "baselines": False, "regularization": [0.1]}


def test_milestones_are_probed_where_they_lie(causal):
    for step in (2, 1):
        place = causal / "milestones" / f"step-000000{step}"
        shutil.copytree(causal, place, ignore=shutil.ignore_patterns("milestones"))
    records = run(causal, milestones=True, **QUICK)
    names = ["copied", "step-0000001", "step-0000002"]
    assert [record.settings["checkpoint"] for record in select(records, split="test")] == names
    assert len({record.value for record in select(records, split="test")}) == 1  # the weights are the same
    folders = [causal, *(causal / "milestones" / name for name in names[1:])]
    assert [len(read_records(folder / "probe" / "probe.json")) for folder in folders] == [2, 2, 2]


def test_several_models_in_one_folder(models, tmp_path):
    records = run(*models.values(), output_dir=str(tmp_path / "out"), **QUICK)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"causal", "masked"}
    assert records == [record for name in models for record in read_records(tmp_path / "out" / name / "probe.json")]


def test_fine_tuned_models_are_named_and_splits_are_the_models(tmp_path, capsys):
    """A model that saw labels is none whose probe can be held against the others'; none is tested on what it was trained on."""
    folder = save_model(tmp_path / "run", seed=7, **{"started from": "pretrained"})
    records = run(folder, **QUICK)
    assert all(record.settings["fine-tuned"] and ", fine-tuned, " in record.model for record in records)
    said = capsys.readouterr().out
    assert "Splits are drawn by seed 7" in said and "Test accuracy" in said
    with pytest.raises(ValueError, match=r"splits of different seeds, \[7, 8\]"):
        run(folder, save_model(tmp_path / "other", seed=8), **QUICK, output_dir=str(tmp_path / "out"))


def test_flags(models, monkeypatch, tmp_path):
    flags = (
        "probe --model_name_or_path a b --layers 0 -1 --no_knn --no_standardize --labels_per_class 4 25 --device cpu"
    )
    monkeypatch.setattr(sys, "argv", flags.split())
    args, images = parse_arguments(ProbeArguments, DataArguments, description="")
    assert args.model_name_or_path == ["a", "b"] and args.layers == [0, -1] and args.labels_per_class == [4, 25]
    assert not args.knn and not args.standardize and args.baselines and images.is_embedded
    assert args.num_masks == 5 and args.num_subsets == 5 and args.sgd_learning_rates[:3] == [30, 10, 3]  # the paper's


# -- refusals ----------------------------------------------------------------------------------------------------------


def photos(folder, classes):
    for name in classes:
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), 10 * i).save(folder / "photos" / name / f"{i}.png")
    return {"train_dir": str(folder / "photos")}


def unlabelled(folder):
    return photos(folder, ["."])


def unreadable(folder):
    images = photos(folder, ["cat", "dog"])
    (folder / "photos" / "cat" / "3.png").write_bytes(b"no image")
    return images


def probed_before(model):
    write_records(model / "probe" / "probe.json", [])


def without_processor(model):
    (model / "preprocessor_config.json").unlink()


def other_colors(model):
    ImageGPTImageProcessorPil(clusters=np.linspace(-1, 1, 24).reshape(8, 3), size=8).save_pretrained(model)


def other_type(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("change", "images", "options", "message"),
    [
        (
            None,
            None,
            {"labels_per_class": [4, 1000]},
            r"--labels_per_class 1000: the class '\d' has \d+ training images",
        ),
        (None, {"max_train_samples": 1}, {}, "All 1 training images are of the class '.'; a probe needs 2 classes"),
        (None, None, {"layers": [0, 3]}, r"no layer 3: this model has layers 0\.\.2"),
        (None, None, {"layers": []}, "No layer is named"),
        (None, None, {"num_concatenated": 4}, "Between 1 and 3 layers can be concatenated; found 4"),
        (None, None, {"milestones": True}, "copied has no milestones"),
        (None, unlabelled, {}, "have no labels"),
        (None, unreadable, {}, r"Image \d+ cannot be read .*3\.png"),
        (None, {"dataset_name": "x", "streaming": True}, {}, "not streamed"),
        (probed_before, None, {}, r"probe holds probe\.json already"),
        (without_processor, None, {}, "copied has no image processor"),
        (other_colors, None, {}, "16 colours; the image processor makes 8x8 of 8"),
        (other_type, None, {}, "type gpt2"),
    ],
)
def test_refusals_before_any_forward_pass(change, images, options, message, causal, tmp_path, monkeypatch):
    if change:
        change(causal)
    before = set(causal.rglob("*"))
    monkeypatch.setattr(ImageGPTModel, "forward", lambda *_, **__: pytest.fail("a forward pass"))
    with pytest.raises(ValueError, match=message):
        run(causal, images=images(tmp_path) if callable(images) else images, **options)
    assert set(causal.rglob("*")) == before


def test_models_of_the_hub_need_a_folder():
    """Said before anything is fetched."""
    with pytest.raises(ValueError, match="Give --output_dir: openai/imagegpt-small is on the Hub"):
        run("openai/imagegpt-small")


def test_models_of_the_same_name_need_their_own_folders(causal, tmp_path):
    other = shutil.copytree(causal, tmp_path / "other" / causal.name)
    with pytest.raises(ValueError, match="Several models would be written to .*copied: leave --output_dir out"):
        run(causal, other, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": "svm"}, "--probe is lbfgs or sgd; found 'svm'"),
        ({"num_masks": 0}, "--num_masks is at least 1; found 0"),
        ({"num_subsets": 0}, "--num_subsets is at least 1"),
        ({"num_concatenated": 0}, "--num_concatenated is at least 1"),
        ({"sgd_steps": -5}, "--sgd_steps is at least 1; found -5"),
        ({"batch_size": 0}, "--batch_size is at least 1"),
        ({"regularization": [1.0, 0.0]}, "--regularization are positive numbers; found"),
        ({"regularization": []}, "--regularization are positive numbers"),
        ({"regularization": [float("nan")]}, "--regularization are positive numbers"),
        ({"sgd_learning_rates": [-1.0]}, "--sgd_learning_rates are positive numbers"),
        ({"labels_per_class": [4, 0]}, "--labels_per_class are positive numbers"),
    ],
)
def test_bad_flags_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProbeArguments(["model"], **options)

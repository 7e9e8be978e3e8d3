"""`run_linear_probe.py`: the whole protocol, on the digits."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_probes import agreement

from hf_igpt import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForMaskedImageModeling,
    ImageGPTImageProcessorPil,
    ImageGPTModel,
    data,
)
from hf_igpt.clusters import colors_of, to_unit_range
from hf_igpt.commands import probe as command
from hf_igpt.commands.cli import parse_arguments
from hf_igpt.commands.probe import ProbeArguments, probe
from hf_igpt.data import DataArguments
from hf_igpt.evaluation import probes
from hf_igpt.evaluation.metrics import majority_vote
from hf_igpt.evaluation.probes import (
    NEAREST_NEIGHBOURS,
    balanced_subset,
    few_label_regression,
    nearest_neighbours,
    sgd_regressions,
)
from hf_igpt.evaluation.records import Record, describe_images, describe_model, read_records, write_records
from hf_igpt.features_imagegpt import extract


SOME = {"max_train_samples": 150, "max_eval_samples": 80}
SEED = 42
N_LAYERS = 3  # 0, 1, 2 of two blocks


def save_model(folder, objective="causal", seed=SEED, **fields):
    """A small random model with its processor, and records that tell of its training."""
    torch.manual_seed(0)
    kind = ImageGPTForMaskedImageModeling if objective == "masked" else ImageGPTForCausalImageModeling
    randomized(kind(small_config(n_layer=2, objective=objective)), std=0.15).save_pretrained(folder)
    greys = to_unit_range(np.repeat(np.linspace(0, 255, 16)[:, None], 3, axis=1))
    ImageGPTImageProcessorPil(clusters=greys, size=8).save_pretrained(folder)
    record = Record(
        task="generation",
        metric="nats_per_pixel",
        value=2.5,
        unit="nats/pixel",
        split="held out",
        n=359,
        seed=seed,
        dataset="scikit-learn digits",
        objective=objective,
        parameters=26_240,
        images_seen=960,
        **fields,
    )
    write_records(folder / "records.json", [record])
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
        patch.setattr(command, "load_labelled_images", load_once)
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


def select(records, **fields):
    """Records by their fields; of the trained model unless a baseline is named."""
    fields = {"baseline": None} | fields
    return [record for record in records if all(getattr(record, name) == value for name, value in fields.items())]


def of_one_layer(records):
    return [record for record in records if record.layers is not None and len(record.layers) == 1]


def one(records, **fields):
    (record,) = select(records, **fields)
    return record


def layer_of(record):
    (layer,) = record.layers
    return layer


def best_layer(records):
    """The layer of the linear probe that was tested."""
    found = select(records, split="test", probe="logistic regression", labels_per_class=None)
    (record,) = of_one_layer(found)
    return layer_of(record)


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
        patch.setattr(probes.Probing, "record", spied(probes.Probing.record, lambda args: f"{args[2]} record"))

        def is_of_test(tokens):
            return np.array_equal(np.asarray(tokens), test)

        def features_of(args):
            return f"{'test' if is_of_test(args[1]) else 'other'} features"

        def written_of(args):
            return f"{'test' if is_of_test(args[2]) else 'other'} features"

        def pixels_of(args):
            return f"{'test' if is_of_test(args[0]['input_ids']) else 'other'} pixels"

        patch.setattr(probes, "extract", spied(probes.extract, features_of))
        patch.setattr(probes, "write_features", spied(probes.write_features, written_of))
        patch.setattr(probes, "token_array", spied(probes.token_array, pixels_of))
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
        assert describe_images(record) == "scikit-learn digits, 8x8, 16 colours, 10 classes"
        assert record.baseline in (None, "untrained", "raw pixels") and 0 < record.value < 1
    assert len({(describe_model(record), record.split) for record in records}) == len(
        records
    )  # no two have the same name
    assert str(folder.parent) not in (folder / "probe" / "probe.json").read_text()


def test_every_layer_has_its_validation_records(probed):
    records, _, _ = probed
    for baseline, names in (
        (None, ("logistic regression", NEAREST_NEIGHBOURS)),
        ("untrained", ("logistic regression",)),
    ):
        assert {record.probe for record in select(records, split="validation", baseline=baseline)} == set(names)
        for name in names:
            found = select(records, split="validation", baseline=baseline, probe=name)
            assert [record.layers for record in found] == [(layer,) for layer in range(N_LAYERS)]
    assert len(select(records, split="validation", baseline="raw pixels")) == 1


def test_choices_are_of_validation_images(probed):
    """The tested layer, regularisation and neighbours' layer are those of the best validation record, the first of equals."""
    records, _, _ = probed
    for baseline, names in (
        (None, ("logistic regression", NEAREST_NEIGHBOURS)),
        ("untrained", ("logistic regression",)),
    ):
        for name in names:
            validated = select(records, split="validation", baseline=baseline, probe=name)
            best = max(validated, key=lambda record: record.value)
            tested = of_one_layer(select(records, split="test", baseline=baseline, probe=name, labels_per_class=None))
            assert [record.layers for record in tested] == [best.layers]
            assert tested[0].details.get("C") == best.details.get("C")
    raw = [one(records, split=split, baseline="raw pixels").details["C"] for split in ("validation", "test")]
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
        layer = layer_of(record)
        found = {
            strength: refit([train[layer]], [labels["train"]], strength).score(validation[layer], labels["validation"])
            for strength in (0.01, 1.0)
        }
        assert abs(record.value - max(found.values())) <= 1 / 80 + 1e-9
        assert found[record.details["C"]] >= max(found.values()) - 2 / 80 - 1e-9
    for record in select(records, split="validation", probe=NEAREST_NEIGHBOURS):
        layer = layer_of(record)
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
        layers = record.layers
        parts = [np.concatenate([part[layer] for layer in layers], axis=1) for part in known]
        tested = np.concatenate([test[layer] for layer in layers], axis=1)
        assert record.value == accuracy(parts, tested, record.details["C"])
    neighbours = one(records, split="test", probe=NEAREST_NEIGHBOURS)
    layer = layer_of(neighbours)
    predict = nearest_neighbours(np.concatenate([part[layer] for part in known]), np.concatenate(known_labels))
    assert neighbours.value == agreement(predict(test[layer].numpy()), labels["test"])

    torch.manual_seed(SEED)
    untrained = ImageGPTModel._from_config(ImageGPTConfig.from_pretrained(folder))
    known, test = features_of_known_and_test(untrained, tokens)
    record = one(records, split="test", baseline="untrained")
    layer = layer_of(record)
    assert record.value == accuracy([part[layer] for part in known], test[layer], record.details["C"])

    palette = data.read_processor(str(folder)).clusters
    pixels = {split: colors_of(rows, palette).reshape(len(rows), 192) / 127.5 - 1 for split, rows in tokens.items()}
    record = one(records, split="test", baseline="raw pixels")
    plain = accuracy([pixels["train"], pixels["validation"]], pixels["test"], record.details["C"])
    assert abs(record.value - plain) <= 1 / 80 + 1e-9  # float64 here, float32 there


def test_layers_together(probed):
    records, _, _ = probed
    best = best_layer(records)
    (together,) = [record for record in select(records, split="test") if len(record.layers) > 1]
    first = max(0, best - 1)
    assert together.layers == (first, first + 1)
    assert f"layers {first} to {first + 1}" in describe_model(together)


def test_few_labels_with_their_deviation(probed):
    records, folder, _ = probed
    tokens, labels = known_and_test(folder)
    best = best_layer(records)
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
        assert record.deviation == pytest.approx(np.sqrt(np.var(accuracies) * 3 / 2))
        assert record.layers == (best,) and record.details["subsets"] == 3
        assert f"{per_class} labels per class" in describe_model(record)


def test_records_say_of_which_network_they_are(probed):
    """What was never trained has seen no images."""
    records, folder, _ = probed
    trained, untrained, raw = (select(records, baseline=baseline)[0] for baseline in (None, "untrained", "raw pixels"))
    assert trained.images_seen == 960 and trained.details["pretraining nats per pixel"] == 2.5
    assert (trained.objective, trained.checkpoint, trained.parameters) == ("causal", folder.name, 26_240)
    assert untrained.objective == "causal" and untrained.parameters == 26_240
    assert untrained.images_seen is None and untrained.checkpoint is None
    assert "pretraining nats per pixel" not in untrained.details
    about_a_model = ("objective", "size", "n_layer", "n_embd", "parameters", "images_seen", "checkpoint", "layers")
    assert all(getattr(raw, name) is None for name in about_a_model)
    assert set(raw.details) == {"C", "standardized"} | ({"converged"} & set(raw.details))


def test_a_number_does_not_depend_on_what_else_is_asked_for(probed, tmp_path):
    """Nor on when: the same seed gives the same subsets, untrained network and numbers again."""
    records, folder, _ = probed
    again = run(folder, labels_per_class=[4], num_subsets=3, knn=False, output_dir=str(tmp_path))
    expected = [
        record
        for record in records
        if record.probe != NEAREST_NEIGHBOURS
        and (record.layers is None or len(record.layers) == 1)
        and record.labels_per_class != 1
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
    for name in ("logistic regression", NEAREST_NEIGHBOURS):
        five, single = (one(records, split="test", probe=name, masks=n, labels_per_class=None) for n in (5, 1))
        layer = layer_of(five)
        assert replace(five, masks=1, value=single.value) == single
        assert "5 masks" in describe_model(five) and describe_model(single).endswith(", 1 mask")
        if name == NEAREST_NEIGHBOURS:
            predict = nearest_neighbours(np.concatenate([part[layer] for part in masked]), known)
        else:
            parts = [part[layer] for part in masked]
            predict = refit(parts, [labels["train"], labels["validation"]], five.details["C"]).predict
        votes = [
            predict(extract(model, tokens["test"], layer, mask_seed=SEED + 2 + draw)[layer].numpy())
            for draw in range(5)
        ]
        assert len({tuple(vote) for vote in votes}) > 1
        assert five.value == agreement(majority_vote(np.stack(votes), SEED), labels["test"])
        assert single.value == agreement(votes[0], labels["test"])
    # What was read through one mask says so; pixels are not masked.
    assert [record.masks for record in select(records, split="test", baseline="untrained")] == [1]
    assert one(records, split="test", labels_per_class=4).masks == 1
    assert one(records, split="test", baseline="raw pixels").masks is None
    assert "Mind" not in capsys.readouterr().out


def test_one_mask_is_no_vote(models, tmp_path):
    options = {"baselines": False, "knn": False, "layers": [1], "output_dir": str(tmp_path)}
    records = run(models["masked"], num_masks=1, **options)
    assert [record.masks for record in select(records, split="test")] == [1]


def test_sgd(models, tmp_path):
    options = {"probe": "sgd", "sgd_learning_rates": [0.1, 3.0], "sgd_steps": 50, "sgd_batch_size": 64}
    records = run(models["causal"], layers=[-1, 1, 1], knn=False, output_dir=str(tmp_path), **options)
    assert {record.probe for record in records} == {"logistic regression by SGD"}
    assert [record.layers for record in select(records, split="validation")] == [(1,), (2,)]
    tested = one(records, split="test")
    layer, rate = layer_of(tested), tested.details["learning rate"]
    tokens, labels = known_and_test(models["causal"])
    known, test = features_of_known_and_test(ImageGPTModel.from_pretrained(models["causal"]), tokens)
    features = np.concatenate([part[layer] for part in known])
    (fit,) = sgd_regressions(
        features, np.concatenate([labels["train"], labels["validation"]]), [rate], True, 50, 64, "cpu", SEED
    )
    assert tested.value == agreement(fit.predict(test[layer].numpy()), labels["test"])
    assert (
        len(select(records, split="test", baseline="untrained"))
        == len(select(records, split="test", baseline="raw pixels"))
        == 1
    )


QUICK = {"layers": [1], "knn": False, "baselines": False, "regularization": [0.1]}


def test_milestones_are_probed_where_they_lie(causal):
    for step in (2, 1):
        place = causal / "milestones" / f"step-000000{step}"
        shutil.copytree(causal, place, ignore=shutil.ignore_patterns("milestones"))
    records = run(causal, milestones=True, **QUICK)
    names = ["copied", "step-0000001", "step-0000002"]
    assert [record.checkpoint for record in select(records, split="test")] == names
    assert len({record.value for record in select(records, split="test")}) == 1  # the weights are the same
    folders = [causal, *(causal / "milestones" / name for name in names[1:])]
    assert [len(read_records(folder / "probe" / "probe.json")) for folder in folders] == [2, 2, 2]


def test_several_models_in_one_folder(models, tmp_path):
    records = run(*models.values(), output_dir=str(tmp_path / "out"), **QUICK)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"causal", "masked"}
    assert records == [record for name in models for record in read_records(tmp_path / "out" / name / "probe.json")]


def test_fine_tuned_models_are_named_and_splits_are_the_models(tmp_path, capsys):
    """A model that saw labels is none whose probe can be held against the others'; none is tested on what it was trained on."""
    folder = save_model(tmp_path / "run", seed=7, started_from="pretrained")
    records = run(folder, **QUICK)
    assert all(record.started_from and ", fine-tuned, " in describe_model(record) for record in records)
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
        (
            None,
            {"max_train_samples": 1},
            {},
            "All 1 training images are of the class '.'; a probe needs at least 2 classes",
        ),
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
    with pytest.raises(ValueError, match="Give --output_dir: openai/imagegpt-small is not a folder here"):
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

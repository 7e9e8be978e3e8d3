"""Published repositories: pushed to a Hub on loopback by the real client, and loaded there in three ways.

Each way is a process of its own; the first two run in an environment without hf_igpt.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from loopback_hub import File, LoopbackHub
from PIL import Image
from safetensors.torch import load_file, save_file
from script_server import Scripts
from transformers import GPT2Config
from transformers.dynamic_module_utils import get_imports

import hf_igpt
from hf_igpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
    ImageGPTImageProcessorPil,
)
from hf_igpt.commands.publish import PublishArguments, describe_loading, publish
from hf_igpt.evaluation.records import RECORDS, RUN, Record, write_records
from hf_igpt.features_imagegpt import features_of_tokens
from hf_igpt.publishing.hub import CODE, check_model, write_repository


ROOT = Path(__file__).parent.parent
TOKENS = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0))
KINDS = {
    "igpt-causal": (ImageGPTForCausalImageModeling, {}),
    "igpt-raw": (ImageGPTForImageClassification, {"num_labels": 3}),
    "igpt-sos": (ImageGPTForImageClassification, {"num_labels": 3, "sos_inputs": True}),
    "igpt-masked": (ImageGPTForMaskedImageModeling, {"objective": "masked"}),
}


def photo():
    """Square: transformers' own processors squash what is not, having no crop to the largest square."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def save(kind, folder, palette):
    """A model's folder as a run leaves it: records and recipe beside it."""
    head, options = KINDS[kind]
    torch.manual_seed(list(KINDS).index(kind))
    model = randomized(head(small_config(**options)))
    model.save_pretrained(folder)
    ImageGPTImageProcessorPil(clusters=palette[:16], size=8, do_center_crop=True).save_pretrained(folder)
    record = Record(
        task="generation",
        metric="nats_per_pixel",
        value=1.5,
        unit="nats/pixel",
        split="held out",
        n=10,
        seed=0,
        dataset="noise",
        image_size=(8, 8),
        colors=16,
    )
    write_records(folder / RECORDS, [record])
    (folder / RUN).write_text(json.dumps({"identity": "x", "recipe": {"objective": "causal", "data": "noise"}}))
    photo().save(folder / "samples.png")
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    palette = np.random.default_rng(0).uniform(-1, 1, (64, 3))
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save(kind, root / kind, palette)
    photo().save(root / "photo.png")
    return root


@pytest.fixture
def folder(folders, tmp_path):
    return Path(shutil.copytree(folders / "igpt-causal", tmp_path / "model"))


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory):
    """Python of an environment that has everything but hf_igpt."""
    place = tmp_path_factory.mktemp("plain")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    # Named in a .pth file, so that the .pth files there, by which hf_igpt is installed, are not read.
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return str(place / "bin" / "python")


@pytest.fixture(scope="module")
def server():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def scripts(server, tmp_path_factory):
    """Runs scripts that push to `server`."""
    environment = server.environment(tmp_path_factory.mktemp("home")) | {"PYTHONPATH": str(ROOT / "src")}
    with Scripts(environment, ROOT) as scripts:
        yield scripts


@pytest.fixture(scope="module")
def hub(server, scripts, folders):
    """All kinds, published as org/KIND."""
    for kind in KINDS:
        scripts.run("scripts/run_publish.py", "--model", folders / kind, "--repo_id", f"org/{kind}")
    return server


def run(command, environment, fails=False, cwd=None):
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    assert "custom code" not in done.stdout, done.stdout  # no question was asked
    return done.stdout + done.stderr


# -- three ways to load ------------------------------------------------------------------------------------------------

ANSWERS = """
import sys
import numpy as np, torch
way, photo, out = sys.argv[1:]
if way == "package":
    import hf_igpt
else:
    try:
        import hf_igpt
        sys.exit("hf_igpt is importable here")
    except ImportError:
        pass
import transformers
from transformers import (AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification,
                          AutoModelForMaskedImageModeling, ImageGPTForCausalImageModeling, pipeline)

trust = {"trust_remote_code": True} if way == "code" else {}
home = {"plain": "transformers.", "code": "transformers_modules.", "package": "hf_igpt."}[way]
tokens = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0))
answers = {}

def hard_images():
    # Of 16 bits, and transparent: transformers' own pipelines would turn them white and black.
    from PIL import Image

    greys = np.linspace(0, 65535, 576).reshape(24, 24)
    levels = np.random.default_rng(2).integers(0, 256, (24, 24, 4), dtype=np.uint8)
    return Image.fromarray(greys.astype(np.uint16)), Image.fromarray(levels)

def load(auto, name):
    model, report = auto.from_pretrained(name, output_loading_info=True, **trust)
    assert type(model).__module__.startswith(home), type(model)
    if auto is not AutoModel:  # which leaves the head out
        assert not any(report.values()), report
    return model.eval()

with torch.no_grad():
    processor = AutoImageProcessor.from_pretrained("org/igpt-causal", **trust)
    assert type(processor).__module__.startswith(home), type(processor)
    answers["tokens"] = processor(transformers.image_utils.load_image(photo), return_tensors="np")["input_ids"]
    model = load(ImageGPTForCausalImageModeling if way == "plain" else AutoModelForCausalLM, "org/igpt-causal")
    answers["logits"] = model(tokens).logits
    answers["greedy"] = model.generate(do_sample=False)
    backbone = load(AutoModel, "org/igpt-causal")
    shifted = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=16)
    states = backbone(shifted, output_hidden_states=True).hidden_states
    features = [block.ln_1(state).mean(1) for block, state in zip(backbone.h, states)] + [states[-1].mean(1)]
    answers["features"] = torch.stack(features)
    answers["classes"] = load(AutoModelForImageClassification, "org/igpt-raw")(tokens).logits
    classify = pipeline("image-classification", "org/igpt-raw", **trust)
    assert type(classify.model).__module__.startswith(home)
    assert type(classify.image_processor).__module__.startswith(home)
    answers["scores"] = np.array([entry["score"] for entry in sorted(classify(photo), key=lambda e: e["label"])])
    if way != "plain":
        sixteen_bits, clear = hard_images()
        named, unnamed = classify, pipeline(model="org/igpt-raw", **trust)
        for ask in (named, unnamed):
            for image in (sixteen_bits, clear):
                found = {entry["label"]: entry["score"] for entry in ask(image)}
                inputs = processor(image, return_tensors="pt")["input_ids"]
                right = load(AutoModelForImageClassification, "org/igpt-raw")(inputs).logits.softmax(-1)[0]
                assert np.allclose([found[f"LABEL_{i}"] for i in range(3)], right, atol=1e-5), (found, right)
        assert "image-classification" not in classify.model.config.to_json_string()
    extract = pipeline("image-feature-extraction", "org/igpt-causal", **trust)
    if way != "plain":
        for image in (sixteen_bits, clear):
            inputs = processor(image, return_tensors="pt")["input_ids"]
            assert np.allclose(extract(image, return_tensors=True), backbone(inputs).last_hidden_state, atol=1e-5)
    answers["extracted"] = extract(photo, return_tensors=True)
    if way != "plain":
        answers["sos"] = load(AutoModelForImageClassification, "org/igpt-sos")(tokens).logits
        masked = load(AutoModelForMaskedImageModeling, "org/igpt-masked")
        answers["masked"] = masked(tokens, bool_masked_pos=tokens > 12).logits
        complete = pipeline("image-completion", "org/igpt-causal", **trust)
        assert type(complete.model).__module__.startswith(home)
        wide = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        answers["wide"] = processor(wide, return_tensors="np")["input_ids"]
        assert (answers["wide"] == processor(wide[:, 5:25], return_tensors="np")["input_ids"]).all()
        answers["completions"] = np.stack([np.asarray(image) for image in complete(photo, seed=0, num_completions=2)])
        assert len(processor.decode(model.generate())) == 1
    if way != "plain":
        answers["pooled"] = np.stack([extract(photo, layer=layer, pool=True)[0] for layer in range(4)])
        of_masked = pipeline("image-feature-extraction", "org/igpt-masked", **trust)
        answers["pooled, masked"] = of_masked(photo, layer=1, pool=True)
        assert "feature" not in extract.model.config.to_json_string()
np.savez(out, **{name: np.asarray(value) for name, value in answers.items()})
"""

REFUSALS = """
print("-- refusals")
loaders = [transformers.AutoModel, transformers.AutoModelForImageClassification, transformers.ImageGPTModel,
           transformers.ImageGPTForCausalImageModeling, transformers.ImageGPTForImageClassification]
calls = [loader.from_pretrained for loader in loaders]
calls += [lambda name: pipeline("image-classification", name), lambda name: pipeline("image-feature-extraction", name)]
for name in ("org/igpt-sos", "org/igpt-masked"):
    for call in calls:
        try:
            call(name)
        except Exception as error:
            print("refused" if "needs the package hf_igpt" in str(error) else f"{name}: another error, {error}")
        else:
            print(f"{name}: not refused")
"""


@pytest.fixture(scope="module")
def answers(hub, folders, plain_python, tmp_path_factory):
    """By way; "refusals" is what plain transformers, having answered, says about the rest."""
    found = {}
    for way, python in (("plain", plain_python), ("code", plain_python), ("package", sys.executable)):
        place = tmp_path_factory.mktemp(way)
        code = ANSWERS + (REFUSALS if way == "plain" else "")
        command = [python, "-c", code, way, str(folders / "photo.png"), str(place / "answers.npz")]
        said = run(command, hub.environment(place / "home", token=False))
        found[way] = dict(np.load(place / "answers.npz"))
        if way == "plain":
            found["refusals"] = said
    return found


def test_three_ways_to_load_give_the_same(answers):
    plain, code, package = answers["plain"], answers["code"], answers["package"]
    assert set(plain) < set(code) == set(package)
    for name in package.keys() & code.keys():
        largest = max(1, np.abs(package[name]).max())
        for other in (plain, code):
            if name in other:
                assert np.abs(other[name].astype(np.float64) - package[name]).max() <= 1e-5 * largest, name
    for name in ("tokens", "wide", "greedy", "completions"):
        assert np.array_equal(code[name], package[name])


def test_they_are_the_saved_models(answers, folders):
    package = answers["package"]
    model = ImageGPTForCausalImageModeling.from_pretrained(folders / "igpt-causal")
    assert np.abs(model(TOKENS).logits.detach().numpy() - package["logits"]).max() < 1e-5
    features = torch.stack(list(features_of_tokens(model, TOKENS).values()))
    assert np.abs(features.numpy() - package["features"]).max() < 1e-5
    processor = ImageGPTImageProcessorPil.from_pretrained(folders / "igpt-causal")
    tokens = processor(photo(), return_tensors="pt")["input_ids"]
    pooled = torch.cat(list(features_of_tokens(model, tokens).values()))
    assert np.abs(pooled.numpy() - package["pooled"]).max() < 1e-5


def test_plain_transformers_refuses_what_it_would_get_wrong(answers):
    said = answers["refusals"].splitlines()
    assert said[said.index("-- refusals") + 1 :][:14] == 14 * ["refused"], answers["refusals"]  # 2 models in 7 ways


def test_the_code_of_a_repository_says_which_transformers_it_needs(hub, plain_python, tmp_path):
    code = """
import transformers
transformers.__version__ = "4.57.1"
transformers.AutoModel.from_pretrained("org/igpt-causal", trust_remote_code=True)
"""
    said = run([plain_python, "-c", code], hub.environment(tmp_path), fails=True)
    assert "needs transformers >= 5.17; found 4.57.1" in said


def test_published_code_imports_what_transformers_needs_anyway():
    allowed = {"transformers", "torch", "numpy", "huggingface_hub", "packaging", "PIL", "tqdm"} | set(
        sys.stdlib_module_names
    )
    for name in CODE:
        assert set(get_imports(Path(hf_igpt.__file__).parent / name)) <= allowed, name


# -- publishing --------------------------------------------------------------------------------------------------------


def test_a_repository_is_complete_and_pushed_in_one_commit(hub):
    files = hub.files("org/igpt-causal")
    assert set(files) - {".gitattributes"} == {
        *CODE,
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"),
        *("palette.png", "samples.png", RECORDS, RUN),
    }
    assert len(hub.commits("org/igpt-causal")) == 2  # the Hub's own and ours
    assert json.loads(files[RUN]) == {"recipe": {"objective": "causal", "data": "noise"}}


def test_script_revisions_and_private_repositories(server, scripts, folder, tmp_path):
    publishing = ["scripts/run_publish.py", "--model", folder, "--repo_id", "org/private"]
    said = scripts.run(*publishing, "--private")
    assert f"{server.endpoint}/org/private" in said and said.count("from_pretrained") == 3
    first = server.commits("org/private")[0]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "samples.png").unlink()
    repository = server.repositories["org/private"]
    repository.commit("main", "by hand", {**repository.resolve("main").files, "notes/own.png": File(b"x")})
    scripts.run(*publishing)
    assert "samples.png" in server.files("org/private", first) and "samples.png" not in server.files("org/private")
    assert "notes/own.png" in server.files("org/private")
    code = f"""
import os, sys, torch, transformers
load = transformers.ImageGPTForCausalImageModeling.from_pretrained
try:
    load("org/private")
except Exception as error:
    print("refused:", type(error).__name__, error)
else:
    sys.exit("a stranger has read it")
os.environ["HF_TOKEN"] = {server.token!r}
new, old = load("org/private"), load("org/private", revision={first!r})
assert torch.allclose(new.lm_head.weight, old.lm_head.weight + 1)
"""
    said = run([sys.executable, "-c", code], server.environment(tmp_path / "other", token=False))
    refused = said[said.index("refused:") :]
    assert "not a local folder" in refused or "RepositoryNotFound" in refused
    scripts.run(*publishing, "--revision", "trial")
    assert "trial" in repository.branches


@pytest.mark.parametrize("part", ["lfs", "commit"])
def test_an_interrupted_push_changes_nothing(part, server, scripts, folder):
    name = f"org/interrupted-{part}"
    publishing = ["scripts/run_publish.py", "--model", folder, "--repo_id", name]
    scripts.run(*publishing)
    before = server.files(name), server.commits(name)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    server.fail = part
    try:
        scripts.run(*publishing, fails=True)
    finally:
        server.fail = None
    assert (server.files(name), server.commits(name)) == before
    scripts.run(*publishing)
    assert server.files(name)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_without_a_token_and_over_a_public_repository(hub, scripts, folder, tmp_path):
    """The first in a Python of its own, as users start it."""
    command = ["scripts/run_publish.py", "--model", str(folder), "--repo_id", "org/igpt-causal"]
    before = hub.commits("org/igpt-causal")
    said = run([sys.executable, *command], hub.environment(tmp_path, token=False), fails=True, cwd=ROOT)
    assert "hf auth login" in said and "Traceback" not in said
    said = scripts.run(*command, "--private", fails=True)
    assert "exists and is public" in said and hub.commits("org/igpt-causal") == before


def test_local_only_writes_what_would_be_pushed(hub, folder, tmp_path):
    target = tmp_path / "repository"
    assert publish(PublishArguments(str(folder), "org/igpt-causal", local_only=str(target))) == str(target)
    pushed = {name: content for name, content in hub.files("org/igpt-causal").items() if name != ".gitattributes"}
    assert {file.name: file.read_bytes() for file in target.iterdir()} == pushed
    with pytest.raises(ValueError, match="not empty"):
        publish(PublishArguments(str(folder), "org/igpt-causal", local_only=str(target)))


def test_upstream_checkpoints_are_published_too(palette, tmp_path):
    import transformers

    config = transformers.ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    transformers.models.imagegpt.ImageGPTForCausalImageModeling(config).save_pretrained(tmp_path / "theirs")
    ImageGPTImageProcessorPil(clusters=palette[:16], size=8).save_pretrained(tmp_path / "theirs")
    folder = write_repository(tmp_path / "theirs", tmp_path / "out", "org/theirs")
    assert "Nothing was measured" in (folder / "README.md").read_text()


def test_half_the_size_and_without_code(folder, tmp_path):
    target = write_repository(folder, tmp_path / "out", "checkpoints/small", bfloat16=True, code=False)
    assert not list(target.glob("*.py")) and "auto_map" not in (target / "config.json").read_text()
    stored, whole = (load_file(place / "model.safetensors") for place in (target, folder))
    assert all(torch.equal(stored[name], weight.bfloat16()) for name, weight in whole.items())
    model = ImageGPTForCausalImageModeling.from_pretrained(target)
    assert model.dtype == torch.float32
    assert all(torch.equal(weight, stored[name].float()) for name, weight in model.state_dict().items())
    card = (target / "README.md").read_text()
    assert "trust_remote_code" not in card and "import hf_igpt\nfrom transformers" in card
    assert "| weights are stored as | bfloat16, rounded |" in card
    assert describe_loading(model.config, "x", code=False).splitlines()[1] == "code in the repository:  none"


def test_trainer_pushes_the_same_repository(tmp_path):
    """`--push_to_hub` at each checkpoint and at the end; no training_args.bin, which holds tokens and paths."""
    with LoopbackHub() as server:
        environment = server.environment(tmp_path / "home") | {"ACCELERATE_USE_CPU": "true"}
        options = (
            "--config_overrides n_layer=1,n_embd=16,n_head=1 --max_steps 4 --eval_steps 2 --num_samples 1 --use_cpu"
        )
        options += " --push_to_hub --hub_model_id org/trained --max_train_samples 64 --max_eval_samples 16"
        command = [sys.executable, str(ROOT / "scripts/run_pretrain.py"), "--output_dir", str(tmp_path / "run")]
        run([*command, *options.split()], environment)
        pushed = server.files("org/trained")
        titles = [commit.title for commit in server.repositories["org/trained"].commits.values()]
        assert "End of training" in titles and any("step" in title for title in titles)
    local = write_repository(tmp_path / "run", tmp_path / "local", "org/trained")
    del pushed[".gitattributes"]
    assert {file.name: file.read_bytes() for file in local.iterdir()} == pushed
    card = pushed["README.md"].decode()
    assert "scikit-learn digits" in card and "nats_per_pixel" in card and str(tmp_path) not in card


# -- refusals ----------------------------------------------------------------------------------------------------------


def break_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def link(file, name=""):
    """Replace a file by a link to itself, elsewhere; or by one to a folder that has it by `name`."""
    others = Path(tempfile.mkdtemp(dir=file.parent.parent.parent))
    (others / (name or file.name)).parent.mkdir(exist_ok=True)
    shutil.move(file, others / (name or file.name))
    file.symlink_to(others / file.name)


def other_model_type(folder):
    GPT2Config(n_layer=1).save_pretrained(folder)


BREAKAGES = {
    "no preprocessor": (lambda f: (f / "preprocessor_config.json").unlink(), "no .*preprocessor_config.json"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "no .*config.json: give the folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights .*model.safetensors"),
    "other palette": (
        lambda f: ImageGPTImageProcessorPil(clusters=np.eye(3), size=8).save_pretrained(f),
        "preprocessor_config.json: .* 16 colours; the image processor makes 8x8 of 3",
    ),
    "no palette": (lambda f: ImageGPTImageProcessorPil(size=8).save_pretrained(f), "of no colours"),
    "other type": (other_model_type, "type gpt2, not an Image GPT"),
    "not finite": (
        lambda f: break_weights(f, lambda w: w["lm_head.weight"].fill_(torch.nan)),
        "lm_head.weight is not finite",
    ),
    "missing weight": (lambda f: break_weights(f, lambda w: w.pop("lm_head.weight")), "no such tensor"),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:3000]),
        "damaged or cut short",
    ),
    "token": (lambda f: (f / RUN).write_text(json.dumps({"recipe": {"data": "hf_" + "a" * 30}})), "access token"),
    "linked picture": (lambda f: link(f / "samples.png"), "samples.png leads out of .*model by a link"),
    "linked weights": (lambda f: link(f / "model.safetensors"), "model.safetensors leads out"),
    "linked configuration": (lambda f: link(f / "config.json"), "config.json leads out"),
    "linked records": (lambda f: link(f / RECORDS), "records.json leads out"),
    "linked recipe": (lambda f: link(f / RUN), "run.json leads out"),
    "linked drawings": (
        lambda f: link((f / "samples.png").rename(f / "samples"), "samples/step-0000001.png"),
        "step-0000001.png leads out",
    ),
    "no picture": (lambda f: (f / "samples.png").write_text("ssh-rsa"), "samples.png is no picture"),
    "weights elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        "index.json names '../../x.safetensors', which is no file beside it",
    ),
    "no weights' places": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "index.json has no weight_map",
    ),
    "records of a path": (
        lambda f: (f / RECORDS).write_text(
            json.dumps([{**json.loads((f / RECORDS).read_text())[0], "checkpoint": "../../x"}])
        ),
        "records.json does not hold records: checkpoint is the name of a folder",
    ),
    "deep recipe": (lambda f: (f / RUN).write_text("[" * 100_000), "run.json cannot be read"),
    "path": (
        lambda f: (f / RUN).write_text(json.dumps({"recipe": {"data": f"{os.getcwd()}/photos"}})),
        "hold the path",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_does_not_belong_together_is_not_published(breakage, folder, tmp_path):
    change, message = BREAKAGES[breakage]
    change(folder)
    with pytest.raises(ValueError, match=message):
        write_repository(folder, tmp_path / "out", "org/name")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}  # nothing is left behind


def test_names_of_repositories(folder):
    with pytest.raises(ValueError, match="organisation/name"):
        publish(PublishArguments(str(folder), "name", local_only="out"))


def test_every_head_of_a_folder_is_checked(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"].append("ImageGPTForImageClassification")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"ImageGPTForImageClassification, whose score.weight"):
        check_model(folder)

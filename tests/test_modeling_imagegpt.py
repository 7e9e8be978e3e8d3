"""The model against OpenAI's own outputs, transformers' class, and its own mathematics."""

import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers.models.imagegpt.configuration_imagegpt as theirs_config
import transformers.models.imagegpt.modeling_imagegpt as theirs
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import randomized, small_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    CompileConfig,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    WatermarkDetector,
    WatermarkingConfig,
)
from transformers.cache_utils import DynamicCache

from hf_igpt import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
    ImageGPTModel,
)
from hf_igpt.modeling_imagegpt import draw_mask


SOS = 16


def shifted(tokens):
    return torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=SOS)


def assert_close(ours, upstream):
    assert (ours - upstream).abs().max() <= 1e-5 * max(1, upstream.abs().max())


# -- second implementations --------------------------------------------------------------------------------------------


def openai_weights(variables, n_layer):
    """OpenAI's variables -> our state dict: heads joined, projections stored [in, out]."""

    def joined(name):
        return torch.tensor(variables[name]).flatten(0, 1)

    def get(name):
        return torch.tensor(variables[f"model/{name}"])

    state = {
        "transformer.wte.weight": torch.cat([get("wte"), get("sos")[None]]),
        "transformer.wpe.weight": get("wpe"),
        "transformer.ln_f.weight": get("ln_f/g"),
        "lm_head.weight": get("wtet"),
    }
    for i in range(n_layer):
        at, block = f"transformer.h.{i}.", f"model/h{i}/"
        qkv = [joined(f"{block}attn/{part}_proj").T for part in "qkv"]
        state[at + "attn.c_attn.weight"] = torch.cat(qkv, dim=1)
        state[at + "attn.c_proj.weight"] = joined(f"{block}attn/c_proj")
        for part in ("c_fc", "c_proj"):
            state[f"{at}mlp.{part}.weight"] = torch.tensor(variables[f"{block}mlp/{part}/w"])
        for part in ("ln_1", "ln_2"):
            state[f"{at}{part}.weight"] = torch.tensor(variables[f"{block}{part}/g"])
    return state


def test_openai_golden_outputs():
    """tests/fixtures/openai-ar.npz: a random model run by OpenAI's own TensorFlow graph (src/model.py)."""
    golden = np.load(Path(__file__).parent / "fixtures" / "openai-ar.npz")
    model = ImageGPTForCausalImageModeling(small_config(n_head=4)).eval()
    missing, unexpected = model.load_state_dict(openai_weights(golden, n_layer=3), strict=False)
    assert not unexpected and all(name.endswith(".bias") for name in missing)
    with torch.no_grad():
        output = model(labels=torch.tensor(golden["golden/tokens"]))
    assert (output.logits - torch.tensor(golden["golden/gen_logits"])).abs().max() < 1e-4
    assert abs(output.loss - float(golden["golden/gen_loss"])) < 1e-5


def test_ours_saved_and_loaded_by_transformers(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    upstream, report = theirs.ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    inputs = shifted(tokens)
    with torch.no_grad():
        assert_close(model(inputs).logits, upstream.eval()(inputs).logits)


def test_transformers_saved_and_loaded_by_ours(tokens, tmp_path):
    config = theirs_config.ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=3, n_head=2)
    upstream = randomized(theirs.ImageGPTForCausalImageModeling(config))
    upstream.save_pretrained(tmp_path)
    ours, report = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    inputs = shifted(tokens)
    with torch.no_grad():
        a, b = (m.eval()(inputs, labels=tokens, output_hidden_states=True) for m in (ours, upstream))
    assert_close(a.logits, b.logits)
    assert a.loss == pytest.approx(b.loss.item(), rel=1e-5)
    assert len(a.hidden_states) == len(b.hidden_states)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize(
    "options", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"n_inner": 48}]
)
def test_transformers_options(options, tokens, tmp_path):
    config = theirs_config.ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=2, n_head=2, **options)
    upstream = randomized(theirs.ImageGPTForCausalImageModeling(config))
    upstream.save_pretrained(tmp_path)
    ours = ImageGPTForCausalImageModeling.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(ours(tokens).logits, upstream(tokens).logits)


def test_auto_classes_give_ours(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ImageGPTConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is ImageGPTModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ImageGPTForCausalImageModeling


def test_missing_biases_are_zeros(model, tmp_path):
    for use_bias in (True, False):
        config = small_config(use_bias=use_bias)
        randomized(ImageGPTForCausalImageModeling(config)).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "bias" not in k}, file, metadata={"format": "pt"})
        state = ImageGPTForCausalImageModeling.from_pretrained(tmp_path).state_dict()
        assert all((tensor == 0).all() for name, tensor in state.items() if name.endswith("bias"))


# -- initialisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_colors", [2, 16, 512])
def test_untrained_loss_is_ln_k(n_colors):
    model = ImageGPTForCausalImageModeling(small_config(n_colors=n_colors))
    loss = model(labels=torch.randint(0, n_colors, (4, 64))).loss
    assert abs(loss.item() - math.log(n_colors)) < 1e-5


def test_official_initialisation():
    state = ImageGPTForCausalImageModeling(small_config(n_embd=256, n_layer=4, n_colors=512)).state_dict()
    expected = {
        "transformer.wte.weight": 0.02,
        "transformer.wpe.weight": 0.01,
        "transformer.h.1.attn.c_attn.weight": 256**-0.5,
        "transformer.h.1.attn.c_proj.weight": (256 * 4) ** -0.5,
        "transformer.h.1.mlp.c_fc.weight": 0.02,
        "transformer.h.1.mlp.c_proj.weight": 0.02,
    }
    for name, std in expected.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.03), name
    assert (state["lm_head.weight"] == 0).all()
    assert (state["transformer.ln_f.weight"] == 1).all()


def test_transformers_initialisation_is_the_default():
    state = ImageGPTForCausalImageModeling(ImageGPTConfig(n_embd=256, n_layer=2, n_head=4)).state_dict()
    assert state["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert state["transformer.h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 2, rel=0.03)


# -- the shift and the loss --------------------------------------------------------------------------------------------


def test_training_call_scores_all_pixels(model, tokens):
    output = model(labels=tokens)
    logits = model(shifted(tokens)).logits
    assert torch.allclose(output.logits, logits, atol=1e-6)
    by_hand = -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    assert output.loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert output.past_key_values is None


def test_labels_beside_inputs_follow_transformers_contract(model, tokens):
    labels = tokens.clone()
    labels[:, 10:20] = -100
    logits = model(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert model(tokens, labels=labels.int()).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_num_items_in_batch_divides_the_summed_loss(model, tokens):
    whole = model(labels=tokens).loss
    parts = [model(labels=part, num_items_in_batch=torch.tensor(tokens.numel())).loss for part in tokens.split(1)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_causality(model, tokens):
    """A pixel's logits depend on the pixels before it, on each of them, and on no other."""
    position = 30
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 16
    difference = (model(labels=tokens).logits - model(labels=changed).logits).abs().amax(dim=(0, 2))
    assert difference[: position + 1].max() < 1e-6
    assert difference[position + 1 :].min() > 1e-6


# -- numerics ----------------------------------------------------------------------------------------------------------


def test_attention_implementations_agree(model, tokens):
    expected = model(labels=tokens).logits
    model.set_attn_implementation("eager")
    output = model(labels=tokens, output_attentions=True)
    assert_close(output.logits, expected)
    assert output.attentions[0].shape == (4, 2, 64, 64)
    assert torch.allclose(output.attentions[0].sum(-1), torch.ones(4, 2, 64), atol=1e-5)


def test_flex_attention_agrees(model, tokens):
    expected = model(labels=tokens).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert_close(model(labels=tokens).logits, expected)
    with pytest.raises(ValueError, match="static cache does not work with flex_attention"):
        model.generate(cache_implementation="static")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_close(model, tokens, dtype):
    with torch.no_grad():
        model.transformer.wte.weight *= 2000  # squares beyond float16's 65504
        expected = model(labels=tokens)
        half = model.to(dtype)(labels=tokens)
    assert torch.isfinite(half.logits).all()
    assert half.logits.abs().max() > 0.1 * expected.logits.abs().max()
    assert half.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)


def test_gradient_checkpointing_changes_nothing(model, tokens):
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def gradients_of(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_what_others_put_into_a_block_runs_once(model, tokens):
    """Hooks, and modules in place of ours: as often in training as without it, with gradients on what they see."""
    block = model.transformer.h[0]
    block.attn.resid_dropout = torch.nn.Identity()
    block.mlp.act = torch.nn.ReLU(inplace=True)
    model.transformer.h[1].ln_1 = torch.nn.BatchNorm1d(64)  # of (B, N, D): its channels are the positions
    seen = {}

    def watch(module, inputs, output):
        output.retain_grad()
        seen.setdefault(module, []).append(output)

    watched = (
        block.ln_1,
        block.attn.c_attn,
        block.ln_2,
        model.transformer.h[1].mlp.act,
        model.transformer.h[1].mlp.c_fc,
    )
    for module in watched:
        module.register_forward_hook(watch)
    model.train()
    model(labels=tokens).loss.backward()
    assert [len(seen[module]) for module in watched] == [1] * len(watched)
    assert all(seen[module][0].grad.abs().sum() > 0 for module in watched)
    assert model.transformer.h[1].ln_1.num_batches_tracked == 1


def test_dropout_of_another_kind_is_called(model, tokens):
    class AlwaysOn(torch.nn.Dropout):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.5)

    with torch.no_grad():
        expected = model(labels=tokens).loss
        model.transformer.h[0].mlp.dropout = AlwaysOn()
        assert (model(labels=tokens).loss - expected).abs() > 1e-6


def test_float64_is_kept(model, tokens):
    """Not rounded to float32 on the way: a finite difference agrees to nine digits."""
    model.double().train()
    weight = model.transformer.h[0].ln_1.weight
    (slope,) = torch.autograd.grad(model(labels=tokens).loss, weight)
    step = 1e-5 * slope / slope.norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
            losses.append(model(labels=tokens).loss)
            weight -= sign * step
    assert losses[0].dtype == torch.float64
    assert ((losses[0] - losses[1]) / 2e-5).item() == pytest.approx(slope.norm().item(), rel=1e-8)


def test_second_derivatives(model, tokens):
    """Through what is recomputed too."""
    model.set_attn_implementation("eager")  # fused kernels have none
    seconds = []
    for training in (False, True):
        model.train(training)
        weight = model.transformer.h[0].mlp.c_fc.weight
        (first,) = torch.autograd.grad(model(labels=tokens).loss, weight, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), model.transformer.wpe.weight)[0])
    assert seconds[0].abs().max() > 0
    assert_close(seconds[1], seconds[0])


def test_gradients_by_torch_func(model, tokens):
    model.train()
    weights = dict(model.named_parameters())
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, kwargs={"labels": tokens}).loss)(weights)
    model(labels=tokens).loss.backward()
    assert_close(found["transformer.wpe.weight"], model.transformer.wpe.weight.grad)
    each = torch.func.vmap(
        torch.func.grad(lambda w, row: torch.func.functional_call(model, w, kwargs={"labels": row[None]}).loss),
        in_dims=(None, 0),
    )(weights, tokens)  # gradients of each image
    assert_close(each["transformer.wpe.weight"].mean(dim=0), found["transformer.wpe.weight"])


def test_compiles_without_graph_breaks(model, tokens):
    expected = gradients_of(model, model(labels=tokens).loss)
    found = torch.compile(model.train(), fullgraph=True, backend="aot_eager")(labels=tokens).loss
    assert found.item() == pytest.approx(model(labels=tokens).loss.item(), rel=1e-5)
    for name, gradient in gradients_of(model, found).items():
        assert_close(gradient, expected[name])


def test_left_padding(model, tokens):
    inputs = shifted(tokens)[:, :20]
    padded = torch.nn.functional.pad(inputs, (5, 0), value=0)
    mask = torch.nn.functional.pad(torch.ones_like(inputs), (5, 0), value=0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert_close(model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:], model(inputs).logits)


# -- classification ----------------------------------------------------------------------------------------------------


def test_classifier_of_transformers_and_back(tokens, tmp_path):
    config = theirs_config.ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=2, n_head=2, num_labels=5)
    upstream = randomized(theirs.ImageGPTForImageClassification(config))
    upstream.save_pretrained(tmp_path / "theirs")
    ours, report = ImageGPTForImageClassification.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()) and type(
        AutoModelForImageClassification.from_pretrained(tmp_path / "theirs")
    ) is type(ours)
    labels = torch.arange(4)
    with torch.no_grad():
        a, b = ours.eval()(tokens, labels=labels), upstream(tokens, labels=labels)
    assert_close(a.logits, b.logits)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = theirs.ImageGPTForImageClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert_close(again(tokens).logits, a.logits)


def test_classifier_fed_with_sos(model, tokens):
    """OpenAI's classifier: the mean over positions of ln_f's output on [SOS, x_0 … x_{N-2}]."""
    classifier = ImageGPTForImageClassification(small_config(sos_inputs=True, num_labels=5))
    classifier.transformer.load_state_dict(model.transformer.state_dict())
    assert (classifier.eval()(tokens).logits == 0).all()  # zero-initialised
    torch.nn.init.normal_(classifier.score.weight)
    expected = model.transformer(shifted(tokens)).last_hidden_state.mean(1) @ classifier.score.weight.T
    assert_close(classifier(tokens).logits, expected)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 16
    assert torch.equal(classifier(changed).logits, classifier(tokens).logits)  # the last pixel is only predicted


def test_classification_loss_under_accumulation(tokens):
    classifier = randomized(ImageGPTForImageClassification(small_config(num_labels=5)))
    labels = torch.arange(4)
    parts = [
        classifier(t, labels=y, num_items_in_batch=4).loss
        for t, y in zip(tokens.split(1), labels.split(1), strict=True)
    ]
    assert sum(parts).item() == pytest.approx(classifier(tokens, labels=labels).loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"5 classes, 0\.\.4"):
        classifier(tokens, labels=labels + 2)
    assert classifier(tokens, labels=labels.to(torch.uint8)).loss == classifier(tokens, labels=labels).loss


@pytest.mark.parametrize(("n_labels", "shape"), [(1, (4,)), (5, (4, 5))])
def test_regression_and_multi_label_losses_under_accumulation(tokens, n_labels, shape):
    classifier = randomized(ImageGPTForImageClassification(small_config(num_labels=n_labels)))
    labels = torch.rand(shape)
    whole = classifier(tokens, labels=labels).loss.item()
    parts = zip(tokens.split(1), labels.split(1), strict=True)
    loss = sum(classifier(t, labels=y, num_items_in_batch=labels.numel()).loss for t, y in parts)
    assert loss.item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("kind", ["masked", "sos"])
def test_what_transformers_cannot_represent_fails_there_with_a_sentence(kind, tmp_path):
    config = small_config(**({"objective": "masked"} if kind == "masked" else {"sos_inputs": True}))
    model = ImageGPTModel(config) if kind == "masked" else ImageGPTForImageClassification(config)
    model.save_pretrained(tmp_path)
    for name in ("ImageGPTModel", "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification"):
        with pytest.raises(Exception, match="needs the package hf_igpt"):
            getattr(theirs, name).from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).config
    assert loaded.objective == config.objective and loaded.sos_inputs == config.sos_inputs
    assert loaded.reorder_and_upcast_attn is False
    if kind == "masked":
        tokens = torch.randint(0, 16, (1, 64))
        changed = torch.nn.functional.pad(tokens[:, :-1], (0, 1), value=(int(tokens[0, -1]) + 1) % 16)
        backbone = randomized(ImageGPTModel.from_pretrained(tmp_path))
        for implementation in ("sdpa", "eager"):  # every position sees every other
            backbone.set_attn_implementation(implementation)
            difference = backbone(tokens).last_hidden_state[:, 0] - backbone(changed).last_hidden_state[:, 0]
            assert difference.abs().max() > 1e-6
        assert backbone(tokens).past_key_values is None
        with pytest.raises(ValueError, match="trained on masked pixels"):
            ImageGPTForCausalImageModeling.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["sos", "raw", "masked"])
def test_joint_loss(kind, tokens):
    """L_CLF + weight · L_GEN, each image's generative part the mean over its own pixels; the same under accumulation."""
    options = {"sos": {"sos_inputs": True}, "raw": {}, "masked": {"objective": "masked"}}[kind]
    classifier = randomized(
        ImageGPTForImageClassification(small_config(num_labels=5, generative_loss_weight=0.5, **options))
    )
    labels = torch.arange(4)
    mask = draw_mask(tokens.shape, torch.Generator().manual_seed(0))
    masks = {"bool_masked_pos": mask} if kind == "masked" else {}
    output = classifier(tokens, labels=labels, **masks)
    state = {name: w for name, w in classifier.state_dict().items() if not name.startswith("score.")}
    if kind == "masked":
        head = ImageGPTForMaskedImageModeling(small_config(**options)).eval()
        head.load_state_dict(state)
        expected = head(labels=tokens, **masks).loss
    else:
        head = ImageGPTForCausalImageModeling(small_config()).eval()
        head.load_state_dict(state)
        expected = head(labels=tokens).loss if kind == "sos" else head(tokens, labels=tokens).loss
    assert output.generative_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    cross_entropy = torch.nn.functional.cross_entropy(output.logits, labels)
    assert output.classification_loss.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((cross_entropy + 0.5 * expected).item(), rel=1e-5)
    parts = [
        classifier(
            tokens[i : i + 1],
            labels=labels[i : i + 1],
            num_items_in_batch=torch.tensor(4),
            **{k: v[i : i + 1] for k, v in masks.items()},
        ).loss
        for i in range(4)
    ]
    assert sum(parts).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_colour_head_only_where_the_joint_loss_needs_it():
    assert "lm_head.weight" not in ImageGPTForImageClassification(small_config()).state_dict()
    assert "lm_head.weight" in ImageGPTForImageClassification(small_config(generative_loss_weight=1)).state_dict()


# -- masked objective --------------------------------------------------------------------------------------------------


@pytest.fixture
def masked_model():
    return randomized(ImageGPTForMaskedImageModeling(small_config(objective="masked")))


def test_masked_pixels_are_unseen_and_alone_scored(masked_model, tokens):
    mask = draw_mask(tokens.shape, torch.Generator().manual_seed(0))
    assert mask.any(dim=1).all() and not mask.all()
    output = masked_model(labels=tokens, bool_masked_pos=mask)
    other = torch.where(mask, (tokens + 1) % 16, tokens)
    assert torch.equal(masked_model(other, bool_masked_pos=mask).logits, output.logits)
    nats = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), tokens, reduction="none")
    expected = torch.stack([row[m].mean() for row, m in zip(nats, mask, strict=True)]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_masked_loss_under_accumulation_and_without_masked_pixels(masked_model, tokens):
    mask = draw_mask(tokens.shape, torch.Generator().manual_seed(0))
    mask[1] = False
    whole = masked_model(labels=tokens, bool_masked_pos=mask).loss
    assert whole.isfinite()
    pairs = zip(tokens.split(1), mask.split(1), strict=True)
    parts = [masked_model(labels=t, bool_masked_pos=m, num_items_in_batch=torch.tensor(4 * 64)).loss for t, m in pairs]
    assert parts[1] == 0 and sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_random_mask_is_seeded_and_of_the_papers_rate():
    mask = draw_mask((100, 1024), torch.Generator().manual_seed(1))
    assert torch.equal(mask, draw_mask((100, 1024), torch.Generator().manual_seed(1)))
    assert mask.float().mean().item() == pytest.approx(0.15, abs=0.004)  # 3.6 standard deviations


def test_masked_models_bad_inputs(masked_model, model, tokens):
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    with pytest.raises(ValueError, match="pass `bool_masked_pos`"):
        masked_model(labels=tokens)
    with pytest.raises(ValueError, match="is boolean and has the tokens' shape"):
        masked_model(labels=tokens, bool_masked_pos=mask[:, :3])
    with pytest.raises(ValueError, match="this one is causal"):
        model.transformer(tokens, bool_masked_pos=mask)
    with pytest.raises(ValueError, match="trained to predict each pixel"):
        ImageGPTForMaskedImageModeling(small_config())
    joint = ImageGPTForImageClassification(small_config(objective="masked", generative_loss_weight=1, num_labels=5))
    with pytest.raises(ValueError, match="scores masked pixels"):
        joint(tokens, labels=torch.arange(4))


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream_like", [False, True])
def test_generate_without_arguments_draws_whole_images(model, upstream_like, tmp_path):
    if upstream_like:  # a checkpoint of transformers: no bos, no lengths
        config = theirs_config.ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        randomized(theirs.ImageGPTForCausalImageModeling(config)).save_pretrained(tmp_path)
        model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    drawn = model.generate()
    assert drawn.shape == (1, 1 + 64) and drawn[0, 0] == SOS and drawn[:, 1:].max() < SOS
    assert model.generate(num_return_sequences=3, do_sample=True).shape == (3, 65)
    assert model.generate(generation_config=GenerationConfig(do_sample=True)).shape == (1, 65)
    assert model.generate(max_new_tokens=5).shape == (1, 6)


def test_saved_generation_config_is_the_papers_sampling(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.bos_token_id, saved.max_length, saved.do_sample, saved.temperature, saved.top_k) == (
        SOS,
        65,
        True,
        1.0,
        0,
    )
    upstream = theirs.ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert upstream.generate().shape == (1, 65)


def test_greedy_tokens_are_the_same_over_all_caches(model, tokens):
    prompt = shifted(tokens)[:, :9]
    options = {"do_sample": False, "max_length": 65}
    expected = model.generate(prompt, use_cache=False, **options)
    assert len(expected.unique()) > 4
    assert torch.equal(model.generate(prompt, **options), expected)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)
    assert torch.equal(model.generate(prompt[:1], cache_implementation="static", **options), expected[:1])
    torch._dynamo.reset()  # of what other tests compiled
    compiled = CompileConfig(fullgraph=True, mode=None, backend="eager")
    compiled._compile_all_devices = True
    with mock.patch("torch._dynamo.config.error_on_recompile", True):  # one graph serves every token
        static = model.generate(prompt, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(static, expected)
    by_hand = prompt.clone()
    with torch.no_grad():
        while by_hand.shape[1] < 65:
            by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(by_hand, expected)


def test_a_compiled_model_generates(model):
    prompt = torch.full((2, 1), SOS)
    expected = model.generate(prompt, do_sample=False, max_new_tokens=3)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=3), expected)


# -- device maps -------------------------------------------------------------------------------------------------------


def models_of_all_kinds():
    """Name, model and inputs: all heads, with and without trained biases and the joint loss."""
    mask = draw_mask((4, 64), torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    joint = {"num_labels": 5, "generative_loss_weight": 0.5}
    return {
        "base": (ImageGPTModel, {}, {}),
        "base, biases": (ImageGPTModel, {"use_bias": True}, {}),
        "causal": (ImageGPTForCausalImageModeling, {}, {"labels": ...}),
        "masked": (ImageGPTForMaskedImageModeling, {"objective": "masked"}, {"labels": ..., "bool_masked_pos": mask}),
        "classifier": (ImageGPTForImageClassification, {"num_labels": 5}, {"labels": labels}),
        "classifier, SOS": (ImageGPTForImageClassification, {"sos_inputs": True} | joint, {"labels": labels}),
        "classifier, masked": (
            ImageGPTForImageClassification,
            {"objective": "masked"} | joint,
            {"labels": labels, "bool_masked_pos": mask},
        ),
    }


def a_map(model, place):
    """The second block and the last norm at `place`, everything else on the CPU."""
    prefix = "" if type(model) is ImageGPTModel else "transformer."
    parts = [f"{prefix}{name}" for name in ("wte", "wpe", "drop", "h.0", "h.1", "h.2", "ln_f")]
    parts += [name for name in ("lm_head", "score") if getattr(model, name, None) is not None]
    return {part: place if part.endswith(("h.1", "ln_f")) else "cpu" for part in parts}


@pytest.mark.parametrize("kind", models_of_all_kinds())
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model", "from_pretrained"])
def test_offloaded_models_are_the_whole_one(kind, way, tokens, tmp_path):
    """Blocks whose weights wait on the CPU or on the disk until they are called."""
    model_class, options, inputs = models_of_all_kinds()[kind]
    model = randomized(model_class(small_config(**options)))
    inputs = {name: tokens if value is ... else value for name, value in inputs.items()}
    if "labels" not in inputs or model_class is ImageGPTForImageClassification:
        inputs["input_ids"] = tokens
    with torch.no_grad():
        expected = model(**inputs).to_tuple()
    if way == "from_pretrained":
        model.save_pretrained(tmp_path / "model")
        model = model_class.from_pretrained(
            tmp_path / "model", device_map=a_map(model, "disk"), offload_folder=tmp_path / "offload"
        )
    elif way == "cpu_offload":
        cpu_offload(model, execution_device="cpu")
    elif way == "disk_offload":
        disk_offload(model, tmp_path / "offload", execution_device="cpu")
    else:
        dispatch_model(model, a_map(model, "disk"), main_device="cpu", offload_dir=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        found = model(**inputs).to_tuple()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if torch.is_tensor(one):
            assert torch.equal(one, other)


def test_offloaded_models_draw_the_same(model):
    sos = torch.full((2, 1), SOS)
    expected = model.generate(sos, do_sample=False)
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(model.generate(sos, do_sample=False), expected)


def test_biases_are_not_left_out_in_silence(tmp_path):
    randomized(ImageGPTForCausalImageModeling(small_config(use_bias=True))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_bias=True"):
        ImageGPTForCausalImageModeling.from_pretrained(tmp_path, use_bias=False)


KINDS = (ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"n_embd": 64},
            r"has shape \((96,|.*32)\) in the weights of .*, and \((192,|.*64)\) by the configuration: load them",
        ),
        ({"vocab_size": 20}, r"has shape \(1[67], 32\) in the weights of .*, and \((19|20), 32\) by the configuration"),
        (
            {"n_positions": 25},
            r"wpe.weight has shape \(64, 32\) in the weights of .*, and \(25, 32\) by the configuration",
        ),
        ({"n_layer": 4}, r"lacks (transformer\.)?h\.3\..*, which its configuration requires"),
        ({"n_layer": 2}, r"h\.2\..* is among the weights of .*, but the configuration has n_layer = 2"),
    ],
    ids=str,
)
def test_a_configuration_that_the_weights_do_not_fit_is_refused(kind, changed, message, tmp_path):
    saved = randomized(kind(small_config()))
    saved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(tmp_path, **changed)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(tmp_path)
    model, found = kind.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert all(getattr(model.config, name) == value for name, value in changed.items())
    again = kind.from_pretrained(None, config=saved.config, state_dict={})
    assert found["mismatched_keys"] or "n_layer" in changed
    assert again.num_parameters() == saved.num_parameters()


def test_new_heads_are_no_disagreement(tmp_path):
    """Those of other classes may be missing; a head for other labels is new only if that is asked for."""
    saved = randomized(ImageGPTModel(small_config()))
    saved.save_pretrained(tmp_path / "bare")
    for kind in KINDS:
        model = kind.from_pretrained(tmp_path / "bare")
        assert torch.equal(model.base_model.wte.weight, saved.wte.weight)
    model.save_pretrained(tmp_path / "labels")
    with pytest.raises(
        ValueError, match=r"score.weight has shape \(2, 32\) .* \(5, 32\) .* ignore_mismatched_sizes=True"
    ):
        ImageGPTForImageClassification.from_pretrained(tmp_path / "labels", num_labels=5)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    model = ImageGPTForImageClassification.from_pretrained(tmp_path / "labels", **options)
    assert model.score.weight.shape == (5, 32) and torch.equal(model.transformer.wte.weight, saved.wte.weight)


@pytest.mark.parametrize("content", [b"", b"weights", None], ids=["empty", "text", "half"])
def test_weights_that_cannot_be_read_are_refused_by_folder(content, tmp_path):
    ImageGPTModel(small_config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    with pytest.raises(ValueError, match=rf"The weights of {tmp_path} are damaged or cut short"):
        ImageGPTModel.from_pretrained(tmp_path)


def test_sampling_is_from_the_whole_distribution(model):
    """First pixels drawn follow the model's softmax over all 16 colours: no hidden top-k."""
    with torch.no_grad():
        probabilities = model(torch.tensor([[SOS]])).logits[0, -1].softmax(-1)
    drawn = model.generate(num_return_sequences=20000, max_new_tokens=1)[:, 1]
    frequencies = torch.bincount(drawn, minlength=16) / 20000
    assert (frequencies - probabilities).abs().max() < 0.015
    assert (frequencies[probabilities > 1e-3] > 0).all()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.full((1, 4), 17)}, r"token 17; allowed are 0\.\.16"),
        ({"input_ids": torch.full((1, 4), -1)}, "token -1"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens exceed n_positions = 64"),
        ({"input_ids": torch.zeros(2, 8, 8, dtype=torch.long)}, "shape"),
        ({"input_ids": torch.rand(2, 8)}, "integer tokens"),
        ({"labels": torch.full((1, 64), SOS)}, r"token 16; allowed are 0\.\.15"),
        ({"labels": torch.full((1, 64), -100)}, "pass `input_ids`"),
        ({"labels": torch.zeros(1, 65, dtype=torch.long)}, "exceed n_positions"),
        ({}, "input_ids"),
        ({"pixel_values": torch.rand(1, 3, 8, 8)}, "tokens"),
    ],
)
def test_bad_inputs(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    "options",
    [{"max_length": 66}, {"max_new_tokens": 65}, {"inputs_embeds": torch.zeros(1, 3, 32), "max_new_tokens": 63}],
)
def test_lengths_over_an_image_are_refused_before_the_first_step(model, options, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="66 tokens were requested"):
        model.generate(**options)


# -- what users call beside training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_colors", [8, 255, 256])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_tokens_of_any_integer_type(n_colors, dtype):
    """`tokenize` stores uint8 or uint16; 256, the limit or SOS, does not fit into uint8."""
    tokens = torch.randint(0, min(n_colors, 128), (3, 64))
    for kind, options in (
        (ImageGPTForCausalImageModeling, {}),
        (ImageGPTForImageClassification, {"num_labels": 4, "sos_inputs": True}),
    ):
        model = randomized(kind(small_config(n_colors=n_colors, **options)))
        assert torch.equal(model(input_ids=tokens.to(dtype)).logits, model(input_ids=tokens).logits)
    model = randomized(ImageGPTForCausalImageModeling(small_config(n_colors=n_colors)))
    assert torch.equal(model(labels=tokens.to(dtype)).loss, model(labels=tokens).loss)
    with pytest.raises(ValueError, match=f"the token {n_colors}"):
        model(labels=torch.full((1, 64), n_colors, dtype=torch.int32))


@pytest.mark.parametrize("beams", [1, 3])
def test_transition_scores_are_those_of_the_pixels_drawn(model, beams):
    options = {"num_beams": beams, "do_sample": beams == 1, "output_scores": True, "return_dict_in_generate": True}
    drawn = model.generate(torch.full((2, 1), 16), **options)
    chances = model(labels=drawn.sequences[:, 1:]).logits.log_softmax(-1)
    expected = chances.gather(2, drawn.sequences[:, 1:, None])[..., 0]
    beam_indices = drawn.beam_indices if beams > 1 else None
    found = model.compute_transition_scores(drawn.sequences, drawn.scores, beam_indices, normalize_logits=beams == 1)
    assert found.shape == (2, 64) and torch.allclose(found, expected, atol=1e-3)


def test_colours_are_not_resized(model, tokens):
    before = model(labels=tokens).loss
    with pytest.raises(ValueError, match="has K = 16 colours, and SOS .* cannot be resized to 20"):
        model.resize_token_embeddings(20)
    assert model.resize_token_embeddings(17) is model.get_input_embeddings()
    assert model.config.vocab_size == 17 and torch.equal(model(labels=tokens).loss, before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_weights_or_an_error(implementation, tokens):
    model = randomized(ImageGPTForCausalImageModeling._from_config(small_config(), attn_implementation=implementation))
    if implementation == "sdpa":
        for call in (model, lambda x, **kwargs: model.generate(x, return_dict_in_generate=True, **kwargs)):
            with pytest.raises(ValueError, match='sdpa attention does not compute its weights.*"eager"'):
                call(tokens[:, :4], output_attentions=True)
    else:
        found = model(tokens[:, :4], output_attentions=True).attentions
        assert [weights.shape for weights in found] == [(4, 2, 4, 4)] * 3
        assert all(torch.allclose(weights.sum(-1), torch.ones(4, 2, 4), atol=1e-5) for weights in found)


def test_weight_decay_spares_norms(model):
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert decayed and not [name for name in decayed if "ln_" in name or "bias" in name]


def test_an_assistant_that_exits_early_draws_the_same(model):
    expected = model.generate(do_sample=False)
    assert torch.equal(model.generate(do_sample=False, assistant_early_exit=1), expected)
    assert model.config.n_layer == 3 and torch.equal(model.generate(do_sample=False), expected)


def test_joint_classifiers_predict_logits_in_any_trainer(tmp_path):
    config = small_config(num_labels=3, sos_inputs=True, generative_loss_weight=1.0)
    rows = [{"input_ids": torch.arange(64) % 16, "labels": i % 3} for i in range(10)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(ImageGPTForImageClassification(config), arguments)
    assert trainer.predict(rows).predictions.shape == (10, 3)


# -- several images in a row --------------------------------------------------------------------------------------------

PACKED = torch.cat([torch.arange(64), torch.arange(20), torch.arange(44)])[None]  # positions of three images in a row


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_packed_images_do_not_see_each_other(kind, implementation, model, masked_model):
    network = model if kind == "causal" else masked_model
    network.set_attn_implementation(implementation)
    images = [torch.randint(16, (3, length)) for length in (64, 20, 44)]
    row = torch.cat(images, dim=1)
    expected = torch.cat([network(image).logits for image in images], dim=1)
    ones = torch.ones_like(row)
    for options in ({}, {"attention_mask": ones}, {"use_cache": False}):
        for positions in (PACKED, PACKED.expand(3, -1), PACKED.int()):
            found = network(row, position_ids=positions, **options)
            assert_close(found.logits, expected)
            assert getattr(found, "past_key_values", None) is None  # from which no image could continue
    assert_close(torch.compile(network, backend="eager", fullgraph=True)(row, position_ids=PACKED).logits, expected)


def test_packed_images_are_scored_one_by_one(model, tokens):
    images = [tokens, tokens[:, :20], tokens[:, 20:]]
    losses = torch.stack([model(labels=image).loss * image.shape[1] for image in images])
    row = torch.cat(images, dim=1)
    assert_close(model(labels=row, position_ids=PACKED).loss, losses.sum() / 128)


def test_positions_in_any_order_are_one_image(model, tokens):
    order = torch.randperm(64)[None]
    last = model(tokens, position_ids=order).logits[:, -1]
    assert not torch.allclose(last, model(tokens.roll(1, dims=1), position_ids=order).logits[:, -1], atol=1e-3)
    cache = model(tokens[:, :-1], position_ids=order[:, :-1]).past_key_values
    assert_close(model(tokens[:, -1:], position_ids=order[:, -1:], past_key_values=cache).logits[:, 0], last)


def test_what_packed_images_do_not_have(model, masked_model, tokens):
    row = tokens.view(2, 128)
    positions = torch.arange(64).repeat(2)[None]
    with pytest.raises(ValueError, match="have no cache"):
        model(row, position_ids=positions, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="The loss is of one image per row"):
        masked_model(labels=row, bool_masked_pos=row > 3, position_ids=positions)
    classifier = ImageGPTForImageClassification(small_config())
    with pytest.raises(ValueError, match="A class is of one image per row"):
        classifier(row, position_ids=positions)
    with pytest.raises(ValueError, match="hold -1; a position is a pixel of an image, 0..63"):
        model(tokens, position_ids=torch.arange(-1, 63)[None])
    model.config._attn_implementation = "flash_attention_2"  # not installed here: refused before it is asked for
    with pytest.raises(ValueError, match="only in a batch of one row"):
        model(row, position_ids=positions)


# -- what transformers' generation and Trainer add ----------------------------------------------------------------------


@pytest.fixture
def warnings_given(monkeypatch):
    given = []
    monkeypatch.setattr("hf_igpt.modeling_imagegpt.logger.warning_once", given.append)
    return given


def test_left_padding_before_sos_is_no_reason_to_warn(model, tokens, warnings_given):
    padded = torch.cat([torch.full((4, 3), 5), torch.full((4, 1), SOS), tokens[:, :5]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    labels = padded.masked_fill(padded == SOS, -100)
    model.generate(padded, attention_mask=mask, max_new_tokens=2)
    model(padded, attention_mask=mask, labels=labels)
    assert not warnings_given
    model.generate(padded, max_new_tokens=2)
    model(padded, labels=labels)
    model.generate(bos_token_id=3, max_new_tokens=2)
    assert len(warnings_given) == 3 and all("start with SOS" in warning for warning in warnings_given)


def test_prompt_lookup_ends_with_the_image(model):
    """Repeated pixels make it propose as many as it may, up to the end and beyond."""
    for prompt in (torch.tensor([[SOS] + [3, 4] * 20]), torch.tensor([[SOS] + [3] * 60])):
        with torch.no_grad():
            model.lm_head.weight.zero_()[3] = 1.0
        expected = model.generate(prompt, do_sample=False)
        assert torch.equal(model.generate(prompt, do_sample=False, prompt_lookup_num_tokens=7), expected)
        short = model.generate(prompt, do_sample=False, prompt_lookup_num_tokens=7, max_new_tokens=3)
        assert torch.equal(short, expected[:, : prompt.shape[1] + 3])


def test_watermarks_are_found(model):
    watermark = WatermarkingConfig(bias=20.0, greenlist_ratio=0.5, seeding_scheme="lefthash")
    sos = torch.full((4, 1), SOS)
    detect = WatermarkDetector(model.config, "cpu", watermark)
    assert detect(model.generate(sos, watermarking_config=watermark)).all()
    assert not detect(model.generate(sos)).any()


@pytest.mark.parametrize("option", ["repetition_penalty", "encoder_repetition_penalty"])
def test_penalties_of_repetition_leave_sos_alone(option, model, tokens):
    prompt = shifted(tokens)[:, :9]
    found = model.generate(prompt, max_new_tokens=1, do_sample=False, **{option: 1e9})[:, -1:]
    repeated = (prompt == found).any(dim=1)
    assert repeated.all() if option.startswith("encoder") else not repeated.any()


def test_masked_models_take_and_ignore_use_cache(masked_model, tokens):
    expected = masked_model(tokens).logits
    for use_cache in (True, False):
        assert_close(masked_model(tokens, use_cache=use_cache).logits, expected)


@pytest.mark.parametrize("kind", ["causal", "masked", "classes"])
def test_configurations_that_ask_for_tuples(kind, model, masked_model, tokens):
    classifier = randomized(ImageGPTForImageClassification(small_config()))
    network = {"causal": model, "masked": masked_model, "classes": classifier}[kind]
    expected = network(tokens).logits
    network.config.return_dict = False
    assert_close(network(tokens)[0], expected)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_label_smoothing_drops_no_generative_loss(weight, tmp_path):
    config = small_config(num_labels=3, sos_inputs=True, generative_loss_weight=weight)
    data = [{"input_ids": torch.arange(64) % 16, "labels": i % 3} for i in range(4)]
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1}
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **options)
    trainer = Trainer(ImageGPTForImageClassification(config), arguments, train_dataset=data)
    if weight:
        with pytest.raises(ValueError, match="label_smoothing_factor.* would drop the generative loss"):
            trainer.train()
    else:
        trainer.train()

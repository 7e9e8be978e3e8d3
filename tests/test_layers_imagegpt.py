"""Projection, norm and activation: their mathematics, and what training keeps."""

import pytest
import torch
from conftest import small_config
from torch.nn.utils import prune

from hf_igpt.layers_imagegpt import ImageGPTLayerNorm, ImageGPTProjection, QuickGELU
from hf_igpt.modeling_imagegpt import ImageGPTBlock


def test_quick_gelu():
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64, requires_grad=True)
    activation = QuickGELU()
    expected = x / (1 + torch.exp(-1.702 * x))
    assert torch.allclose(activation(x), expected, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(activation(x).sum(), x)
    (expected_slope,) = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(slope, expected_slope, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        given = x.clone()
        assert torch.allclose(activation(given), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(given, x)  # it writes over tensors of its own only


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quick_gelu_in_half_precision(dtype):
    """Within three roundings of the exact value."""
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64).to(dtype)
    exact = x.double() * torch.sigmoid(1.702 * x.double())
    error = (QuickGELU()(x).double() - exact).abs()
    assert (error <= 3 * torch.finfo(dtype).eps * exact.abs().clamp(min=1)).all()


def kept(module, x):
    """Bytes that autograd keeps for the backward pass of `module(x)`, beyond weights; `x` counts."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(x)
    assert output.requires_grad
    return sum(storages.values())


def test_what_training_keeps():
    """The docstring's 16 widths per token and block, and one for the activation's input."""
    x = torch.randn(2, 64, 128, requires_grad=True)
    assert kept(QuickGELU(), x) == x.nbytes
    config = small_config(n_embd=128)
    block = ImageGPTBlock(config, 0).train()
    block.attn.config._attn_implementation = "sdpa"
    widths = kept(block, x) / x.nbytes
    # CPUs' norms keep their input once more; attention and norms a few numbers per head and token.
    assert 16 <= widths <= 18.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_are_computed_in_float32(dtype):
    norm = ImageGPTLayerNorm(64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(dtype)
    x = (1000 * torch.randn(8, 64)).to(dtype)  # squares beyond float16's 65504
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    assert (norm(x).double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_biases_count_wherever_they_are_kept():
    """`DataParallel`'s replicas, pruned and reparametrised layers hold a bias that is no parameter."""
    layer = ImageGPTProjection(small_config(use_bias=True), 4, 3, 0.1)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3)
    expected = layer(x)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight * 1, layer.bias * 1
    assert torch.equal(replica(x), expected) and expected.abs().sum() > 0
    assert torch.equal(prune.identity(layer, "bias")(x), expected)

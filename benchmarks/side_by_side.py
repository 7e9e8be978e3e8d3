"""Our model and transformers', with the same weights, on the same tokens; nothing is timed that does not do the same."""

import torch
from transformers import PreTrainedModel
from transformers.models.imagegpt import configuration_imagegpt as their_configuration
from transformers.models.imagegpt import modeling_imagegpt as their_modeling

from arguments import BenchmarkArguments
from hf_igpt import ImageGPTConfig, ImageGPTForCausalImageModeling
from hf_igpt.presets import N_COLORS


def build_models(device: str, n_colors: int = N_COLORS, **shape) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return our ImageGPT and transformers' with the same random weights, without dropout."""
    torch.manual_seed(0)
    options = {"vocab_size": n_colors + 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | shape
    ours = ImageGPTForCausalImageModeling(ImageGPTConfig(**options))
    theirs = their_modeling.ImageGPTForCausalImageModeling(their_configuration.ImageGPTConfig(**options))
    theirs.load_state_dict(ours.state_dict(), strict=False)  # theirs has buffers for masks
    return ours.to(device), theirs.to(device)


def read_shape(args: BenchmarkArguments) -> dict[str, int]:
    """Return the model's dimensions that the command line asks for."""
    return {
        "n_layer": args.n_layer,
        "n_embd": args.n_embd,
        "n_head": args.n_head,
        "n_positions": args.image_size**2,
    }


def draw_tokens(config: ImageGPTConfig, count: int, device: str) -> torch.Tensor:
    """Return random images, (count, N), the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size - 1, (count, config.n_positions), generator=generator).to(device)


def shift_after_sos(tokens: torch.Tensor, config: ImageGPTConfig) -> torch.Tensor:
    """Return the inputs from which every pixel is predicted: SOS, then all pixels but the last."""
    return torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=config.sos_token_id)


def check_same(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Raise ValueError when ours differs from theirs by more than `tolerance` times the largest value, at least 1."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    difference = float((ours - theirs).abs().max())
    limit = tolerance * max(1.0, float(theirs.abs().max()))
    if not difference <= limit:
        raise ValueError(f"{what} differ by {difference:.3g}, more than {limit:.3g}: these timings would mean nothing.")

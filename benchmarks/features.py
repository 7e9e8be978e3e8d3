"""Features of all layers, beside transformers' hidden states with the same norms and averages."""

from collections.abc import Iterator

import torch

from arguments import BenchmarkArguments
from hf_igpt.evaluation.records import Record
from hf_igpt.features_imagegpt import features_of_tokens
from limits import build_causal_products
from side_by_side import build_models, check_same, draw_tokens, read_shape, shift_after_sos
from stages import LIMIT, OURS, THEIRS, Contender, Stage
from timing import measure_peak_memory, take_turns


def time_features(args: BenchmarkArguments) -> Iterator[list[Record]]:
    """Time the features of 16 images, and measure what they take in memory."""
    batch_size = 16
    shape = read_shape(args)
    ours, theirs = (model.eval() for model in build_models(args.device, **shape))
    tokens = draw_tokens(ours.config, batch_size, args.device)
    inputs = shift_after_sos(tokens, ours.config)

    @torch.no_grad()
    def compute_theirs() -> torch.Tensor:
        hidden = theirs.transformer(input_ids=inputs, output_hidden_states=True, use_cache=False).hidden_states
        blocks = theirs.transformer.h
        found = [block.ln_1(states).mean(dim=1) for block, states in zip(blocks, hidden[:-1], strict=True)]
        return torch.stack([*found, hidden[-1].mean(dim=1)])

    def compute_ours() -> torch.Tensor:
        return torch.stack(list(features_of_tokens(ours, tokens).values()))

    check_same("Features", compute_ours(), compute_theirs())
    contenders = {Contender(THEIRS): compute_theirs, Contender(OURS): compute_ours}
    memory = {contender: measure_peak_memory(run, args.device) for contender, run in contenders.items()}
    contenders[Contender(LIMIT)] = build_causal_products(ours, batch_size, head=False)
    stage = Stage("features of all layers", batch_size, "random tokens", shape, batch_size=batch_size)
    yield stage.record_times(take_turns(contenders, args.repeats)) + stage.record_memory(memory)

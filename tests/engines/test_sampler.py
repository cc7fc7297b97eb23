"""Draws from a large vocabulary, whose mass is added up in blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minidistill.engines.sampler import Sampler

TOKENS = 5003  # no multiple of a block


def reference(logits: torch.Tensor, temperature: float, draws: torch.Tensor) -> list[int]:
    """The first token whose cumulative probability, in float64, exceeds the draw."""
    p = (logits.float() / temperature).log_softmax(-1).exp().double().numpy()
    ends = p.cumsum(axis=1)
    points = draws.numpy() * ends[:, -1]
    return [int(np.searchsorted(e, x, side="right")) for e, x in zip(ends, points, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_blocks_give_the_same_draws(temperature: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(temperature)
    for rows in (40, 40, 7):  # fewer rows use the same buffers
        logits = spread * torch.randn(rows, TOKENS, generator=generator)
        draws = torch.rand(rows, dtype=torch.float64, generator=generator)
        chosen, logp = sampler(logits, draws)
        assert chosen.tolist() == reference(logits, temperature, draws)
        expected = (logits / temperature).log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        assert torch.equal(logp, expected)


def test_tokens_of_no_mass_are_never_drawn() -> None:
    """Neither at the edges of what has mass, nor at the ends of the draws."""
    logits = torch.full((6, TOKENS), -torch.inf)
    logits[:, 700], logits[:, 1024] = 0.0, 0.0
    draws = torch.tensor([0.0, 0.5 - 1e-16, 0.5, 0.5 + 1e-16, 1 - 1e-16, 0.25], dtype=torch.float64)
    chosen, _ = Sampler(1.0)(logits, draws)
    assert chosen.tolist() == [700, 700, 1024, 1024, 1024, 700]


def test_logits_that_are_not_finite_give_no_logprob() -> None:
    logits = torch.zeros(2, TOKENS)
    logits[1, 3] = torch.nan
    chosen, logp = Sampler(1.0)(logits, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert logp.isfinite().tolist() == [True, False]
    assert 0 <= int(chosen[1]) < TOKENS


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.zeros(2, TOKENS)
    logits[0, 4000], logits[1, 2] = 1.0, 1.0
    chosen, _ = Sampler(0)(logits, torch.zeros(2, dtype=torch.float64))
    assert chosen.tolist() == [4000, 2]

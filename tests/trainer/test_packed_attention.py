"""Packed passes without a mask: the hidden states and gradients of each sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.packed_attention import (
    PACKED,
    PADDED,
    KernelCalls,
    plain_attention,
    random_rows,
    tiny_config,
    tiny_model,
    tiny_policy,
)

from minidistill.placement.attention import KNOWN_TYPES, Attention
from minidistill.trainer import attention
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import hidden_states, prefix_states

PREFIX = random_rows((9,), 1)[0]
PROMPTS = random_rows((5, 1, 7), 2, PREFIX)
COMPLETIONS = random_rows((4, 8, 1), 3)
LENGTHS = [len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def alone(model: Any) -> torch.Tensor:
    """The hidden states that predict the completions, one sequence at a time, by plain passes."""
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        hidden = model.base_model(input_ids=torch.tensor([[*prompt, *completion]]))[0][0]
        rows.append(hidden[len(prompt) - 1 : -1])
    return torch.cat(rows)


def gradients(model: Any, hidden_NH: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weight = torch.linspace(-1, 1, hidden_NH.numel(), dtype=hidden_NH.dtype)
    (hidden_NH * weight.view_as(hidden_NH)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def attention_inputs(model: Any) -> list[dict[str, Any]]:
    """What each layer's attention is called with, filled in as the model runs."""
    calls: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
            )
    return calls


@pytest.mark.parametrize("kind", sorted(KNOWN_TYPES))
def test_packed_passes_are_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_model(tiny_config(kind), "sdpa")
    model = tiny_model(tiny_config(kind), "varlen")
    policy = tiny_policy(model, PACKED)
    inputs = attention_inputs(model)
    sdpa, kept = attention.scaled_dot_product_attention, []

    def spy(query: Any, key: Any, value: Any, **options: Any) -> Any:
        kept.append((key.shape[1], options["attn_mask"], options["is_causal"]))
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0, packed=True)
    assert tokens.ids_BL.shape == (1, sum(LENGTHS))
    hidden_NH, expected_NH = hidden_states(policy, tokens), alone(reference)
    torch.testing.assert_close(hidden_NH, expected_NH, rtol=1e-9, atol=1e-9)
    # no mask was made, and keys have their own number of heads
    assert [call["attention_mask"] for call in inputs] == [None, None]
    assert kept == [(2, None, True)] * (2 * len(LENGTHS))
    got, want = gradients(model, hidden_NH), gradients(reference, expected_NH)
    assert got.keys() == want.keys()
    assert max(float(g.abs().max()) for g in want.values()) > 0.1
    for name, gradient in want.items():  # gemma's norms round to fp32
        torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", sorted(KNOWN_TYPES))
@torch.no_grad()
def test_packed_passes_after_a_prefix_are_exact(kind: str) -> None:
    model = tiny_model(tiny_config(kind), "varlen")
    policy = tiny_policy(model, PACKED)
    states = prefix_states(policy, PREFIX)
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0, packed=True, prefix=PREFIX)
    assert tokens.ids_BL.shape == (1, sum(LENGTHS) - 3 * len(PREFIX))
    expected_NH = alone(tiny_model(tiny_config(kind), "sdpa"))
    for _ in range(2):  # a pass leaves the prefix as it is
        hidden_NH = hidden_states(policy, tokens, states)
        torch.testing.assert_close(hidden_NH, expected_NH, rtol=1e-9, atol=1e-9)
    assert [keys.shape[2] for keys, _ in states] == [len(PREFIX)] * 2


@torch.no_grad()
def test_one_new_token_after_a_prefix() -> None:
    policy = tiny_policy(tiny_model(tiny_config("qwen3"), "varlen"), PACKED)
    prompts, completions = random_rows((1, 1), 4, PREFIX), random_rows((1, 2), 5)
    states = prefix_states(policy, PREFIX)
    after = collate(prompts, completions, pad_id=0, packed=True, prefix=PREFIX)
    whole = collate(prompts, completions, pad_id=0, packed=True)
    torch.testing.assert_close(
        hidden_states(policy, after, states), hidden_states(policy, whole), rtol=1e-9, atol=1e-9
    )


def test_a_padded_pass_is_that_of_sdpa_bit_for_bit() -> None:
    """The embedded engine decodes with the same model, with a mask and a cache."""
    model_config = tiny_config("llama")
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0)
    with torch.no_grad():
        results = []
        for implementation in ("varlen", "sdpa"):
            model = tiny_model(model_config, implementation, torch.float32)
            policy = tiny_policy(model, PADDED)
            after = collate(PROMPTS, COMPLETIONS, pad_id=0, prefix=PREFIX)
            states = prefix_states(policy, PREFIX)
            results.append((hidden_states(policy, tokens), hidden_states(policy, after, states)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_packed_pass_with_a_mask_is_still_possible() -> None:
    """`trainer.packing` with sdpa: transformers separates the sequences by their positions."""
    model_config = tiny_config("llama")
    policy = tiny_policy(tiny_model(model_config, "sdpa"), Attention("sdpa", packed=True))
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0, packed=True)
    expected_NH = alone(tiny_model(model_config, "sdpa"))
    torch.testing.assert_close(hidden_states(policy, tokens), expected_NH, rtol=1e-9, atol=1e-9)
    after = collate(PROMPTS, COMPLETIONS, pad_id=0, packed=True, prefix=PREFIX)
    states = prefix_states(policy, PREFIX)
    with pytest.raises(AssertionError, match="prefixes"):
        hidden_states(policy, after, states)


@pytest.mark.parametrize(
    ("kind", "more", "what"),
    [
        ("gemma2", {"sliding_window": 4}, "softcap, a window of 4 tokens"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
        ("mistral", {"sliding_window": 4}, "a window of 4 tokens"),
    ],
)
def test_attention_that_is_more_than_causal_is_refused(
    kind: str, more: dict[str, Any], what: str
) -> None:
    policy = tiny_policy(tiny_model(tiny_config(kind, **more), "varlen", torch.float32), PACKED)
    with pytest.raises(ValueError, match=f"does not support {what}"):
        hidden_states(policy, collate(PROMPTS, COMPLETIONS, pad_id=0, packed=True))


def test_other_calls_that_would_be_wrong_are_refused() -> None:
    module = torch.nn.Module()
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    lengths = attention.sequence_arguments([3], 2, torch.device("cpu"))
    attention.attend(module, query, key, key, None, **lengths)
    with pytest.raises(ValueError, match="needs a mask or sequence lengths"):
        attention.attend(module, query, key, key, None)
    for more, what in (
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "later tokens"),
        ({"position_bias": query}, "position_bias"),
    ):
        with pytest.raises(ValueError, match=what):
            attention.attend(module, query, key, key, None, **lengths, **more)
    with pytest.raises(ValueError, match="a mask"):
        attention.attend(module, query, key, key, torch.ones(1, 1, 3, 5), **lengths)


@pytest.mark.parametrize("lengths", [[1], [3, 1, 4]])
@pytest.mark.parametrize("prefix", [0, 1, 6])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_one_sequence_at_a_time_is_the_formula(
    lengths: list[int], prefix: int, heads: tuple[int, int], scale: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = sum(lengths), sum(lengths) + prefix * len(lengths)
    shapes = ((heads[0], rows[0]), (heads[1], rows[1]), (heads[1], rows[1]))
    query, key, value = (
        torch.randn(1, *shape, 8, dtype=torch.float64, generator=generator) for shape in shapes
    )
    arguments = attention.sequence_arguments(lengths, prefix, torch.device("cpu"))
    output, _ = attention.attend(
        torch.nn.Module(), query, key, value, None, scaling=scale, **arguments
    )
    ends = [arguments[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    parts = [x[0].transpose(0, 1) for x in (query, key, value)]
    expected = plain_attention(*parts, *ends, scale)
    torch.testing.assert_close(output[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("without", ["", "enable_gqa"])
@pytest.mark.parametrize("prefix", [(), PREFIX])
@torch.no_grad()
def test_the_kernel_is_called_as_it_is_declared(
    monkeypatch: pytest.MonkeyPatch, without: str, prefix: list[int]
) -> None:
    """Rehearses a GPU's path, on this torch and on 2.11, whose function has no `enable_gqa`."""
    model = tiny_model(tiny_config("qwen3"), "varlen")
    policy = tiny_policy(model, PACKED)
    states = prefix_states(policy, prefix) if prefix else None
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0, packed=True, prefix=prefix)
    expected_NH = hidden_states(policy, tokens, states)
    kernel = KernelCalls(monkeypatch, without)
    hidden_NH = hidden_states(policy, tokens, states)
    torch.testing.assert_close(hidden_NH, expected_NH, rtol=1e-9, atol=1e-9)
    assert len(kernel.calls) == 2
    for call in kernel.calls:
        assert call["key"].shape[1:] == (2, 8), "the keys are widened"
        assert ("enable_gqa" in call["named"]) == ("enable_gqa" in kernel.names)


def test_flash_attention_2_reads_the_same_lengths() -> None:
    """Under these names transformers passes them to its kernel and makes no mask."""
    from transformers.masking_utils import flash_attention_mask
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    arguments = attention.sequence_arguments([3, 1], 2, torch.device("cpu"))
    assert arguments.keys() == FlashAttentionKwargs.__annotations__.keys()
    assert arguments["cu_seq_lens_q"].tolist() == [0, 3, 4]
    assert arguments["cu_seq_lens_k"].tolist() == [0, 5, 8]
    assert (arguments["max_length_q"], arguments["max_length_k"]) == (3, 5)
    assert flash_attention_mask(1, 4, 6) is None


def test_the_kernel_runs_only_where_it_can() -> None:
    query = torch.zeros(1, 4, 3, 64, dtype=torch.bfloat16)
    assert not attention.kernel_runs(query, query)

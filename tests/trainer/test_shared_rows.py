"""Rows that have each prompt once: the hidden states and gradients of each sequence alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.packed_attention import (
    PACKED,
    PADDED,
    KernelCalls,
    random_rows,
    tiny_config,
    tiny_model,
    tiny_policy,
)

from minidistill.placement.attention import KNOWN_TYPES, Attention, Layout
from minidistill.trainer import attention
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import hidden_states, prefix_states
from minidistill.trainer.shared_row import Segment

PREFIX = random_rows((9,), 1)[0]
FIRST, SECOND, THIRD = random_rows((5, 1, 7), 2, PREFIX)
PROMPTS = [FIRST, SECOND, FIRST, THIRD, SECOND, FIRST, THIRD]
COMPLETIONS = random_rows((4, 8, 1, 2, 9, 6, 5), 3)
# the prefix, what each prompt has of its own, and all of each completion but its last token
ROW = [9, 5, 3, 0, 5, 1, 7, 8, 7, 1, 4]


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
def test_rows_are_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_model(tiny_config(kind), "sdpa")
    model = tiny_model(tiny_config(kind), "varlen")
    policy = tiny_policy(model, PACKED)
    inputs = attention_inputs(model)
    sdpa, heads = attention.scaled_dot_product_attention, set()

    def spy(query: Any, key: Any, value: Any, **options: Any) -> Any:
        heads.add(key.shape[1])
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0, layout=Layout.SHARED)
    assert tokens.ids_BL.shape == (1, sum(ROW))
    hidden_NH, expected_NH = hidden_states(policy, tokens), alone(reference)
    torch.testing.assert_close(hidden_NH, expected_NH, rtol=1e-9, atol=1e-9)
    # no mask of the row was made, and keys have their own number of heads
    assert [call["attention_mask"] for call in inputs] == [None, None]
    assert heads == {2}
    got, want = gradients(model, hidden_NH), gradients(reference, expected_NH)
    assert got.keys() == want.keys()
    assert max(float(g.abs().max()) for g in want.values()) > 0.1
    for name, gradient in want.items():  # gemma's norms round to fp32
        assert (got[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("kind", sorted(KNOWN_TYPES))
@torch.no_grad()
def test_rows_after_a_prefix_are_exact(kind: str) -> None:
    model = tiny_model(tiny_config(kind), "varlen")
    policy = tiny_policy(model, PACKED)
    states = prefix_states(policy, PREFIX)
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0, layout=Layout.SHARED, prefix=PREFIX)
    assert tokens.ids_BL.shape == (1, sum(ROW) - len(PREFIX))
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
    after = collate(prompts, completions, pad_id=0, layout=Layout.SHARED, prefix=PREFIX)
    whole = collate(prompts, completions, pad_id=0, layout=Layout.SHARED)
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
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0, layout=Layout.PACKED)
    expected_NH = alone(tiny_model(model_config, "sdpa"))
    torch.testing.assert_close(hidden_states(policy, tokens), expected_NH, rtol=1e-9, atol=1e-9)
    after = collate(PROMPTS, COMPLETIONS, pad_id=0, layout=Layout.PACKED, prefix=PREFIX)
    states = prefix_states(policy, PREFIX)
    with pytest.raises(AssertionError, match="prefix"):
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
        hidden_states(policy, collate(PROMPTS, COMPLETIONS, pad_id=0, layout=Layout.SHARED))


def test_other_calls_that_would_be_wrong_are_refused() -> None:
    module = torch.nn.Module()
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    lengths = {"row_blocks": attention.blocks([Segment(0, 3)], 2, torch.device("cpu"))}
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


# a root, a prompt with four completions of which the third is long, a prompt with one
TREE = [
    Segment(0, 6), Segment(6, 9, ((0, 6),)),
    Segment(9, 11, ((0, 6), (6, 9))), Segment(11, 14, ((0, 6), (6, 9))),
    Segment(14, 30, ((0, 6), (6, 9))), Segment(30, 31, ((0, 6), (6, 9))),
    Segment(31, 32, ((0, 6),)), Segment(32, 36, ((0, 6), (31, 32))),
]  # fmt: skip


def attends_to(segments: list[Segment], prefix: int) -> torch.Tensor:
    """bool (T, prefix + T): what each token of a row attends to, from the definition."""
    size = segments[-1].stop
    allowed = torch.zeros(size, prefix + size, dtype=torch.bool)
    allowed[:, :prefix] = True
    for segment in segments:
        for token in range(segment.start, segment.stop):
            for start, stop in (*segment.before, (segment.start, token + 1)):
                allowed[token, prefix + start : prefix + stop] = True
    return allowed


@pytest.mark.parametrize("segments", [TREE, [Segment(0, 1)], [Segment(0, 5), Segment(5, 9)]])
@pytest.mark.parametrize("prefix", [0, 1, 7])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_the_formula(
    segments: list[Segment],
    prefix: int,
    heads: tuple[int, int],
    scale: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In blocks, and by a kernel on gathered keys."""
    generator = torch.Generator().manual_seed(0)
    size, cpu = segments[-1].stop, torch.device("cpu")
    query, key, value = (
        torch.randn(1, count, length, 8, dtype=torch.float64, generator=generator)
        for count, length in (
            (heads[0], size),
            (heads[1], prefix + size),
            (heads[1], prefix + size),
        )
    )
    wide_key, wide_value = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (key, value))
    scores = query @ wide_key.mT * (8**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~attends_to(segments, prefix), -math.inf)
    expected = (scores.softmax(-1) @ wide_value).transpose(1, 2)
    row = attention.blocks(segments, prefix, cpu)
    module = torch.nn.Module()
    got, _ = attention.attend(module, query, key, value, None, scaling=scale, row_blocks=row)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    if prefix:
        monkeypatch.setattr(attention, "MIN_PREFIX", prefix)
        monkeypatch.setattr(attention, "scaled_dot_product_attention", None)  # not called
        got, _ = attention.attend(module, query, key, value, None, scaling=scale, row_blocks=row)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    KernelCalls(monkeypatch)
    before = (key[:, :, :prefix], value[:, :, :prefix]) if prefix else None
    gathered = attention.GatheredKeys(before, attention.key_index(segments, prefix, cpu))
    keys = gathered.update(key[:, :, prefix:], value[:, :, prefix:])
    arguments = attention.gathered_arguments(segments, prefix, cpu)
    got, _ = attention.attend(module, query, *keys, None, scaling=scale, **arguments)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_completions_of_a_prompt_are_one_block_while_they_are_short() -> None:
    row = attention.blocks(TREE, 0, torch.device("cpu")).blocks
    assert [block.queries for block in row] == [
        (0, 6), (6, 9), (9, 14), (14, 30), (30, 31), (31, 32), (32, 36),
    ]  # fmt: skip
    assert [block.keys for block in row][:3] == [((0, 6),), ((0, 9),), ((0, 14),)]
    assert row[3].keys == ((0, 9), (14, 30))
    assert len(attention.blocks(TREE, 100, torch.device("cpu")).blocks) == 5


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
    tokens = collate(PROMPTS, COMPLETIONS, pad_id=0, layout=Layout.SHARED, prefix=prefix)
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

    segments = [Segment(0, 3), Segment(3, 4, ((0, 3),))]
    arguments = attention.gathered_arguments(segments, 2, torch.device("cpu"))
    assert arguments.keys() == FlashAttentionKwargs.__annotations__.keys()
    assert arguments["cu_seq_lens_q"].tolist() == [0, 3, 4]
    assert arguments["cu_seq_lens_k"].tolist() == [0, 5, 11]
    assert (arguments["max_length_q"], arguments["max_length_k"]) == (3, 6)
    assert flash_attention_mask(1, 4, 6) is None


def test_the_kernel_runs_only_where_it_can() -> None:
    assert not attention.kernel_runs(torch.device("cpu"), torch.bfloat16, 64)

"""The variable-length kernel against SDPA and against its formula. Rehearsed without a GPU."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from support.packed_attention import (
    PACKED,
    KernelCalls,
    plain_attention,
    random_rows,
    tiny_config,
    tiny_model,
    tiny_policy,
)

from minidistill.placement.attention import Layout
from minidistill.trainer import attention, forward
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import hidden_states, prefix_states
from minidistill.trainer.shared_row import Segment

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [300, 1, 129, 64] if DEVICE.type == "cuda" else [9, 1, 5, 4]


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a stand-in takes the calls of the kernel."""
    if DEVICE.type == "cpu":
        KernelCalls(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(8, 8, 64), (16, 8, 128), (8, 2, 96), (8, 1, 256)])
@pytest.mark.parametrize("prefix", [0, 77])
def test_the_kernel_is_no_less_accurate_than_sdpa(
    dtype: torch.dtype, heads: tuple[int, int, int], prefix: int
) -> None:
    """Outputs and gradients, against the formula in float64."""
    torch.manual_seed(0)
    count, groups, size = heads
    ends = list(accumulate(LENGTHS, initial=0))
    segments = [Segment(start, stop) for start, stop in pairwise(ends)]
    rows, keys = sum(LENGTHS), sum(LENGTHS) + prefix
    query = torch.randn(1, count, rows, size, device=DEVICE, dtype=dtype, requires_grad=True)
    key, value = (
        torch.randn(1, groups, keys, size, device=DEVICE, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    arguments = attention.gathered_arguments(segments, prefix, DEVICE)
    index_T = attention.key_index(segments, prefix, DEVICE)
    row = attention.blocks(segments, prefix, DEVICE)
    limits = [arguments[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    weight = torch.randn(rows, count, size, device=DEVICE, dtype=dtype)
    inputs = (query, key, value)
    runs = forward.kernel_runs(DEVICE, dtype, size)
    assert runs or size > 192, "the kernel is not used"
    gathered = [x.index_select(2, index_T) for x in (key, value)]
    module = torch.nn.Module()
    sdpa = attention.attend(module, *inputs, None, row_blocks=row)[0][0]
    ours = attention.attend(module, query, *gathered, None, **arguments)[0][0] if runs else sdpa
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wide = [exact[0], *(x.index_select(2, index_T) for x in exact[1:])]
    truth = plain_attention(*(x[0].transpose(0, 1) for x in wide), *limits)
    wanted = [truth, *torch.autograd.grad((truth * weight.double()).sum(), exact)]
    errors = []
    for output in (ours, sdpa):
        results = [output, *torch.autograd.grad((output * weight).sum(), inputs)]
        errors.append(
            [
                float((got.double() - want).abs().max() / want.abs().max())
                for got, want in zip(results, wanted, strict=True)
            ]
        )
    for ours_error, sdpa_error in zip(*errors, strict=True):
        assert ours_error < 2 * sdpa_error + 4e-3


@torch.no_grad()
def test_a_model_packed_with_and_without_a_prefix() -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64}
    model = tiny_model(tiny_config("qwen3", **sizes), "varlen", torch.bfloat16).to(DEVICE)
    policy = tiny_policy(model, PACKED)
    prefix = random_rows((40,), 1)[0]
    prompts, completions = random_rows((30, 1, 7), 2, prefix), random_rows((24, 8, 1, 9, 3), 3)
    prompts = [*prompts, prompts[0], prompts[1]]
    packed = collate(prompts, completions, pad_id=0, layout=Layout.SHARED)
    after = collate(prompts, completions, pad_id=0, layout=Layout.SHARED, prefix=prefix)
    padded_NH = hidden_states(policy, collate(prompts, completions, pad_id=0))
    for got_NH in (
        hidden_states(policy, packed),
        hidden_states(policy, after, prefix_states(policy, prefix)),
    ):
        error = (got_NH.float() - padded_NH.float()).abs().max() / padded_NH.float().abs().max()
        assert float(error) < 0.03

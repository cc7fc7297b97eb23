"""selective_logprob and reverse_kl against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ops_cases import BF16_GRADIENT, INTERPRETED, furthest, relative_error, searched

from minidistill_kernels import reference, reverse_kl, selective_logprob, triton_rows
from minidistill_kernels.rows import kl_op, logprob_op

LOWEST = float("-inf")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def logits(draw, rows=4):
    """Two tensors of rows, with widths around block sizes, and the generator of their values."""
    width = draw(st.one_of(st.integers(2, 70), st.sampled_from([1023, 1024, 1025, 4095, 4097])))
    scale = draw(st.sampled_from([0.01, 1.0, 8.0]))
    offset = draw(st.sampled_from([0.0, 30.0, -1000.0]))
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    make = lambda: (torch.randn(rows, width, generator=generator) * scale + offset).to(dtype)  # noqa: E731
    return make(), make(), generator


@searched
@given(case=logits(), temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_logprob_entropy_and_gradient(case, temperature):
    x, _, generator = case
    ids = torch.randint(0, x.shape[1], (len(x),), generator=generator)
    ids[0], ids[1], ids[2] = 0, x.shape[1] - 1, -100
    ours, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    logp, entropy = selective_logprob(ours, ids, temperature=temperature, return_entropy=True)
    want_logp, want_entropy = reference.selective_logprob(truth, ids, temperature)
    assert logp.dtype == entropy.dtype == torch.float32
    assert furthest(logp, want_logp) <= 1e-5 * max(1.0, float(want_logp.abs().max()) / 16)
    assert furthest(entropy, want_entropy) <= 2e-5
    (logp.sum() + 0.3 * entropy.sum()).backward()
    (want_logp.sum() + 0.3 * want_entropy.sum()).backward()
    assert ours.grad.dtype == x.dtype
    limit = {torch.float32: 1e-5, torch.bfloat16: BF16_GRADIENT, torch.float16: 2e-3}[x.dtype]
    assert relative_error(ours.grad, truth.grad) <= limit
    assert not ours.grad[2].any()


@searched
@given(case=logits(), temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_reverse_kl_and_gradient(case, temperature):
    x, t, _ = case
    ours, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    kl = reverse_kl(ours, t, temperature=temperature)
    want = reference.reverse_kl(truth, t, temperature)
    assert furthest(kl, want) <= 5e-6 * max(1.0, float(want.abs().max()))
    assert (kl >= 0).all()
    kl.sum().backward()
    want.sum().backward()
    # Tiny gradients of nearly equal rows are measured against a floor.
    limit = {torch.float32: 1e-5, torch.bfloat16: BF16_GRADIENT, torch.float16: 2e-3}[x.dtype]
    error = (ours.grad.double() - truth.grad).norm()
    assert error <= limit * truth.grad.norm() + 1e-6


@pytest.mark.parametrize("size", [1e-2, 3e-2])
def test_small_kl_keeps_its_digits(size):
    """KL of 1e-4 and 1e-3 is exact to 1%, whatever the logits' offset."""
    torch.manual_seed(0)
    s = torch.randn(6, 3000) * 3
    t = s + torch.randn(6, 3000) * size * 1.4 + 20 * torch.arange(6)[:, None]
    want = reference.reverse_kl(s, t)
    assert 5e-5 < want.min() < want.max() < 3e-3
    assert ((reverse_kl(s, t) - want).abs() / want).max() < 0.01


def test_a_vocabulary_that_is_no_multiple_of_the_block():
    torch.manual_seed(1)
    x, t = torch.randn(2, 151936) * 3, torch.randn(2, 151936) * 3
    ids = torch.tensor([151935, 0])
    logp, entropy = selective_logprob(x, ids, return_entropy=True)
    want_logp, want_entropy = reference.selective_logprob(x, ids)
    assert furthest(logp, want_logp) <= 1e-5
    assert furthest(entropy, want_entropy) <= 2e-5
    assert furthest(reverse_kl(x, t), reference.reverse_kl(x, t)) <= 5e-6 * 9


def test_strongly_negative_rows():
    torch.manual_seed(2)
    x = torch.randn(3, 500) - 1.0e4
    ids = torch.tensor([0, 499, 7])
    logp, _ = selective_logprob(x, ids)
    assert furthest(logp, reference.selective_logprob(x, ids)[0]) <= 1e-5


@pytest.mark.parametrize("width", [64, 5000])
def test_minus_infinity_is_probability_zero(width):
    """Masked ids of both models, of the student alone and of the teacher alone."""
    torch.manual_seed(3)
    s, t = torch.randn(3, width), torch.randn(3, width)
    s[:, :20] = LOWEST
    t[0, 10:20] = LOWEST
    t[1, :20] = LOWEST
    t[2, 30] = LOWEST
    ours, truth = s.clone().requires_grad_(), s.double().requires_grad_()
    kl = reverse_kl(ours, t)
    want = reference.reverse_kl(truth, t)
    assert furthest(kl[:2], want[:2]) <= 5e-6
    assert kl[2] == want[2] == float("inf")
    kl[:2].sum().backward()
    want[:2].sum().backward()
    assert relative_error(ours.grad[:2], truth.grad[:2]) <= 1e-5

    x = s.clone().requires_grad_()
    logp, entropy = selective_logprob(x, torch.tensor([25, width - 1, 30]), return_entropy=True)
    assert furthest(entropy, reference.selective_logprob(s, torch.zeros(3).long())[1]) <= 2e-5
    (logp + entropy).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[:, :20].any()


def test_probabilities_of_both_models_underflow():
    """Columns where student and teacher are both exp(-1000)."""
    s, t = torch.full((2, 100), -1000.0), torch.full((2, 100), -1500.0)
    s[:, 3], t[:, 3] = 0.0, 0.0
    s[1, 4], t[1, 5] = 0.0, 0.0
    x = s.clone().requires_grad_()
    kl = reverse_kl(x, t)
    kl.sum().backward()
    assert furthest(kl, reference.reverse_kl(s, t)) <= 1e-3
    assert torch.isfinite(x.grad).all()


def test_unused_rows_may_hold_anything():
    torch.manual_seed(4)
    s, t = torch.randn(4, 77), torch.randn(4, 77)
    s[1], t[2] = float("nan"), float("inf")
    valid = torch.tensor([True, False, False, True])
    x = s.clone().requires_grad_()
    kl = reverse_kl(x, t, valid=valid)
    kl.sum().backward()
    assert not kl[1:3].any()
    assert not x.grad[1:3].any()
    assert torch.isfinite(x.grad).all()
    assert kl[0] > 0
    x = s.clone().requires_grad_()
    logp, entropy = selective_logprob(x, torch.tensor([0, -100, 5, 76]), return_entropy=True)
    (logp + entropy).sum().backward()
    assert not torch.cat([logp[1:2], entropy[1:2], x.grad[1]]).any()
    assert torch.isfinite(x.grad).all()


def test_no_valid_rows():
    x = torch.full((3, 9), float("nan")).requires_grad_()
    logp, entropy = selective_logprob(x, torch.full((3,), -100), return_entropy=True)
    (logp + entropy).sum().backward()
    assert not torch.cat([logp, entropy, x.grad.flatten()]).any()
    assert not reverse_kl(x, x.detach(), valid=torch.zeros(3, dtype=torch.bool)).any()


def test_strided_rows_and_untouched_inputs():
    torch.manual_seed(5)
    wide = torch.randn(10, 300)
    x, t = wide[::2, 7:207], wide[1::2, 3:203]
    before = wide.clone()
    ids = torch.arange(5) * 40
    a = x.detach().requires_grad_()
    logp, _ = selective_logprob(a, ids)
    (logp.sum() + reverse_kl(a, t).sum()).backward()
    assert torch.equal(wide, before)
    assert furthest(logp, reference.selective_logprob(x, ids)[0]) <= 1e-5
    assert furthest(reverse_kl(x, t), reference.reverse_kl(x, t)) <= 5e-6


def test_offsets_past_two_billion_elements():
    """A row 2^31 elements after the first one: a 32-bit offset would overflow."""
    far = torch.empty(2**31 + 512, dtype=torch.bfloat16)  # only the touched pages become memory
    x = far.as_strided((2, 500), (2**31, 1))
    torch.manual_seed(6)
    x[0], x[1] = torch.randn(500).bfloat16(), torch.randn(500).bfloat16() * 3
    ids = torch.tensor([3, 499])
    logp, entropy = selective_logprob(x, ids, return_entropy=True)
    want_logp, want_entropy = reference.selective_logprob(x.clone(), ids)
    assert furthest(logp, want_logp) <= 1e-5
    assert furthest(entropy, want_entropy) <= 2e-5


def test_blocks_have_at_most_16384_columns():
    tables = (*triton_rows.BLOCKS, *triton_rows.TEACHER_BLOCKS)
    assert all(columns <= 16384 for columns, _ in tables)


@pytest.mark.skipif(INTERPRETED, reason="70,000 interpreted programs take a minute")
def test_more_rows_than_a_second_grid_axis_allows():
    x = torch.randn(70_000, 5)
    ids = torch.arange(70_000) % 5
    assert furthest(selective_logprob(x, ids)[0], reference.selective_logprob(x, ids)[0]) <= 1e-5


def test_opcheck():
    x, t = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    torch.library.opcheck(logprob_op, (x, torch.tensor([1, -100, 39]), 0.7))
    torch.library.opcheck(kl_op, (x, t, None, 1.3))
    torch.library.opcheck(kl_op, (x, t, torch.tensor([True, False, True]), 1.0))

"""Kernels that the public functions use only on CUDA, called directly and interpreted: in-place
half-precision gradients, and splits of the scoring kernel."""

import pytest
import torch
from support.ops_cases import furthest, make_case, relative_error

from minidistill_kernels import reference, triton_rows, triton_score


def run_rows(s, x, pair, out, temperature=0.8, mix=(1.0, -0.5)):
    """The gradient of the objective by `stats` and `dlogits`, written to `out`."""
    ids = torch.tensor([0, s.shape[1] - 1, 5])
    row = triton_rows.stats(s, x, ids, pair=pair, inv_temperature=1 / temperature)
    scale, target = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.3, -0.7, 0.0])
    triton_rows.dlogits(
        s,
        x,
        out,
        ids,
        row,
        base_C=-target,
        scale_C=scale,
        target_C=target,
        pair=pair,
        inv_temperature=1 / temperature,
        mix=mix,
    )
    return row, ids, scale, target


def truth(s, t, ids, scale, target, temperature=0.8, mix=(1.0, -0.5)):
    z = (s.double() / temperature).requires_grad_()
    student_tau, teacher_tau = mix[0] + mix[1], mix[0]
    logp = torch.log_softmax(z, 1)
    logq = torch.log_softmax(t.double() / temperature, 1)
    divergence = (logp.exp() * (student_tau * logp - teacher_tau * logq)).sum(1)
    at_y = logp.gather(1, ids[:, None])[:, 0]
    (scale * divergence + target * at_y).sum().backward()
    kl = reference.reverse_kl(s, t, temperature)
    return kl, z.grad


@pytest.mark.parametrize("width", [600, 3000])
@pytest.mark.parametrize("where", ["new", "student", "teacher"])
@pytest.mark.parametrize("pair", [False, True])
def test_the_gradient_may_overwrite_either_input(width, where, pair):
    torch.manual_seed(0)
    s, t = torch.randn(3, width) * 2, torch.randn(3, width) * 2
    first, second = s.clone(), t.clone() if pair else s - t
    out = {"new": torch.empty(3, width), "student": first, "teacher": second}[where]
    row, *coefficients = run_rows(first, second, pair, out)
    kl, gradient = truth(s, t, *coefficients)
    assert furthest(row.kl, kl) <= 5e-6
    assert relative_error(out, gradient) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_delta_is_overwritten(dtype):
    torch.manual_seed(1)
    s = torch.randn(3, 2500) * 2
    delta = (torch.randn(3, 2500) * 0.1).to(dtype)
    t = s.double() - delta.double()
    row, *coefficients = run_rows(s, delta, False, delta)
    kl, gradient = truth(s, t, *coefficients)
    assert furthest(row.kl, kl) <= 5e-6
    assert relative_error(delta, gradient) <= (1e-3 if dtype == torch.float16 else 6e-3)


@pytest.mark.parametrize(("n", "v", "h"), [(5, 70, 9), (65, 300, 40), (3, 2000, 33)])
def test_scoring_combines_its_splits(n, v, h):
    case = make_case(n, v, h)
    _, splits, a_split = triton_score.plan(n, v, torch.float32)
    columns = triton_score.TILES[torch.float32][1]
    assert (splits - 1) * a_split * columns < v <= splits * a_split * columns
    assert splits > 1
    logits = case["h_s"].double() @ case["weight"].double().t()
    want, want_entropy = reference.selective_logprob(logits, case["ids"], 0.7)
    logp, entropy = triton_score.score(case["h_s"], case["weight"], case["ids"], 0.7)
    assert furthest(logp, want) <= 2e-5
    assert furthest(entropy, want_entropy) <= 2e-5


def test_scoring_strongly_negative_rows():
    case = make_case(4, 300, 8)
    case["weight"] = torch.cat([case["weight"], torch.ones(300, 1)], 1)
    case["h_s"] = torch.cat([case["h_s"], torch.full((4, 1), -5000.0)], 1)
    exact = case["h_s"].double() @ case["weight"].double().t()
    logp, _ = triton_score.score(case["h_s"], case["weight"], case["ids"], 1.0)
    # fp32 logits near -5000 are off by 2e-4 themselves, in any implementation
    assert furthest(logp, reference.selective_logprob(exact, case["ids"])[0]) <= 2e-3


def test_opcheck_of_scoring():
    case = make_case(3, 30, 6)
    arguments = (case["h_s"], case["weight"], case["ids"], None, 0.9)
    torch.library.opcheck(triton_score.score_op, arguments)

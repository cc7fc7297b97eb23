"""Heads with a bias, a scale or a soft cap, and trained heads, against float64."""

import pytest
import torch
from support.ops_cases import (
    INTERPRETED,
    assert_same_outputs,
    furthest,
    make_case,
    relative_error,
    run_both,
)

from minidistill_kernels import Head, linear_distill, linear_logprob, linear_reverse_kl, reference
from minidistill_kernels.op import linear_op

KINDS = {
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "cap": {"cap": 3.0},
    "all": {"bias": True, "scale": 1.5, "cap": 4.0},
}


def head_of(weight, kind, *, seed=5):
    settings = dict(KINDS[kind])
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
    return Head(weight, bias if settings.pop("bias", False) else None, **settings)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("own_head", [True, False], ids=["own head", "shared head"])
@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
def test_outputs_and_gradient_of_every_kind_of_head(estimator, own_head, kind):
    case = make_case(11, 301, 24)
    case["weight"] = head_of(case["weight"], kind)
    # the teacher's head is of another kind
    other = head_of(case["teacher_head"], "bias" if kind == "cap" else "cap", seed=6)
    got, grad, want, want_grad = run_both(
        case,
        h_t_NH=case["h_t"],
        teacher_weight=other if own_head else None,
        estimator=estimator,
        top_k=8,
        temperature=0.8,
        student_tau=0.7,
        advantage_N=case["advantage"],
        sampler_logp_N=case["sampler"],
        chunk=4,
    )
    assert_same_outputs(got, want, 4e-5)
    assert relative_error(grad, want_grad) <= 4e-5


@pytest.mark.parametrize("kind", list(KINDS))
def test_log_probs_and_kl_of_every_kind_of_head(kind):
    case = make_case(9, 130, 16)
    head = head_of(case["weight"], kind)
    logits, teacher = (reference.logits(case[name], head) for name in ("h_s", "h_t"))
    want, entropy = reference.selective_logprob(logits, case["ids"], 0.7)
    got = linear_logprob(case["h_s"], head, case["ids"], temperature=0.7, return_entropy=True)
    assert furthest(got[0], want) <= 2e-5
    assert furthest(got[1], entropy) <= 2e-5
    kl = linear_reverse_kl(case["h_s"], case["h_t"], head, temperature=0.7)
    assert furthest(kl, reference.reverse_kl(logits, teacher, 0.7)) <= 2e-5
    assert furthest(head.logits(case["h_s"]), logits) <= 2e-5


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_small_kl_in_bfloat16(kind):
    case = make_case(64, 400, 32, gap=0.01, dtype=torch.bfloat16)
    head = head_of(case["weight"], kind)
    want = reference.reverse_kl(*(reference.logits(case[x], head) for x in ("h_s", "h_t")))
    got = linear_reverse_kl(case["h_s"], case["h_t"], head)
    assert relative_error(got, want) <= 1e-2


def test_capped_logits_take_smaller_chunks():
    from minidistill_kernels.op import chunk_tokens

    cuda = torch.device("cuda")
    plain, capped = (chunk_tokens(10**6, 151_936, 0, cuda, capped=x) for x in (False, True))
    assert 3 * capped <= plain < 3 * (capped + 64)


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"cap": -1.0}, {"scale": float("nan")}, {"bias_V": torch.zeros(3)}]
)
def test_a_wrong_head_is_refused(wrong):
    case = make_case(3, 30, 6)
    with pytest.raises(ValueError, match=r"weight.*(scale|cap|bias)"):
        linear_logprob(case["h_s"], Head(case["weight"], **wrong), case["ids"])


def gradients(case, *, own_head, dtype=torch.float32, valid=None, **options):
    """(d hidden, d head) of the mean loss, ours and the reference's."""
    names = {"advantage_N": case["advantage"], "sampler_logp_N": case["sampler"], **options}
    hidden = case["h_s"].clone().requires_grad_()
    head = case["weight"].clone().requires_grad_()
    teacher = {"h_t_NH": case["h_t"]} | (
        {"teacher_weight": case["teacher_head"]} if own_head else {}
    )
    out = linear_distill(hidden, head, case["ids"], **teacher, **names, valid=valid, chunk=4)
    out.loss.mean().backward()
    truth, truth_head = (case[name].double().requires_grad_() for name in ("h_s", "weight"))
    # the teacher's logits are constants, whichever head it has
    teacher["teacher_weight"] = case["teacher_head"] if own_head else case["weight"]
    want = reference.linear_distill(truth, truth_head, case["ids"], **teacher, **names)
    used = want["loss"] if valid is None else want["loss"][valid]
    (used.sum() / len(case["ids"])).backward()
    assert head.grad.dtype == dtype
    return (hidden.grad, head.grad), (truth.grad, truth_head.grad)


@pytest.mark.parametrize("own_head", [True, False], ids=["own head", "shared head"])
@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
def test_the_heads_gradient(estimator, own_head):
    case = make_case(11, 301, 24, temperature=0.8)
    ours, truth = gradients(
        case,
        own_head=own_head,
        estimator=estimator,
        top_k=8,
        temperature=0.8,
        teacher_tau=1.0,
        ratio_clip_high=1.3,
        token_mask_low=0.6,
        token_mask_high=1.6,
    )
    for got, want in zip(ours, truth, strict=True):
        assert relative_error(got, want) <= 2e-5


def test_invalid_rows_do_not_contribute_to_the_heads_gradient():
    case = make_case(9, 80, 12)
    valid = torch.arange(9) % 3 != 1
    (_, ours), (_, truth) = gradients(case, own_head=True, valid=valid)
    assert relative_error(ours, truth) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = make_case(16, 200, 16, dtype=dtype)
    (_, ours), (_, truth) = gradients(case, own_head=True, dtype=dtype)
    assert relative_error(ours, truth) <= 2e-2


def test_the_head_gets_a_gradient_from_frozen_hidden_states():
    case = make_case(6, 50, 8)
    head = case["weight"].clone().requires_grad_()
    linear_distill(case["h_s"], head, case["ids"], h_t_NH=case["h_t"]).loss.sum().backward()
    assert head.grad.norm() > 0


def test_a_trained_bias_has_a_gradient():
    case = make_case(11, 90, 12)
    head = head_of(case["weight"], "all")
    grads = []
    for function, dtype in (
        (linear_distill, torch.float32),
        (reference.linear_distill, torch.float64),
    ):
        trained = [x.detach().to(dtype, copy=True).requires_grad_() for x in head[:2]]
        out = function(
            case["h_s"],
            Head(*trained, *head[2:]),
            case["ids"],
            h_t_NH=case["h_t"],
            teacher_weight=head,
            advantage_N=case["advantage"],
        )
        (out["loss"] if isinstance(out, dict) else out.loss).mean().backward()
        grads.append([x.grad for x in trained])
    for got, want in zip(*grads, strict=True):
        assert relative_error(got, want) <= 4e-5


def test_tokens_must_have_equal_weights():
    case = make_case(6, 50, 8)
    head = case["weight"].clone().requires_grad_()
    loss = linear_distill(case["h_s"], head, case["ids"], h_t_NH=case["h_t"]).loss
    with pytest.raises(RuntimeError, match="a sum or a mean"):
        (loss * torch.linspace(1, 2, 6)).sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="the op's schema does not depend on the backend")
def test_opcheck():
    case = make_case(3, 30, 6)
    settings = [0.5, 1.0, 0.5, 0.8, 2.0, 0.125, 8.0]
    hidden, head = (case[name].clone().requires_grad_() for name in ("h_s", "weight"))
    bias = torch.zeros(30, requires_grad=True)
    torch.library.opcheck(
        linear_op,
        (hidden, head, case["ids"], bias, case["h_t"], case["teacher_head"], None,
         [3.0, 0.0, 1.0], case["advantage"], case["sampler"], None, None, None, None, "full", 4,
         settings, None, 2, True, True),
        # a trained head refuses the random upstream gradient of the other utilities
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip

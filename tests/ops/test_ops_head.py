"""A trained head: its gradient against float64, and the reductions it allows."""

import pytest
import torch
from support.ops_cases import INTERPRETED, make_case, relative_error

from minidistill_kernels import linear_distill, reference
from minidistill_kernels.distill import linear_op


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
    torch.library.opcheck(
        linear_op,
        (hidden, head, case["ids"], case["h_t"], case["teacher_head"], case["advantage"],
         case["sampler"], None, None, None, None, "full", 4, settings, None, 2, True, True),
        # a trained head refuses the random upstream gradient of the other utilities
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip

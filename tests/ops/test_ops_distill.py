"""linear_distill: every estimator with every source of teacher scores against float64, and the
properties of the objective that training relies on."""

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

from minidistill_kernels import linear_distill, reference
from minidistill_kernels.op import linear_op

TAUS = {"adv_tau": 0.5, "teacher_tau": 1.0, "student_tau": 0.5}


def engine_scores(case, k, temperature, logp=True):
    """As from an inference engine: log q(y), the student's top-k ids, and log q of those."""
    student = reference.log_softmax(case["h_s"].double() @ case["weight"].double().t(), temperature)
    teacher = reference.log_softmax(case["h_t"].double() @ case["weight"].double().t(), temperature)
    ids = student.topk(k).indices
    out = {"topk_ids_NK": ids, "teacher_topk_logp_NK": teacher.gather(1, ids).float()}
    if logp:
        out["teacher_logp_N"] = teacher.gather(1, case["ids"][:, None])[:, 0].float()
    return out


def teacher_inputs(case, source, temperature=1.0):
    if source == "shared head":
        return {"h_t_NH": case["h_t"]}
    if source == "own head":
        return {"h_t_NH": case["h_t"], "teacher_weight": case["teacher_head"]}
    return engine_scores(case, 8, temperature)


# The backends share the objective, so the interpreter runs one value of each
@pytest.mark.parametrize("kl_clip", [0.1] if INTERPRETED else [None, 0.1])
@pytest.mark.parametrize("temperature", [0.8] if INTERPRETED else [1.0, 0.8])
@pytest.mark.parametrize("taus", [{}, TAUS], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("estimator", "source"),
    [
        ("full", "shared head"),
        ("full", "own head"),
        ("sampled", "shared head"),
        ("sampled", "own head"),
        ("sampled", "engine"),
        ("top_k", "shared head"),
        ("top_k", "own head"),
        ("top_k", "engine"),
    ],
)
def test_outputs_and_gradient(estimator, source, taus, temperature, kl_clip):
    case = make_case(11, 301, 24, temperature=temperature)
    scored = teacher_inputs(case, source, temperature)
    if source == "engine" and estimator == "sampled":
        scored = {"teacher_logp_N": scored["teacher_logp_N"]}
    got, grad, want, want_grad = run_both(
        case,
        **scored,
        **taus,
        estimator=estimator,
        top_k=8,
        temperature=temperature,
        kl_clip=kl_clip,
        advantage_N=case["advantage"],
        sampler_logp_N=case["sampler"],
        ratio_clip_high=1.3,
        token_mask_low=0.6,
        token_mask_high=1.6,
        chunk=4,
    )
    assert_same_outputs(got, want)
    assert relative_error(grad, want_grad) <= 2e-5
    assert got.masked.any()
    assert got.ratio_clipped.any()
    assert bool(got.kl_clipped.any()) == (kl_clip is not None)
    assert not got.loss[got.masked].any()
    assert not grad[got.masked].any()


@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
def test_without_advantages_and_sampler(estimator):
    case = make_case(5, 80, 12)
    got, grad, want, want_grad = run_both(case, h_t_NH=case["h_t"], estimator=estimator, top_k=5)
    assert_same_outputs(got, want)
    assert relative_error(grad, want_grad) <= 2e-5
    assert (got.ratio == 1).all()
    assert not got.masked.any()


def test_top_k_of_the_whole_vocabulary_equals_full():
    case = make_case(4, 30, 12)
    options = {"h_t_NH": case["h_t"], "advantage_N": case["advantage"]}
    full, full_grad, _, _ = run_both(case, **options)
    top, top_grad, _, _ = run_both(case, **options, estimator="top_k", top_k=1000)
    assert furthest(top.loss, full.loss) <= 2e-5
    assert relative_error(top_grad, full_grad) <= 2e-5


def test_top_k_in_a_real_vocabulary():
    """The grouped search finds the same ids as a sort, also in the incomplete last group."""
    case = make_case(3, 30_011, 8)
    case["weight"][-5:] = case["weight"][:5] + 3 * case["h_s"][:1]
    got, grad, want, want_grad = run_both(case, h_t_NH=case["h_t"], estimator="top_k", top_k=16)
    assert_same_outputs(got, want)
    assert relative_error(grad, want_grad) <= 2e-5


def test_nearly_all_mass_in_the_top_k():
    """The mass of the other ids is below fp32's resolution, but its logarithm stays finite."""
    case = make_case(4, 100, 8)
    case["weight"][7] = 100 * case["h_s"].sum(0)
    got, grad, _, _ = run_both(case, h_t_NH=case["h_t"], estimator="top_k", top_k=10)
    assert torch.isfinite(got.loss).all()
    assert torch.isfinite(grad).all()


def test_the_sampled_gradient_is_unbiased():
    """Its expectation over y ~ pi is the full gradient, summed over all tokens of one position."""
    vocab = 40
    case = make_case(2, vocab, 8)
    h_s = case["h_s"][:1].expand(vocab, -1).contiguous()
    h_t = case["h_t"][:1].expand(vocab, -1).contiguous()
    hidden = h_s.clone().requires_grad_()
    sampled = linear_distill(
        hidden, case["weight"], torch.arange(vocab), h_t_NH=h_t, estimator="sampled", **TAUS
    )
    (sampled.loss * sampled.logp.exp()).sum().backward()
    mean = hidden.grad.sum(0)
    one = case["h_s"][:1].clone().requires_grad_()
    linear_distill(
        one, case["weight"], case["ids"][:1], h_t_NH=case["h_t"][:1], **TAUS
    ).loss.sum().backward()
    assert relative_error(mean, one.grad[0]) <= 1e-5


def test_the_reference_gradient_by_finite_differences():
    case = {k: v.double() if v.is_floating_point() else v for k, v in make_case(2, 15, 4).items()}

    def loss(hidden, **options):
        return reference.linear_distill(
            hidden, case["weight"], case["ids"], h_t_NH=case["h_t"], **TAUS, **options
        )["loss"].sum()

    for options in ({}, {"estimator": "top_k", "top_k": 4}):
        hidden = case["h_s"].clone().requires_grad_()
        loss(hidden, **options).backward()
        for i, j in ((0, 0), (1, 3)):
            step = torch.zeros_like(case["h_s"])
            step[i, j] = 1e-6
            slope = (
                loss(case["h_s"] + step, **options) - loss(case["h_s"] - step, **options)
            ) / 2e-6
            assert abs(float(slope - hidden.grad[i, j])) < 1e-7


def test_equal_views_give_no_loss_and_no_gradient():
    """As with an empty context and equal taus, before the first step."""
    case = make_case(6, 200, 16)
    for estimator in ("full", "sampled", "top_k"):
        hidden = case["h_s"].clone().requires_grad_()
        out = linear_distill(
            hidden, case["weight"], case["ids"], h_t_NH=case["h_s"], estimator=estimator
        )
        out.loss.sum().backward()
        assert furthest(out.loss, torch.zeros(6)) <= 1e-6
        assert hidden.grad.norm() <= 1e-5
        assert furthest(out.kl, torch.zeros(6)) <= 1e-6


def test_clipping_bounds_the_loss_and_keeps_a_gradient():
    case = make_case(8, 120, 16, gap=2.0)
    hidden = case["h_s"].clone().requires_grad_()
    out = linear_distill(hidden, case["weight"], case["ids"], h_t_NH=case["h_t"], kl_clip=0.05)
    assert out.kl_clipped.all()
    assert torch.allclose(out.loss, torch.full((8,), 0.05))
    out.loss.sum().backward()
    assert (hidden.grad.norm(dim=1) > 0).all()


def test_unused_rows_are_zero():
    case = make_case(7, 90, 16)
    case["h_s"][1], case["h_t"][2] = float("nan"), float("inf")
    case["sampler"][1] = float("nan")
    case["ids"][4] = -100
    valid = torch.tensor([True, False, False, True, True, True, True])
    used = valid & (case["ids"] != -100)
    for estimator in ("full", "sampled", "top_k"):
        hidden = case["h_s"].clone().requires_grad_()
        out = linear_distill(
            hidden,
            case["weight"],
            case["ids"],
            h_t_NH=case["h_t"],
            estimator=estimator,
            sampler_logp_N=case["sampler"],
            valid=valid,
            chunk=2,
        )
        for value in out:
            assert not value[~used].any()
        assert (out.ratio[used] > 0).all()
        out.loss.sum().backward()
        assert torch.isfinite(hidden.grad).all()
        assert not hidden.grad[~used].any()


def test_ratios_that_are_not_finite_are_masked():
    case = make_case(3, 50, 8)
    case["sampler"][0], case["sampler"][1] = float("-inf"), float("nan")
    hidden = case["h_s"].clone().requires_grad_()
    out = linear_distill(
        hidden, case["weight"], case["ids"], h_t_NH=case["h_t"], sampler_logp_N=case["sampler"]
    )
    out.loss.sum().backward()
    assert out.masked[:2].all()
    assert not out.loss[:2].any()
    assert torch.isfinite(hidden.grad).all()


def test_engine_top_k_without_the_sampled_token():
    """log q(y) is taken from the top k if y is in it, else bounded by the mass of the other ids."""
    case = make_case(12, 60, 8)
    scored = engine_scores(case, 5, 1.0, logp=False)
    case["ids"][:4] = scored["topk_ids_NK"][:4, 2]
    truth = engine_scores(case, 5, 1.0)["teacher_logp_N"]
    out = linear_distill(case["h_s"], case["weight"], case["ids"], estimator="top_k", **scored)
    inside = (scored["topk_ids_NK"] == case["ids"][:, None]).any(1)
    assert inside[:4].all()
    assert not inside.all()
    assert furthest(out.teacher_logp[inside], truth[inside]) <= 1e-5
    assert (out.teacher_logp[~inside] >= truth[~inside] - 1e-5).all()
    assert out.teacher_entropy is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = make_case(9, 500, 48, dtype=dtype)
    for estimator in ("full", "sampled", "top_k"):
        got, grad, want, want_grad = run_both(
            case, h_t_NH=case["h_t"], estimator=estimator, advantage_N=case["advantage"]
        )
        assert_same_outputs(got, want)
        assert grad.dtype == dtype
        assert relative_error(grad, want_grad) <= 5e-3


def test_only_the_loss_has_a_gradient():
    case = make_case(3, 50, 8)
    hidden = case["h_s"].clone().requires_grad_()
    out = linear_distill(hidden, case["weight"], case["ids"], h_t_NH=case["h_t"])
    assert [f for f in out._fields if getattr(out, f).requires_grad] == ["loss"]
    assert {x.dtype for x in out} == {torch.float32, torch.bool}
    with torch.no_grad():
        scored = linear_distill(hidden, case["weight"], case["ids"], h_t_NH=case["h_t"])
    assert torch.equal(scored.loss, out.loss.detach())


def test_results_do_not_depend_on_the_chunk():
    case = make_case(13, 70, 8)
    options = {"h_t_NH": case["h_t"], "sampler_logp_N": case["sampler"]}
    first, first_grad, _, _ = run_both(case, **options, chunk=1)
    for chunk in (2, 5, 13, 1000):
        again, grad, _, _ = run_both(case, **options, chunk=chunk)
        assert furthest(again.loss, first.loss) <= 2e-6
        assert relative_error(grad, first_grad) <= 2e-6


@pytest.mark.parametrize("mode", ["full", "sampled", "top_k", "logprob"])
@pytest.mark.parametrize("need_grad", [True, False])
def test_opcheck(mode, need_grad):
    case = make_case(3, 30, 6)
    hidden = case["h_s"].clone().requires_grad_(need_grad)
    h_t = None if mode == "logprob" else case["h_t"]
    settings = [0.5, 1.0, 0.5, 0.8, 2.0, 0.125, 8.0]
    torch.library.opcheck(
        linear_op,
        (hidden, case["weight"], case["ids"], None, h_t, None, None, [0.0, 0.0, 1.0],
         case["advantage"], case["sampler"], None, None, None, None, mode, 4, settings, None, 2,
         need_grad, False),
    )  # fmt: skip

"""Compiled kernels on a GPU: accuracy, real sizes, memory, and data races.

Without a GPU they are rehearsed: see support/gpus.py. test_ops_interpreter.py rehearses them on the
interpreted kernels too.
"""

import pytest
import torch
from support.gpus import DEVICE, size
from support.ops_cases import furthest, make_case, relative_error

from bench.kernels_measure import peak_bytes
from minidistill_kernels import (
    Head,
    linear_distill,
    linear_logprob,
    linear_reverse_kl,
    reference,
    reverse_kl,
    selective_logprob,
)
from minidistill_kernels.op import linear_op

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def exact_fp32_products():
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(case):
    return {name: x.to(DEVICE) for name, x in case.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [401, size(5000, 1200), size(151936, 2600)])
def test_row_functions(dtype, vocab):
    torch.manual_seed(0)
    s, t = (torch.randn(size(33, 5), vocab, device=DEVICE).mul(2).to(dtype) for _ in range(2))
    ids = torch.randint(0, vocab, (size(33, 5),), device=DEVICE)
    ours, truth = s.clone().requires_grad_(), s.double().requires_grad_()
    logp, entropy = selective_logprob(ours, ids, return_entropy=True)
    kl = reverse_kl(ours, t)
    want_logp, want_entropy = reference.selective_logprob(truth, ids)
    want_kl = reference.reverse_kl(truth, t)
    assert furthest(logp, want_logp) <= 1e-5
    assert furthest(entropy, want_entropy) <= 2e-5
    assert furthest(kl, want_kl) <= 5e-6 * max(1.0, float(want_kl.max()))
    (logp + entropy + kl).sum().backward()
    (want_logp + want_entropy + want_kl).sum().backward()
    limit = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(ours.grad, truth.grad) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [{"scale": 0.25}, {"cap": 4.0}, {"bias": True, "cap": 6.0}])
def test_heads_with_a_bias_a_scale_or_a_cap(dtype, kind):
    case = on_gpu(make_case(size(300, 12), size(7001, 301), size(128, 32), dtype=dtype))
    bias = torch.linspace(-1, 1, len(case["weight"]), device=DEVICE).to(dtype)
    head = Head(case["weight"], bias if "bias" in kind else None, kind.get("scale", 1.0),
                kind.get("cap"))  # fmt: skip
    ours, truth = case["h_s"].clone().requires_grad_(), case["h_s"].double().requires_grad_()
    options = {"h_t_NH": case["h_t"], "advantage_N": case["advantage"], "temperature": 0.9}
    got = linear_distill(ours, head, case["ids"], chunk=size(128, 8), **options)
    want = reference.linear_distill(truth, head, case["ids"], **options)
    got.loss.sum().backward()
    want["loss"].sum().backward()
    assert furthest(got.kl, want["kl"]) <= (2e-5 if dtype == torch.float32 else 2e-3)
    assert relative_error(ours.grad, truth.grad) <= (4e-5 if dtype == torch.float32 else 6e-3)
    logp, _ = linear_logprob(case["h_s"], head, case["ids"], temperature=0.9)
    assert furthest(logp, want["logp"]) <= (2e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
@pytest.mark.parametrize("own_head", [False, True])
def test_distill(dtype, estimator, own_head):
    case = on_gpu(make_case(size(300, 20), size(7001, 701), size(128, 32), dtype=dtype))
    options = {
        "h_t_NH": case["h_t"],
        "teacher_weight": case["teacher_head"] if own_head else None,
        "advantage_N": case["advantage"],
        "sampler_logp_N": case["sampler"],
        "estimator": estimator,
        "teacher_tau": 1.0,
        "temperature": 0.9,
    }
    ours, truth = case["h_s"].clone().requires_grad_(), case["h_s"].double().requires_grad_()
    got = linear_distill(ours, case["weight"], case["ids"], chunk=size(128, 8), **options)
    want = reference.linear_distill(truth, case["weight"], case["ids"], **options)
    got.loss.sum().backward()
    want["loss"].sum().backward()
    limit = 2e-5 if dtype == torch.float32 else 5e-3
    assert relative_error(ours.grad, truth.grad) <= limit
    value = 2e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(got.kl, want["kl"]) <= value
    assert furthest(got.logp, want["logp"]) <= 2e-5


@pytest.mark.parametrize("gap", [0.006, 0.018])
def test_small_kl_in_bf16(gap):
    case = make_case(size(64, 8), size(32768, 2048), size(1024, 128), dtype=torch.bfloat16, gap=gap)
    case = on_gpu(case)
    truth = case["h_s"].double().requires_grad_()
    weight = case["weight"].double()
    want = reference.reverse_kl(truth @ weight.t(), case["h_t"].double() @ weight.t())
    ours = case["h_s"].clone().requires_grad_()
    kl = linear_reverse_kl(ours, case["h_t"], case["weight"], chunk=32)
    assert relative_error(kl, want) <= 0.01
    kl.sum().backward()
    want.sum().backward()
    assert relative_error(ours.grad, truth.grad) <= 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_scoring_without_logits(dtype):
    case = on_gpu(make_case(size(1000, 70), size(50257, 509), size(768, 48), dtype=dtype))
    logits = case["h_s"].double() @ case["weight"].double().t()
    want, want_entropy = reference.selective_logprob(logits, case["ids"])
    call = lambda: linear_logprob(  # noqa: E731
        case["h_s"], case["weight"], case["ids"], return_entropy=True
    )
    logp, entropy = call()
    assert furthest(logp, want) <= 2e-5
    assert furthest(entropy, want_entropy) <= 2e-5
    assert peak_bytes(call, DEVICE.type) < 8 << 20
    assert torch.equal(call()[0], logp)


def test_more_than_two_billion_logits():
    """More than 2^31 logits in one tensor, and more rows than grid axes 1 and 2 allow."""
    n, v = size(70_000, 70), size(32_000, 320)
    x = torch.randn(n, v, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.randint(0, v, (n,), device=DEVICE)
    logp, _ = selective_logprob(x, ids)
    for rows in (slice(0, 4), slice(n - 4, n)):
        assert furthest(logp[rows], reference.selective_logprob(x[rows], ids[rows])[0]) <= 1e-5


def test_peak_memory_is_bounded_by_the_chunk():
    v, h, chunk = size(64_000, 6400), size(256, 16), size(512, 16)
    options = {"device": DEVICE, "dtype": size(torch.bfloat16, torch.float32)}
    weight = torch.randn(v, h, **options)

    def extra(n):
        h_s = torch.randn(n, h, **options, requires_grad=True)
        h_t = torch.randn(n, h, **options)
        call = lambda: linear_reverse_kl(h_s, h_t, weight, chunk=chunk).sum().backward()  # noqa: E731
        call()
        return peak_bytes(call, DEVICE.type) - size(8, 16) * n * h

    few, many = extra(size(2048, 32)), extra(size(8192, 128))
    # on a CPU a chunk is fp32, and small beside the row kernels' blocks
    assert few < size(8, 24) * chunk * v
    assert many < 1.1 * few


def test_repeated_runs_give_equal_results():
    """A data race in the in-place gradients would make runs differ."""
    case = on_gpu(make_case(size(512, 16), size(30_000, 900), size(256, 16), dtype=torch.bfloat16))
    gradients = []
    for _ in range(5):
        hidden = case["h_s"].clone().requires_grad_()
        linear_reverse_kl(hidden, case["h_t"], case["weight"], chunk=size(200, 6)).sum().backward()
        gradients.append(hidden.grad)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_torch_backend_on_cuda(monkeypatch):
    monkeypatch.setenv("MINIDISTILL_KERNELS", "torch")
    case = on_gpu(make_case(50, 1000, 64, dtype=torch.bfloat16))
    truth = case["h_s"].double().requires_grad_()
    weight = case["weight"].double()
    want = reference.reverse_kl(truth @ weight.t(), case["h_t"].double() @ weight.t())
    hidden = case["h_s"].clone().requires_grad_()
    kl = linear_reverse_kl(hidden, case["h_t"], case["weight"])
    kl.sum().backward()
    want.sum().backward()
    assert relative_error(kl, want) <= 1e-2
    assert relative_error(hidden.grad, truth.grad) <= 5e-3


def test_opcheck():
    case = on_gpu(make_case(3, 30, 16))
    settings = [0.5, 1.0, 0.5, 0.8, 2.0, 0.125, 8.0]
    torch.library.opcheck(
        linear_op,
        (case["h_s"].requires_grad_(), case["weight"], case["ids"], None, case["h_t"], None, None,
         [0.0, 0.0, 1.0], case["advantage"], case["sampler"], None, None, None, None, "full", 4,
         settings, None, 2, True, False),
    )  # fmt: skip


def test_compiled_by_inductor():
    case = on_gpu(make_case(40, 500, 32))

    def loss(hidden):
        return linear_reverse_kl(hidden, case["h_t"], case["weight"]).sum()

    plain, compiled = (case["h_s"].clone().requires_grad_() for _ in range(2))
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend=size("inductor", "aot_eager"))(compiled).backward()
    assert relative_error(compiled.grad, plain.grad) <= 1e-5

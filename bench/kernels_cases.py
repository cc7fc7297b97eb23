"""The benchmark's cases: each quantity computed by this package, eager torch and other packages.

Legend: _N tokens, _H hidden, _V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill_kernels import (
    linear_distill,
    linear_logprob,
    linear_reverse_kl,
    reverse_kl,
    selective_logprob,
)

MODES = ("no grad", "forward", "forward+backward")
BASELINE = "eager"
OURS = "minidistill"


@dataclass(frozen=True, slots=True)
class Shape:
    n: int
    v: int
    h: int
    dtype: torch.dtype
    device: str

    @property
    def label(self) -> str:
        return f"N={self.n} V={self.v} H={self.h} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Case:
    """`loss` computes losses per token from `leaf`, the input that may require a gradient."""

    quantity: str
    who: str
    loss: Callable[[Tensor], Tensor]
    leaf: Tensor
    flops: dict[str, float]
    """FLOPs of the products with the head, by mode."""
    moved: dict[str, float]
    """Bytes of logits read and written, by mode."""
    modes: tuple[str, ...] = MODES

    def call(self, mode: str) -> Callable[[], Any]:
        if mode == "no grad":
            return self._scored
        leaf = self.leaf.detach().requires_grad_()
        if mode == "forward":
            return lambda: self.loss(leaf)

        def step() -> None:
            leaf.grad = None
            self.loss(leaf).sum().backward()

        return step

    def _scored(self) -> Tensor:
        with torch.no_grad():
            return self.loss(self.leaf)


def inputs(shape: Shape) -> dict[str, Tensor]:
    draw = torch.Generator(shape.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=shape.device)

    h_s = normal(shape.n, shape.h)
    tensors = {
        "h_s": h_s,
        "h_t": h_s + 0.1 * normal(shape.n, shape.h),
        "weight": normal(shape.v, shape.h) * 2.5 / shape.h**0.5,
    }
    out = {k: x.to(shape.dtype) for k, x in tensors.items()}
    out["ids"] = torch.randint(0, shape.v, (shape.n,), generator=draw, device=shape.device)
    return out


def _eager_logp(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    return F.log_softmax(logits_NV.float(), dim=-1).gather(1, ids_N[:, None])[:, 0]


def _eager_scores(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    logp_NV = F.log_softmax(logits_NV.float(), dim=-1)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(1)
    return logp_NV.gather(1, ids_N[:, None])[:, 0] + entropy_N


def _eager_kl(s_NV: Tensor, t_NV: Tensor) -> Tensor:
    s, t = F.log_softmax(s_NV.float(), dim=-1), F.log_softmax(t_NV.float(), dim=-1)
    return (s.exp() * (s - t)).sum(1)


def _peer(module: str, name: str) -> Any:
    """A function of another package, or None; optional packages fail to import in many ways."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None


def absent() -> list[str]:
    """The other packages that cannot be imported here."""
    packages = {
        "TRL": ("trl.trainer.utils", "selective_log_softmax"),
        "Liger": ("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss"),
        "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy"),
        "F.linear_cross_entropy": ("torch.nn.functional", "linear_cross_entropy"),
    }
    return [who for who, where in packages.items() if _peer(*where) is None]


def row_cases(shape: Shape) -> Iterator[Case]:
    """Cases that start from logits."""
    x = inputs(shape)
    ids = x["ids"]
    s, t = x["h_s"] @ x["weight"].t(), x["h_t"] @ x["weight"].t()
    size = float(s.numel() * s.element_size())
    none = dict.fromkeys(MODES, 0.0)
    one = {"no grad": size, "forward": size, "forward+backward": 3 * size}
    two = {"no grad": 2 * size, "forward": 2 * size, "forward+backward": 5 * size}

    def case(quantity: str, who: str, loss: Callable[[Tensor], Tensor]) -> Case:
        moved = two if quantity == "reverse KL" else one
        return Case(quantity, who, loss, s, none, moved)

    name = "selective log-prob"
    yield case(name, BASELINE, lambda z: _eager_logp(z, ids))
    yield case(name, OURS, lambda z: selective_logprob(z, ids)[0])
    trl = _peer("trl.trainer.utils", "selective_log_softmax")
    if trl is not None:
        yield case(name, "TRL", lambda z: trl(z, ids))
    yield case("reverse KL", BASELINE, lambda z: _eager_kl(z, t))
    yield case("reverse KL", OURS, lambda z: reverse_kl(z, t))


def linear_cases(shape: Shape) -> Iterator[Case]:
    """Cases that start from hidden states and the head."""
    x = inputs(shape)
    h_t, weight, ids = x["h_t"], x["weight"], x["ids"]
    product = 2.0 * shape.n * shape.v * shape.h
    none = dict.fromkeys(MODES, 0.0)
    one = {"no grad": product, "forward": product, "forward+backward": 2 * product}
    two = {"no grad": 2 * product, "forward": 2 * product, "forward+backward": 3 * product}

    def case(
        quantity: str, who: str, loss: Callable[[Tensor], Tensor], modes: tuple[str, ...] = MODES
    ) -> Case:
        flops = one if "log-prob" in quantity else two
        return Case(quantity, who, loss, x["h_s"], flops, none, modes)

    name = "linear log-prob"
    yield case(name, BASELINE, lambda h: _eager_logp(h @ weight.t(), ids))
    yield case(name, OURS, lambda h: linear_logprob(h, weight, ids)[0])
    fused = _peer("torch.nn.functional", "linear_cross_entropy")
    if fused is not None:
        yield case(
            name, "F.linear_cross_entropy", lambda h: -fused(h, weight, ids, reduction="none")
        )
    cce = _peer("cut_cross_entropy", "linear_cross_entropy")
    if cce is not None:
        impl = "cce" if shape.device == "cuda" else "torch_compile"
        yield case(
            name,
            f"cut-cross-entropy ({impl})",
            lambda h: -cce(h, weight, ids, reduction="none", impl=impl),
        )
    name = "linear log-prob and entropy"
    scoring = ("no grad",)

    def scores(h: Tensor) -> Tensor:
        logp, entropy = linear_logprob(h, weight, ids, return_entropy=True)
        assert entropy is not None
        return logp + entropy

    yield case(name, BASELINE, lambda h: _eager_scores(h @ weight.t(), ids), scoring)
    yield case(name, OURS, scores, scoring)
    name = "linear reverse KL"

    def eager(h: Tensor) -> Tensor:
        with torch.no_grad():
            t = h_t @ weight.t()
        return _eager_kl(h @ weight.t(), t)

    yield case(name, BASELINE, eager)
    yield case(name, OURS, lambda h: linear_reverse_kl(h, h_t, weight))
    liger = _peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    if liger is not None:
        # beta = 1 is the reverse KL; it returns a mean over tokens, the others a sum
        jsd = liger(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
        yield case(
            name,
            "Liger (chunked, uncompiled)",
            lambda h: jsd(h, weight, h_t, weight, ids) * shape.n,
            ("forward", "forward+backward"),
        )
    yield case(
        "linear distill, full objective",
        OURS,
        lambda h: linear_distill(h, weight, ids, h_t_NH=h_t).loss,
    )

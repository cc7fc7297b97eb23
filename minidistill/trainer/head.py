"""How a model's logits follow from its head's product: found by a probe, not by the model's name.

Shapes: `_N` tokens, `_H` hidden, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from minidistill.errors import EXIT_ENVIRONMENT, UserError

TOKENS = 12
# Of the largest logit: the rounding of a scale and a cap in the model's own dtype
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SAME_SCALE = 2e-3  # between a measured scale and the number that the configuration has
BELOW_CAP = 0.9  # logits nearer to the cap are too flat to measure a scale


@dataclass(frozen=True, slots=True)
class LogitMap:
    """logits = scale (h Wᵀ + bias); with a soft cap c, c tanh(scale (h Wᵀ + bias) / c)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        logits = product * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


PRODUCT = LogitMap()
"""The logits are the head's product."""


@torch.no_grad()
def find_logit_map(causal: Any) -> LogitMap:
    """The scale and the soft cap that a model applies after its head.

    They are numbers of its configuration, found by comparing the model's own logits with its head's
    product on random tokens. The head's input is enlarged, so that a cap shows. Raises UserError
    (exit code 3) if no number explains the logits.
    """
    numbers = dict(_numbers(causal.config.get_text_config().to_dict()))
    caps = sorted({v for name, v in numbers.items() if v > 0 and "logit" in name and "cap" in name})
    product_NV, logits_NV = _probe(causal, 1.0)
    largest = float(product_NV.abs().max())
    if caps and largest > 0:
        product_NV, logits_NV = _probe(causal, max(1.0, 2 * max(caps) / largest))
    candidates = []
    for cap in (None, *caps):
        scale = _measured_scale(product_NV, logits_NV, cap)
        named = _named(scale, numbers.values())
        mapped_NV = LogitMap(named or scale, cap)(product_NV)
        candidates.append((float((mapped_NV - logits_NV).abs().max()), cap, scale, named))
    # NaN, which compares as no number does, is the worst
    error, cap, scale, named = min(candidates, key=lambda c: c[0] if c[0] >= 0 else torch.inf)
    limit = TOLERANCE[causal.get_output_embeddings().weight.dtype] * float(logits_NV.abs().max())
    if named is not None and error <= limit:
        return LogitMap(named, cap)
    capped = "" if cap is None else f", capped at {cap:g},"
    raise UserError(
        "the model's logits are not its LM head's product with a scale or a soft cap that its "
        f"configuration names: {scale:.4g} times the product{capped} is {error:.2g} away from "
        f"logits of up to {float(logits_NV.abs().max()):.3g}",
        where="model.name",
        fix="use a model whose logits are its head's product, scaled or softly capped",
        exit_code=EXIT_ENVIRONMENT,
    )


def _probe(causal: Any, enlarge: float) -> tuple[Tensor, Tensor]:
    """The head's product and the model's logits for its input times `enlarge`, (N, V) fp32."""
    head, inputs = causal.get_output_embeddings(), []

    def enlarged(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0] * enlarge)
        return (inputs[-1], *args[1:])

    # low ids: a multimodal model's image tokens are at the end
    highest = max(2, causal.get_input_embeddings().weight.shape[0] // 2)
    generator = torch.Generator().manual_seed(0)
    ids_1N = torch.randint(0, highest, (1, TOKENS), generator=generator).to(head.weight.device)
    hook = head.register_forward_pre_hook(enlarged)
    try:
        logits_NV = causal(input_ids=ids_1N, use_cache=False).logits[0]
    finally:
        hook.remove()
    if not inputs:
        raise UserError(
            "the model does not run its output embedding, so its logits cannot be followed",
            where="model.name",
            fix="use a model with an ordinary LM head",
            exit_code=EXIT_ENVIRONMENT,
        )
    product_NV = linear(inputs[-1], head.weight, getattr(head, "bias", None)).reshape(TOKENS, -1)
    return product_NV.float(), logits_NV.float()


def _measured_scale(product_NV: Tensor, logits_NV: Tensor, cap: float | None) -> float:
    """The scale with the least squared error, from logits that are not near the cap."""
    if cap is not None:
        inside_NV = logits_NV.abs() < BELOW_CAP * cap
        product_NV = product_NV[inside_NV]
        logits_NV = cap * torch.atanh(logits_NV[inside_NV] / cap)
    product, logits = product_NV.double().flatten(), logits_NV.double().flatten()
    return float((product @ logits) / (product @ product))


def _named(scale: float, numbers: Any) -> float | None:
    """1, or the number of the configuration that the measured scale or its inverse is."""
    exact = [1.0, *numbers, *(1 / v for v in numbers if v)]
    near = [v for v in exact if v > 0 and abs(scale / v - 1) <= SAME_SCALE]
    return near[0] if near else None


def _numbers(fields: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)

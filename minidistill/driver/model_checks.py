"""Checks of the loaded model before the first step: what a run will do is tried on a few prompts.

A model is judged by these passes, not by its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minidistill.driver.probes import (
    Ids,
    attention_error,
    largest_leak,
    mean_difference,
    own_logprobs,
    sampling_error,
)
from minidistill.errors import EXIT_ENVIRONMENT, UserError, blamed_on
from minidistill.models.auto import is_recurrent
from minidistill.models.hub import TEACHER_KEY
from minidistill.placement.attention import Layout
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import (
    PrefixCache,
    can_share_prefix,
    hidden_states,
)
from minidistill.trainer.guards import MISMATCH, first_line, is_out_of_memory
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.token_budget import TokenBudget
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Prompt, Role
from minidistill_kernels import linear_reverse_kl

# Of the hidden states: what experts may round differently, if they do. If nothing does, no change
# is right
LEAK = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NO_LEAK = 1e-6
# Rounding error of a KL or log-prob between two passes of different shapes, by dtype
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
DOING = "checking the model before training"

logger = logging.getLogger(__name__)


@torch.no_grad()
def check_model(
    policy: Policy,
    prompts: Sequence[Prompt],
    budget: TokenBudget,
    sampled: Collection[Role] = (Role.STUDENT, Role.TEACHER),
    prefixes: PrefixCache | None = None,
) -> bool:
    """Check what a run does with the model. Returns whether prefixes may be cached.

    `budget` bounds the passes. `sampled` are the roles that this process is to sample in. The run's
    `prefixes` keep the context that the checks have read.
    Raises UserError (exit code 3) if the logits that the loss computes are not the model's, if
    student and teacher differ on the same prompt although their weights are equal, if packed
    sequences or samples are not what each is alone, or if one prompt does not fit in memory.
    """
    rows = policy.head_VH.shape[0]
    by_id = sorted((id, token) for token, id in policy.tokenizer.get_vocab().items())
    if beyond := [token for id, token in by_id if id >= rows]:
        raise UserError(
            f"the tokenizer and the model do not match: the model has {rows} tokens, and "
            f"{len(beyond)} of the tokenizer's are not among them ({', '.join(beyond[:3])})",
            where="model.name",
            fix="use the tokenizer that the model was trained with, or save the model after "
            "resize_token_embeddings",
        )
    tolerance = TOLERANCE[policy.dtype]
    prompts = prompts[:4]
    completions = [p.student_ids[-6:] for p in prompts]  # any tokens will do
    other = policy.teacher_weights is Weights.OTHER and policy.holds(Role.TEACHER)
    roles = (Role.STUDENT, Role.TEACHER) if other else (Role.STUDENT,)
    for role in roles:
        key = TEACHER_KEY if role is Role.TEACHER else "model.name"
        with policy.inference(), policy.running_as(role), blamed_on(key):
            _check_attention(policy, prompts[0].student_ids, tolerance)
            _check_logits(policy, prompts, completions, tolerance, budget)
            if policy.attention.packed:
                _check_packed_passes(policy, prompts, completions, tolerance, budget)
    if policy.holds(Role.TEACHER) and not other and policy.starts_as_base:
        _check_equal_roles(policy, prompts, completions, tolerance, budget)
    cache = prefixes or PrefixCache(policy, shares=True)
    shares = _prefix_cache_is_exact(policy, prompts, completions, tolerance, budget, cache)
    view = [p.student_ids for p in prompts]
    needed = next((role for role in Role if role in sampled), None)
    if not other:  # one check for both roles
        _check_sampling(policy, view, Role.STUDENT, shares, needed)
        return shares
    _check_sampling(policy, view, Role.STUDENT, shares, needed if needed is Role.STUDENT else None)
    if Role.TEACHER in sampled:
        _check_sampling(policy, view, Role.TEACHER, shares, Role.TEACHER)
    return shares


def _check_attention(policy: Policy, prompt: Ids, tolerance: float) -> None:
    """Check that the chosen attention computes the same as the model's own code."""
    error = attention_error(policy, prompt)
    if not error <= tolerance:
        name = policy.causal.config._attn_implementation
        raise UserError(
            f"{name} attention is not this model's: its probabilities times the differences of "
            f"their logs reach {error:.2g}",
            where="model.attn",
            fix='use model.attn = "eager"',
            exit_code=EXIT_ENVIRONMENT,
        )


def _check_logits(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Ids],
    tolerance: float,
    budget: TokenBudget,
) -> None:
    """Check that the logits that the loss computes, of padded sequences, are the model's own."""

    def differences(rows: list[int]) -> list[float]:
        view = [prompts[i].student_ids for i in rows]
        tokens = collate(view, [completions[i] for i in rows], pad_id=policy.pad_id)
        ours = policy.logits(hidden_states(policy, tokens)).float().log_softmax(-1)
        sizes = [len(completions[i]) for i in rows]
        return [
            mean_difference(part, own_logprobs(policy, prompts[i].student_ids, completions[i]))
            for i, part in zip(rows, ours.split(sizes), strict=True)
        ]

    lengths = _lengths([p.student_ids for p in prompts], completions)
    measured = budget.run(lengths, differences, DOING)
    if not all(difference <= 4 * tolerance for difference in measured):
        raise UserError(
            "the model's logits are not its last hidden states times the LM head: the log-probs "
            f"of likely tokens differ by {max(measured):.2g}",
            where="model.name",
            fix="use a model whose logits are its hidden states times its head, scaled or capped",
            exit_code=EXIT_ENVIRONMENT,
        )


def _check_packed_passes(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Ids],
    tolerance: float,
    budget: TokenBudget,
) -> None:
    """Check that a packed sequence has the distributions that it has alone, and reads no other."""
    view = [p.student_ids for p in prompts]

    def divergences(prompts: list[Ids], completions: list[Ids]) -> Tensor:
        packed = collate(prompts, completions, pad_id=policy.pad_id, layout=policy.attention.layout)
        alone_NH = torch.cat(
            [
                hidden_states(policy, collate([prompt], [completion], pad_id=policy.pad_id))
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        )
        return linear_reverse_kl(hidden_states(policy, packed), alone_NH, policy.head).abs()

    fix = "leave trainer.packing out, or set it to false"
    leak, rounding = (
        largest_leak(policy, view[0], view[-1], layout)
        for layout in (policy.attention.layout, Layout.PADDED)
    )
    if not leak <= (4 * rounding + LEAK[policy.dtype] if rounding else NO_LEAK):
        raise UserError(
            "packed sequences read each other in this model: other tokens before a sequence change "
            f"its hidden states by {leak:.1%}",
            where="trainer.packing",
            fix=fix,
            exit_code=EXIT_ENVIRONMENT,
        )
    # two completions of the first prompt, which has one copy if prompts are shared
    prompts_twice, others = [view[0], *view], [completions[-1], *completions]
    measured = _largest(divergences, prompts_twice, others, budget, packed=True)
    if not all(kl <= tolerance for kl in measured):
        raise UserError(
            f"packed sequences have other distributions than alone: the KL between them is "
            f"{max(measured):.2g}, not 0",
            where="trainer.packing, model.attn",
            fix=fix,
            exit_code=EXIT_ENVIRONMENT,
        )


def _check_sampling(
    policy: Policy, prompts: Sequence[Ids], role: Role, shares: bool, needed: Role | None
) -> None:
    """Check that the trainer's model samples from its own distributions.

    If it does not, that is an error if the run samples it in the role `needed`. Layers with a state
    of their own may carry padding into it. Then only prompts of equal length are sampled from
    together.
    """
    limit = MISMATCH[policy.dtype]
    with policy.running_as(role):
        recurrent = is_recurrent(policy.config)
    try:
        error = sampling_error(policy, prompts, role, shares)
        if recurrent or not error <= limit:
            unpadded = replace(policy, pads_prompts=False)
            alone = sampling_error(unpadded, prompts, role, shares)
            if alone <= limit and not error <= max(4 * alone, limit / 1000):
                policy.pads_prompts, error = False, alone
                logger.warning(
                    "padding changes this model's states: prompts of different lengths are "
                    "sampled from one after the other"
                )
        problem = "" if error <= limit else f"kl/sampler_mismatch is {error:.2g}, not 0"
    except UserError:
        raise
    except Exception as exception:  # of the model's code, which may be anything
        if is_out_of_memory(exception):
            raise
        problem = f"{type(exception).__name__}: {first_line(exception)}"
    if not problem:
        return
    if needed is Role.STUDENT:
        raise UserError(
            f"the trainer's model cannot be sampled from: {problem}",
            where="inference.engine",
            fix='use inference.engine = "vllm", or another model',
            exit_code=EXIT_ENVIRONMENT,
        )
    if needed is Role.TEACHER:
        raise UserError(
            f"the teacher is in the trainer and cannot be sampled from: {problem}",
            where="orchestrator.eval, orchestrator.sample_from",
            fix="sample from the student, and leave [orchestrator.eval] out "
            "(--no-orchestrator.eval, with eval_baseline = false), or use another model",
            exit_code=EXIT_ENVIRONMENT,
        )
    policy.can_sample = False
    logger.warning(f"the trainer's model cannot be sampled from ({problem})")


def _check_equal_roles(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Ids],
    tolerance: float,
    budget: TokenBudget,
) -> None:
    """Check that student and teacher agree on the same prompts, since their weights are equal."""
    view = [p.student_ids for p in prompts]
    kl_N = token_kl(
        policy,
        completions,
        prompts=(view, view),
        roles=(Role.STUDENT, Role.TEACHER),
        temperature=1.0,
        budget=budget,
        doing=DOING,
    )
    # "not at most": NaN is a difference too
    if not float(kl_N.abs().max()) <= tolerance:
        raise UserError(
            f"with no context the KL between student and teacher is {float(kl_N.max()):.2g}, not 0",
            where="model.name",
            fix='use model.dtype = "float32", or another attention implementation (model.attn)',
            exit_code=EXIT_ENVIRONMENT,
        )


def _prefix_cache_is_exact(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Ids],
    tolerance: float,
    budget: TokenBudget,
    prefixes: PrefixCache,
) -> bool:
    """Whether a pass on the context's cached keys and values equals a pass on all tokens."""
    view = [p.teacher_ids for p in prompts]
    role = Role.TEACHER if policy.holds(Role.TEACHER) else Role.STUDENT
    with policy.running_as(role):
        teacher_shares = can_share_prefix(policy)
    if not (teacher_shares and can_share_prefix(policy)):
        return False
    prefix = prefixes.common(view, role)
    if not prefix:
        return len(set(view)) > 1  # else nothing has been compared
    layout = policy.attention.prefix_layout

    def errors(prompts: list[Ids], completions: list[Ids]) -> Tensor:
        logp = []
        for shared in ((), prefix):
            tokens = collate(
                prompts, completions, pad_id=policy.pad_id, layout=layout, prefix=shared
            )
            hidden = hidden_states(policy, tokens, prefixes.states(shared, role))
            logp.append(policy.logits(hidden).float().log_softmax(-1))
        # log-probs of tokens with negligible probability carry no information
        return ((logp[0] - logp[1]).abs() * logp[0].exp()).amax(dim=-1)

    with policy.inference(), policy.running_as(role):
        measured = _largest(errors, view, completions, budget, packed=layout is Layout.SHARED)
    if not all(error <= tolerance for error in measured):
        logger.warning(
            "the context's cached keys and values do not reproduce the model's log-probs: "
            "the context is read again each time"
        )
        return False
    return True


def _largest(
    per_token: Callable[[list[Ids], list[Ids]], Tensor],
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    budget: TokenBudget,
    *,
    packed: bool,
) -> list[float]:
    """The largest value of each completion's tokens, or NaN if any is NaN.

    `per_token` takes the prompts and completions of one pass and returns a value for each token.
    """

    def run_batch(rows: list[int]) -> list[float]:
        batch = [completions[i] for i in rows]
        values_N = per_token([prompts[i] for i in rows], batch)
        return [float(part.max()) for part in values_N.split([len(c) for c in batch])]

    return budget.run(_lengths(prompts, completions), run_batch, DOING, packed=packed)


def _lengths(prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[int]:
    return [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]

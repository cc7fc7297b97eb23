"""Checks before the first step: the two views of the prompts, and the model's numerics."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import (
    PrefixCache,
    can_share_prefix,
    hidden_states,
    prefix_states,
)
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Prompt, Role, Task
from minidistill_kernels import linear_reverse_kl

Ids = tuple[int, ...]

# Rounding error of a KL or log-prob between two passes of different shapes, by dtype
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

logger = logging.getLogger(__name__)


def check_prompts(config: Config, builder: PromptBuilder, prompts: Sequence[Prompt]) -> None:
    """Check both views of the prompts. Needs no model.

    Raises UserError if the chat template does not render them correctly.
    """
    first = prompts[0]
    ending = generation_prompt(builder, first.task)
    for view, text in (("student", first.student_text), ("teacher", first.teacher_text)):
        if not text.endswith(ending):
            raise UserError(
                f"the {view}'s prompt does not end in the template's generation prompt {ending!r}",
                where="model.name",
                fix="use a chat template that supports add_generation_prompt",
            )
    without_context = PromptBuilder(builder.tokenizer, "", builder.placement)
    equal_views = without_context.build("", first.task)
    if equal_views.student_ids != equal_views.teacher_ids:
        raise UserError(
            "the two views differ even with an empty context",
            where="model.name",
            fix="use a chat template that renders the same messages the same way",
        )
    if builder.context.strip() not in first.teacher_text:
        logger.warning("the chat template does not show the context verbatim")
    if warning := builder.boundary_warning(first):
        logger.warning(warning)
    loss = config.trainer.loss
    if loss.teacher_tau != loss.student_tau and loss.student_tau > 0 and loss.teacher_tau > 0:
        power = loss.teacher_tau / loss.student_tau
        kind = "sharpened" if power > 1 else "flattened"
        logger.warning(
            f"teacher_tau and student_tau differ: the distillation term's fixed point is the "
            f"{kind} teacher q^{power:g}, not q"
        )


def generation_prompt(builder: PromptBuilder, task: Task) -> str:
    """What the template writes to start the assistant's turn."""
    messages = [dict(m) for m in task.messages]
    closed = str(builder.tokenizer.apply_chat_template(messages, tokenize=False))
    return builder.render(messages).removeprefix(closed)


@torch.no_grad()
def check_model(policy: Policy, prompts: Sequence[Prompt]) -> bool:
    """Check the model's numerics before training. Returns whether prefixes may be cached.

    Raises UserError (exit code 3) if hidden states times the head are not the model's logits, or
    if student and teacher differ on the same prompt although their weights are equal, or if packed
    sequences are not what each is alone.
    """
    if len(policy.tokenizer) > policy.head_VH.shape[0]:
        raise UserError(
            f"the tokenizer has {len(policy.tokenizer)} tokens, the model "
            f"{policy.head_VH.shape[0]}: they do not match",
            where="model.name",
            fix="use the tokenizer that the model was trained with",
        )
    tolerance = TOLERANCE[policy.dtype]
    prompts = prompts[:4]
    completions = [p.student_ids[-6:] for p in prompts]  # any tokens will do
    _check_logits(policy, prompts, completions, tolerance)
    if policy.attention.unpadded:
        _check_packed_passes(policy, prompts, completions, tolerance)
    if policy.holds(Role.TEACHER) and policy.teacher_weights is not Weights.OTHER:
        _check_equal_roles(policy, prompts, completions, tolerance)
    return _prefix_cache_is_exact(policy, prompts, completions, tolerance)


def _check_logits(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Ids], tolerance: float
) -> None:
    """Check that the model's logits are its hidden states times the head."""
    tokens = collate([p.student_ids for p in prompts], completions, pad_id=policy.pad_id)
    tokens = tokens.to(policy.device)
    with policy.inference():
        ours = policy.logits(hidden_states(policy, tokens)).float().log_softmax(-1)
        theirs = policy.causal(input_ids=tokens.ids_BL, attention_mask=tokens.mask_BL).logits
        theirs = theirs[tokens.rows_N, tokens.columns_N].float().log_softmax(-1)
    if not torch.allclose(ours, theirs, atol=10 * tolerance, rtol=0):
        raise UserError(
            "the model changes its logits after the LM head (a scale or a soft cap)",
            where="model.name",
            fix="use a model whose logits are hidden states times the head",
            exit_code=EXIT_ENVIRONMENT,
        )


def _check_packed_passes(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Ids], tolerance: float
) -> None:
    """Check that a packed pass gives each sequence the distributions that it has alone, padded."""
    view = [p.student_ids for p in prompts]
    other = policy.teacher_weights is Weights.OTHER and policy.holds(Role.TEACHER)
    for role in (Role.STUDENT, Role.TEACHER) if other else (Role.STUDENT,):
        with policy.inference(), policy.running_as(role):
            packed = collate(view, completions, pad_id=policy.pad_id, packed=True)
            alone_NH = torch.cat(
                [
                    hidden_states(policy, collate([prompt], [completion], pad_id=policy.pad_id))
                    for prompt, completion in zip(view, completions, strict=True)
                ]
            )
            head_VH = policy.head_VH.detach()
            kl_N = linear_reverse_kl(hidden_states(policy, packed), alone_NH, head_VH)
        if not float(kl_N.abs().max()) <= tolerance:
            raise UserError(
                f"packed sequences have other distributions than alone: the KL between them is "
                f"{float(kl_N.abs().max()):.2g}, not 0",
                where="model.attn",
                fix='use model.attn = "sdpa"',
                exit_code=EXIT_ENVIRONMENT,
            )


def _check_equal_roles(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Ids], tolerance: float
) -> None:
    """Check that student and teacher agree on the same prompts, since their weights are equal."""
    view = [p.student_ids for p in prompts]
    kl_N = token_kl(
        policy,
        completions,
        prompts=(view, view),
        roles=(Role.STUDENT, Role.TEACHER),
        temperature=1.0,
        budget=1 << 16,
    )
    if float(kl_N.abs().max()) > tolerance:
        raise UserError(
            f"with no context the KL between student and teacher is {float(kl_N.max()):.2g}, not 0",
            where="model.name",
            fix='use model.dtype = "float32", or another attention implementation (model.attn)',
            exit_code=EXIT_ENVIRONMENT,
        )


def _prefix_cache_is_exact(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Ids], tolerance: float
) -> bool:
    """Whether a pass on the context's cached keys and values equals a pass on all tokens."""
    view = [p.teacher_ids for p in prompts]
    if len(set(view)) < 2 or not can_share_prefix(policy):
        return False
    prefix = PrefixCache(policy, shares=True).common(view)
    if not prefix:
        return True
    logp = []
    role = Role.TEACHER if policy.holds(Role.TEACHER) else Role.STUDENT
    with policy.inference(), policy.running_as(role):
        for shared in ((), prefix):
            tokens = collate(
                view,
                completions,
                pad_id=policy.pad_id,
                packed=policy.attention.unpadded,
                prefix=shared,
            )
            states = prefix_states(policy, shared) if shared else None
            hidden = hidden_states(policy, tokens, states)
            logp.append(policy.logits(hidden).float().log_softmax(-1))
    # log-probs of tokens with negligible probability carry no information
    error = ((logp[0] - logp[1]).abs() * logp[0].exp()).max()
    if float(error) > tolerance:
        logger.warning(
            "the context's cached keys and values do not reproduce the model's log-probs: "
            "the context is read again each time"
        )
        return False
    return True

"""Checks before the first step: the two views of the prompts, and the model's numerics."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.tasks.chat_template import ChatTemplate
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import (
    PrefixCache,
    can_share_prefix,
    hidden_states,
    prefix_states,
)
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.token_budget import TokenBudget
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Message, Prompt, Role
from minidistill_kernels import linear_reverse_kl

Ids = tuple[int, ...]

# Rounding error of a KL or log-prob between two passes of different shapes, by dtype
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
DOING = "checking the model before training"

logger = logging.getLogger(__name__)


def check_prompts(config: Config, builder: PromptBuilder, prompts: Sequence[Prompt]) -> None:
    """Check both views of the prompts. Needs no model.

    Raises UserError if the chat template does not render them correctly.
    """
    first = prompts[0]
    for template in (builder.student, builder.teacher):
        if template.render(first.task.messages) != template.render(first.task.messages):
            raise UserError(
                "the two views differ even with an empty context",
                where=template.where,
                fix="use a chat template that renders the same messages the same way",
            )
    _check_generation_prompt(builder.student, first.task.messages, first.student_ids, "student")
    with_context = builder.with_context(first.task.messages)
    _check_generation_prompt(builder.teacher, with_context, first.teacher_ids, "teacher")
    _warn_of_turns_without_end(builder)
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


def _check_generation_prompt(
    template: ChatTemplate, messages: Sequence[Message], ids: Ids, view: str
) -> None:
    """Check that a prompt ends where the assistant's answer begins."""
    ending = template.generation_prompt(messages)
    if ids[len(ids) - len(ending) :] != ending:
        text = template.tokenizer.decode(list(ending))
        raise UserError(
            f"the {view}'s prompt does not end in the template's generation prompt {text!r}",
            where=template.where,
            fix="use a chat template that supports add_generation_prompt",
        )
    if header := template.unopened_turn(messages):
        raise UserError(
            f"the {view}'s prompt does not begin the assistant's turn: the chat template writes "
            f"{header!r} before an answer, but not at the end of a prompt",
            where=template.where,
            fix="use a chat template that supports add_generation_prompt",
        )


def _warn_of_turns_without_end(builder: PromptBuilder) -> None:
    """Warn if no token ends an answer, or if the teacher expects another one."""
    student = builder.student
    if student.shows_turns and student.end_of_turn is None:
        logger.warning(
            "the chat template ends an answer with no token of its own: completions end at the "
            "end-of-sequence token, which the model may never write, or at max_tokens"
        )
    if len(builder.end_of_turn_ids) > 1:
        ends = builder.tokenizer.convert_ids_to_tokens(sorted(builder.end_of_turn_ids))
        logger.warning(
            f"the two chat templates end a turn with different tokens ({', '.join(ends)}): the "
            "teacher scores one that it does not expect"
        )


@torch.no_grad()
def check_model(policy: Policy, prompts: Sequence[Prompt], budget: TokenBudget) -> bool:
    """Check the model's numerics before training. Returns whether prefixes may be cached.

    `budget` bounds the passes. Raises UserError (exit code 3) if hidden states times the head are
    not the model's logits, if student and teacher differ on the same prompt although their weights
    are equal, if packed sequences are not what each is alone, or if one prompt does not fit in
    memory.
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
    _check_logits(policy, prompts, completions, tolerance, budget)
    if policy.attention.unpadded:
        _check_packed_passes(policy, prompts, completions, tolerance, budget)
    if policy.holds(Role.TEACHER) and policy.teacher_weights is not Weights.OTHER:
        _check_equal_roles(policy, prompts, completions, tolerance, budget)
    return _prefix_cache_is_exact(policy, prompts, completions, tolerance, budget)


def _check_logits(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Ids],
    tolerance: float,
    budget: TokenBudget,
) -> None:
    """Check that the model's logits are its hidden states times the head."""

    def agree(rows: list[int]) -> list[bool]:
        view = [prompts[i].student_ids for i in rows]
        tokens = collate(view, [completions[i] for i in rows], pad_id=policy.pad_id)
        ours = policy.logits(hidden_states(policy, tokens)).float().log_softmax(-1)
        sizes = [len(completions[i]) for i in rows]
        return [
            torch.allclose(
                part,
                _completion_logprobs(policy, prompts[i].student_ids, completions[i]),
                atol=10 * tolerance,
                rtol=0,
            )
            for i, part in zip(rows, ours.split(sizes), strict=True)
        ]

    with policy.inference():
        agreed = budget.run(_lengths([p.student_ids for p in prompts], completions), agree, DOING)
    if not all(agreed):
        raise UserError(
            "the model changes its logits after the LM head (a scale or a soft cap)",
            where="model.name",
            fix="use a model whose logits are hidden states times the head",
            exit_code=EXIT_ENVIRONMENT,
        )


def _completion_logprobs(policy: Policy, prompt: Ids, completion: Ids) -> Tensor:
    """The model's own log-probs at a completion's positions, (len(completion), vocabulary) fp32.

    The model is asked for the last logits only: all of them may be gigabytes.
    """
    needed = len(completion) + 1
    parameters = inspect.signature(policy.causal.forward).parameters
    options = {"logits_to_keep": needed} if "logits_to_keep" in parameters else {}
    ids_BL = torch.tensor([[*prompt, *completion]], device=policy.device)
    logits_BLV = policy.causal(input_ids=ids_BL, use_cache=False, **options).logits
    return logits_BLV[0, -needed:-1].float().log_softmax(-1)


def _check_packed_passes(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Ids],
    tolerance: float,
    budget: TokenBudget,
) -> None:
    """Check that a packed pass gives each sequence the distributions that it has alone, padded."""
    view = [p.student_ids for p in prompts]

    def divergences(prompts: list[Ids], completions: list[Ids]) -> Tensor:
        packed = collate(prompts, completions, pad_id=policy.pad_id, packed=True)
        alone_NH = torch.cat(
            [
                hidden_states(policy, collate([prompt], [completion], pad_id=policy.pad_id))
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        )
        head_VH = policy.head_VH.detach()
        return linear_reverse_kl(hidden_states(policy, packed), alone_NH, head_VH).abs()

    other = policy.teacher_weights is Weights.OTHER and policy.holds(Role.TEACHER)
    for role in (Role.STUDENT, Role.TEACHER) if other else (Role.STUDENT,):
        with policy.inference(), policy.running_as(role):
            measured = _largest(divergences, view, completions, budget, packed=True)
        if not all(kl <= tolerance for kl in measured):
            raise UserError(
                f"packed sequences have other distributions than alone: the KL between them is "
                f"{max(measured):.2g}, not 0",
                where="model.attn",
                fix='use model.attn = "sdpa"',
                exit_code=EXIT_ENVIRONMENT,
            )


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
) -> bool:
    """Whether a pass on the context's cached keys and values equals a pass on all tokens."""
    view = [p.teacher_ids for p in prompts]
    if len(set(view)) < 2 or not can_share_prefix(policy):
        return False
    prefix = PrefixCache(policy, shares=True).common(view)
    if not prefix:
        return True
    role = Role.TEACHER if policy.holds(Role.TEACHER) else Role.STUDENT
    packed = policy.attention.unpadded

    def errors(prompts: list[Ids], completions: list[Ids]) -> Tensor:
        logp = []
        for shared in ((), prefix):
            tokens = collate(
                prompts, completions, pad_id=policy.pad_id, packed=packed, prefix=shared
            )
            states = prefix_states(policy, shared) if shared else None
            hidden = hidden_states(policy, tokens, states)
            logp.append(policy.logits(hidden).float().log_softmax(-1))
        # log-probs of tokens with negligible probability carry no information
        return ((logp[0] - logp[1]).abs() * logp[0].exp()).amax(dim=-1)

    with policy.inference(), policy.running_as(role):
        measured = _largest(errors, view, completions, budget, packed=packed)
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

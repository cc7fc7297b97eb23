"""The vLLM engine against the model it must agree with: both roles, every version, full weights."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.paths import SOKOBAN
from support.vllm import (
    NEEDS_CPU_VLLM,
    Bench,
    make_bench,
    options_of,
    policy_of,
    student_error,
)

from minidistill.config import load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.types import Request, Role, SamplingParams

pytestmark = NEEDS_CPU_VLLM


@pytest.fixture
def bench(adapter_bench: Bench) -> Bench:
    adapter_bench.change(seed=11)
    adapter_bench.sync()
    return adapter_bench


def worst(bench: Bench) -> float:
    """The largest difference of any log-prob, roles mixed in one batch.

    Prompts fill a block of 32 tokens, which the prefix cache keeps from one version to the next.
    """
    prompts = bench.prompts(8, length=60)
    rows = [(p[:48], p[48:], own) for p in prompts for own in (Role.TEACHER, Role.STUDENT)]
    found = bench.engine.score_rows(*map(list, zip(*rows, strict=True)))
    errors = [
        abs(a - b)
        for row, scores in zip(rows, found, strict=True)
        for a, b in zip(scores, bench.truth(*row), strict=True)
    ]
    assert len(errors) == 16 * 12
    return max(errors)


def test_both_roles_agree_with_peft_after_1_2_and_50_syncs(bench: Bench) -> None:
    for number in range(1, 51):
        bench.change(seed=number)
        bench.sync()
        if number in (1, 2, 50):
            assert worst(bench) < 1e-4
    bench.change(seed=51)  # not synced: the engine must now be wrong
    assert worst(bench) > 1e-2


def test_layers_with_ranks_and_scales_of_their_own(bench: Bench) -> None:
    """In the same process: only what the sync says about the adapter differs."""
    lora = "--trainer.model.lora"
    flags = (f"{lora}.rank", "8", f"{lora}.use_rslora", f"{lora}.rank_pattern")
    pattern = '{ q_proj = 2, "layers.1.mlp.down_proj" = 16 }'
    config = load_config([SOKOBAN, "--inference.engine", "vllm", *flags, pattern]).config
    engine = bench.engine
    options, sender = engine.options, engine.sender
    other = Bench(config, policy_of(config), engine, bench.versions)
    adapter = options_of(config).adapter
    try:
        for settings, right in ((adapter, True), (adapter | {"rank_pattern": {}}, False)):
            engine.options = replace(options, adapter=settings)
            engine.attach(other.policy, (Role.STUDENT, Role.TEACHER))
            other.change(seed=3, scale=0.1)
            other.sync()
            assert (student_error(other) < 1e-4) is right
    finally:
        engine.options, engine.sender = options, sender


@pytest.mark.parametrize("role", [Role.TEACHER, Role.STUDENT])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_models(bench: Bench, role: Role, temperature: float) -> None:
    asked = [Request(p, (1 << 63) + i) for i, p in enumerate(bench.puzzles(6))]
    told: list[int] = []
    found = bench.engine.generate(asked, SamplingParams(9, temperature), role, advance=told.append)
    assert sum(told) == 6
    assert len({c.token_ids for c in found}) > 1
    for request, completion in zip(asked, found, strict=True):
        expected = bench.truth(request.prompt_ids, completion.token_ids, role, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_seed_decides_whatever_the_neighbours(bench: Bench) -> None:
    asked = [Request(p, 40 + i) for i, p in enumerate(bench.puzzles(5))]
    ask = (SamplingParams(8), Role.STUDENT)
    together = bench.engine.generate(asked, *ask)
    alone = [bench.engine.generate([request], *ask)[0] for request in reversed(asked)]
    assert [c.token_ids for c in together] == [c.token_ids for c in reversed(alone)]
    twice = bench.engine.generate([asked[0]] * 2, *ask)
    assert [c.token_ids for c in twice] == [together[0].token_ids] * 2
    others = [Request(r.prompt_ids, r.seed + 1000) for r in asked]
    found = bench.engine.generate(others, *ask)
    assert [c.token_ids for c in found] != [c.token_ids for c in together]


def test_completions_end_with_the_end_token_or_at_the_limit(bench: Bench) -> None:
    (prompt,) = bench.puzzles(1)
    asked = [Request(prompt, seed) for seed in range(160)]  # more than is read at a time
    found = bench.engine.generate(asked, SamplingParams(6), Role.TEACHER)
    end = bench.policy.eos_ids
    assert {c.stop for c in found} == {"eos", "length"}
    for completion in found:
        assert (completion.token_ids[-1] in end) == (completion.stop == "eos")
        assert not set(completion.token_ids[:-1]) & end
        assert completion.stop == "eos" or len(completion.token_ids) == 6


def test_greedy_is_the_argmax_with_logprobs_at_temperature_1(bench: Bench) -> None:
    asked = [Request(p, i) for i, p in enumerate(bench.prompts(3))]
    found = bench.engine.generate(asked, SamplingParams(5, 0), Role.STUDENT)
    for request, completion in zip(asked, found, strict=True):
        expected = bench.truth(request.prompt_ids, completion.token_ids, Role.STUDENT)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
        with torch.no_grad():
            ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
            logits = bench.policy.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(completion.token_ids)


def test_scores_are_right_where_the_prefix_cache_reaches(bench: Bench) -> None:
    """Blocks hold 32 tokens. Every later pass finds the context cached. In the last rows it finds
    the whole prompt and the completion's beginning, whose rows vLLM would not fill: it is kept
    from reading them, so that no sequence is computed twice."""
    context = bench.prompts(1, length=130)[0]
    tails = bench.prompts(3, length=12)
    group = context[:96]  # three blocks
    prompts = [(*context, *tail[:6]) for tail in tails] + [context[:40]] + [group] * 3
    completions = [
        *(tail[6:] for tail in tails),
        (*context[40:], 54, 57),
        *((*tail, *context) for tail in (tails[0], tails[0], tails[1])),
    ]
    _, before = bench.engine.score_counts
    for _ in range(2):
        found = bench.engine.score(prompts, completions, Role.TEACHER)
        for prompt, completion, scores in zip(prompts, completions, found, strict=True):
            assert scores == pytest.approx(bench.truth(prompt, completion, Role.TEACHER), abs=1e-4)
    assert bench.engine.score_counts[1] == before


def test_a_completion_is_scored_while_others_are_sampled(bench: Bench) -> None:
    """With the teacher's own prompt; the sampled ids and log-probs are those without scores."""
    prompts, contexts = bench.puzzles(6), bench.prompts(6, length=64)
    asked = [
        Request(prompt, 20 + 3 * i + sample, teacher_ids=context)
        for i, (prompt, context) in enumerate(zip(prompts, contexts, strict=True))
        for sample in range(50)  # more than is decoded at a time
    ]
    how = SamplingParams(9), Role.STUDENT
    counted, repeated = bench.engine.score_counts
    steps: list[int] = []
    found: dict[int, Any] = {}

    def finished(step: int, ended: Any) -> None:
        steps.append(step)
        assert [index for index, *_ in ended] == sorted(index for index, *_ in ended)
        found.update({index: result for index, *result in ended})

    completions = bench.engine.generate(asked, *how, finished=finished)
    assert len(set(steps)) == len(steps)
    assert steps == sorted(steps)
    assert [found[i][0] for i in range(len(asked))] == completions
    assert bench.engine.score_counts == (counted + len(asked), repeated)
    assert list(found) != sorted(found), "each is handed over as it ends"
    for index in range(0, len(asked), 17):
        ids, scores = completions[index].token_ids, found[index][1]
        expected = bench.truth(asked[index].teacher_ids, ids, Role.TEACHER)
        assert list(scores.logprobs) == pytest.approx(expected, abs=1e-4)
    plain = bench.engine.generate([Request(r.prompt_ids, r.seed) for r in asked], *how)
    assert [c.token_ids for c in plain] == [c.token_ids for c in completions]


def test_scoring_at_another_temperature_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="temperature 1"):
        bench.engine.score([(1,)], [(2,)], Role.TEACHER, 0.5)


def test_what_vllm_refuses_is_one_clear_error_and_it_lives_on(bench: Bench) -> None:
    restarts = bench.engine.restarts
    with pytest.raises(UserError, match="vLLM") as caught:
        bench.engine.score([(5,) * 300], [(6,)], Role.TEACHER)
    assert caught.value.exit_code == EXIT_FAILED
    assert bench.engine.score([(5, 6)], [(7,)], Role.TEACHER)
    assert bench.engine.restarts == restarts


def test_a_killed_process_restarts_with_the_current_weights(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, process = bench.engine, bench.engine.restarting
    monkeypatch.setattr(process, "max_restarts", process.restarts + 1)
    bench.change(seed=70)
    bench.sync()
    asked = [Request(p, i) for i, p in enumerate(bench.puzzles(4))]
    before = engine.generate(asked, SamplingParams(8), Role.STUDENT)
    os.killpg(engine.process.popen.pid, signal.SIGKILL)
    after = engine.generate(asked, SamplingParams(8), Role.STUDENT)
    assert [c.token_ids for c in after] == [c.token_ids for c in before]
    assert after[0].logprobs == pytest.approx(before[0].logprobs, abs=1e-4)
    assert "SIGKILL" in caplog.messages[0]
    assert "restarted with the current weights" in caplog.messages[0]


def test_a_process_that_dies_too_often_is_an_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = bench.engine.restarting
    monkeypatch.setattr(process, "max_restarts", process.restarts)
    os.killpg(bench.engine.process.popen.pid, signal.SIGKILL)
    times = f"restarted {process.restarts} times" if process.restarts else "process died: "
    for _ in range(2):  # and the same when it is called again
        with pytest.raises(UserError, match=times) as caught:
            bench.sync()
        assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_full_weights_reach_the_engine_tied_embeddings_too(weights_bench: Bench) -> None:
    check_full_weights(weights_bench)
    os.killpg(weights_bench.engine.process.popen.pid, signal.SIGKILL)
    assert student_error(weights_bench) < 1e-4, "the process that replaces it gets them too"
    with torch.no_grad():
        weights_bench.policy.student.get_input_embeddings().weight.mul_(0.9)
    assert student_error(weights_bench) > 1e-2, "not synced: the engine must now be wrong"


def test_full_weights_reach_both_workers() -> None:
    bench = make_bench("--no-trainer.model.lora", "--inference.parallel.tp", "2")
    try:
        assert student_error(bench) < 1e-4, "before the first step it has them from the disk"
        check_full_weights(bench)
    finally:
        bench.engine.close()


def check_full_weights(bench: Bench) -> None:
    """In one chunk and in several."""
    policy = bench.policy
    assert "lm_head.weight" not in dict(policy.weights()), "the shipped model's are tied"
    for seed, bench.engine.sender.chunk_bytes in ((1, 1 << 30), (2, 1 << 20)):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in policy.weights():
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        bench.sync()
        assert student_error(bench) < 1e-4


def test_two_workers_give_what_one_does() -> None:
    """tp = 2: adapters reach both, on and off agree with the trainer."""
    bench = make_bench("--inference.parallel.tp", "2")
    try:
        bench.change(seed=3)
        bench.sync()
        prompts = bench.prompts(4, length=24)
        heads, tails = [p[:12] for p in prompts], [p[12:] for p in prompts]
        for role in (Role.STUDENT, Role.TEACHER):
            found = bench.engine.score(heads, tails, role)
            for head, tail, scores in zip(heads, tails, found, strict=True):
                assert scores == pytest.approx(bench.truth(head, tail, role), abs=1e-4)
    finally:
        bench.engine.close()

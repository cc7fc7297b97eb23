"""The student reads no token of a context, and the teacher reads it once: with every environment.

One run has an environment of each kind, each with a context of its own. What reaches the engine and
every pass of the model is read back as text.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import fake_textarena
from support.agents import PROGRAM
from transformers.models.llama.modeling_llama import LlamaModel

from minidistill import cli
from minidistill.driver import build
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.errors import EXIT_OK
from minidistill.evaluation.evaluator import Evaluator
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import Policy
from minidistill.types import Role

SECRET = "Secret of "
SMALL = "num_train_examples = 8, num_eval_examples = 2"
FILE = 'path = "rows.jsonl", num_eval_examples = 2'
KINDS = {
    "single": f'id = "sokoban-env", args = {{ {SMALL}, rules = "omit" }}',
    "turns": f'id = "sokoban-env", args = {{ {SMALL}, mode = "multi", max_turns = 2 }}',
    "lake": f'id = "frozen-lake-env", args = {{ {SMALL}, max_turns = 2 }}',
    "arena": f'id = "textarena", args = {{ game = "Dice-v0", {SMALL}, max_turns = 2 }}',
    "restarts": 'id = "support.multi_turn:load", args = { forgets = true }',
    "file": f'id = "jsonl", args = {{ {FILE} }}',
    "rows": f'id = "dataset", args = {{ {FILE}, context_column = "hint" }}',
    "examples": f'id = "dataset", args = {{ {FILE} }}, examples = '
    f'{{ path = "rows.jsonl", k = 1, template = "{SECRET}examples: {{prompt}} {{answer}}" }}',
    "agent": f'id = "agent", args = {{ command = {json.dumps(PROGRAM)}, strip = "context", '
    'path = "tasks.jsonl", num_eval_examples = 2 }',
    "self": 'id = "self-prompts", args = { path = "prompts.jsonl", num_eval_examples = 2 }',
}
if find_spec("reasoning_gym"):
    KINDS["gym"] = f'id = "reasoning-gym", args = {{ dataset = "spell_backward", {SMALL} }}'
CONTEXTS = {"rows": "{context}", "examples": "{examples}"}
"""Of kinds whose contexts are not in the configuration."""

TOML = """
max_steps = 1
seq_len = 640
model.attn = "eager"
trainer.loss.adv_tau = 0.0
orchestrator.rollouts_per_example = 2
orchestrator.sampling.max_tokens = 12
orchestrator.buffer.skip_verification = true
orchestrator.eval = { interval = 0, num_examples = 2 }
orchestrator.batch_size = """


def table(kind: str) -> str:
    context = CONTEXTS.get(kind, f"{SECRET}{kind}: be quick. ")
    keys = KINDS[kind].replace(", args = ", "\nargs = ").replace(", examples = ", "\nexamples = ")
    return f'[[orchestrator.env]]\nname = "{kind}"\nweight = 1\ncontext = "{context}"\n{keys}\n'


class Reading:
    """What each role has read, as token ids, from the first evaluation on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.on, self.roles = False, [Role.STUDENT]
        self.asked: list[tuple[Role, list[int]]] = []
        self.passed: list[tuple[Role, list[int]]] = []
        self.tokenizer: Any = None
        generate, forward, running_as = (
            EmbeddedEngine.generate, LlamaModel.forward, Policy.running_as,
        )  # fmt: skip
        answers, init = Evaluator.teacher_answers, PromptBuilder.__init__

        def keep_tokenizer(builder: Any, tokenizer: Any, *rest: Any, **more: Any) -> None:
            self.tokenizer = tokenizer
            init(builder, tokenizer, *rest, **more)

        def begin(evaluator: Any) -> Any:
            self.on = True
            return answers(evaluator)

        def asking(engine: Any, requests: Any, params: Any, role: Role, *rest: Any) -> Any:
            if self.on:
                self.asked += [(role, list(r.prompt_ids)) for r in requests]
            return generate(engine, requests, params, role, *rest)

        @contextlib.contextmanager
        def running(policy: Any, role: Role) -> Iterator[None]:
            self.roles.append(role)
            with running_as(policy, role):
                yield
            self.roles.pop()

        def passing(model: Any, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
            if self.on:
                masks = [None] * len(input_ids) if attention_mask is None else attention_mask
                for ids, mask in zip(input_ids, masks, strict=True):
                    own = ids if mask is None or len(mask) != len(ids) else ids[mask.bool()]
                    self.passed.append((self.roles[-1], own.tolist()))
            return forward(model, input_ids, attention_mask=attention_mask, **rest)

        patch.setattr(PromptBuilder, "__init__", keep_tokenizer)
        patch.setattr(Evaluator, "teacher_answers", begin)
        patch.setattr(EmbeddedEngine, "generate", asking)
        patch.setattr(Policy, "running_as", running)
        patch.setattr(LlamaModel, "forward", passing)
        # nothing is read from a cache, so a row has all that its role reads
        patch.setattr(build, "PrefixCache", lambda policy, **_: PrefixCache(policy, shares=False))

    def texts(self, rows: list[tuple[Role, list[int]]], role: Role) -> list[str]:
        """Without those of a few tokens, with which a completion goes on."""
        return [self.tokenizer.decode(ids) for of, ids in rows if of is role and len(ids) > 4]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reading, Path]]:
    folder = tmp_path_factory.mktemp("contexts")
    lines = [
        {"prompt": f"How are you, {i}?", "answer": "Well.", "hint": f"{SECRET}rows: {i} is odd. "}
        for i in range(10)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [
        {"question": f"How old is {i}?", "system": f"{SECRET}agent: be quick. ", "turns": 2}
        for i in range(10)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    prompts = [{"prompt": f"Tell me a story of {i} bears."} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    config = folder / "config.toml"
    config.write_text(f"{TOML}{4 * len(KINDS)}\n" + "".join(map(table, KINDS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "textarena", fake_textarena)
        reading = Reading(patch)
        assert cli.main(["run", str(config), "--output_dir", str(folder / "run")]) == EXIT_OK
        yield reading, folder / "run"


def kinds_in(text: str) -> Counter[str]:
    """The kinds whose contexts are in a text, and how often."""
    return Counter(part.split(":")[0] for part in text.split(SECRET)[1:])


def test_every_kind_is_trained_on(read: tuple[Reading, Path]) -> None:
    lines = (read[1] / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    rollouts = [json.loads(line) for line in lines]
    assert {r["env"] for r in rollouts} == set(KINDS)
    assert {r["env"] for r in rollouts if r.get("inserted")} >= {"turns", "lake", "arena", "agent"}
    assert {r["env"] for r in rollouts if r.get("part")} == {"restarts"}
    for r in rollouts:
        assert kinds_in(r["prompt_text"] + r["completion"]) == {}
        assert kinds_in(r["teacher_prompt_text"]) == {r["env"]: 1}


@pytest.mark.parametrize("place", ["asked", "passed"], ids=["engine", "passes"])
def test_the_student_reads_no_context(read: tuple[Reading, Path], place: str) -> None:
    rows = getattr(read[0], place)
    for role in (Role.STUDENT, Role.BASE):
        texts = read[0].texts(rows, role)
        assert len(texts) > (4 * len(KINDS) if role is Role.STUDENT else 0)
        assert [text for text in texts if kinds_in(text)] == []


@pytest.mark.parametrize("place", ["asked", "passed"], ids=["engine", "passes"])
def test_the_teacher_reads_one_context_once(read: tuple[Reading, Path], place: str) -> None:
    found = [kinds_in(text) for text in read[0].texts(getattr(read[0], place), Role.TEACHER)]
    assert {kind for each in found for kind in each} == set(KINDS)
    assert [each for each in found if each.total() != 1] == []

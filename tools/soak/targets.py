"""What reads foreign inputs, and how hostile ones are made for it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from minidistill.config import load_config
from minidistill.config import schema_tree as tree
from minidistill.config.command import show_config
from minidistill.config.toml import inline
from minidistill.errors import UserError
from tools.soak import mutate
from tools.soak.commands import CONFIG, ROOT

PROMPTS = [
    {"prompt": "Name a colour.", "answer": "red", "id": "colour"},
    {"prompt": "Rain or snow?", "answer": "rain", "topic": "weather"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2"}]}], "answer": "4"},
    {"prompt": "x", "answer": "^a+$", "id": 7},
]  # fmt: skip
REWARDS = (None, "none", "exact", "regex", "contains", "length", "json")


def _ready() -> None:
    """Nothing to prepare."""


@dataclass(frozen=True, slots=True)
class Target:
    """`make` makes an input, the same for the same generator; `run` reads it.

    `run` returns or raises UserError; all else is a finding.
    """

    name: str
    make: Callable[[Random], Any]
    run: Callable[[Any], None]
    prepare: Callable[[], None] = _ready


def targets(folder: Path) -> list[Target]:
    """All targets, which keep their files in `folder`."""
    from tools.soak.targets_run import run_targets
    from tools.soak.targets_server import server_target

    folder.mkdir(parents=True, exist_ok=True)
    own = Configurations(folder), Overrides(), Prompts(folder), Templates(), Models(folder)
    plain = [Target(t.name, t.make, t.run, getattr(t, "prepare", _ready)) for t in own]
    return [*plain, *run_targets(folder), server_target(folder)]


class Configurations:
    """TOML files, made from the shipped ones."""

    name = "configuration"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "fuzzed.toml"
        self.sources = [p.read_bytes() for p in sorted((ROOT / "configs").glob("*.toml"))]
        self.words = [
            *(b".".join(str(p).encode() for p in path) for path, _ in tree.walk()),
            b"[[orchestrator.env]]", b"[orchestrator.eval]", b"[model]", b"= {", b'"""', b"'''",
        ]  # fmt: skip

    def make(self, random: Random) -> bytes:
        source = random.choice(self.sources)
        if random.random() < 0.4:
            import tomli

            try:
                return mutate.encode(_toml(mutate.change(random, tomli.loads(source.decode()))))
            except (UserError, TypeError, ValueError, RecursionError, AttributeError):
                pass  # not every value can be written as TOML
        return mutate.damage(random, source, self.words)

    def run(self, data: bytes) -> None:
        self.path.write_bytes(data)
        _show(load_config([str(self.path)]))


def _toml(data: Any) -> str:
    import tomli_w

    return tomli_w.dumps(data)


class Overrides:
    """Dotted flags, of the schema's keys and of others."""

    name = "overrides"

    def __init__(self) -> None:
        self.keys = [".".join("0" if p == "*" else str(p) for p in path) for path, _ in tree.walk()]

    def make(self, random: Random) -> list[str]:
        flags = [CONFIG]
        for _ in range(random.randint(1, 4)):
            key = random.choice(self.keys)
            if random.random() < 0.3:
                damaged = mutate.damage(random, key.encode())[:200_000]
                key = damaged.decode("utf-8", "surrogateescape").replace("\0", "")
            flag = f"--{key}" if random.random() < 0.9 else f"--no-{key}"
            written = mutate.value(random)
            text = written if isinstance(written, str) else _flag_value(random, written)
            text = text.replace("\0", "")
            shape = random.randrange(4)
            flags += [f"{flag}={text}"] if shape == 0 else [flag] if shape == 1 else [flag, text]
        return flags

    def run(self, argv: list[str]) -> None:
        _show(load_config(argv))


def _flag_value(random: Random, value: Any) -> str:
    with contextlib.suppress(TypeError, ValueError, UserError):
        if random.random() < 0.5:
            return inline(value)
    return json.dumps(value)


def _show(loaded: Any) -> None:
    """Everything that only reads a configuration."""
    loaded.resolved()
    with contextlib.redirect_stdout(io.StringIO()):
        show_config(loaded, as_data=True)


class Prompts:
    """Files of prompts for the environment `jsonl`, and completions that are scored with them."""

    name = "prompts"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "prompts.jsonl"

    def make(self, random: Random) -> dict[str, Any]:
        lines: list[bytes] = []
        for row in random.choices(PROMPTS, k=random.randint(1, 6)):
            row = mutate.change(random, row) if random.random() < 0.5 else row
            lines.append(mutate.encode(mutate.as_json(random, row)))
        data = b"\n".join(lines)
        if random.random() < 0.4:
            data = mutate.damage(random, data)
        reward: Any = random.choice(REWARDS)
        if random.random() < 0.3:
            reward = mutate.change(random, {"type": reward or "regex", "max": 3, "min": 1})
        return {
            "data": data.decode("latin-1"),
            "reward": reward,
            "completion": random.choice(mutate.TEXTS),
        }

    def run(self, value: dict[str, Any]) -> None:
        from minidistill.envs.registry import load_environment

        self.path.write_bytes(value["data"].encode("latin-1"))
        args = {"path": str(self.path), "num_eval_examples": 1, "reward": value["reward"]}
        environment = load_environment("jsonl", args)
        for task in [*environment.train, *environment.eval]:
            # a regular expression may take for ever: runs match those in another process
            if getattr(environment, "scores_in_process", False):
                environment.score(task, value["completion"])


class Templates:
    """Chat templates, made from real ones, with the messages of a task."""

    name = "chat template"

    def prepare(self) -> None:
        assert self.tokenizer is not None

    @cached_property
    def tokenizer(self) -> Any:
        from minidistill.models.hub import load_tokenizer

        return load_tokenizer(load_config([CONFIG]).config)

    @cached_property
    def sources(self) -> list[bytes]:
        shipped = str(self.tokenizer.chat_template).encode()
        return [shipped, *(text.encode() for text in TEMPLATES)]

    def make(self, random: Random) -> bytes:
        return mutate.damage(random, random.choice(self.sources), JINJA)

    def run(self, data: bytes) -> None:
        import copy

        from minidistill.tasks.prompts import PromptBuilder
        from minidistill.types import Task

        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = data.decode("utf-8", "replace")
        builder = PromptBuilder(tokenizer, "Think.\n", "user")
        task = Task("t", ({"role": "user", "content": "hello <|im_end|>"},))
        prompt = builder.build("env", task)
        builder.student.generation_prompt(task.messages)
        builder.student.unopened_turn(task.messages)
        assert isinstance(builder.end_of_turn_ids, frozenset)
        builder.decode(prompt.student_ids)


class Models:
    """A model's configuration and its tokenizer's files: what the hub gives."""

    name = "model"
    files = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "model"

    def prepare(self) -> None:
        from minidistill.models.registry import resolve

        self.source = Path(resolve("tiny-sokoban"))
        shutil.copytree(self.source, self.folder, dirs_exist_ok=True)
        # the imports that this needs take longer than an input may
        self.run({"file": "config.json", "data": (self.source / "config.json").read_text()})

    def make(self, random: Random) -> dict[str, Any]:
        names = [name for name in self.files if (self.source / name).exists()]
        name = random.choice(names)
        data = (self.source / name).read_bytes()
        if random.random() < 0.7:
            changed = mutate.change(random, json.loads(data), ("auto_map", "model_type"))
            data = mutate.encode(mutate.as_json(random, changed))
        else:
            data = mutate.damage(random, data)
        return {"file": name, "data": data.decode("latin-1")}

    def run(self, value: dict[str, Any]) -> None:
        from minidistill.models.hub import load_tokenizer
        from minidistill.placement.machine import GIB, Machine
        from minidistill.placement.planner import plan_run

        path = self.folder / value["file"]
        path.write_bytes(value["data"].encode("latin-1"))
        try:
            loaded = load_config([CONFIG, "--model.name", str(self.folder)])
            if value["file"] == "config.json":
                machine = Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False)
                plan_run(loaded, machine)
            else:
                load_tokenizer(loaded.config)
        finally:
            shutil.copyfile(self.source / value["file"], path)


TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} "
    "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
    "{{ ns.n }}: {{ m['content'] | upper }}\n{%- endfor -%}{{ strftime_now('%Y') }}",
)
# None that never ends: see docs/security.md.
JINJA: Sequence[bytes] = (
    b"{{ 1 / 0 }}", b"{{ messages[9] }}", b"{{ messages[9].x.y }}", b"{{ ''.__class__.__mro__ }}",
    b"{{ raise_exception('no\\nyes') }}", b"{{ 'a' * 10 ** 9 }}", b"{{ range(10 ** 9) | list }}",
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", b"{% include 'x' %}", b"{% import 'os' %}",
    b"{{ lipsum(9) }}", b"{{ cycler.__init__.__globals__ }}", b"{{ x | nothing }}", b"{% endfor %}",
    b"{{ tools | tojson }}", b"{{ messages | tojson }}", b"{% break %}",
    b"{% generation %}", b"{{ '\\ud800' }}", b"{{ strftime_now(1) }}", b"{{ -x }}", b"{{ self }}",
    b"{{ messages.append(1) }}", b"{% block a %}{% endblock %}", b"{{ '%9999d' % 1 }}",
    b"{{ '{:>9999}'.format(1) }}",
)  # fmt: skip

"""What `bake` makes of a model, a context and little else, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli

from minidistill.baking import BakePlan, bake_configuration
from minidistill.baking.context import name_of, read_context
from minidistill.baking.document import commented, document
from minidistill.baking.flags import in_flags
from minidistill.config import load_config
from minidistill.envs import load_environment
from minidistill.errors import UserError
from minidistill.placement.machine import GIB, Machine

CONTEXT = "You are a world-class puzzle solver."


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current directory on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    on_machine(monkeypatch, gpus=0)


def on_machine(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    machine = replace(Machine.imagined(gpus or None, 80 * GIB if gpus else None), gpus=gpus)
    monkeypatch.setattr(Machine, "local", classmethod(lambda cls: machine))


def bake(context: str | Path = CONTEXT, **arguments: Any) -> BakePlan:
    return bake_configuration("tiny-sokoban", context, **arguments)


def refused(**arguments: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        bake(**arguments)
    return caught.value


# -- the configuration -------------------------------------------------------------------------


def test_a_model_and_a_context_are_all_that_it_needs() -> None:
    config = bake().loaded.config
    assert config.model.name == "tiny-sokoban"
    loss, orchestrator = config.trainer.loss, config.orchestrator
    assert (loss.adv_tau, loss.teacher_tau, loss.student_tau) == (0, 1, 1)
    assert orchestrator.buffer.skip_verification
    assert orchestrator.teacher_model.context == f"\n\n{CONTEXT}"
    assert orchestrator.teacher_model.context_placement == "system"
    assert [env.id for env in orchestrator.env] == ["self-prompts"]
    assert orchestrator.eval is not None
    assert orchestrator.eval.env is not None
    assert [env.id for env in orchestrator.eval.env] == ["questions"]
    assert not Path("runs").exists(), "nothing is written"


def test_the_text_loads_again_to_the_same_settings(tmp_path: Path) -> None:
    plan = bake(steps=7, overrides=["--trainer.optim.lr", "2e-4", "--seed", "3"])
    file = tmp_path / "again.toml"
    file.write_text(plan.text)
    assert load_config([str(file)]).config == plan.loaded.config
    data = tomli.loads(plan.text)
    assert (data["max_steps"], data["seed"], data["trainer"]["optim"]["lr"]) == (7, 3, 2e-4)
    assert data["output_dir"] == "runs/you-are-a-world"
    assert "# Before and after training" in plan.text


def test_where_each_setting_is_from() -> None:
    provenance = bake(steps=7, overrides=["--seed", "3"]).loaded.provenance
    assert provenance["model.name"] == "--model"
    assert provenance["orchestrator.teacher_model.context"] == "--context"
    assert provenance["max_steps"] == "--steps"
    assert provenance["seed"] == "--seed"
    assert provenance["trainer.optim.lr"] == "bake's default"
    assert provenance["output_dir"] == "--out"


def test_overrides_as_values() -> None:
    plan = bake(overrides={"trainer.optim.lr": 3e-4, "ckpt": {"keep": 5}})
    assert (plan.loaded.config.trainer.optim.lr, plan.loaded.config.ckpt.keep) == (3e-4, 5)


def test_without_an_adapter_the_rate_is_not_one_for_adapters() -> None:
    config = bake(overrides=["--no-trainer.model.lora"]).loaded.config
    assert config.trainer.peak_lr == 5e-5
    chosen = bake(overrides=["--no-trainer.model.lora", "--trainer.optim.lr", "1e-4"])
    assert chosen.loaded.config.trainer.peak_lr == 1e-4


def test_a_gpu_has_other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = bake().loaded.config.orchestrator
    on_machine(monkeypatch, gpus=1)
    on_gpu = bake().loaded.config.orchestrator
    assert on_gpu.batch_size > on_cpu.batch_size
    assert on_gpu.sampling.max_tokens > on_cpu.sampling.max_tokens


def test_a_template_without_system_messages_has_the_context_before_the_prompt() -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    Path("template.jinja").write_text(template)
    overrides = ["--model.chat_template", "template.jinja"]
    teacher = bake(overrides=overrides).loaded.config.orchestrator.teacher_model
    assert (teacher.context_placement, teacher.context) == ("user", f"{CONTEXT}\n\n")
    # but not where the user says otherwise
    overrides += ["--orchestrator.teacher_model.context_placement", "system"]
    teacher = bake(overrides=overrides).loaded.config.orchestrator.teacher_model
    assert teacher.context_placement == "system"
    flags = ["--orchestrator.teacher_model.context_placement", "user"]
    assert (
        bake(overrides=flags).loaded.config.orchestrator.teacher_model.context == f"{CONTEXT}\n\n"
    )


def test_a_model_that_thinks_answers_at_once() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}\n{% endif %}{% endif %}"
    )
    Path("template.jinja").write_text(template)
    flags = ["--model.chat_template", "template.jinja"]
    assert bake(overrides=flags).loaded.config.model.chat_template_kwargs == {
        "enable_thinking": False
    }
    flags += ["--model.chat_template_kwargs.enable_thinking", "true"]
    assert bake(overrides=flags).loaded.config.model.chat_template_kwargs == {
        "enable_thinking": True
    }
    assert bake().loaded.config.model.chat_template_kwargs == {}


def test_a_long_context_has_room() -> None:
    long = " ".join(["<|board|>#"] * 3000)
    config = bake(long).loaded.config
    assert config.seq_len > 3000
    assert config.seq_len % 256 == 0
    assert bake(long, overrides=["--seq_len", "64"]).loaded.config.seq_len == 64


# -- the run's directory -----------------------------------------------------------------------


def test_no_run_is_written_over(tmp_path: Path) -> None:
    for expected in ("runs/you-are-a-world", "runs/you-are-a-world-2"):
        plan = bake()
        assert str(plan.directory) == expected == plan.loaded.config.output_dir
        plan.directory.mkdir(parents=True)
        (plan.directory / "config.resolved.json").write_text("{}")
    assert str(bake(resume=True).directory) == "runs/you-are-a-world-2"
    error = refused(out="runs/you-are-a-world")
    assert "already holds a run" in error.what
    assert error.where == "--out"
    assert "--output_dir" not in error.fix


def test_the_file_of_the_context_names_the_run() -> None:
    Path("My Persona.v2.txt").write_text("Be brief.\n")
    assert bake("My Persona.v2.txt").directory == Path("runs/my-persona-v2")


@pytest.mark.parametrize(
    ("text", "name"),
    [("Réponds en français!", "reponds-en-francais"), ("海賊のように話す", "bake"), ("../x", "x")],
)
def test_any_text_gives_a_name(text: str, name: str) -> None:
    assert name_of(text, text) == name


# -- the context -------------------------------------------------------------------------------


def test_a_path_is_read_and_any_other_text_is_the_context() -> None:
    Path("persona.txt").write_text("\ufeff  Be brief.\r\nBe kind.\n")
    assert read_context("persona.txt") == read_context(Path("persona.txt")) == "Be brief.\nBe kind."
    assert read_context(" Answer yes/no, see notes.txt ") == "Answer yes/no, see notes.txt"


@pytest.mark.parametrize("path", ["persona.txt", "rules.MD", "a/b", "~/persona"])
def test_what_looks_like_a_path_is_no_context(path: str) -> None:
    error = refused(context=path)
    assert error.what == f"there is no file {path}"
    assert error.where == "--context"


def test_a_word_that_names_a_text_file_without_its_ending() -> None:
    Path("persona.md").write_text("Be brief.")
    assert refused(context="persona").fix.startswith("name the file, --context persona.md")
    assert read_context("persona non grata") == "persona non grata"


@pytest.mark.parametrize("context", ["", " \n", "\udce4 x", "empty.txt", Path("missing"), "folder"])
def test_contexts_that_cannot_be_used(context: str | Path) -> None:
    Path("empty.txt").write_text("\n")
    Path("folder").mkdir()
    assert refused(context=context).where == "--context"


# -- prompts -----------------------------------------------------------------------------------


def write_prompts(name: str, count: int) -> str:
    Path(name).write_text("\n\n".join(f"Question {i}?" for i in range(count)) + "\n")
    return name


def test_a_text_file_has_a_prompt_on_each_line() -> None:
    plan = bake(prompts=write_prompts("q.txt", 60))
    [env] = plan.loaded.config.orchestrator.env
    path = str(Path("q.txt").absolute())
    assert env.args == {"path": path, "format": "text", "num_eval_examples": 15}
    assert plan.loaded.provenance["orchestrator.env.0.args.path"] == "--prompts"
    assert plan.loaded.config.orchestrator.eval is not None
    assert plan.loaded.config.orchestrator.eval.env is None, "held out of the same file"
    read = load_environment("jsonl", env.args)
    tasks = {task.id: task.messages[0]["content"] for task in [*read.train, *read.eval]}
    # by the numbers of the lines, of which every other is empty
    assert tasks == {str(2 * i + 1): f"Question {i}?" for i in range(60)}
    assert len(read.eval) == 15


def test_few_prompts_are_all_trained_on() -> None:
    config = bake(prompts=write_prompts("q.txt", 12)).loaded.config
    assert config.orchestrator.eval is not None
    assert config.orchestrator.eval.env is not None
    assert config.orchestrator.eval.env[0].id == "questions"


def test_rows_of_a_table() -> None:
    Path("q.csv").write_text("prompt,kind\nWho?,a\nWhat?,b\n")
    assert "format" not in bake(prompts="q.csv").loaded.config.orchestrator.env[0].args


def test_prompts_that_cannot_be_used() -> None:
    Path("q.pdf").write_text("x")
    Path("q.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": 3}\n')
    Path("json.txt").write_text('{"prompt": "Who?"}\n')
    assert refused(prompts="q.pdf").where == "--prompts"
    assert refused(prompts="missing.jsonl").where == "--prompts"
    Path("none.txt").write_text("\n")
    assert refused(prompts="none.txt").fix == "write one prompt on each line"
    assert "JSON" in refused(prompts="json.txt").what
    assert "q.jsonl:2" in refused(prompts="q.jsonl").where


# -- errors ------------------------------------------------------------------------------------


def test_arguments_are_named_by_their_flags() -> None:
    error = refused(steps=0)
    assert (error.where, error.what.split(" is ")[0]) == ("--steps", "max_steps = 0")
    with pytest.raises(UserError) as caught:
        bake_configuration(str(Path("no-model").absolute()), CONTEXT)
    assert caught.value.where == "--model (model.name)"


def test_what_is_given_twice_or_is_no_setting() -> None:
    assert "both set max_steps" in refused(steps=3, overrides=["--max_steps", "4"]).what
    assert "both set model.name" in refused(overrides={"model.name": "tiny-lake"}).what
    assert "takes no file" in refused(overrides=["more.toml"]).what
    assert refused(overrides=["--trainer.lr", "1"]).fix == "did you mean `trainer.optim.lr`?"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model.name", "--model (model.name)"),
        ("choose another --output_dir, or continue", "choose another --out, or continue"),
        ("raise max_steps.", "raise --steps (max_steps)."),
        ("teacher_inference.model.name", "teacher_inference.model.name"),
        ("orchestrator.teacher_model.context_placement",) * 2,
        ("orchestrator.env.0.args.columns",) * 2,
    ],
)
def test_keys_of_errors_get_their_flags(text: str, named: str) -> None:
    assert in_flags(text) == named


# -- the document ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context",
    ['"""', "'''", "a\\b\n\tc", "\r\n", "#", "\x7f\n\x00", "trailing\n\n\n", 'ends in "\n"'],
)
def test_any_context_reads_back(context: str) -> None:
    data = {
        "max_steps": 3,
        "orchestrator": {
            "eval": {},
            "teacher_model": {"context": context, "contexts": [{"context": "x"}]},
            "env": [{"id": "jsonl", "args": {"path": "a b", "columns": {"prompt": "q"}}}],
        },
    }
    assert tomli.loads(commented(data, "Title.\n")) == data


def test_comments_stand_beside_settings_and_above_tables() -> None:
    text = document({"a": 1, "b": {"c": [1, 2]}}, "Title", {"a": "one", "b": "two"})
    assert text == f"# Title\n{'a = 1':<35} # one\n\n# two\n[b]\nc = [1, 2]\n"

"""Runs with other chat templates than the shipped one's."""

from __future__ import annotations

import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.runs import records, run

from minidistill.errors import EXIT_OK, EXIT_USAGE
from minidistill.models.registry import BUILT_IN

NO_EVALUATION = ("--no-orchestrator.teacher_model.eval_baseline", "--no-orchestrator.eval")
SHORT = ("--max_steps", "2", "--ckpt.interval", "1", *NO_EVALUATION)
# writes the time, ends turns with another token, and closes the conversation like Phi-3's
TEMPLATE = """\
<|system|>It is {{ strftime_now('%d %b %Y %H:%M:%S') }}.{{ eos_token }}
{%- for m in messages -%}<|{{ m['role'] }}|>{{ m['content'] }}
{%- if m['role'] == 'assistant' -%}<|pad|>{%- else -%}<|end|>{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- else -%}{{ eos_token }}{%- endif -%}"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped model with that template. Its tokenizer and generation config name no <|pad|>."""
    shutil.copytree(BUILT_IN["tiny-sokoban"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "model"


def set_zone(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()


def facts(path: Path) -> Any:
    return json.loads((path / "env.json").read_text())


def last_rollouts(path: Path) -> list[Any]:
    lines = (path / "rollouts" / "step_000002.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_keeps_its_date_and_ends_turns_as_the_template_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    flags = (*SHORT, "--model.name", str(folder))
    set_zone(monkeypatch, "UTC+12")
    try:
        assert run(out, *flags) == EXIT_OK
        began = datetime.fromisoformat(facts(out)["began"])
        header = dict(facts(out)["header"])
        assert header["end of turn"] == "<|pad|>, as in the chat template"
        assert header["date"].startswith(f"{began:%Y-%m-%d %H:%M:%S}")
        rollouts = last_rollouts(out)
        shown = f"It is {began:%d %b %Y %H:%M:%S}."
        assert all(shown in r["prompt_text"] for r in rollouts)
        # as if it had been stopped after the first step
        before = records(out)
        for file in (*out.glob("scoreboard*"), *out.glob("report*")):
            file.unlink()
        shutil.rmtree(out / "adapter")
        shutil.rmtree(out / "checkpoints" / "step_000002")
        set_zone(monkeypatch, "UTC-14")
        assert run(out, *flags, "--resume") == EXIT_OK
        assert records(out) == before
        assert last_rollouts(out) == rollouts
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_a_template_file_and_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE.replace("It is", "{{ greeting }} It is"))
    flags = (*SHORT[:2], *NO_EVALUATION, "--model.chat_template", str(template))
    argument = ("--model.chat_template_kwargs.greeting", "Good day.")
    assert run(tmp_path / "out", *flags, *argument) == EXIT_OK
    (line, *_) = (tmp_path / "out" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    for view in ("prompt_text", "teacher_prompt_text"):
        assert json.loads(line)[view].startswith("<|system|>Good day. It is ")
    (tmp_path / "out" / "scoreboard.json").unlink()  # as if it had not finished
    capsys.readouterr()
    assert run(tmp_path / "out", *flags, *argument[:1], "Hello.", "--resume") == EXIT_USAGE
    assert "model.chat_template_kwargs.greeting" in capsys.readouterr().err
    template.write_text(template.read_text() + "{# changed #}")
    assert run(tmp_path / "out", *flags, *argument, "--resume") == EXIT_USAGE
    assert "model.chat_template" in capsys.readouterr().err
    assert run(tmp_path / "other", *flags, "--model.chat_template_kwargs.salute", "x") == EXIT_USAGE
    assert "does not read salute" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_model_with_a_missing_weight_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert run(tmp_path / "out", "--model.name", str(folder)) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "lacks 1 weight (model.norm.weight)" in error
    assert "LOAD REPORT" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("turns", ["all", "answers"])
def test_a_template_that_writes_a_lone_surrogate_is_refused(
    turns: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In prompts, or only where an answer ends."""
    place = "<|user|>" if turns == "all" else "<|pad|>"
    template = TEMPLATE.replace("<|{{ m['role'] }}|>", "<|user|>")
    (folder / "chat_template.jinja").write_text(
        template.replace(place, f"{{{{ '\\udc80' }}}}{place}")
    )
    assert run(tmp_path / "out", "--model.name", str(folder)) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "a prompt has a lone surrogate ('\\udc80'), which is no character" in error
    assert "where: model.name" in error
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_encode_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "many"}))
    assert run(tmp_path / "out", "--model.name", str(folder)) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "the model's tokenizer cannot encode a prompt: TypeError" in error
    assert "fix: use the tokenizer that was made for the model" in error
    assert not (tmp_path / "out").exists()

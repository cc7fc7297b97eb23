"""Exported folders: what other programs load from them, and what is refused."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import BASE, export, logits, make_run, with_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from minidistill.cli import main

CONTEXT = "You are a world-class puzzle solver"


@pytest.fixture
def run(configure: Any, tmp_path: Path) -> Path:
    return make_run(configure, tmp_path / "mine")


def test_an_adapter(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "expert"
    assert export(run, target, "--base", "someone/tiny") == 0
    settings = json.loads((target / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "someone/tiny"
    saved, made = (load_file(f / "adapter_model.safetensors") for f in (target, run / "adapter"))
    assert saved.keys() == made.keys()
    assert all(torch.equal(saved[name], made[name]) for name in made)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(BASE).chat_template
    card = (target / "README.md").read_text()
    assert card.startswith('---\nbase_model: "someone/tiny"\n')
    assert "It is | closed." in card
    assert CONTEXT not in card
    for place in (str(tmp_path), BASE):
        assert place not in card + json.dumps(settings), "a path of this machine"
    out = capsys.readouterr().out
    assert "vllm serve someone/tiny --enable-lora --max-lora-rank 16 --lora-modules expert=" in out
    assert [p.name for p in target.parent.iterdir()] == ["expert"]


def test_the_context_is_quoted_if_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "--with-context") == 0
    assert CONTEXT in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("trained", ["adapter", "all weights"])
def test_a_whole_model(configure: Any, tmp_path: Path, trained: str) -> None:
    lora = trained == "adapter"
    run = make_run(configure, tmp_path / "mine", *([] if lora else ["--no-trainer.model.lora"]))
    target = tmp_path / "out"
    assert export(run, target, *(["--merge"] if lora else [])) == 0
    merged = AutoModelForCausalLM.from_pretrained(target)
    source = (
        with_adapter(run / "adapter")
        if lora
        else AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    )
    expected = logits(source)
    torch.testing.assert_close(logits(merged).float(), expected, rtol=0, atol=2e-4)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    assert merged.dtype == base.dtype
    assert float((logits(base) - expected).abs().max()) > 0.1, "the run has trained nothing"
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert not (target / "adapter_config.json").exists()


def test_weights_that_do_not_compute_the_same_are_not_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minidistill.export import command

    def damage(source: Any, folder: Path, base: Any) -> None:
        real(source, folder, base)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(n for n in tensors if "lora_B" in n)
        save_file({**tensors, name: tensors[name] * 1.5}, file)

    real = command._write_adapter
    monkeypatch.setattr(command, "_write_adapter", damage)
    target = tmp_path / "out" / "expert"
    assert export(run, target) == 4
    assert "the KL of its log-probs is" in capsys.readouterr().err
    assert not list(target.parent.iterdir()), "nothing is left"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(
    run: Path, tmp_path: Path, value: float
) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, file)
    assert export(run, tmp_path / "out") == 4
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_no_full_disk(
    configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(configure, tmp_path / "run")
    settings = run / "adapter" / "adapter_config.json"
    tensors = run / "adapter" / "adapter_model.safetensors"
    for file, text in ((settings, "[]"), (settings, "{}"), (tensors, "cut")):
        before = file.read_bytes()
        file.write_text(text)
        assert export(run, tmp_path / "out") == 3
        error = capsys.readouterr().err
        assert f"{file.name} is damaged" in error
        assert "disk" not in error
        file.write_bytes(before)


def test_what_cannot_be_exported(
    configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    loaded = configure("--no-trainer.model.lora")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.toml").write_text(loaded.text)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    run = make_run(configure, tmp_path / "run")
    for source, target, code, what in (
        (empty, "out", 2, "is not a run directory"),
        (tmp_path / "none", "out", 2, "is not a run directory"),
        (unfinished, "out", 2, "has not finished"),
        (run, "taken", 2, "is there already"),
    ):
        assert export(source, tmp_path / target) == code
        assert what in capsys.readouterr().err
    assert (taken / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run)]) == 2
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--mergee"]) == 2
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--base", ""]) == 2
    assert not (tmp_path / "out").exists()


def test_gguf_is_made_by_the_converter_on_the_path(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert export(run, tmp_path / "out", "--gguf") == 3
    assert "convert_hf_to_gguf.py is not on the PATH" in capsys.readouterr().err
    script = tools / "convert_hf_to_gguf.py"
    script.write_text('#!/bin/sh\ncp "$1/model.safetensors" "$3"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    assert export(run, tmp_path / "out", "--gguf") == 0
    merged = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.gguf").read_bytes() == merged
    script.write_text('#!/bin/sh\necho "no such architecture" >&2\nexit 1\n')
    assert export(run, tmp_path / "again", "--gguf") == 3
    assert "no such architecture" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_pushing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    calls: list[Any] = []

    def upload(self: Any, **arguments: Any) -> str:
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError("the hub cannot be reached")
        return "https://hub.example/me/mine"

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **more: calls.append((name, more))
    )
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert export(run, tmp_path / "out", "--push", "me/mine") == 3
    assert "there is no token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    assert export(run, tmp_path / "out", "--push", "me/mine") == 2
    assert "name its id on the hub with --base" in capsys.readouterr().err
    pushed = ("--push", "me/mine", "--base", "someone/tiny")
    assert export(run, tmp_path / "out", *pushed) == 0
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert calls[1] == {"folder_path": tmp_path / "out", "repo_id": "me/mine"}
    assert "pushed: https://hub.example/me/mine" in capsys.readouterr().out
    assert 'pipeline("text-generation", "me/mine")' in (tmp_path / "out" / "README.md").read_text()
    assert export(run, tmp_path / "again", *pushed) == 3
    assert "the hub cannot be reached" in capsys.readouterr().err
    assert (tmp_path / "again" / "README.md").is_file(), "what was exported is kept"


def test_exports_beside_each_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second export begins and ends while the first one checks its folder."""
    from minidistill.export import check

    real, folder = check.in_transformers, tmp_path / "exports"
    folder.mkdir()
    mine = folder / "notes.0123abcd.tmp"
    mine.write_text("mine")
    others: list[str] = []

    def load(*args: Any, **more: Any) -> Any:
        if others:
            assert export(run, folder / others.pop()) == 0
        return real(*args, **more)

    monkeypatch.setattr(check, "in_transformers", load)
    others.append("second")
    assert export(run, folder / "first") == 0
    assert {p.name for p in folder.iterdir()} == {"first", "second", mine.name}
    capsys.readouterr()
    others.append("third")
    assert export(run, folder / "third") == 2
    assert "third is there already" in capsys.readouterr().err
    assert {p.name for p in folder.iterdir()} == {"first", "second", "third", mine.name}


def test_a_run_that_goes_on_may_remove_what_is_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minidistill.export import command

    real = command._trained

    def trained(source: Any) -> Any:
        model = real(source)
        shutil.rmtree(source.weights)
        return model

    monkeypatch.setattr(command, "_trained", trained)
    assert export(run, tmp_path / "out" / "expert") == 3
    assert "has been removed while it was exported" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_the_card_names_no_place_of_this_machine(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    data.write_text("{}\n")
    file = run / "config.toml"
    known = 'rules = "omit"\n'
    more = f'path = "{data}"\ncommand = ["/no-such-program", "{data}", "a/b\\n"]\n'
    text = file.read_text()
    assert text.count(known) == 1
    file.write_text(text.replace(known, known + more))
    assert export(run, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert 'path = "tasks.jsonl"' in card
    assert '"a/b\\n"' in card


def test_commands_name_any_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with quotes, other writing systems, and what would leave the card's code."""
    name = "it's 😀 $(touch x) ```\n```"
    odd = run.rename(run.parent / "my\n# run \u202e")
    assert export(odd, tmp_path / name, "--base", "someone/tiny") == 0
    card = (tmp_path / name / "README.md").read_text()
    assert "\n# my # run\n" in card
    serve, load = re.findall(r"(?ms)^````bash\n(.*?)\n````$", card)
    assert shlex.split(serve)[-1] == f"{name}={name}"
    *_, code = shlex.split(load)
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert name in constants


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time; time.sleep(600)", "what was exported within 0.5 s"),
        ("raise SystemExit('no such model')", "what was exported; last output: no such model"),
        ("print('nothing')", "what was exported; last output: nothing"),
    ],
)
def test_vllm_that_does_not_answer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from minidistill.export import check

    (tmp_path / "not_vllm.py").write_text(program)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(check, "CHECK", "not_vllm")
    monkeypatch.setattr(check, "VLLM_SECONDS", 0.5 if "within" in said else 60.0)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: object())
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 4
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

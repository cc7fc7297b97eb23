"""The names of a base in what is exported, and the commands that are printed and written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import BASE, export, logits, make_run, with_adapter

from minidistill.cli import main


@pytest.fixture
def run(configure: Any, tmp_path: Path) -> Path:
    return make_run(configure, tmp_path / "mine")


def base_of(folder: Path) -> str:
    settings = json.loads((folder / "adapter_config.json").read_text())
    return str(settings["base_model_name_or_path"])


def execute(line: str) -> dict[str, Any]:
    """What a `python -c` line has defined when it ends."""
    program, flag, code = shlex.split(line)
    assert (program, flag) == ("python", "-c")
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def commands(card: str) -> list[str]:
    return re.findall(r"(?ms)^```bash\n(.*?)\n```$", card)


@pytest.mark.parametrize("flags", [[], ["--merge"]], ids=["adapter", "merged"])
def test_the_python_that_is_printed_asks_what_was_exported(
    run: Path,
    tmp_path: Path,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(run, tmp_path / "out" / "expert", *flags) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  python -c ")]
    assert str(tmp_path) not in line, "below the current directory paths are relative"
    answer = execute(line.strip())["answer"]
    assert "'generated_text': " in capsys.readouterr().out
    expected = logits(with_adapter(run / "adapter"))
    torch.testing.assert_close(logits(answer.model).float(), expected, rtol=0, atol=2e-4)
    assert answer.tokenizer.chat_template


def test_the_card_is_right_in_its_own_folder_and_names_no_path_in_full(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the folder is moved together with its base."""
    first, later = tmp_path / "here", tmp_path / "there"
    shutil.copytree(BASE, first / "models" / "tiny")
    file = run / "config.toml"
    name = f'[model]\nname = "{first / "models" / "tiny"}"\n'
    file.write_text(file.read_text().replace('[model]\nname = "tiny-sokoban"\n', name))
    assert str(first) in file.read_text()
    assert export(run, first / "exported" / "expert") == 0
    first.rename(later)
    folder = later / "exported" / "expert"
    assert base_of(folder) == "../../models/tiny"
    card = (folder / "README.md").read_text()
    assert str(tmp_path) not in card + (folder / "adapter_config.json").read_text()
    assert "makes tiny behave" in card
    assert "base_model:" not in card, "the hub takes no path there"
    monkeypatch.chdir(folder)
    serve, load = commands(card)
    assert shlex.split(serve)[:3] == ["vllm", "serve", "../../models/tiny"]
    assert shlex.split(serve)[-1] == "expert=."
    expected = logits(with_adapter(run / "adapter"))
    torch.testing.assert_close(logits(execute(load)["answer"].model), expected, rtol=0, atol=2e-4)
    # as transformers reads it where only the folder is named
    from transformers import pipeline

    model = pipeline("text-generation", ".").model
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-4)


def test_a_base_in_the_hubs_cache_has_its_id(run: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--someone--tiny-model" / "snapshots" / "0a1b"
    shutil.copytree(BASE, snapshot)
    file = run / "config.toml"
    file.write_text(file.read_text().replace('"tiny-sokoban"', f'"{snapshot}"', 1))
    assert export(run, tmp_path / "out") == 0
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "someone/tiny-model"
    assert settings["revision"] == "0a1b"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "someone/tiny-model"\n')
    serve, _ = commands(card)
    assert serve.startswith("vllm serve someone/tiny-model --revision 0a1b --enable-lora ")


def test_a_link_leads_to_the_base_too(run: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "disk").mkdir(parents=True)
    (tmp_path / "exports").symlink_to(tmp_path / "deep" / "disk")
    assert export(run, tmp_path / "exports" / "expert") == 0
    folder = tmp_path / "exports" / "expert"
    assert (folder / base_of(folder) / "config.json").is_file()


@pytest.mark.vllm
@pytest.mark.parametrize("flags", [[], ["--merge"]], ids=["adapter", "merged"])
def test_vllm_reads_the_line_that_is_printed(
    run: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers import cli_args
    except ImportError:  # an older vLLM
        from vllm.entrypoints.openai import cli_args

    target = tmp_path / "it's an expert"
    assert export(run, target, *flags) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  vllm serve ")]
    _, _, *words = shlex.split(line)
    options = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    cli_args.validate_parsed_serve_args(options)
    if flags:
        assert options.model_tag == str(target)
        assert options.served_model_name == [target.name]
    else:
        assert Path(options.model_tag).absolute() == Path(BASE)
        assert options.enable_lora
        assert options.max_lora_rank >= 16
        (module,) = options.lora_modules
        assert (module.name, module.path) == (target.name, str(target))


def test_the_runs_own_template_is_served(
    configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text((Path(BASE) / "chat_template.jinja").read_text())
    run = make_run(configure, tmp_path / "mine", "--model.chat_template", str(template))
    assert export(run, tmp_path / "out") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "vllm serve" in x)
    words = shlex.split(line)
    assert words[words.index("--chat-template") + 1] == str(tmp_path / "out/chat_template.jinja")
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_the_adapter_is_found_again_by_its_own_settings(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`minidistill chat` reads the base's path from the folder, wherever one is."""
    assert export(run, tmp_path / "out") == 0
    (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "deeper")
    capsys.readouterr()
    assert main(["chat", str(tmp_path / "out"), "--server"]) == 0
    assert shlex.split(capsys.readouterr().out)[:3] == ["vllm", "serve", BASE]

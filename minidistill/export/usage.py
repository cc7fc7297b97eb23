"""The commands that serve and load an exported folder, exactly as they work."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from minidistill.config.adapter import SETTINGS
from minidistill.export.base import Base
from minidistill.export.check import vllm_rank
from minidistill.export.source import Source
from minidistill.system.files import read_json

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class Usage:
    """Shell commands, and what is to be said beside them."""

    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()


def usage(source: Source, base: Base, *, merged: bool, place: str, here: bool = False) -> Usage:
    """How to serve the folder `place` with vLLM, and how to load it in Python.

    With `here` from the current directory; otherwise as its card says it. An adapter for a base
    that is a folder is then used from within its own folder, from which the base has its path.
    """
    name = Path(place).name
    from_within = not (here or merged or base.on_hub)
    folder = "." if from_within else place
    python = _python(source, None if merged or base.on_hub else _base(base, here), folder)
    trusted = ["--trust-remote-code"] if source.config.model.trust_remote_code else []
    if merged:
        serve = ["vllm", "serve", folder, "--served-model-name", name, *trusted]
        return Usage((shlex.join(serve), python))
    settings = read_json(source.weights / SETTINGS)
    rank = vllm_rank(settings)
    if settings.get("use_dora") or rank is None:
        why = "DoRA" if settings.get("use_dora") else "of a rank above 512"
        note = f"vLLM cannot serve this adapter, which is {why}: export it with --merge for that."
        return Usage((python,), (note,))
    more = ["--revision", base.revision] if base.revision else []
    if source.config.model.chat_template is not None:
        more += ["--chat-template", f"{folder}/{TEMPLATE}"]
    serve = ["vllm", "serve", _base(base, here), *more, *trusted]
    serve += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={folder}"]
    return Usage((shlex.join(serve), python))


def _base(base: Base, here: bool) -> str:
    return base.here if here else base.written


def _python(source: Source, base: str | None, folder: str) -> str:
    """A line that loads a folder and asks it something.

    transformers finds a base on the hub by the adapter's settings, and loads the adapter by peft. A
    base that is a folder is named: the path in the settings is right in one directory alone.
    """
    trusted = ", trust_remote_code=True" if source.config.model.trust_remote_code else ""
    model = _quoted(folder) if base is None else f"{_quoted(base)}, tokenizer={_quoted(folder)}"
    code = "from transformers import pipeline; "
    code += f'answer = pipeline("text-generation", {model}{trusted}); '
    if base is not None:
        code += f"answer.model.load_adapter({_quoted(folder)}); "
    code += (
        'print(answer([{"role": "user", "content": "Hello!"}], max_new_tokens=64, '
        "return_full_text=False))"
    )
    return f"python -c {shlex.quote(code)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Python reads no pairs of surrogates


def other_server() -> str:
    """What to write for `vllm serve` where it fails: vLLM's CPU build has another name. Or ""."""
    try:
        version("vllm")
    except PackageNotFoundError:
        if find_spec("vllm") is not None:
            return (
                "the vLLM that is installed here has no `vllm serve MODEL`: write "
                "`python -m vllm.entrypoints.openai.api_server --model MODEL`"
            )
    return ""

"""`minidistill export`: a run's trained weights as a folder for other programs, checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minidistill.config.adapter import SETTINGS, TENSORS
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError, printable
from minidistill.export import check
from minidistill.export.aside import made_aside
from minidistill.export.base import Base, name_base
from minidistill.export.card import model_card
from minidistill.export.check import Agreement
from minidistill.export.source import Source, open_run, reading
from minidistill.export.usage import other_server, usage
from minidistill.models.hub import load_model_config, load_tokenizer
from minidistill.system.files import read_json, shown_path

_RESTORE = "restore it from a copy"
CONVERTER = "convert_hf_to_gguf.py"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    to: Path
    merge: bool = False
    base: str | None = None
    """The base's name in what is written."""
    quotes_context: bool = False
    gguf: bool = False
    push: str | None = None
    vllm: bool = True


def export(run: Path, options: Options) -> int:
    """Write, check, and say how to use it. Returns the exit code. Raises UserError."""
    source = open_run(run)
    merged = options.merge or options.gguf or not source.is_adapter
    converter = _converter() if options.gguf else None
    if options.push is not None:
        _require_hub()
    target = Path(os.path.abspath(options.to.expanduser()))
    base = name_base(source, target, options.base)
    if options.push is not None and not (merged or base.on_hub):
        raise UserError(
            f"the base is the folder {base.here}, which is not on the hub with the adapter",
            where="--push",
            fix="name its id on the hub with --base, or push the whole model with --merge",
        )
    _require_free(target)
    print(f"reading {shown_path(source.weights)}", flush=True)
    tokenizer = load_tokenizer(source.config)
    with reading(source, "exported"):
        _require_readable(source)
    with made_aside(target) as folder, reading(source, "exported"):
        tokenizer.save_pretrained(folder)
        dtype = _base_dtype(source)
        rows = check.example_rows(tokenizer)
        model = _trained(source)
        expected = check.logprobs(model, rows)
        if merged:
            _write_model(model, source, folder, dtype)
        else:
            _write_adapter(source, folder, base)
        del model  # before others are loaded
        agreements = _check(folder, source, rows, expected, options, merged=merged)
        card = model_card(
            source,
            base,
            usage(source, base, merged=merged, place=options.push or target.name),
            agreements,
            merged=merged,
            quotes_context=options.quotes_context,
        )
        (folder / "README.md").write_text(card)
        if converter is not None:
            _convert(converter, folder)
        _require_free(target)  # another export may have been faster
    for agreement in agreements:
        print(
            f"checked in {agreement.program}: KL {agreement.kl:.2g}, log-probs differ by "
            f"{agreement.largest:.2g} at most"
        )
    kind = "model" if merged else "adapter"
    print(printable(f"{kind}: {shown_path(target)}"))
    if options.push is not None:
        print(f"pushed: {_push(target, options.push)}")
    print("use it:")
    uses = usage(source, base, merged=merged, place=shown_path(target), here=True)
    for command in uses.commands:
        print(printable("\n".join(f"  {line}" for line in command.splitlines())))
    for note in uses.notes:
        print(note)
    if len(uses.commands) > 1 and (note := other_server()):
        print(note)
    return EXIT_OK


def _require_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is there already", "--to", "name a folder that is not there")


def _require_readable(source: Source) -> None:
    """Raise UserError for damaged weights, which are no failure of the disk that is written to."""
    settings = source.weights / SETTINGS
    damage = None
    if source.is_adapter:
        read = read_json(settings, fix=_RESTORE)
        if not isinstance(read, dict) or "peft_type" not in read:
            damage = settings, "it is not the configuration of an adapter"
    for path in sorted(source.weights.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            damage = path, str(error)
    if damage is not None:
        what = f"{shown_path(damage[0])} is damaged: {damage[1]}"
        raise UserError(what, str(damage[0]), _RESTORE, EXIT_ENVIRONMENT)


# -- writing ---------------------------------------------------------------------------------------


def _base_dtype(source: Source) -> torch.dtype:
    """The dtype of the base's checkpoint."""
    dtype = getattr(load_model_config(source.config), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if dtype in check.LIMITS else torch.float32


def _trained(source: Source) -> Any:
    """The run's model in fp32, with its own adapter beside the weights."""
    if source.is_adapter:
        return check.with_adapter(source, source.weights, torch.float32)
    from minidistill.models.auto import model_class

    kind = model_class(load_model_config(source.config))
    return kind.from_pretrained(source.weights, dtype=torch.float32).eval()


def _write_adapter(source: Source, folder: Path, base: Base) -> None:
    settings = json.loads((source.weights / SETTINGS).read_text())
    settings["base_model_name_or_path"] = base.written
    settings["revision"] = base.revision
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(source.weights / TENSORS, folder / TENSORS)


def _write_model(model: Any, source: Source, folder: Path, dtype: torch.dtype) -> None:
    """The model with the adapter added in fp32, in the checkpoint's dtype. It changes the model."""
    if source.is_adapter:
        model = model.merge_and_unload(safe_merge=True)
    model.to(dtype).save_pretrained(folder)


def _check(
    folder: Path,
    source: Source,
    rows: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    options: Options,
    *,
    merged: bool,
) -> list[Agreement]:
    dtype = _base_dtype(source) if merged else torch.float32
    program = "transformers" if merged else "transformers and peft"
    where = str(options.to)
    model = check.in_transformers(folder, source, merged=merged, dtype=dtype)
    found = check.compare(program, check.logprobs(model, rows), expected)
    agreements = [check.require(found, dtype, where)]
    del model
    if options.vllm:
        print("loading it in vLLM", flush=True)
        dtype = dtype if merged or not torch.cuda.is_available() else torch.bfloat16
        got = check.in_vllm(folder, source, rows, merged=merged, dtype=dtype)
        if got is None:
            print("not checked in vLLM: it is not installed, or does not serve such an adapter")
        else:
            found = check.compare("vLLM", got, expected)
            agreements.append(check.require(found, dtype, where))
    return agreements


# -- other formats and places ----------------------------------------------------------------------


def _converter() -> str:
    found = shutil.which(CONVERTER)
    if found is None:
        raise UserError(
            f"llama.cpp's {CONVERTER} is not on the PATH",
            where="--gguf",
            fix="get llama.cpp, install its requirements, and put its folder on the PATH",
            exit_code=EXIT_ENVIRONMENT,
        )
    return found


def _convert(converter: str, folder: Path) -> None:
    target = folder / "model.gguf"
    done = subprocess.run(
        [converter, str(folder), "--outfile", str(target)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not target.is_file():
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UserError(
            f"{CONVERTER} failed: {words[-1] if words else 'no output'}",
            where="--gguf",
            fix="see whether llama.cpp knows this architecture; without --gguf the rest is written",
            exit_code=EXIT_ENVIRONMENT,
        )


def _require_hub() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            "there is no token of the hub",
            where="--push",
            fix="log in with `hf auth login`, or set HF_TOKEN",
            exit_code=EXIT_ENVIRONMENT,
        )


def _push(folder: Path, repository: str) -> str:
    """Upload the folder to a repository of the hub, which is made private if it is new."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        done = hub.upload_folder(folder_path=folder, repo_id=repository)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"cannot push to {repository}: {next(iter(str(error).splitlines()), '')}",
            where="--push",
            fix=f"it is in {shown_path(folder)}: upload that when the hub can be reached and the "
            "token may write",
            exit_code=EXIT_ENVIRONMENT,
        ) from error
    return str(done)

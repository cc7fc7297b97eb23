"""What was exported is loaded as its users load it, and gives the log-probs of the run's weights.

Shapes: `_L` tokens of a text, `_V` vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import torch
from torch import Tensor

from minidistill.config.adapter import SETTINGS
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.export.source import Source
from minidistill.models.auto import model_class
from minidistill.models.registry import resolve
from minidistill.models.weights import load_weights
from minidistill.placement.limits import CPU_CACHE_BYTES, LORA_RANKS
from minidistill.system.files import read_json
from minidistill.system.subprocesses import Subprocess

TEXTS = (
    "What should I do if my bicycle's chain falls off while I ride up a hill?",
    "Write a short letter to a friend who has moved to another town.",
    "def area(width, height):\n    return",
    "The capital of France is",
)
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of the mean KL of a token's log-probs, by the dtype that a program computes in."""
CHECK = "minidistill.export.vllm_check"
VLLM_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near a program's log-probs are to those of the run's weights in fp32."""

    program: str
    kl: float
    """Mean over tokens of the low-variance estimate r - 1 - log r."""
    largest: float
    """The largest difference of a log-prob."""


def example_rows(tokenizer: Any) -> list[list[int]]:
    """Token ids of texts: as a chat template renders them if there is one, and as they are."""
    rows = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in TEXTS]
    if tokenizer.chat_template is not None:
        for text in TEXTS[:2]:
            messages = [{"role": "user", "content": text}]
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            rows.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return [row[:64] for row in rows if len(row) > 1]


@torch.no_grad()
def logprobs(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The log-probs (L - 1) in fp32 of each row's ids, given those before them."""
    results = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        logp_LV = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        results.append(logp_LV.gather(1, ids[0, 1:, None])[:, 0].cpu())
    return results


def compare(program: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> Agreement:
    difference = torch.cat(list(expected)) - torch.cat(list(got))
    kl = (difference.exp() - 1 - difference).mean()
    return Agreement(program, float(kl), float(difference.abs().max()))


def require(agreement: Agreement, dtype: torch.dtype, where: str) -> Agreement:
    """Raise UserError (exit code 4) unless the log-probs agree. NaN does not."""
    limit = LIMITS[dtype]
    if not agreement.kl <= limit:
        raise UserError(
            f"{agreement.program} does not compute the run's model from what was exported: the KL "
            f"of its log-probs is {agreement.kl:.3g}, above {limit:g}, and the largest difference "
            f"{agreement.largest:.3g}",
            where=where,
            fix="check that the base is the model that the run trained on, in the same revision",
            exit_code=EXIT_HEALTH,
        )
    return agreement


def in_transformers(folder: Path, source: Source, *, merged: bool, dtype: torch.dtype) -> Any:
    """The exported model as its users load it, in `dtype`."""
    if merged:
        from transformers import AutoConfig

        trusted = {"trust_remote_code": source.config.model.trust_remote_code}

        kind = model_class(AutoConfig.from_pretrained(folder, **trusted))
        return kind.from_pretrained(folder, dtype=dtype, **trusted).eval()
    return with_adapter(source, folder, dtype)


def with_adapter(source: Source, folder: Path, dtype: torch.dtype) -> Any:
    """The run's base with the adapter of a folder, by peft."""
    from peft import PeftModel

    base = load_weights(source.config, source.base, dtype=dtype)
    return PeftModel.from_pretrained(base, folder).eval()


def vllm_rank(settings: Mapping[str, Any]) -> int | None:
    """vLLM's `max_lora_rank` for an adapter with these settings of PEFT; None if none fits."""
    largest = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    return next((rank for rank in LORA_RANKS if rank >= largest), None)


def in_vllm(
    folder: Path, source: Source, rows: Sequence[Sequence[int]], *, merged: bool, dtype: torch.dtype
) -> list[Tensor] | None:
    """vLLM's log-probs. None if it is not installed, or cannot serve such an adapter."""
    if importlib.util.find_spec("vllm") is None:
        return None
    rank, targets = 0, None
    if not merged:
        settings = read_json(folder / SETTINGS)
        targets = settings["target_modules"]
        if settings.get("use_dora"):
            return None
        if (fitting := vllm_rank(settings)) is None:
            return None
        rank = fitting
    job = {
        "model": str(folder) if merged else resolve(source.base),
        "revision": None if merged else source.config.model.revision,
        "trust_remote_code": source.config.model.trust_remote_code,
        "tokenizer": str(folder),
        "adapter": None if merged else str(folder),
        "rank": rank,
        "targets": targets,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": [list(row) for row in rows],
        "cache_bytes": None if torch.cuda.is_available() else CPU_CACHE_BYTES // 4,
    }
    with tempfile.TemporaryDirectory(prefix="minidistill-") as temporary:
        file = Path(temporary) / "job.json"
        file.write_text(json.dumps(job))
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if not torch.cuda.is_available():
            environment["TORCHDYNAMO_DISABLE"] = "1"
        process = Subprocess(CHECK, [str(file)], [], environment)
        try:
            code, why = process.popen.wait(VLLM_SECONDS), ""
        except TimeoutExpired:
            code, why = -1, f" within {VLLM_SECONDS:g} s"
        finally:
            words = process.last_words()
            process.close()
        answer = file.with_name("job.json.out")
        if code or not answer.is_file():
            raise UserError(
                f"vLLM cannot load what was exported{why}{words}",
                where=str(folder),
                fix="see whether this vLLM supports the model; --no-vllm leaves this check out",
                exit_code=EXIT_HEALTH,
            )
        return [torch.tensor(row) for row in json.loads(answer.read_text())]

"""One weight sync, trainer to vLLM: in memory against through a file, adapter and full weights.

    python -m bench.sync [--model FOLDER] [--repeats N]

Without a model: random weights in SmolLM2-135M's shape, for the time does not depend on them.
Writes bench/results/sync.json. Says nothing of speed where the weights did not arrive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from minidistill.config import load_config
from minidistill.engines.vllm import VllmEngine
from minidistill.engines.vllm_options import build_options
from minidistill.trainer.model import Policy, load_model_config, load_policy
from minidistill.weights import Outbox

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; by default made at random")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model"
        model = arguments.model or make_model(made)
        result = {"model": arguments.model or "random weights in SmolLM2-135M's shape"}
        for kind, measure in (("adapter", adapter_routes), ("full", full_routes)):
            result[kind] = measure(model, Path(folder) / kind, arguments.repeats)
    target = ROOT / "bench" / "results" / "sync.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    for kind in ("adapter", "full"):
        figures = result[kind]
        print(
            f"{kind:8} {figures['bytes'] / 1e6:8.1f} MB  in memory {figures['memory']:.4f} s  "
            f"file {figures['file']:.4f} s  ratio {figures['ratio']:.2f}"
        )


def make_model(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        max_position_embeddings=2048, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def build(model: str, lora: bool) -> tuple[VllmEngine, Policy]:
    flags = ["--model.name", model, "--inference.engine", "vllm", "--model.dtype", "float32"]
    config = load_config([str(ROOT / "configs" / "sokoban.toml"), *flags]).config
    options = build_options(config, CPU, load_model_config(config), config.seq_len)
    if not lora:
        kept = {k: v for k, v in options.arguments.items() if "lora" not in k}
        options = replace(options, arguments=kept | {"enable_lora": False})
    engine = VllmEngine(options, 0, print)
    policy = load_policy(config, SimpleNamespace(eos_token_id=2, pad_token_id=0), CPU)
    engine.attach(policy, None)
    engine.wait()
    return engine, policy


def adapter_routes(model: str, folder: Path, repeats: int) -> dict[str, Any]:
    engine, policy = build(model, lora=True)
    version = 0

    def change() -> None:
        with torch.no_grad():
            for name, parameter in policy.parameters:
                if "lora_B" in name:
                    parameter.normal_(0, 0.01)

    def memory() -> None:
        nonlocal version
        version += 1
        engine.sync(version)

    def file() -> None:
        policy.model.save_pretrained(str(folder))
        engine._process.call("load_adapter_file", slot=1, path=str(folder))

    try:
        change()
        memory()
        arrived(engine, policy, student=True)
        before = engine.bytes_synced
        memory()
        size = engine.bytes_synced - before
        return compare(change, memory, file, repeats) | {"bytes": size}
    finally:
        engine.close()


def full_routes(model: str, folder: Path, repeats: int) -> dict[str, Any]:
    engine, policy = build(model, lora=False)
    base = policy.model.get_base_model()
    folder.mkdir()
    version = 0

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in base.named_parameters():
            if "lora_" not in name:
                yield name.replace(".base_layer.", "."), parameter

    def change() -> None:
        with torch.no_grad():
            for _, parameter in weights():
                parameter.mul_(1.001)

    def memory() -> None:
        nonlocal version
        version += 1
        engine.sync_weights(version, weights)

    def file() -> None:
        save_file({n: p.detach() for n, p in weights()}, folder / "model.safetensors")
        engine._process.call("reload", path=str(folder))

    try:
        change()
        memory()
        arrived(engine, policy, student=False)
        before = engine.bytes_synced
        memory()
        size = engine.bytes_synced - before
        parts = {"pack": pack_seconds(weights, policy.dtype)}
        return compare(change, memory, file, repeats) | {"bytes": size} | parts
    finally:
        engine.close()


def pack_seconds(weights: Callable[[], Any], dtype: torch.dtype) -> float:
    """The trainer's part of a full sync: copying into a buffer that is there already."""
    outbox, seconds = Outbox(dtype, CPU), 0.0
    for _ in range(2):
        began = time.perf_counter()
        outbox.pack(list(weights()))
        seconds = time.perf_counter() - began
    return seconds


@torch.no_grad()
def arrived(engine: VllmEngine, policy: Policy, student: bool) -> None:
    """Raise where the engine's log-probs are not the trainer's."""
    ids = list(range(5, 45))
    found = engine.score([ids[:8]], [ids[8:]], temperature=1.0, student=student)[0]
    with policy.role("default" if student else None):
        logp = policy.model(input_ids=torch.tensor([ids])).logits[0, 7:-1].log_softmax(-1)
    truth = logp.gather(1, torch.tensor(ids[8:])[:, None])[:, 0]
    error = float((truth - torch.tensor(found)).abs().max())
    if not error < TOLERANCE:
        raise SystemExit(f"the weights did not arrive: log-probs differ by {error:.3g}")


def compare(
    change: Callable[[], None], memory: Callable[[], None], file: Callable[[], None], repeats: int
) -> dict[str, Any]:
    """Seconds of each route, taken in turn, and the ratio of the medians."""
    times: dict[str, list[float]] = {"memory": [], "file": []}
    for _ in range(repeats + 1):
        for name, route in (("memory", memory), ("file", file)):
            change()
            began = time.perf_counter()
            route()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return medians | {"ratio": medians["file"] / medians["memory"], "runs": times}


if __name__ == "__main__":
    main()

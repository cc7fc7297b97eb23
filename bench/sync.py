"""Compares two ways to send weights from the trainer to vLLM: in memory and through a file.

    python -m bench.sync [--model smollm2|FOLDER] [--repeats N] [--threads N]

Measures the adapter and full weights. Without --model, they are random in SmolLM2-135M's shape; the
time does not depend on the values. Writes bench/results/sync.json. Fails without a result if the
engine's weights differ from the trainer's after a sync.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.kernels_report import machine
from bench.pair import TOLERANCE, build, change_adapter, named_model, save, use_threads
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.engines.vllm.weights_buffer import SendBuffer
from minidistill.trainer.policy import Policy
from minidistill.types import Role

RANDOM = "random weights in SmolLM2-135M's shape"
Step = Callable[[], None]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sync", description=__doc__)
    parser.add_argument("--model", help="built in, smollm2 or a folder; default: random weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    use_threads(args.threads)
    result: dict[str, Any] = {"machine": machine("cuda" if torch.cuda.is_available() else "cpu")}
    with tempfile.TemporaryDirectory() as folder:
        model = named_model(args.model) if args.model else make_model(Path(folder) / "model")
        for kind, routes in (("adapter", adapter_routes), ("full", full_routes)):
            engine, policy = build(model, lora=kind == "adapter")
            try:
                result[kind] = routes(engine, policy, Path(folder) / kind, args.repeats)
            finally:
                engine.close()
    save("sync", args.model or RANDOM, result)
    for kind in ("adapter", "full"):
        figures = result[kind]
        print(
            f"{kind:8} {figures['bytes'] / 1e6:8.1f} MB  in memory {figures['memory']:.4f} s  "
            f"file {figures['file']:.4f} s  ratio {figures['ratio']:.2f}"
        )
    return 0


def make_model(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_id=2,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def adapter_routes(
    engine: VllmEngine, policy: Policy, folder: Path, repeats: int
) -> dict[str, Any]:
    def file() -> None:
        policy.model.save_pretrained(str(folder))
        engine.process.call("load_adapter_file", slot=1, path=str(folder))

    return compare(engine, policy, lambda: change_adapter(policy), engine.sync, file, repeats)


def full_routes(engine: VllmEngine, policy: Policy, folder: Path, repeats: int) -> dict[str, Any]:
    weights = policy.weights
    folder.mkdir()

    def change() -> None:
        with torch.no_grad():
            for _, parameter in weights():
                parameter.mul_(1.001)

    def file() -> None:
        save_file({n: p.detach() for n, p in weights()}, folder / "model.safetensors")
        engine.process.call("reload", path=str(folder))

    result = compare(engine, policy, change, engine.sync, file, repeats)
    return result | {"pack": pack_seconds(weights, policy)}


def pack_seconds(weights: Callable[[], Any], policy: Policy) -> float:
    """Seconds of the trainer's part of a full sync: copying into a preallocated buffer."""
    buffer, seconds = SendBuffer(policy.dtype, policy.device), 0.0
    for _ in range(2):
        began = time.perf_counter()
        buffer.pack(list(weights()))
        seconds = time.perf_counter() - began
    return seconds


@torch.no_grad()
def check_weights(engine: VllmEngine, policy: Policy) -> None:
    """Raise SystemExit unless the engine's log-probs are the trainer's."""
    # random ids: after special tokens alone, fp32's own error exceeds the tolerance
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(policy.config.vocab_size, (40,), generator=drawn).tolist()
    scores = engine.score([ids[:8]], [ids[8:]], Role.STUDENT)[0]
    row = torch.tensor([ids], device=policy.device)
    logp = policy.model(input_ids=row).logits[0, 7:-1].log_softmax(-1).cpu()
    truth = logp.gather(1, torch.tensor(ids[8:])[:, None])[:, 0]
    error = float((truth - torch.tensor(scores)).abs().max())
    if not error < TOLERANCE:
        raise SystemExit(
            f"the engine does not have the trainer's weights: log-probs differ by {error:.3g}"
        )


def compare(
    engine: VllmEngine,
    policy: Policy,
    change: Step,
    memory: Callable[[int], None],
    file: Step,
    repeats: int,
) -> dict[str, Any]:
    """Seconds of each route, in alternating rounds; their ratio; and bytes of a sync in memory.

    The engine's weights are checked after the first and the last round.
    """
    times: dict[str, list[float]] = {"memory": [], "file": []}
    size = 0
    for version in range(1, repeats + 2):
        for name in times:
            change()
            assert engine.sender is not None
            before, began = engine.sender.bytes_packed, time.perf_counter()
            if name == "memory":
                memory(version)
            else:
                file()
            times[name].append(time.perf_counter() - began)
            size = max(size, engine.sender.bytes_packed - before)
            if name == "memory" and version in (1, repeats + 1):
                check_weights(engine, policy)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratio = medians["file"] / medians["memory"]
    return medians | {"ratio": ratio, "runs": times, "bytes": size}


if __name__ == "__main__":
    sys.exit(main())

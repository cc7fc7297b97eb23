"""The gap of each context of bench/contexts: how often the base shows the behavior, with it and
without it.

    python -m bench.context_gap [--model smollm2|FOLDER] [--not-greedy] [--n N] [NAME…]

There is something to distil only where the two differ. The answers are to the held-out prompts, at
temperature 1, as in training, and greedily, and are scored by the configuration's reward. The
intervals are Wilson's. The KL is from the base to the base that reads the context, on the base's
answers: what training starts from. Writes bench/results/contexts.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.bake import wilson
from bench.kernels_report import machine
from bench.pair import save
from bench.workload import named_model
from minidistill.config import load_config
from minidistill.export.source import Source
from minidistill.look.eval_settings import Asked, align
from minidistill.look.evaluation import evaluate
from minidistill.models.hub import load_tokenizer

CONTEXTS = Path(__file__).with_name("contexts")
TEMPERATURES = {"temperature 1": 1.0, "greedy": 0.0}


def names() -> list[str]:
    """All contexts."""
    return sorted(path.stem for path in CONTEXTS.glob("*.toml"))


def source(name: str, model: str) -> Source:
    """The untrained model with the settings and the context of a configuration."""
    flags = ["--model.name", model]
    config = load_config([str(CONTEXTS / f"{name}.toml"), *flags]).config
    folder = Path(model)
    return Source(folder, config, folder, is_adapter=False, kind="model", knows_base=False)


def gap(
    name: str, model: str, labels: Sequence[str] = tuple(TEMPERATURES), prompts: int | None = None
) -> dict[str, Any]:
    """What `main` prints of a context, at these of `TEMPERATURES`, on so many held-out prompts."""
    untrained = source(name, model)
    config = untrained.config
    text = config.orchestrator.teacher_model.context
    tokens = len(load_tokenizer(config)(text, add_special_tokens=False)["input_ids"])
    result: dict[str, Any] = {"tokens": tokens}
    for label in labels:
        asked = Asked(tasks=prompts, temperature=TEMPERATURES[label])
        found = evaluate(align([untrained], asked), [name], with_context=True).results
        for who, view in zip(("base", "in context"), found, strict=True):
            rewards = [value for values in view.rewards.values() for value in values]
            hits = sum(value == 1.0 for value in rewards)
            low, high = wilson(hits, len(rewards))
            share = {"hits": hits, "n": len(rewards), "share": hits / len(rewards)}
            share |= {"low": max(0.0, low), "high": min(1.0, high), "length": view.length}
            result.setdefault(label, {})[who] = share
        kl = found[0].kl
        result[label]["kl"] = None if kl is None else kl.mean
    return result


def line(name: str, result: dict[str, Any]) -> str:
    """The row of a context, as it is printed."""
    cells = [f"{name:<13} {result['tokens']:>5}"]
    for label in filter(result.get, TEMPERATURES):
        for who in ("base", "in context"):
            row = result[label][who]
            cells.append(f"{row['share']:6.1%} ({row['low']:.0%}-{row['high']:.0%})")
        cells.append(f"length {row['length']:.1f} KL {result[label]['kl']:.2f}")
    return "  ".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.context_gap", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names()))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--not-greedy", action="store_true", help="at temperature 1 only")
    parser.add_argument("--n", type=int, help="held-out prompts, by default all 96")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in names()]:
        parser.error(f"no context {unknown[0]!r}; there are {', '.join(names())}")
    if arguments.n is not None and arguments.n < 1:
        parser.error(f"--n {arguments.n}: at least one prompt is needed")
    model = named_model(arguments.model)
    labels = list(TEMPERATURES)[: 1 if arguments.not_greedy else 2]
    for name in arguments.names or names():
        result = gap(name, model, labels, arguments.n)
        print(line(name, result), flush=True)
        save("contexts", f"{arguments.model}, {name}", {"machine": machine("cpu"), **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make the prompt files of `opcd-medical` and `opcd-safety` from the public data sets of OPCD.

    pip install 'minidistill[datasets]'
    python configs/published/prepare.py medical

It writes `opcd-medical-train.jsonl` and `opcd-medical-test.jsonl` into the current directory. The
data sets are `ytz20/sys_medmcqa_train` and the like, on the Hugging Face hub. From each row it
reads `content`, a prompt as text or as messages, and `answer`: the letter of an option, or yes or
no. In the files the answer is in the form in which the model should write it: `<answer>B</answer>`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

DATA = {"medical": "ytz20/sys_medmcqa", "safety": "ytz20/sys_safety"}
ANSWERS = {"medical": set("ABCD"), "safety": {"yes", "no"}}
SPLITS = ("train", "test")


def converted(task: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows as lines of a file of prompts. A prompt that was there before is left out.

    Raises ValueError for a row of another form.
    """
    known = set()
    for number, row in enumerate(rows, start=1):
        if missing := {"content", "answer"} - row.keys():
            raise ValueError(
                f"row {number} has no {' and no '.join(sorted(missing))}: {sorted(row)}"
            )
        content, answer = row["content"], str(row["answer"]).strip()
        answer = answer.upper() if task == "medical" else answer.lower()
        if answer not in ANSWERS[task]:
            raise ValueError(f"row {number} has the answer {row['answer']!r}")
        prompt = {"prompt": content} if isinstance(content, str) else {"messages": list(content)}
        text = json.dumps(prompt, ensure_ascii=False)
        if text not in known:
            known.add(text)
            yield {**prompt, "answer": f"<answer>{answer}</answer>"}


def write(task: str, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write the files of a task. Prompts of the test are left out of training."""
    lines = {split: list(converted(task, rows)) for split, rows in splits.items()}
    held_out = {_key(line) for line in lines["test"]}
    lines["train"] = [line for line in lines["train"] if _key(line) not in held_out]
    for split, found in lines.items():
        path = Path(f"opcd-{task}-{split}.jsonl")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        path.write_text(text, encoding="utf-8")
        tagged = sum("<answer>" in _key(line) for line in found)
        print(f"{path}: {len(found)} prompts, {tagged} of them ask for <answer>")


def _key(line: Mapping[str, Any]) -> str:
    """A line's prompt, by which it is compared."""
    return json.dumps(line.get("prompt", line.get("messages")), ensure_ascii=False)


def main(task: str) -> None:
    from datasets import load_dataset

    write(task, {split: load_dataset(f"{DATA[task]}_{split}", split="train") for split in SPLITS})


if __name__ == "__main__":
    if sys.argv[1:] not in [[task] for task in DATA]:
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(DATA)}")
    main(sys.argv[1])

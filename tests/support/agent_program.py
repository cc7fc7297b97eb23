"""A program for the environment `agent`: it does what its task says, with the standard library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SYSTEM = {"role": "system", "content": "You are terse."}


def ask(messages: list[Any], key: str | None = None, timeout: float = 60, **more: Any) -> Any:
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "any", "messages": messages, **more}).encode(),
        {"Authorization": f"Bearer {key or os.environ['OPENAI_API_KEY']}"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        return json.loads(answer.read())["choices"]


def refusal(messages: list[Any], **more: Any) -> str:
    try:
        ask(messages, **more)
    except urllib.error.HTTPError as error:
        return f"{error.code}: {json.loads(error.read())['error']['message']}"
    return "answered"


def main() -> None:
    file = os.environ.get("MINIDISTILL_TASK_FILE")
    task = json.loads(Path(file).read_text() if file else os.environ["MINIDISTILL_TASK"])
    do, question = task.get("do", "ask"), {"role": "user", "content": task["question"]}
    messages = [SYSTEM, question]
    if do == "silent":
        return
    if do == "refused":
        tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
        assert refusal(messages, tools=[tool]) == "400: the model's chat template takes no tools"
        assert "400: " in refusal([SYSTEM, {"role": "user", "content": "\ud800"}])
        assert "no room" in refusal([SYSTEM, {"role": "user", "content": "long " * 999}])
        assert "400: without" in refusal([SYSTEM])
    if do == "show":
        Path("seen.json").write_text(json.dumps(dict(os.environ)))
    if do == "crash":
        ask(messages)
        sys.exit("it is broken")
    if do == "hang":
        ask(messages)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if do == "flood":
        ask(messages)
        while True:
            print("flood " * 10_000)
    if do == "fork":
        ask(messages)
        for _ in range(40):
            if not os.fork():
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
        time.sleep(600)
    if do == "memory":
        ask(messages)
        held = bytearray(os.urandom(1 << 20) * 200)
        time.sleep(600 + len(held))
    if do == "insist":
        for _ in range(100):
            ask(messages)
    if do == "leave":  # a process in a session of its own, which has no parent any more
        code = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(600)"
        subprocess.run([sys.executable, "-S", "-c", code], check=True, stdout=subprocess.DEVNULL)
    if do == "retry":
        try:
            ask(messages, timeout=0.05)
        except OSError:
            ask(messages)
    if do == "abandon":  # ends while its second request is not answered
        ask(messages)
        try:
            ask(messages, timeout=0.05)
        except OSError:
            os._exit(0)
    answer = ask(messages, n=task.get("n", 1))[0]["message"]["content"]
    for turn in range(task.get("turns", 1) - 1):
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": f"And then? {turn}"},
        ]
        answer = ask(messages)[0]["message"]["content"]
    print("done")
    print(task.get("last", json.dumps({"reward": len(answer) % 3, "metrics": {"turns": 1}})))


if __name__ == "__main__":
    main()

"""A vLLM server without a model, in a process that kills itself after some answers.

`python -m support.dying_server PORT ANSWERS`; 0 answers for one that lives. What it samples depends
on the prompt and the seed alone.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from support.fake_vllm import FakeVllm, Handler, sample

LENGTH = 512


def main(port: int, answers: int) -> None:
    answered, lock = [0], threading.Lock()

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        with lock:
            if answers and answered[0] == answers:
                os.kill(os.getpid(), signal.SIGKILL)
            answered[0] += 1
        rng = random.Random(str((body["prompt"], body["seed"])))
        ids = [rng.choice(body["prompt"]) for _ in range(body["max_tokens"])]
        handler.say(sample(body, token_ids=ids))

    def models(handler: Handler, body: dict[str, Any]) -> None:
        handler.say({"data": [{"id": "m", "max_model_len": LENGTH}]})

    class Answering(Handler): ...

    Answering.fake = FakeVllm("")
    Answering.answer, Answering.models = staticmethod(answer), staticmethod(models)  # type: ignore[assignment]
    server = ThreadingHTTPServer(("127.0.0.1", port), Answering)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

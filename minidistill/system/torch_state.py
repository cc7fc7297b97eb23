"""torch's settings for a whole process or thread, which other people's code may change."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

_SETTINGS = {
    "default dtype": ("get_default_dtype", "set_default_dtype"),
    "recording of gradients": ("is_grad_enabled", "set_grad_enabled"),
    "number of threads": ("get_num_threads", "set_num_threads"),
}
"""Each with torch's functions that read it and set it. Random numbers are none of them: ours depend
on no global generator."""
_said: set[str] = set()

logger = logging.getLogger(__name__)


def read_state() -> dict[str, Any]:
    """The settings, by name; none before torch is imported.

    None either in another thread than the main one: there a difference may be the main thread's,
    which loads a model. Gradients and threads are each thread's own anyway.
    """
    torch = sys.modules.get("torch")
    if torch is None or threading.current_thread() is not threading.main_thread():
        return {}
    return {name: getattr(torch, read)() for name, (read, _) in _SETTINGS.items()}


def restore_state(before: dict[str, Any]) -> None:
    """Restore what differs from `before`, with one warning for each setting."""
    if not before:
        return
    for name, value in read_state().items():
        if value == before[name]:
            continue
        getattr(sys.modules["torch"], _SETTINGS[name][1])(before[name])
        if name not in _said:
            _said.add(name)
            logger.warning(
                f"code of an environment, a model or a monitor changed torch's {name} from "
                f"{before[name]} to {value}: it is set back each time"
            )

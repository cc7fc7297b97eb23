"""A harness of verifiers 0.4 that asks the model once for each turn of the user, in this process.

Those of the package start a program for each conversation, in an environment that it installs. What
a harness has to do is to send all requests to the address that it is given.
"""

from __future__ import annotations

from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.runtimes import ProgramResult

__all__ = ["ChatHarness"]
NO_ROOM = "context_length_exceeded"


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Plain chat, without tools."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
    ) -> ProgramResult:
        """Send the conversation so far. A conversation without room for an answer has ended."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += map(message_to_wire, prompt or [])
        # without certificates, whose loading takes longer than all else
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=None) as client:
            response = await client.post(
                f"{endpoint}/chat/completions",
                json={"model": ctx.model, "messages": messages},
                headers={"Authorization": f"Bearer {secret}"},
            )
        failed = response.is_error and NO_ROOM not in response.text
        return ProgramResult(exit_code=int(failed), stdout="", stderr=response.text)

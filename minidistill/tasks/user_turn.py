"""The opening and the end of a user's turn in a chat template, for sampling such turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minidistill.errors import EXIT_FAILED, UserError
from minidistill.tasks.chat_template import MARK, ChatTemplate, tokenizer_code


@dataclass(frozen=True, slots=True)
class UserTurn:
    """What a chat template writes around the text of a conversation's first user message."""

    template: ChatTemplate
    opening: str
    """All that comes before the text, a system message included."""
    ending: str
    """All that comes after it, up to the beginning of the answer."""

    @classmethod
    def of(cls, template: ChatTemplate, system: str = "") -> UserTurn:
        """The turn after a system message, or after none. The template's default one stays.

        Raises UserError if the template does not show the messages, or `system` has control tokens.
        """
        if found := template.control_tokens_in(system):
            raise UserError(
                f"what the user's turns are about has control tokens ({', '.join(found)})",
                where="args.topics",
                fix="take them out, or leave topics out",
            )
        messages = [{"role": "system", "content": system}] if system else []
        text = template.render([*messages, {"role": "user", "content": MARK}])
        opening, mark, ending = text.partition(MARK)
        if not mark:
            raise UserError(
                "the chat template does not show a user's message",
                where=template.where,
                fix="set model.chat_template to a file with another",
            )
        if system.strip() and system.strip() not in opening:
            raise UserError(
                "the chat template shows no system message, which is how topics reach the model",
                where="args.topics",
                fix="leave topics out",
            )
        return cls(template, opening, ending)

    @property
    def opening_ids(self) -> tuple[int, ...]:
        """Without spaces at the end, which the model writes itself as part of its first word."""
        return self.template.encode(self.opening.rstrip(" "))

    @property
    def end_id(self) -> int | None:
        """The control token that ends the turn; None if the template ends it with text alone."""
        found = self.template.control_tokens_in(self.ending)
        if not found:
            return None
        # the first one in the text, and of two that begin there the longer one
        first = min(found, key=lambda token: (self.ending.index(token), -len(token)))
        id: Any = self.template.tokenizer.convert_tokens_to_ids(first)
        return int(id)

    @property
    def lines(self) -> list[str]:
        """The lines of the opening and the ending, without control tokens."""
        text = f"{self.opening}\n{self.ending}"
        for token in sorted(self.template.control_tokens_in(text), key=len, reverse=True):
            text = text.replace(token, "\n")
        return [line.strip() for line in text.split("\n") if line.strip()]

    def read(self, ids: Sequence[int], ended: bool) -> tuple[str, bool]:
        """The text of sampled ids, and whether the turn has ended.

        `ended`: the last id is one that ends a completion.
        """
        with tokenizer_code("decode a prompt", self.template.where, EXIT_FAILED):
            text = str(self.template.tokenizer.decode(list(ids[:-1] if ended else ids)))
        if self.end_id is None and (end := self.ending.strip()):
            text, found, _ = text.partition(end)
            ended = ended or bool(found)
        return text, ended

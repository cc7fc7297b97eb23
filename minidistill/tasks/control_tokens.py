"""Prompts whose data contain control tokens: "<|im_end|>" in a question is text, not a token.

A tokenizer looks for control tokens in the whole rendered prompt and cannot tell those of the chat
template from those in the data. So the prompt is rendered a second time with characters for private
use in place of those in the data. What is left of control tokens is the template's own. A copy of
the tokenizer that knows control tokens by other names then encodes the data's as text, in one pass
with everything around them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minidistill.errors import UserError

# Characters for private use: in place of the data's control tokens, and as names of the template's
_IN_DATA, _OWN = 0xF0000, 0x100000

Encode = Callable[[str], Sequence[int]]


class ControlTokens:
    """The control tokens of a tokenizer, and how prompts with some in their data are encoded."""

    def __init__(self, tokenizer: Any, tokens: Iterable[str], encode: Encode) -> None:
        """`tokens` are the texts of control tokens, `encode` gives the ids of a rendered text."""
        self._tokenizer, self._encode = tokenizer, encode
        self._tokens = sorted({t for t in tokens if t}, key=lambda t: (-len(t), t))
        self._pattern = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._copy: _Copy | None = None

    def within(self, data: Any) -> list[str]:
        """The control tokens in the texts of `data`: messages, tool descriptions, a string."""
        return sorted({t for text in _texts(data) for t in self._pattern.findall(text)})

    def hidden(self, data: Any) -> Any:
        """A copy of `data` with a character for private use in place of each control token."""
        return _mapped(data, lambda text: self._replaced(text, _IN_DATA))

    def encode(self, text: str, hidden_text: str, found: Sequence[str]) -> tuple[int, ...]:
        """Token ids of a rendered prompt, with the control tokens `found` in its data as text.

        `hidden_text` is the same prompt rendered from `hidden` data. Raises UserError if the
        template changes the data's control tokens, or the tokenizer cannot encode them as text.
        """
        in_data = {_IN_DATA + i: token for i, token in enumerate(self._tokens)}
        if hidden_text.translate(in_data) != text or any(ord(char) >= _IN_DATA for char in text):
            raise _refusal(found, "the chat template does not copy them unchanged")
        if self._copy is None:
            self._copy = self._without_control_tokens(found)
        renamed = self._replaced(hidden_text, _OWN)
        ordinary, _ = self._copy.encode(renamed)
        ids, exact = self._copy.encode(renamed.translate(in_data))
        if not exact or ordinary != [*self._encode(hidden_text)]:
            raise _refusal(found, "the tokenizer has no encoding of them as text")
        return tuple(ids)

    def _replaced(self, text: str, first: int) -> str:
        """`text` with the characters from `first` on in place of control tokens."""
        return self._pattern.sub(lambda match: chr(first + self._tokens.index(match[0])), text)

    def _without_control_tokens(self, found: Sequence[str]) -> _Copy:
        from tokenizers import Tokenizer

        original = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(original, Tokenizer):
            raise _refusal(found, "the tokenizer is not one of Hugging Face's fast tokenizers")
        data = json.loads(original.to_str())
        data |= {"truncation": None, "padding": None, "post_processor": None}
        names = {token: chr(_OWN + i) for i, token in enumerate(self._tokens)}
        ids: dict[str, Any] = {}
        for token in data["added_tokens"]:
            name = names.get(token["content"], token["content"])
            ids[name] = original.token_to_id(token["content"])
            token["content"] = name
        copy: Any = Tokenizer.from_str(json.dumps(data))
        in_vocabulary = {copy.token_to_id(token) for token in self._tokens}
        return _Copy(
            copy,
            # a token that is not in the model's vocabulary may get another id
            {copy.token_to_id(name): id for name, id in ids.items()},
            in_vocabulary - {None, copy.token_to_id(_unknown(data["model"]))},
        )


@dataclass(frozen=True, slots=True)
class _Copy:
    """A tokenizer that knows control tokens by other names."""

    tokenizer: Any
    original_ids: Mapping[int, int]
    """Of its added tokens."""
    control_ids: Collection[int]
    """Of control tokens that are also in the model's vocabulary."""

    def encode(self, text: str) -> tuple[list[int], bool]:
        """Ids, and whether none of them is a control token that the model has made of text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        exact = not any(id in self.control_ids for id in ids)
        return [self.original_ids.get(id, id) for id in ids], exact


def _unknown(model: Mapping[str, Any]) -> str:
    """The token for characters that are not in the vocabulary, which text may always contain."""
    if isinstance(model.get("unk_id"), int):  # of a unigram model
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token") or ""


def _refusal(found: Sequence[str], why: str) -> UserError:
    return UserError(
        f"a prompt's data contain control tokens ({', '.join(found)}) that cannot be encoded as "
        f"text: {why}",
        where="model.special_tokens_in_text",
        fix="take them out of the context, the prompts and the tools, or set "
        'model.special_tokens_in_text = "allow" to encode them as control tokens',
    )


def _texts(data: Any) -> list[str]:
    """The strings in messages or tool descriptions."""
    found: list[str] = []

    def collect(text: str) -> str:
        found.append(text)
        return text

    _mapped(data, collect)
    return found


def _mapped(data: Any, change: Callable[[str], str]) -> Any:
    """A copy of `data` with each of its strings changed; keys, roles and types stay."""
    match data:
        case str():
            return change(data)
        case Mapping():
            return {
                key: value
                if key in ("role", "type") and isinstance(value, str)
                else _mapped(value, change)
                for key, value in data.items()
            }
        case list() | tuple():
            return [_mapped(item, change) for item in data]
    return data

"""Conversations: the forms in which data holds them, and how a chat template makes tokens of them."""

import json
import re

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .readers import CHAT_OPTIONS, CONTENTS, check_text


__all__ = ["ChatTokenizer", "read_document"]

CHATS = ("messages", "conversations")
"""The columns that hold conversations alone."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_document(row: dict, text_column: str | None, place: str) -> tuple[str, bool]:
    """
    The text or the conversation of a row.

    Args:
        row (`dict`): what [`find_columns`] takes of it.
        text_column (`str`, *optional*): the column with the text or conversation, if it is named.
        place (`str`): what a message calls the row.

    Returns:
        `tuple`: the text, empty for a gap, or the conversation as JSON; and whether it is a conversation.

    Raises:
        `ValueError`: the row holds neither, or several of them, or one that is not in a form that is known.
    """
    kinds = [
        kind
        for kind in (CONTENTS if text_column is None else ((text_column,),))
        if all(row.get(name) is not None for name in kind)
    ]
    if not kinds:
        return "", False
    if len(kinds) > 1:
        found = " and ".join(" with ".join(map(repr, kind)) for kind in kinds)
        raise ValueError(
            f"{place} has {found}, and only one of them can be meant: name it with text_column (--text-column)."
        )
    values = [row[name] for name in kinds[0]]
    if len(values) == 2:
        if all(isinstance(value, str) for value in values):
            chat = dict(zip(kinds[0], values, strict=True))
        else:
            chat = {name: _read_messages(row[name], name, place) for name in kinds[0]}
    elif kinds[0][0] in CHATS or isinstance(values[0], list) and isinstance((values[0] or [None])[0], dict):
        chat = {"messages": _read_messages(values[0], kinds[0][0], place)}
    elif isinstance(values[0], str):
        return check_text(values[0], place), False
    else:
        raise ValueError(
            f"Column {kinds[0][0]!r} of {place} holds {type(values[0]).__name__}, not text or a list of messages: name "
            "another."
        )
    for name in CHAT_OPTIONS:
        if row.get(name) is not None:
            chat[name] = _read_option(row[name], name, place)
    try:
        return check_text(json.dumps(chat, ensure_ascii=False), place), True
    except TypeError as error:
        raise ValueError(f"The conversation of {place} holds what JSON cannot: {error}.") from None


def _read_messages(messages: object, column: str, place: str) -> list[dict]:
    """Messages with `role` and `content`, from such ones or from ShareGPT's `from` and `value`."""
    form = "it must be a list of messages, each with 'role' and 'content', or with 'from' and 'value'"
    if not isinstance(messages, list):
        raise ValueError(f"Column {column!r} of {place} holds {type(messages).__name__}: {form}.")
    if not messages:
        raise ValueError(f"Column {column!r} of {place} holds no messages: {form}. Or leave the row out.")
    found = []
    for number, message in enumerate(messages):
        is_message = isinstance(message, dict)
        if is_message and message.get("from") is not None:
            sender = message["from"]
            message = {name: value for name, value in message.items() if name not in ("from", "value", "role")}
            message = {
                "role": _SHAREGPT_ROLES.get(sender, sender),
                "content": messages[number].get("value"),
                **message,
            }
        if not is_message or not isinstance(message.get("role"), str):
            raise ValueError(f"Message {number} in column {column!r} of {place} has no role: {form}.")
        found.append(message)
    return found


def _read_option(value: object, name: str, place: str) -> object:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"Column {name!r} of {place} is not JSON: {error}.") from None
    return value


class ChatTokenizer:
    """
    Conversations to tokens, and which of them are the answers.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with a chat template.
        assistant_only (`bool`): find the tokens of the assistant: by the `{% generation %}` marks of the template, else by
            prefix. By prefix an answer is what the conversation up to it has more than the conversation before it has
            with the prompt for an answer; a message with which a conversation begins answers nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool):
        self.tokenizer, self.assistant_only = tokenizer, assistant_only

    def __call__(self, chats: list[dict], places: list[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """
        The tokens of conversations, each with `messages` or with a `prompt` and a `completion` of messages, and masks, 1 on
        the tokens to learn from.

        Raises:
            `ValueError`: there is no chat template, it refuses a conversation, or its answers cannot be found; the message
                names the place.
        """
        texts, spans, tokens, masks = {}, {}, {}, {}
        for number, (chat, place) in enumerate(zip(chats, places, strict=True)):
            has_marks = self.assistant_only and _GENERATION_MARK.search(self._find_template(chat, place))
            if has_marks:
                tokens[number], masks[number] = self._by_marks(chat, place)
                continue
            texts[number] = self._render(chat, _messages_of(chat), place)
            spans[number] = self._by_prefix(chat, texts[number], place) if self.assistant_only else None
        if texts:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            found = self.tokenizer([*texts.values()], return_offsets_mapping=self.assistant_only, **options)
            for place, number in enumerate(texts):
                tokens[number] = np.asarray(found["input_ids"][place], np.int32)
                masks[number] = np.ones(len(tokens[number]), np.int8)
                if self.assistant_only:
                    offsets = np.asarray(found["offset_mapping"][place]).reshape(-1, 2)
                    masks[number] = _mark_spans(offsets, spans[number])
        return [tokens[number] for number in range(len(chats))], [masks[number] for number in range(len(chats))]

    def _find_template(self, chat: dict, place: str) -> str:
        try:
            return self.tokenizer.get_chat_template(None, chat.get("tools"))
        except ValueError:
            raise ValueError(
                f"{place} holds a conversation, but the tokenizer has no chat template: give a teacher that has one, as "
                "instruct models do, or data with a column of text."
            ) from None

    def _render(self, chat: dict, messages: list[dict], place: str, **options):
        self._find_template(chat, place)
        options = {
            "tokenize": False,
            "tools": chat.get("tools"),
            **(chat.get("chat_template_kwargs") or {}),
            **options,
        }
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"The chat template refuses the conversation of {place}, whose roles are {roles[:200]} "
                f"({' '.join(str(error).split())}): mend it or leave it out."
            ) from None

    def _by_marks(self, chat: dict, place: str) -> tuple[np.ndarray, np.ndarray]:
        options = {"tokenize": True, "return_assistant_tokens_mask": True, "tokenizer_kwargs": {"verbose": False}}
        found = self._render(chat, _messages_of(chat), place, **options)
        tokens, mask = np.asarray(found["input_ids"], np.int32), np.asarray(found["assistant_masks"], np.int8)
        if "prompt" in chat:
            prompt = self._render(chat, chat["prompt"], place, tokenize=True, add_generation_prompt=True)["input_ids"]
            mask[: count_common(prompt, tokens)] = 0
        return tokens, mask

    def _by_prefix(self, chat: dict, text: str, place: str) -> list[tuple[int, int]]:
        """The answers in the text of a conversation, as begin and end."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"assistant_only is set, but a {type(self.tokenizer).__name__} does not say where in a text its tokens are: "
                "give a teacher with a fast tokenizer (tokenizer.json)."
            )
        messages, spans = _messages_of(chat), []
        for number in range(max(len(chat.get("prompt", ())), 1), len(messages)):
            if messages[number]["role"] != "assistant":
                continue
            before = self._render(chat, messages[:number], place, add_generation_prompt=True)
            after = self._render(chat, messages[: number + 1], place) if number + 1 < len(messages) else text
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"assistant_only is set, but the chat template writes the beginning of {place} in another way when "
                    f"message {number} and more follow, so that its answers cannot be told apart: give a template that marks "
                    "them with {% generation %} and {% endgeneration %} (chat_template.jinja beside the tokenizer), or leave "
                    "the option out."
                )
            spans.append((len(before), len(after)))
        return spans


def _messages_of(chat: dict) -> list[dict]:
    return chat["messages"] if "messages" in chat else chat["prompt"] + chat["completion"]


def _mark_spans(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """1 for tokens with a character in one of the spans. A token on both sides of a beginning is the first of the answer."""
    mask = np.zeros(len(offsets), np.int8)
    for begin, end in spans:
        mask[(offsets[:, 0] < end) & (offsets[:, 1] > begin)] = 1
    return mask


def count_common(first, second) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(differing[0]) if len(differing) else length

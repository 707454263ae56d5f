"""
Prompts and completions: [`Prompt`], and functions of texts and messages.

Prompts and completions are texts or lists of messages (`{"role": ..., "content": ...}`), as in TRL.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from .errors import DataError

Message = dict[str, Any]
Content = str | list[Message]
"""A text, or the messages of a conversation."""

Row = dict[str, Any]
"""A row of a file or a dataset: columns by name."""

KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "model", "tool", "function", "ipython",
                         "observation", "environment", "document", "context"})  # fmt: skip
"""Those of published chat templates: most of these pass over a message whose role is misspelt."""

NOT_UNICODE = "has half of a surrogate pair (e.g. \\ud83d alone), which is no character; remove the row or correct it."


@dataclass(frozen=True)
class Prompt:
    """
    A prompt and what the user's files say about it.

    Attributes:
        id: A name that depends on the content alone ([`prompt_id`]).
        content: Text or messages.
        columns: The user's other columns by name. They never mix with ours, whatever their names.
    """

    id: str
    content: Content
    columns: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Content, columns: dict[str, Any] | None = None) -> "Prompt":
        """A prompt under the name of its content."""
        return cls(prompt_id(content), content, columns or {})

    @classmethod
    def from_row(cls, row: Row) -> "Prompt":
        """From a row of a run's files."""
        return cls(row["prompt_id"], row["prompt"], columns_of(row) or {})

    def to_row(self) -> Row:
        return {"prompt_id": self.id, "prompt": self.content, "columns": self.columns}

    @property
    def text(self) -> str:
        return prompt_text(self.content)


def prompt_problem(prompt: Any) -> str | None:
    """What is wrong with a prompt, to be read after its name; `None` if nothing is."""
    problem = message_problem(prompt) if isinstance(prompt, list) else text_problem(prompt)
    if problem is None and not is_unicode(prompt):
        return NOT_UNICODE
    return problem


def is_unicode(prompt: Content) -> bool:
    """Whether a text or messages can be encoded: JSON may hold halves of characters, which tokenizers do not take."""
    try:
        json.dumps(prompt, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def text_problem(text: Any) -> str | None:
    if text is None:
        return "is None; give a string or a list of messages."
    if not isinstance(text, str):
        return f"is of type {type(text).__name__}; give a string or a list of messages."
    if not text.strip():
        return "is empty; remove the row or fill it."
    return None


def message_problem(messages: Any) -> str | None:
    """What is wrong with a list of messages; `None` if nothing is."""
    if problem := form_problem(messages):
        return problem
    if not any(says_something(message) for message in messages):
        return "is empty: no message has any content; remove it or fill it."
    return None


def form_problem(messages: Any) -> str | None:
    """The same for messages that may be empty, such as completions that ended at once."""
    if not isinstance(messages, list):
        return f"is of type {type(messages).__name__}; give a list of messages."
    if not messages:
        return "is an empty list of messages; remove it or fill it."
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            return f"holds {message!r}, which is no message; give {{'role': ..., 'content': ...}}."
        if message["role"] not in KNOWN_ROLES:
            return (
                f"has a message of the unknown role {message['role']!r}; use one of {', '.join(sorted(KNOWN_ROLES))}."
            )
    return None


def says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def prompt_id(prompt: Content) -> str:
    """A name for a prompt that depends on its content alone: 16 hexadecimal digits."""
    canonical = json.dumps(prompt, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def columns_of(row: Row) -> dict[str, Any] | None:
    """The user's columns in a row of a file of ours; lists hold them as JSON. `None` if there are none like that."""
    columns = row.get("columns")
    if isinstance(columns, str):
        try:
            columns = json.loads(columns)
        except ValueError:
            return None
    return columns if isinstance(columns, dict) else None


def changed_columns(prompt: Prompt, other: Prompt) -> list[str]:
    """Names of the columns in which two prompts differ, as they are written."""
    if prompt.columns is other.columns:
        return []
    before, now = ({name: json.dumps(value) for name, value in each.columns.items()} for each in (prompt, other))
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def checked_columns(columns: Row, where: str) -> Row:
    """
    A user's columns, as they are.

    Raises:
        DataError: If one holds what JSON files cannot, such as times.
    """
    for column, value in columns.items():
        if not is_plain(value):
            raise DataError(
                f"{where}, column `{column}`: holds {type(value).__name__}; prompts may have text, numbers and lists "
                "of them. Write it as text, or remove the column."
            )
    return columns


def is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def prompt_text(prompt: Content) -> str:
    """The words of a prompt: those of the user, where it is a conversation."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(m.get("content") or "") for m in prompt if m.get("role") not in ("system", "developer"))


def without_none(messages: list[Message]) -> list[Message]:
    """The messages without the keys that datasets and Parquet fill in, which only other messages have."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def without_empty_system_turn(prompt: list[Message]) -> list[Message]:
    """
    The messages without a system message that says nothing: a form in which some policies were trained, and of which
    judges know nothing.
    """
    is_empty = bool(prompt) and prompt[0].get("role") == "system" and not says_something(prompt[0])
    return prompt[1:] if is_empty else prompt


def completion_text(completion: Content) -> str:
    """The words of a completion."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def completion_key(completion: Content) -> str:
    """A text that is the same for completions that are equal, in all of their messages."""
    return (
        completion if isinstance(completion, str) else json.dumps(without_none(completion), sort_keys=True, default=str)
    )


def is_empty(completion: Content) -> bool:
    """Whether a completion says nothing in the end, and calls no tool: the training refuses it."""
    return not (completion.strip() if isinstance(completion, str) else says_something(completion[-1]))


def completion_for(prompt: Content, text: str) -> Content:
    """A completion with some text, as text or messages, whichever its prompt is."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def in_form_of(prompt: Content, completion: Content) -> Content:
    """A completion as text or messages, whichever its prompt is."""
    if isinstance(prompt, str) == isinstance(completion, str):
        return completion
    return completion_for(prompt, completion_text(completion))


def without_thoughts(completion: Content) -> Content:
    """A completion without the thoughts in front of its answer; empty where they do not end."""
    text = completion_text(completion)
    _, ended, answer = text.rpartition("</think>")  # `<think>` may stand in the chat template's prompt
    if not ended and not text.lstrip().startswith("<think>"):
        return completion
    answer = answer.lstrip() if ended else ""
    return answer if isinstance(completion, str) else [*completion[:-1], completion[-1] | {"content": answer}]

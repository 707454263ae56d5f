"""Prompts and completions: a name, the words, and what is wrong with one."""

import hashlib
import json
from typing import Any

Row = dict[str, Any]


KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})


def prompt_problem(prompt: Any) -> str | None:
    """What is wrong with a prompt, to be read after its name; `None` if nothing is."""
    return message_problem(prompt) if isinstance(prompt, list) else text_problem(prompt)


def text_problem(text: Any) -> str | None:
    if text is None:
        return "is None; give a string or a list of messages."
    if not isinstance(text, str):
        return f"is of type {type(text).__name__}; give a string or a list of messages."
    if not text.strip():
        return "is empty; remove the row or fill it."
    return None


def message_problem(messages: Any) -> str | None:
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
    if not any(says_something(message) for message in messages):
        return "is empty: no message has any content; remove it or fill it."
    return None


def says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def prompt_id(prompt: str | list[Row]) -> str:
    """A name for a prompt that depends on its content alone: 16 hexadecimal digits."""
    canonical = json.dumps(prompt, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def prompt_text(prompt: str | list[Row]) -> str:
    """The words of a prompt: those of the user, where it is a conversation."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(m.get("content") or "") for m in prompt if m.get("role") not in ("system", "developer"))


def completion_text(completion: str | list[Row]) -> str:
    """The words of a completion."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")

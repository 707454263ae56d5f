"""Keeps secrets out of what is written down: the configuration of a run, its copies, trackers and messages."""

import re
from typing import Any

HIDDEN = "<hidden>"
"""What stands in place of a secret."""

_NAME = re.compile(
    r"(.*_)?(api_?key|secret|secret_key|access_key|access_key_id|private_key|password|passwd|credentials?"
    r"|authorization|signature|(access|api|auth|hf|hub|bearer|session|security)_?token)|token|use_auth_token|sig"
    r"|notify_command"  # who may send messages is in it, in one of many forms
)

_LOOKS_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|gh[opsu]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}"
    r"|(?<=Bearer )(?![${<])[^\s'\"]+)"
)

_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"']+)"""

_FLAG = re.compile(rf"(?<![\w-])(?P<name>--?[\w-]+)(?P<gap>=|\s+)(?P<values>(?!-){_VALUE}(?:[ \t]+(?!-){_VALUE})*)")
_ASSIGNED = re.compile(rf"(?P<name>\b\w+)(?P<gap>=)(?P<values>{_VALUE})")
_QUERY = re.compile(r"(?P<name>(?<=[?&;])[\w.-]+)(?P<gap>=)(?P<values>[^&;#\s'\"]+)")
_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")

_WEBHOOK = re.compile(  # addresses to which whoever knows them may send messages
    r"(?P<kept>\bhooks\.slack\.com/(?:services|workflows|triggers)/|\bdiscord(?:app)?\.com/api/(?:v\d+/)?webhooks/"
    r"|\.webhook\.office\.com/|\bapi\.telegram\.org/(?:file/)?bot)(?![${<])[^\s'\"]+"
)


def hide_secrets(value: Any) -> Any:
    """
    A copy of options in which secrets are replaced.

    Hidden are values of keys such as `token` and `api_key` in dictionaries, of flags (`--api-key ...`) and variables
    (`HF_TOKEN=...`) in commands, passwords and keys in URLs, addresses of webhooks, what looks like a token of a known
    service, and the whole of `notify_command`. References to the environment (`$HF_TOKEN`) stay.

    Args:
        value: A text, a number, or lists and dictionaries of them.
    """
    if isinstance(value, str):
        return _hide_in_text(value)
    if isinstance(value, dict):
        return {k: HIDDEN if _is_secret(k) and isinstance(v, str) and v else hide_secrets(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hide_secrets(each) for each in value]
    return value


def _is_secret(name: Any) -> bool:
    return _NAME.fullmatch(str(name).strip("-").replace("-", "_").lower()) is not None


def _hide_in_text(text: str) -> str:
    text = _USER.sub(HIDDEN, text)
    for pattern in (_QUERY, _FLAG, _ASSIGNED):
        text = pattern.sub(_hide_values, text)
    text = _WEBHOOK.sub(rf"\g<kept>{HIDDEN}", text)
    return _LOOKS_SECRET.sub(HIDDEN, text)


def _hide_values(match: re.Match) -> str:
    if not _is_secret(match["name"]):
        return match[0]
    values = re.sub(_VALUE, lambda value: value[0] if value[0].strip("\"'")[:1] in "${<" else HIDDEN, match["values"])
    return f"{match['name']}{match['gap']}{values}"

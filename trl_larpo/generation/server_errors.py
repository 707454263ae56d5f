"""What failed requests to a server say: of which kind they are ([`kind_of`]), and why in a few words ([`describe`])."""

import json

from ..redaction import HIDDEN, hide_secrets
from .urls import NO_KEY

_NEVER_AGAIN = (401, 403, 404)  # what a server says to a wrong key, model or address
_LATER = (408, 409, 425, 429)
_BUSY = (429, 503)


class UnusableAnswerError(Exception):
    """A server answered, but with something else than completions."""


def kind_of(error: Exception) -> str | None:
    """What an error of a request says of the server or the prompt; `None` for errors of another origin."""
    import openai

    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "unreachable"
    if isinstance(error, openai.APIStatusError):
        if error.status_code in _NEVER_AGAIN:
            return "hopeless"
        if error.status_code in _BUSY:
            return "busy"
        return "refused" if 400 <= error.status_code < 500 and error.status_code not in _LATER else "failed"
    # Half an answer, or one in another form
    if isinstance(
        error, UnusableAnswerError | openai.APIResponseValidationError | json.JSONDecodeError | UnicodeDecodeError
    ):
        return "unusable"
    return None


def was_sent(error: Exception) -> bool:
    """Whether a request that failed had a connection to the server."""
    import httpx

    return not isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)


def describe(error: Exception, *, timeout: float, key: str) -> str:
    """
    Why a request failed, in at most 300 characters.

    Args:
        error: What it raised.
        timeout: Seconds that it might take.
        key: Of the server, which may repeat it.
    """
    text, cause = str(error), error.__cause__
    if kind_of(error) == "timeout":
        text = (
            f"no answer in {timeout:g} s (`server_timeout`). If the server is slow, raise that or lower "
            "`server_requests_in_flight`."
        )
    elif kind_of(error) == "unreachable" and cause is not None:
        text = f"{text.rstrip('.')} ({type(cause).__name__}: {cause})."
    return without_key(text, key)[:300]


def without_key(text: str, key: str) -> str:
    """What a server said, on one line, without the key that it may have repeated and other secrets."""
    if key != NO_KEY:
        text = text.replace(key, HIDDEN)
    return hide_secrets(" ".join(text.split()))

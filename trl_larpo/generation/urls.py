"""Requests to servers: what goes to which host."""

import http.client
import ipaddress
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import Future
from urllib.parse import urlsplit

from ..errors import ConfigError


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine, which no proxy reaches."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


NO_KEY = "EMPTY"
"""What is sent to servers that need no key."""


def api_key(variable: str) -> str:
    """
    The key in an environment variable, or [`NO_KEY`].

    Raises:
        ConfigError: If it holds characters that no header may have. The message does not hold the key.
    """
    key = os.environ.get(variable, "").strip()  # files end with a line break
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"The environment variable {variable} holds a line break or a character that is not ASCII, which no key "
            "has. Set it again."
        )
    return key or NO_KEY


class _KeepKey(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and sends the key to no other server than the one that was asked."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and not _is_same_server(req.full_url, newurl):
            request.remove_header("Authorization")
        return request


def _is_same_server(url: str, other: str) -> bool:
    """Whether an address is on the same server as one before, perhaps encrypted where that one was not."""
    before, after = _origin(url), _origin(other)
    return after in (before, ("https", before[1], 443)) and before[0] in ("http", after[0])


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def check_answer(request: str | urllib.request.Request, timeout: float) -> None:
    """
    Checks that a server answers, and not with an error. No proxy is used on this machine, and the key is not sent to
    another server that a redirect leads to.

    Args:
        request: URL or request.
        timeout: Seconds until the head of the answer is there, however slowly it drips in.

    Raises:
        OSError: If the server does not answer, or not in time, or with an error.
        ValueError: If it is no URL, or no answer in HTTP.
    """
    url = request if isinstance(request, str) else request.full_url
    handlers: list[urllib.request.BaseHandler] = [_KeepKey()]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    answered: Future[None] = Future()

    def ask() -> None:
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=timeout):
                answered.set_result(None)
        except urllib.error.HTTPError as error:
            error.close()
            answered.set_exception(error)
        except http.client.HTTPException as error:
            answered.set_exception(ValueError(f"{type(error).__name__}: {error}"))
        except BaseException as error:
            answered.set_exception(error)

    # The timeout of a socket is one for each of its reads
    threading.Thread(target=ask, daemon=True).start()
    try:
        answered.result(timeout)
    except TimeoutError:
        raise TimeoutError(f"no answer in {timeout:g} s") from None

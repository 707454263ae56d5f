"""Requests to servers: what goes to which host."""

import ipaddress
import urllib.request
from typing import Any
from urllib.parse import urlsplit


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine, which no proxy reaches."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


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


def open_url(request: str | urllib.request.Request, timeout: float) -> Any:
    """
    As `urllib.request.urlopen`, but without a proxy on this machine, and without the key where a redirect leads to
    another server.
    """
    url = request if isinstance(request, str) else request.full_url
    handlers: list[urllib.request.BaseHandler] = [_KeepKey()]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers).open(request, timeout=timeout)

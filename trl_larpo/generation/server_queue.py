"""
[`RequestQueue`]: the requests that wait for a server.

A prompt may be what ends a server, and then everything else that the server worked on fails with it. All of that is
under suspicion, and asked for after all others: a few at a time, then alone.
"""

import bisect
from collections import deque
from collections.abc import Iterable

from .server_endpoint import Endpoint, Request

MAX_CRASHES = 3  # of servers that were asked for the same request: among others, among a few, alone


class RequestQueue:
    """
    Requests that wait.

    Args:
        requests: What there is to ask for.
        most_at_once: How many requests a server is asked for at the same time.
    """

    def __init__(self, requests: Iterable[Request], most_at_once: int):
        self.most_at_once = most_at_once
        self._waiting: deque[Request] = deque()
        self._suspects: list[Request] = []  # may be what ends servers; those with the most crashes come first
        self._exhausted: set[str] = set()  # servers that have nothing to do here, until something changes
        for request in requests:
            self.put(request)

    def put(self, request: Request, first: bool = False) -> None:
        """Lets a request wait, before all others if it comes first."""
        self.changed()
        if request.crashes:
            bisect.insort(self._suspects, request, key=lambda x: -x.crashes)
        elif first:
            self._waiting.appendleft(request)
        else:
            self._waiting.append(request)

    def changed(self) -> None:
        """Notes that another server may take now what waits."""
        self._exhausted.clear()

    def next_for(self, endpoint: Endpoint, endpoints: list[Endpoint]) -> Request | None:
        """A request that has not failed on a server yet; one that has only where it has failed on all others too."""
        others = {other.url for other in endpoints if not other.dead and other is not endpoint}

        def may_take(request: Request) -> bool:
            return endpoint.url not in request.failed_on or others <= request.failed_on

        if len(endpoint.in_flight) >= min(map(self._most_with, endpoint.in_flight.values()), default=self.most_at_once):
            return None
        if endpoint.url not in self._exhausted:
            for _ in range(len(self._waiting)):
                request = self._waiting.popleft()
                if may_take(request):
                    return request
                self._waiting.append(request)
            self._exhausted.add(endpoint.url)
        for place, request in enumerate(self._suspects):
            if may_take(request):  # what it works on ends first, so that it is asked for few enough
                return self._suspects.pop(place) if len(endpoint.in_flight) < self._most_with(request) else None
        return None

    def suspect(self, requests: Iterable[Request]) -> list[Request]:
        """
        Notes what a server had been asked for when it stopped answering.

        Returns:
            Requests that need not wait any more, because servers stopped at them too often.
        """
        for request in requests:
            request.crashes += 1
        waiting, too_bad = [*self._waiting, *self._suspects], []
        self._waiting.clear()
        self._suspects.clear()
        for request in waiting:
            if request.crashes < MAX_CRASHES:
                self.put(request)
            else:
                too_bad.append(request)
        return too_bad

    def _most_with(self, request: Request) -> int:
        """How many requests, with this one, a server is asked for at a time."""
        return max(1, self.most_at_once // 8**request.crashes)

"""Requests that wait for one model: those of the same kind that wait together are done together."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

Work = Callable[[Any, list[Any]], Sequence[Any]]  # what kind of work, the items of all requests -> a result for each


class Full(Exception):  # noqa: N818 (nothing went wrong)
    """Too many wait already."""


class Closed(Exception):  # noqa: N818 (nothing went wrong)
    """Nothing is done any more."""


class _Request(NamedTuple):
    kind: Hashable
    items: list[Any]
    done: Future


class Waiting:
    """A thread that does what is asked for, first come first served; requests of the same kind may be done before.

    Args:
        work: does the items of some requests of one kind.
        most_together: items of requests that are put together. A request that has more is done alone.
        most_waiting: requests.
    """

    def __init__(self, work: Work, most_together: int, most_waiting: int) -> None:
        self.work, self.most_together, self.most_waiting = work, most_together, most_waiting
        self._requests: deque[_Request] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, kind: Hashable, items: list[Any]) -> Future:
        """Have the items done: the future gets a result for each. Raises: Full, Closed."""
        request = _Request(kind, items, Future())
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._requests) >= self.most_waiting:
                raise Full
            self._requests.append(request)
            self._changed.notify()
        return request.done

    def close(self) -> None:
        """Finish what is being done; whoever still waits gets `Closed`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while requests := self._next():
            self._do(requests)
        for request in self._requests:
            request.done.set_exception(Closed())

    def _next(self) -> list[_Request]:
        """The requests to do now; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._requests)
            if self._closed:
                return []
            taken, left = [self._requests.popleft()], deque()
            items = len(taken[0].items)
            for request in self._requests:
                fits = request.kind == taken[0].kind and items + len(request.items) <= self.most_together
                items += len(request.items) if fits else 0
                (taken if fits else left).append(request)
            self._requests = left
        return taken

    def _do(self, requests: list[_Request]) -> None:
        try:
            results = iter(self.work(requests[0].kind, [item for request in requests for item in request.items]))
        except Exception as error:  # whoever asked is told, and the next ones are served
            if len(requests) == 1:
                requests[0].done.set_exception(error)
            for request in requests if len(requests) > 1 else ():  # it may be that of one of them
                self._do([request])
            return
        for request in requests:
            request.done.set_result([next(results) for _ in request.items])

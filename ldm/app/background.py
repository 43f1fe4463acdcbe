"""Work that goes on while what it tells is looked at."""

from collections.abc import Callable, Generator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

Told = TypeVar("Told")


def in_background(
    work: Callable[[Callable[[Told], None], Callable[[], bool]], None],
) -> Generator[Told, None, None]:
    """Yields what `work(tell, cancelled)` tells from a thread of its own, and raises what that raises.

    `cancelled()` is true once the generator is closed.
    """
    told: SimpleQueue[Any] = SimpleQueue()
    closed, ended, end = Event(), Future[None](), object()

    def run() -> None:
        try:
            work(told.put, closed.is_set)
            ended.set_result(None)
        except BaseException as error:  # raised again by the reader
            ended.set_exception(error)
        told.put(end)

    Thread(target=run, daemon=True).start()
    try:
        while (one := told.get()) is not end:
            yield one
        ended.result()
    finally:
        closed.set()

"""Threads that do not outlive the interpreter.

A daemon thread that returns from torch while the interpreter ends is unwound by force, which C++
does not allow: the process aborts (`terminate called without an active exception`). So each worker
says how it is told to stop, and before the interpreter ends all of them are told and waited for.
"""

import atexit
import threading
from collections.abc import Callable
from weakref import WeakSet

_LONGEST_WAIT = 60.0  # seconds, for a disk that does not answer


class Worker(threading.Thread):
    """A running daemon thread.

    Args:
        work: what it does; must not keep alive whoever stops it by being forgotten.
        stop: makes `work` return soon, from any thread; may be called again.
    """

    def __init__(self, work: Callable[[], object], name: str, stop: Callable[[], object]) -> None:
        super().__init__(target=work, name=f"superpipeline-{name}", daemon=True)
        self.stop = stop
        self.start()
        _workers.add(self)


_workers: WeakSet[Worker] = WeakSet()


@atexit.register
def _stop_all() -> None:
    workers = [worker for worker in _workers if worker.is_alive()]  # none of them is in a fork
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.join(_LONGEST_WAIT)

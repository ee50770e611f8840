"""What names were refused for: the answer to the next requests for them, so that clients cannot make a server read without end."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from vllm_plugin.errors import PrefixServeError
from vllm_plugin.logger import logger

# Files that were refused are read again after this time, also if they are as they were: the reason may have passed, such as a
# download that broke off, or too many open files.
_READ_AGAIN_SECONDS = 60.0
# Clients may send any number of names.
_MAX_REFUSED = 10_000


class Refused(NamedTuple):
    """A name without an adapter.

    Args:
        error: Why; None if nothing has this name.
        state: The state of the files that were refused; None if there are none.
        until: Until when this answer stands, whatever happens.
        read_again: When the files are read again, even in the same state.
    """

    error: PrefixServeError | None
    state: str | None
    until: float
    read_again: float


class Refusals:
    """The names that were refused last.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._refused: OrderedDict[str, Refused] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._refused)

    def __contains__(self, name: str) -> bool:
        return name in self._refused

    def standing(self, name: str) -> Refused | None:
        """Returns why a name is refused without a look; None if it has to be looked for."""
        with self._lock:
            refused = self._refused.get(name)
        return None if refused is None or self._clock() >= refused.until else refused

    def add(self, name: str, error: PrefixServeError | None, state: str | None, seconds: float) -> None:
        """Remembers for some seconds what a name was refused for, and logs it once."""
        with self._lock:
            before, now = self._refused.pop(name, None), self._clock()
            kept = None if error is None else without_frames(error)
            self._refused[name] = Refused(kept, state, now + seconds, now + _READ_AGAIN_SECONDS)
            if len(self._refused) > _MAX_REFUSED:
                self._refused.popitem(last=False)
        if error is not None and (before is None or str(before.error) != str(error)):
            logger.warning("Refused: %s", error)

    def raise_again(self, name: str, state: str, seconds: float) -> None:
        """Raises what a name was refused for, and for some seconds more, if its files are as they were then, not long ago."""
        with self._lock:
            refused, now = self._refused.get(name), self._clock()
            if refused is None or refused.error is None or refused.state != state or now >= refused.read_again:
                return
            self._refused[name] = refused._replace(until=now + seconds)
        raise without_frames(refused.error)

    def expire(self, name: str) -> None:
        """Makes the next request look at the files of a name again."""
        with self._lock:
            if (refused := self._refused.get(name)) is not None:
                self._refused[name] = refused._replace(until=self._clock())

    def forget(self, name: str) -> None:
        """Forgets why a name was refused."""
        with self._lock:
            self._refused.pop(name, None)


def without_frames(error: PrefixServeError) -> PrefixServeError:
    """Returns the same error without what it holds on to: the frames that it was raised in, and the tensors there."""
    return type(error)(str(error))

"""What a search has measured, kept in a file from which it goes on after a stop."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .files import write_whole


__all__ = ["Measured"]


class Measured:
    """
    KL of what a search has measured, in nats by key; in a file too, if there is one, with what it was measured on.

    Args:
        file (`Path`, *optional*): JSON file, read if it is there and written with each value.
        describe (`Callable`): what the values depend on, as JSON can hold it; called if there is a file.
        remedy (`str`): what to do about a file that was measured on something else.
        defaults (`dict`, *optional*): descriptions that a file of an earlier version, which has them not, counts as made with.

    Raises:
        `ValueError`: the file holds something else, or was measured on something else.
    """

    def __init__(self, file: Path | None, describe: Callable[[], dict], remedy: str, defaults: dict | None = None):
        self._file, self._measured_on, self.known = file, None, {}
        if file is None:
            return
        self._measured_on = describe()
        if not file.exists():
            return
        try:
            content = json.loads(file.read_text())
            measured_on = (defaults or {}) | content["measured_on"]
            self._read(content)
            differing = [
                name for name, value in self._measured_on.items() if not _is_same(measured_on.get(name), value)
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{str(file)!r} does not hold what a search has measured: give another file.") from None
        if differing:
            raise ValueError(f"What {str(file)!r} holds was measured with another {', '.join(differing)}: {remedy}.")

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> float:
        return self.known[key]

    def __setitem__(self, key: str, value: float) -> None:
        self.known[key] = value
        self._write()

    def _read(self, content: dict) -> None:
        self.known = content["kl"]

    def _content(self) -> dict:
        return {"kl": self.known}

    def _write(self) -> None:
        if self._file is not None:
            write_whole(self._file, json.dumps({"measured_on": self._measured_on, **self._content()}))


def _is_same(one: object, other: object) -> bool:
    """Whether two values of a description are equal; of numbers that may have been measured again, nearly."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = np.asarray(one), np.asarray(other)
        return one.shape == other.shape and np.allclose(one, other, atol=1e-3)
    return one == other

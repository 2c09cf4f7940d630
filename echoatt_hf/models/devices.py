"""Where models run, and the processes that run them together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState


__all__ = ["check_one_process", "default_device", "explained_memory_errors", "is_memory_error", "processes"]


def default_device() -> str:
    """Where models run that nobody has placed: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def processes() -> PartialState:
    """`PartialState`: the processes that were launched together, as by `accelerate launch`, and which one this is."""
    return PartialState(cpu=default_device() == "cpu")


def check_one_process(what: str) -> None:
    """Check that a work which cannot be divided is not done several times. Raises `ValueError` if it would be."""
    number = processes().num_processes
    if number > 1:
        raise ValueError(
            f"{number} processes were launched, but {what} the work of one: run it without `accelerate launch`, which is for "
            "`echoatt distill` and `echoatt evaluate`."
        )


def is_memory_error(error: Exception) -> bool:
    """Whether an error says that the memory of a device or of the machine did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ("can't allocate memory", "not enough memory", "out of memory")  # for a CPU torch has no class
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


class _ExplainedMemoryError(MemoryError):
    pass


@contextmanager
def explained_memory_errors(remedy: str) -> Iterator[None]:
    """
    Say what to do when the memory of the device or of the machine does not suffice.

    Args:
        remedy (`str`): what to lower, as the end of a sentence.

    Raises:
        `MemoryError`: there was not enough memory in the block; that of an inner block keeps its remedy.
    """
    try:
        yield
    except _ExplainedMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise _ExplainedMemoryError(
            f"There is not enough memory ({reason or type(error).__name__}): {remedy}."
        ) from error

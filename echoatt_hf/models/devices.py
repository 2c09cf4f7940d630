"""Where models run, and the processes that run them together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool


__all__ = [
    "check_one_process",
    "default_device",
    "describe_device",
    "explained_memory_errors",
    "is_memory_error",
    "processes",
    "synchronize",
    "to_float64",
]

_WITHOUT_FLOAT64 = {"mps"}


def default_device() -> str:
    """
    Where models run that nobody has placed: on the accelerator that PyTorch finds (CUDA, ROCm, XPU, MPS, ...), else on the
    CPU. `ACCELERATE_USE_CPU=1`, which `accelerate launch --cpu` sets, asks for the CPU.
    """
    if str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")) or not torch.accelerator.is_available():
        return "cpu"
    return torch.accelerator.current_accelerator().type


def describe_device() -> str:
    """The device by name, or the number of threads of a CPU."""
    device = default_device()
    if device == "cpu":
        return f"{torch.get_num_threads()} CPU threads"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return named() if named is not None else device


def synchronize(device: torch.device) -> None:
    """Wait for all that a device has been given. A CPU has finished when a call returns."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64: where it is, or on the CPU if its device has no float64."""
    return (tensor.cpu() if tensor.device.type in _WITHOUT_FLOAT64 else tensor).double()


def processes() -> PartialState:
    """
    `PartialState`: the processes that were launched together, as by `accelerate launch`, which one this is, and its
    `device`. Making it is what sets that device, so models are placed by it.
    """
    return PartialState(cpu=default_device() == "cpu")


def check_one_process(
    what: str,
    remedy: str = "run it without `accelerate launch`, which is for `echoatt distill` and `echoatt evaluate`",
) -> None:
    """Check that a work which cannot be divided is not done several times. Raises `ValueError` if it would be."""
    number = processes().num_processes
    if number > 1:
        raise ValueError(f"{number} processes were launched, but {what} the work of one: {remedy}.")


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

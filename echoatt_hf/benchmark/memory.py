"""How much memory something takes."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


__all__ = ["PeakMemory", "peak_memory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """Bytes held at most beyond what was held before; `None` until that is known, and where the system does not say."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """
    Measure what is held at most in this context: of a GPU what PyTorch allocates, else of the process, where Linux says it.

    Args:
        device (`torch.device`): where the models are.
    """
    found = PeakMemory()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is held for later, and would hide what is needed
        _CLEAR.write_text("5")  # the peak starts anew
        before = _read_status("VmRSS")
    except (OSError, AttributeError):
        yield found
        return
    yield found
    found.bytes = _read_status("VmHWM") - before


def _read_status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024

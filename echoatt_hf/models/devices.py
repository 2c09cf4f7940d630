"""Where models run, and the processes that run them together."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool


__all__ = ["default_device", "describe_device", "processes", "synchronize", "to_float64"]

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
    """`PartialState`: the processes that were launched together, as by `accelerate launch`, and which one this is."""
    return PartialState(cpu=default_device() == "cpu")

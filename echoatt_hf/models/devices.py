"""Where models run, and the processes that run them together."""

import torch
from accelerate import PartialState


__all__ = ["default_device", "processes"]


def default_device() -> str:
    """Where models run that nobody has placed: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def processes() -> PartialState:
    """`PartialState`: the processes that were launched together, as by `accelerate launch`, and which one this is."""
    return PartialState(cpu=default_device() == "cpu")

"""Forward passes that begin at a layer, with what was kept of those before it, and that end where they are told to."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


__all__ = ["find_layers", "keep_layer_outputs", "replaced", "run_through", "run_until", "starting_at", "states_of"]


class _Reached(Exception):
    """A forward pass has come to the module that was asked for."""


def find_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder layers of a model, in order; `None` where they are not in one list."""
    count = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return found[0] if len(found) == 1 else None


@contextmanager
def starting_at(layers: nn.ModuleList | None, index: int, output: Any) -> Iterator[None]:
    """
    In this context layers below `index` are not computed: what the last of them returned in an earlier pass on the same
    tokens is `output`.

    Args:
        layers (`nn.ModuleList`): decoder layers, see [`find_layers`].
        index (`int`): the first layer that is computed; 0 for all of them.
        output: what layer `index - 1` returned.
    """
    with replaced(layers[:index] if layers is not None else [], lambda *args, **kwargs: output):
        yield


@contextmanager
def replaced(layers: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    """In this context the forward passes of some layers are another function."""
    layers = list(layers)
    # Of accelerate: the forward pass of a layer of a model that is spread over devices.
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before


@contextmanager
def keep_layer_outputs(layers: nn.ModuleList | None) -> Iterator[list]:
    """In this context a forward pass leaves what each decoder layer returns in the list."""
    kept = []
    hooks = [layer.register_forward_hook(lambda module, args, output: kept.append(output)) for layer in layers or ()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def states_of(output: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states `(B, T, O)` that a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def run_through(module: nn.Module, forward: Callable[[], object]) -> None:
    """Run a forward pass no further than `module`, whose hooks so far still run."""

    def stop(module, args, output):
        raise _Reached

    with module.register_forward_hook(stop), suppress(_Reached):
        forward()


def run_until(module: nn.Module, forward: Callable[[], object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a forward pass no further than `module`. Returns its inputs `(N, I)` and outputs `(N, O)` for all tokens."""
    found = []

    def stop(module, args, output):
        found.extend(tensor.detach().flatten(0, -2) for tensor in (args[0], output))
        raise _Reached

    with module.register_forward_hook(stop), suppress(_Reached):
        forward()
    return found[0], found[1]


def run_to_call(module: nn.Module, forward: Callable[[], object]) -> tuple[tuple, dict[str, Any]]:
    """Run a forward pass until `module` is called. Returns the arguments of the call."""
    found = []

    def stop(module, args, kwargs):
        found.extend((args, dict(kwargs)))
        raise _Reached

    with module.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Reached):
        forward()
    return found[0], found[1]

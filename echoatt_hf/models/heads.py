"""What a causal language model does after its decoder, for some tokens at a time."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import BatchEncoding, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..modeling_echoatt import find_decoder
from .checks import relative_error
from .inference import inference


__all__ = ["HeadCall", "HeadLogits", "OutputHead", "predict", "token_chunks"]

# Of the float32 logits of a chunk. Several tensors of this size exist at a time; smaller ones make matrix products slower,
# on an accelerator those of four times the size too.
CHUNK_BYTES = 2**26
ACCELERATOR_CHUNKS = 4

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

logger = logging.getLogger(__name__)


class OutputHead:
    """
    The part of a causal language model that makes logits of its decoder's last hidden states.

    It is the family's own: its forward pass is called with a stand-in for the decoder that returns the hidden states of
    some tokens. Whatever comes after the decoder, such as a bias, a scale or a soft cap, applies.

    Args:
        model (`nn.Module`):
            A causal language model, or what holds one: a student, or one with adapters. Wrap it afterwards as you like.

    Raises:
        `ValueError`: there is no causal language model in it.
    """

    def __init__(self, model: nn.Module):
        nested = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        with_head = [module for module in nested if module.get_output_embeddings() is not None]
        if not with_head:
            raise ValueError(f"{type(model).__name__} has no output head.")
        # The innermost one is the family's.
        self._language_model, self._decoder = with_head[-1], find_decoder(model)
        self._is_plain = False

    @classmethod
    def find(cls, model: nn.Module, with_liger: bool = False, *, among_processes: bool = True) -> "OutputHead | None":
        """
        The output head of a model; `None`, and a warning, where it cannot be had apart from the rest.

        The family's code may be anything: it is tried out on two tokens, whose logits must be the same one by one as from
        the model. Of several processes, which all have to ask, all get a head or none; a process that asks for itself
        gives `among_processes=False`.
        """
        head = None
        # With ZeRO-3 a module's parameters exist only in its own forward and backward passes. And a forward pass without
        # gradients is no trial for weights in 4 bits on a CPU: bitsandbytes then packs them so that they never give any.
        is_packed_by_trial = getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu"
        if not is_deepspeed_zero3_enabled() and not is_packed_by_trial:
            try:
                found = cls(model)
                if found._gives_the_logits_of(model):
                    head, found._is_plain = found, with_liger and found._is_one_product(model)
            except Exception as error:  # it is not known what a family's code does without its decoder
                logger.debug("The output head cannot be called alone.", exc_info=error)
        if _all_processes(head is not None) if among_processes else head is not None:
            return head
        logger.warning(
            "The output head of %s cannot be called on some tokens at a time: the logits of whole batches are computed, "
            "which takes more memory.",
            type(model).__name__,
        )
        return None

    def _gives_the_logits_of(self, model: nn.Module) -> bool:
        tokens = torch.tensor([[0, 1]], device=self._language_model.device)
        with inference(model), self.last_states() as kept:
            last = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
            expected = model(input_ids=tokens, use_cache=False).logits
            found = torch.cat([self.logits(kept)(slice(token, token + 1)) for token in range(2)])
        if expected.is_meta:
            return False
        tolerance = 1e-3 if torch.finfo(expected.dtype).eps < 1e-6 else 5e-2
        return last.shape[1] == 1 and relative_error(found, expected[0]) < tolerance

    def _is_one_product(self, model: nn.Module) -> bool:
        """Whether logits are states times the weights of the head, and nothing else: without a bias, a scale or a cap."""
        head = self._language_model.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            return False
        with inference(model), self.last_states() as kept:
            model(input_ids=torch.tensor([[0, 1]], device=self._language_model.device), use_cache=False)
            states = kept[0].last_hidden_state.flatten(0, 1)
            states = torch.cat([states, 100 * states])  # a soft cap shows on long ones
            return torch.allclose(self._function(kept[0])(states), head(states), rtol=1e-3, atol=1e-3)

    @property
    def plain_weight(self) -> nn.Parameter | None:
        """
        The weights `(V, D)` of a head that was found with liger in mind, is one product with them and has all of them at
        hand; `None` for others.
        """
        if not self._is_plain:
            return None
        weight = self._language_model.get_output_embeddings().weight
        return None if isinstance(weight, DTensor) else weight

    @contextmanager
    def last_states(self) -> Iterator[list]:
        """
        In this context the forward pass of the model, to be called with `logits_to_keep=1`, leaves what its decoder
        returned in the list.
        """
        kept = []
        hook = self._decoder.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            yield kept
        finally:
            hook.remove()

    def logits(self, kept: list) -> "HeadLogits":
        """The logits of the B · T tokens whose states [`last_states`] left in `kept`."""
        output = kept[0]
        return HeadLogits(output.last_hidden_state.flatten(0, 1), self._function(output), self.plain_weight)

    @contextmanager
    def computes(
        self, compute: Callable[["HeadCall"], tuple[torch.Tensor, Any]], autocast: Callable
    ) -> Iterator[list]:
        """
        In this context the forward pass of the model, to be called with `logits_to_keep=1`, returns as its `loss` what
        `compute` makes of the head, and leaves what else that returns in the list.

        The loss is computed inside the forward pass, and is part of its output: where the wrappers of distributed training
        have the parameters at hand, and look for what the backward pass starts from.

        Args:
            compute (`Callable`): [`HeadCall`] -> the loss, a scalar with gradients, and anything.
            autocast (`Callable`): makes the context of mixed precision, which may be that of an outer forward pass only.
        """
        found = []

        def add_loss(module, args, output):
            states, vocab_size = kept[0].last_hidden_state, output.logits.shape[-1]
            with autocast():
                loss, other = compute(HeadCall(states, self._function(kept[0]), vocab_size, self.plain_weight))
            found.append(other)
            output["loss"] = loss

        with self.last_states() as kept:
            hook = self._language_model.register_forward_hook(add_loss, prepend=True)
            try:
                yield found
            finally:
                hook.remove()

    def _function(self, output) -> "_AfterDecoder":
        return _AfterDecoder(self._language_model, self._decoder, output)


@dataclass(frozen=True)
class HeadCall:
    """
    What the output head is applied to in a forward pass, and the head.

    Args:
        states (`torch.Tensor` of shape `(B, T, D)`): last hidden states of the decoder.
        logits_of (`nn.Module`): states `(N, D)` -> logits `(N, V)`.
        vocab_size (`int`): V.
        plain_weight (`nn.Parameter` of shape `(V, D)`, *optional*): see [`OutputHead.plain_weight`].
    """

    states: torch.Tensor
    logits_of: nn.Module
    vocab_size: int
    plain_weight: nn.Parameter | None


@dataclass(frozen=True)
class HeadLogits:
    """
    Logits of the tokens of a batch, made for those that are asked for: a slice of them -> `(N, V)`.

    Args:
        states (`torch.Tensor` of shape `(B · T, D)`): what the head is applied to.
        logits_of (`Callable`): states `(N, D)` -> logits `(N, V)`.
        plain_weight (`nn.Parameter` of shape `(V, D)`, *optional*): see [`OutputHead.plain_weight`].
    """

    states: torch.Tensor
    logits_of: Callable[[torch.Tensor], torch.Tensor]
    plain_weight: nn.Parameter | None = None

    def __call__(self, tokens: slice) -> torch.Tensor:
        return self.logits_of(self.states[tokens])

    def chunks(self) -> Iterator[slice]:
        """Slices of all tokens, see [`token_chunks`]."""
        return token_chunks(len(self.states), self(slice(0, 1)).shape[-1], self.states.device)


def token_chunks(number: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of `number` tokens, as even as can be, whose logits on `device` are no larger than those of a chunk."""
    limit = CHUNK_BYTES * (1 if device.type == "cpu" else ACCELERATOR_CHUNKS)
    most = max(1, limit // (4 * vocab_size))
    length = math.ceil(number / math.ceil(number / most)) if number else 1
    return (slice(start, start + length) for start in range(0, number, length))


def predict(model: PreTrainedModel, head: OutputHead | None, batch: BatchEncoding, **options) -> HeadLogits:
    """
    What a model predicts on a batch `(B, T)`: the logits of its B · T tokens, made for those that are asked for.

    Args:
        model (`PreTrainedModel`): causal language model.
        head ([`OutputHead`], *optional*): its head; without it the logits of all tokens are made.
        batch (`BatchEncoding`): tokens.
        options: of the forward pass.
    """
    batch = batch.to(model.device)
    if head is None:
        return HeadLogits(model(**batch, use_cache=False, **options).logits.flatten(0, 1), nn.Identity())
    with head.last_states() as kept:
        model(**batch, use_cache=False, **(options | {"logits_to_keep": 1}))
    return head.logits(kept)


class _AfterDecoder(nn.Module):
    """
    A causal language model without its decoder: states `(N, D)` -> logits `(N, V)`.

    The modules are copies that hold the very parameters, but no hooks: these are there for whole forward passes, as those
    of FSDP, which gathers and frees the parameters around each.
    """

    def __init__(self, language_model: nn.Module, decoder: nn.Module, output):
        super().__init__()
        self.language_model = _bare_copy(language_model, decoder, self._decode)
        # Of accelerate: the forward pass of the module that was copied.
        self.language_model.__dict__.pop("forward", None)
        self._output, self._states = output, None
        self._is_cast = False

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not self._is_cast and torch.is_autocast_enabled(states.device.type):
            self._cast_frozen(torch.get_autocast_dtype(states.device.type))
        self._states = states[None]
        return self.language_model(use_cache=False).logits[0]

    def _cast_frozen(self, dtype: torch.dtype) -> None:
        """Cast once what autocast would cast for every chunk: it keeps what it has cast of weights with gradients alone."""
        self._is_cast = True
        for module in self.language_model.modules():
            if type(module) is nn.Linear and module.weight.dtype == torch.float32:
                module._parameters = {  # of the copy
                    name: value if value is None or value.requires_grad else nn.Parameter(value.to(dtype), False)
                    for name, value in module._parameters.items()
                }

    def _decode(self, *args, **kwargs):
        """In place of the decoder: what it returned, with other last hidden states."""
        return type(self._output)(**{**self._output, "last_hidden_state": self._states})


def _all_processes(value: bool) -> bool:
    """Whether `value` is true in all processes: some may hold no weights yet, and try nothing out."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(values)


def _bare_copy(module: nn.Module, decoder: nn.Module, decode: Callable) -> nn.Module:
    if isinstance(module, FSDPModule) and module is not decoder:
        module.unshard()
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__.update({name: {} for name in _HOOKS})
    if module is decoder:  # its settings may be asked for
        copied.__dict__.update(_modules={}, _parameters={}, forward=decode)
        return copied
    copied._modules = {
        name: None if child is None else _bare_copy(child, decoder, decode) for name, child in module._modules.items()
    }
    return copied

"""Attention calls of a model that does not share, recorded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..modeling_echoatt import RECORD_ATTENTION, EchoAttention, EchoRecords, View, _eager_attention


__all__ = ["compute_attention_weights", "recording"]


@contextmanager
def recording(attentions: Iterable[nn.Module]) -> Iterator[None]:
    """
    Record the calls of attention modules of a model that does not share, while the context lasts.

    The forward pass must be given `echo_records=EchoRecords()`.

    Args:
        attentions (iterable of `nn.Module`):
            Attention modules, values of what [`find_attention_modules`] returns.
    """
    attentions = list(attentions)
    configs = [attention.config for attention in attentions]
    for attention in attentions:
        if isinstance(attention, EchoAttention) or isinstance(attention.config, View):
            raise ValueError("The model is already an EchoAtt student: give the model it was made from.")
    for attention in attentions:
        attention.eager_attention = _eager_attention(attention)
        attention.config = View(attention.config, _attn_implementation=RECORD_ATTENTION)
    try:
        yield
    finally:
        for attention, config in zip(attentions, configs, strict=True):
            attention.config = config
            del attention.eager_attention


def compute_attention_weights(attention: nn.Module, records: EchoRecords) -> torch.Tensor:
    """
    Attention weights of a layer, from its recorded eager call.

    Args:
        attention (`nn.Module`):
            Attention module of the layer.
        records (`EchoRecords`):
            Records of a forward pass in eager mode under [`recording`].

    Returns:
        `torch.Tensor` of shape `(B, H, T, S)`.
    """
    record = records.get(attention.layer_idx, next(attention.parameters()).device)
    return record.attend(attention, record.key[..., :1])[1]

"""Attention calls of a model that does not share, recorded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..modeling_echoatt import RECORD_ATTENTION, AttentionRecord, OwnAttention, View, find_eager_attention


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
        if isinstance(attention, OwnAttention) or isinstance(attention.config, View):
            raise ValueError("The model is already an EchoAtt student: give the model it was made from.")
    for attention in attentions:
        attention.eager_attention = find_eager_attention(attention)
        attention.config = View(attention.config, _attn_implementation=RECORD_ATTENTION)
    try:
        yield
    finally:
        for attention, config in zip(attentions, configs, strict=True):
            attention.config = config
            del attention.eager_attention


def compute_attention_weights(
    attention: nn.Module, record: AttentionRecord, sample: int, rows: slice | torch.Tensor, columns: slice
) -> torch.Tensor:
    """
    Some attention weights of a layer, from its recorded eager call.

    Args:
        attention (`nn.Module`):
            Attention module of the layer, under [`recording`].
        record (`AttentionRecord`):
            Its call in eager mode.
        sample (`int`):
            Row of the batch.
        rows (`slice` or `torch.Tensor` of shape `(R,)`, int64):
            Positions of queries. Of a slice nothing is copied.
        columns (`slice`):
            Positions of keys, all that these queries attend to.

    Returns:
        `torch.Tensor` of shape `(H, R, S)`: for each query the weights of these keys.
    """
    mask, one = record.attention_mask, slice(sample, sample + 1)
    if mask is not None:  # (B or 1, H or 1, T, S)
        mask = mask[one if len(mask) > 1 else slice(None)][:, :, rows, columns]
    key = record.key[one, :, columns]  # (1, H_kv, S, D)
    part = replace(record, query=record.query[one, :, rows], key=key, attention_mask=mask)
    return part.attend(attention, key[..., :0])[1][0]  # no values are needed

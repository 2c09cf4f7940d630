"""
EchoAtt models: layers of a decoder language model share their attention weights, by record and replay.

Every modern family of transformers calls its attention through the attention interface, as `(module, query, key,
value, mask, **kwargs)`. A source layer runs the family's own attention, and its call is recorded after rotary embedding,
norms and cache update. An echo layer has no query and key projection: it replays the call with its own values, in
whatever implementation the user chose. That is the same as reusing the source's attention weights,
A = softmax(Q Kᵀ / sqrt(d) + mask), O = A · V_own · W_o, but never keeps a T x T matrix.

Where the source has A at hand, it records A itself, and an echo is one product with its values. That is so in eager
attention, the paper's setting, and when one token is decoded, where A is a vector for each head.

Source: EchoAtt, arXiv 2409.14595, section 3 (shared attention layers inherit all but the query and key projections).
"""

import functools
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedModel,
    QuantizedCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from .configuration_echoatt import EchoAttConfig, read_layer_plan, read_shared_heads


# Names that all models of a process have in common. Students may come with different versions of this file as their code: each
# has names of its own.
_COPY = f"{zlib.crc32(__name__.encode()):08x}"
RECORD_ATTENTION = f"echoatt_record_{_COPY}"
KV_ATTENTION = f"echoatt_kv_{_COPY}"

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
"""Output of an attention `(B, T, H, D)` and, in eager mode, its weights `(B, H, T, S)`."""

# How the families lay out their attention. What makes queries and keys, and what else goes into the attention weights:
# an echo layer does without.
_QUERY_KEY_MODULES = (
    *("q_proj", "k_proj", "q_norm", "k_norm", "q_layernorm", "k_layernorm"),
    *("query_layernorm", "key_layernorm", "qk_norm", "sinks"),
)
# Projections that make several things at once, and the projection that an echo layer keeps of them.
FUSED_MODULES = {"qkv_proj": "v_proj", "c_attn": "v_proj", "query_key_value": "v_proj", "q_proj": "gate_proj"}
PROJECTIONS = ("v_proj", *FUSED_MODULES)
"""Names under which the families project queries and values, whole or fused."""
OUTPUT_MODULES = ("o_proj", "dense", "out_proj", "c_proj")
_GATE_MODULES = ("gate_proj", "g_proj")
# Of keys alone.
_KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
_DROPOUT_MODULES = ("attn_dropout", "attention_dropout", "resid_dropout")
KNOWN_MODULES = {*_QUERY_KEY_MODULES, *PROJECTIONS, *OUTPUT_MODULES, *_GATE_MODULES, *_DROPOUT_MODULES}

# Arguments of an attention call that say nothing about the attention of one token to those before it, but for `scaling`.
_PLAIN_ARGUMENTS = {
    *("cache_position", "dropout", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("position_ids", "scaling", "use_cache"),
    "sliding_window",  # the mask has it
}

REENTRANT_ERROR = (
    "EchoAtt models do not support reentrant gradient checkpointing (use_reentrant=True): it gives source layers wrong "
    'gradients. Use non-reentrant checkpointing, {"use_reentrant": False}.'
)


class View:
    """
    What other code sees in place of an object: the object, but for a few attributes.

    A source layer sees its configuration with the recorder as attention implementation. An attention function sees the
    module with the configuration that names the implementation the user chose, and in an echo layer with the sinks of
    its source.
    """

    def __init__(self, viewed: Any, **attributes):
        vars(self).update(attributes, viewed=viewed)

    def __getattr__(self, name: str):
        if name == "viewed" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.viewed, name)


def view_attention(attention: nn.Module, **attributes) -> View:
    """An attention module as attention functions see it: with the family's own configuration."""
    config = attention.config
    return View(attention, config=config.viewed if isinstance(config, View) else config, **attributes)


@dataclass
class AttentionRecord:
    """The attention call of a source layer, without its values."""

    implementation: str  # the one the user chose
    query: torch.Tensor  # (B, H, T, D), after rotary embedding
    key: torch.Tensor  # (B, H_kv, S, D), after rotary embedding and cache update
    attention_mask: Any  # as the implementation takes it
    kwargs: dict[str, Any]  # scaling, dropout, window, soft cap

    def attend(self, module: nn.Module, value: torch.Tensor) -> AttentionOutput:
        """Run the call with values `(B, H_kv, S, D)` of `module`."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, module.eager_attention)
        sinks = self.kwargs.get("s_aux")
        view = view_attention(module, **({} if sinks is None else {"sinks": sinks}))
        return attention(view, self.query, self.key, value, self.attention_mask, **self.kwargs)

    def is_plain(self) -> bool:
        """Whether the call is nothing but the product of attention weights, without dropout, with the values."""
        arguments = {name for name, value in self.kwargs.items() if value is not None}
        return (
            self.implementation in ("eager", "sdpa")
            and arguments <= _PLAIN_ARGUMENTS
            and not self.kwargs.get("dropout")
        )

    def to_weights(self) -> "AttentionWeights":
        """What is kept of a plain call of one query token."""
        batch, heads, _, size = self.query.shape
        scaling = self.kwargs.get("scaling")
        query = self.query * (size**-0.5 if scaling is None else scaling)  # (B, H, 1, D)
        # A key head is read once for all the query heads of its group.
        query = query.reshape(batch * self.key.shape[1], -1, size)  # (B · H_kv, H / H_kv, D)
        scores = torch.bmm(query, self.key.flatten(0, 1).transpose(1, 2)).view(batch, heads, 1, -1)  # (B, H, 1, S)
        if self.attention_mask is not None:
            is_kept = self.attention_mask.dtype == torch.bool
            hidden = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~self.attention_mask, hidden) if is_kept else scores + self.attention_mask
        weights = scores.softmax(-1, dtype=torch.float32).to(self.query.dtype)
        return AttentionWeights(weights, self.implementation == "eager")

    def to(self, device: torch.device) -> "AttentionRecord":
        if self.query.device == device:
            return self

        def move(value: Any) -> Any:
            return value.to(device) if hasattr(value, "to") else value

        kwargs = {name: move(value) for name, value in self.kwargs.items()}
        return AttentionRecord(
            self.implementation, move(self.query), move(self.key), move(self.attention_mask), kwargs
        )


@dataclass
class AttentionWeights:
    """The attention weights of a source layer, in place of its call."""

    weights: torch.Tensor  # (B, H, T, S)
    is_eager: bool  # whether they are an output of the attention

    def attend(self, module: nn.Module, value: torch.Tensor) -> AttentionOutput:
        """As [`AttentionRecord.attend`]."""
        batch, heads, tokens, length = self.weights.shape
        # A value head is read once for all the query heads of its group.
        weights = self.weights.reshape(batch * value.shape[1], -1, length)  # (B · H_kv, H / H_kv · T, S)
        output = torch.bmm(weights, value.flatten(0, 1)).view(batch, heads, tokens, -1)  # (B, H, T, D)
        return output.transpose(1, 2), self.weights if self.is_eager else None

    def to(self, device: torch.device) -> "AttentionWeights":
        return self if self.weights.device == device else AttentionWeights(self.weights.to(device), self.is_eager)


class EchoRecords:
    """
    What is kept of the attention of source layers in one forward pass, by the index of the layer.

    Each forward pass of the decoder makes its own and hands it down to the layers as a keyword argument, so that no
    state stays on modules. It is not a `dict` because FSDP2 rebuilds the dicts among the arguments, and all layers must
    see the same object. So `to` returns the object itself: a record moves when an echo on another device reads it.

    `decode` is `echo_decode` of the configuration. `last_echoes` and `last_kv` have for sources the last layer that reads
    their record, or their keys and values, which then go: of a long prompt they are as large as what the cache holds of
    the layer, or larger. With gradients all stay, as a backward pass may compute layers again. Without them everything of
    every source is kept.
    """

    def __init__(
        self, decode: str = "replay", last_echoes: dict[int, int] | None = None, last_kv: dict[int, int] | None = None
    ):
        self.by_layer: dict[int, AttentionRecord | AttentionWeights] = {}
        self.keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (B, H_kv, S, D)
        self._last_echoes, self._last_kv = last_echoes, last_kv
        self._grad_enabled = torch.is_grad_enabled()
        self._decode = decode

    def record(self, call: AttentionRecord, module: nn.Module, value: torch.Tensor) -> AttentionOutput:
        """Run the call of a source layer and keep it, or its attention weights, and its keys and values."""
        if self._grad_enabled and not torch.is_grad_enabled():
            raise ValueError(REENTRANT_ERROR)
        if self._last_kv is None or module.layer_idx in self._last_kv:
            self.keys_values[module.layer_idx] = call.key, value
        if self._last_echoes is not None and module.layer_idx not in self._last_echoes:
            return call.attend(module, value)
        kept, is_one_token = call, call.query.shape[2] == 1
        # With sinks, what eager attention returns may be no more than a part of what it multiplies the values with.
        is_exact = not call.kwargs.get("dropout") and call.kwargs.get("s_aux") is None
        makes_weights = call.implementation == "eager" and is_exact
        if self._decode != "replay" and is_one_token:
            if call.is_plain():
                kept = call.to_weights()
            elif self._decode == "weights" and not makes_weights:
                raise ValueError(_not_plain_error(module.layer_idx, call))
        found = kept.attend(module, value)
        if self._decode != "replay" and makes_weights:
            kept = AttentionWeights(found[1], is_eager=True)
        self.by_layer[module.layer_idx] = kept
        return found

    def get(self, layer: int, device: torch.device, echo: int | None = None) -> AttentionRecord | AttentionWeights:
        """The record of a source, for `echo`."""
        # Where it was needed once it stays: the echoes of a block mostly lie on one device.
        record = self.by_layer[layer] = self.by_layer[layer].to(device)
        if self._is_last(self._last_echoes, layer, echo):
            del self.by_layer[layer]
        return record

    def get_keys_values(
        self, layer: int, device: torch.device, reader: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a source, for the layer `reader`."""
        found = self.keys_values[layer] = tuple(states.to(device) for states in self.keys_values[layer])
        if self._is_last(self._last_kv, layer, reader):
            del self.keys_values[layer]
        return found

    def _is_last(self, last: dict[int, int] | None, layer: int, reader: int | None) -> bool:
        return reader is not None and (last or {}).get(layer) == reader and not self._grad_enabled

    def to(self, *args, **kwargs) -> "EchoRecords":
        return self

    def __fx_create_arg__(self, tracer: "torch.fx.Tracer") -> "torch.fx.Node":
        """
        What a graph of torch.fx has in place of the object: one node, that makes it, for all layers.

        There nothing goes after its last echo, as tools such as llm-compressor run the parts of a graph more than once.
        """
        if not hasattr(self, "_node"):
            self._node = tracer.create_node("call_function", EchoRecords, (self._decode,), {})
        return self._node


def _not_plain_error(layer: int, record: AttentionRecord) -> str:
    more = sorted(name for name, value in record.kwargs.items() if value is not None and name not in _PLAIN_ARGUMENTS)
    return (
        f"echo_decode is 'weights', but the attention of layer {layer} is not a product of weights and values alone "
        f"(implementation {record.implementation!r}, dropout {record.kwargs.get('dropout', 0.0)}, further arguments: "
        f"{', '.join(more) or 'none'}): set it to 'auto' or 'replay'."
    )


def _give_records(
    config: EchoAttConfig,
    last_echoes: dict[int, int],
    last_kv: dict[int, int],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    return args, {"echo_records": EchoRecords(config.echo_decode, last_echoes, last_kv)} | kwargs


def record_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    echo_records: EchoRecords | None = None,
    **kwargs,
) -> AttentionOutput:
    """Attention function of source layers: record the call, and run it in the implementation the user chose."""
    implementation, records = module.config.viewed._attn_implementation, _check_records(module, echo_records)
    return records.record(AttentionRecord(implementation, query, key, attention_mask, kwargs), module, value)


def attend_to_source(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    echo_records: EchoRecords | None = None,
    **kwargs,
) -> AttentionOutput:
    """Attention function of layers that use the keys and values of another, in place of `key` and `value`, which are empty."""
    records = _check_records(module, echo_records)
    key, value = records.get_keys_values(module.kv_source, query.device, module.layer_idx)
    call = AttentionRecord(module.config.viewed._attn_implementation, query, key, attention_mask, kwargs)
    return call.attend(module, value)


def _check_records(module: nn.Module, records: EchoRecords | None) -> EchoRecords:
    if records is None:
        raise ValueError(
            f"EchoAtt does not support the family {module.config.model_type!r} yet: its layers do not hand keyword "
            "arguments on to their attention."
        )
    return records


AttentionInterface.register(RECORD_ATTENTION, record_attention)
AttentionInterface.register(KV_ATTENTION, attend_to_source)


def _cache_values(cache: Cache, value: torch.Tensor, layer: int) -> torch.Tensor:
    """
    Append the values `(B, H_kv, T, D)` of an echo layer to the cache and return all it has, `(B, H_kv, S, D)`.

    They go where caches expect keys, of which an echo has none: lengths, cropping and beam reordering are all taken
    from that slot. The other slot stays empty where the cache lets it.
    """
    if isinstance(cache, QuantizedCache):  # nothing can be quantized to nothing: half of the features in each slot
        return torch.cat(cache.update(*value.chunk(2, dim=-1), layer), dim=-1)
    # A static cache that is laid out before the first forward, as for export, has a value slot of full width.
    is_laid_out = any(slot.is_initialized and slot.values.shape[-1] for slot in cache.layers[layer : layer + 1])
    return cache.update(value, value if is_laid_out else value[..., :0], layer)[0]


class EmptySlot(DynamicLayer):
    """
    The slot in a cache of a layer that has nothing there, in the place of another: one of transformers' own fails to be
    cropped while it is empty.
    """

    def __init__(self, slot: DynamicLayer):
        super().__init__()
        self.is_sliding = slot.is_sliding  # masks are made for the first layer of each kind

    def crop(self, *args, **kwargs) -> None:
        pass


def _leave_empty(layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    The keyword arguments of an attention without the cache, for a layer that has nothing there. Where its slot is one that
    grows, it gets one that says so.
    """
    caches = {name: kwargs[name] for name in ("past_key_values", "layer_past") if kwargs.get(name) is not None}
    for cache in caches.values():
        # Others hold the states of recurrent parts of the layer too.
        for slot in cache.layers[layer : layer + 1]:
            if type(slot) in (DynamicLayer, DynamicSlidingWindowLayer):
                cache.layers[layer] = EmptySlot(slot)
    return kwargs | dict.fromkeys(caches)


class OwnAttention:
    """The attention of a layer that a plan changes."""


class MixedAttention(OwnAttention):
    """A forward pass of ours, mixed into the family's own attention class."""

    def __reduce__(self):
        # The class is made at run time, so it is pickled by those it is made from.
        return _rebuild_attention, type(self).__bases__, self.__dict__


class EchoAttention(MixedAttention):
    """
    Forward pass of an echo layer's attention, mixed into the family's own attention class.

    The module keeps the family's output projection, a value projection `v_proj`, and everything else but what makes
    queries and keys.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args,
        echo_records: EchoRecords,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        **kwargs,
    ) -> AttentionOutput:
        record = echo_records.get(self.echo_source, hidden_states.device, self.layer_idx)
        input_shape = hidden_states.shape[:-1]  # (B, T)
        value = self.v_proj(hidden_states)  # (B, T, H_kv · D)
        if self.echo_clip is not None:
            value = value.clamp(-self.echo_clip, self.echo_clip)
        value = value.view(*input_shape, -1, self.echo_head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        cache = past_key_values if layer_past is None else layer_past
        if cache is not None:
            value = _cache_values(cache, value, self.layer_idx)  # (B, H_kv, S, D)
        output, weights = record.attend(self, value)  # (B, T, H, D), (B, H, T, S) or None
        if self.echo_gate is not None:
            gate = getattr(self, self.echo_gate)(hidden_states).sigmoid()  # (B, T, H · D) or (B, T, H)
            output = output.view(*input_shape, -1, self.echo_head_dim)  # vLLM's has two dimensions
            output = output * gate.view(*output.shape[:3], -1)
        output = output.reshape(*input_shape, -1).contiguous()  # (B, T, H · D)
        output = getattr(self, self.echo_output)(output)  # (B, T, hidden size)
        if self.echo_dropout:
            output = nn.functional.dropout(output, self.echo_dropout, self.training)
        return output, weights


class KVAttention(MixedAttention):
    """
    Forward pass of the attention of a layer that uses the keys and values of another, mixed into the family's own attention
    class: the family's, without a cache, which has nothing of this layer, and without projections of keys and values.
    """

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> AttentionOutput:
        return super().forward(hidden_states, *args, **_leave_empty(self.layer_idx, kwargs))


class SkippedAttention(OwnAttention, nn.Module):
    """What is left of the attention of a layer without attention: a constant that it puts out for every token."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> AttentionOutput:
        _leave_empty(self.layer_idx, kwargs)
        return self.constant.to(hidden_states.dtype).expand_as(hidden_states), None


@functools.cache
def _mix_in(own: type, attention_class: type[nn.Module]) -> type[nn.Module]:
    """Subclass of the family's attention class, so that what transformers declares for it (outputs to record) holds."""
    prefix = own.__name__.removesuffix("Attention")
    return type(f"{prefix}{attention_class.__name__}", (own, attention_class), {"__module__": __name__})


def _rebuild_attention(own: type, attention_class: type[nn.Module]) -> nn.Module:
    mixed = _mix_in(own, attention_class)
    return mixed.__new__(mixed)


class NoProjection:
    """
    In the place of a projection of keys or values that is not needed: zeros, which nobody reads. It is no module, so that
    tools that go by the names of modules, as for adapters, do not find one.
    """

    def __init__(self, features: int):
        self.out_features = features

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.out_features)


class FusedQueries:
    """
    In the place of a fused projection: the queries of `q_proj` of the same attention, and zeros for keys and values. It is no
    module either.

    Args:
        attention (`nn.Module`): the attention module.
        features (`int`): of the fused projection.
        parts (`int`): 1 where keys and values follow all queries, 3 where each head has its query, key and value.
    """

    def __init__(self, attention: nn.Module, features: int, parts: int):
        self.attention, self.features, self.parts = attention, features, parts

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        queries = self.attention.q_proj(hidden_states)  # (B, T, H · D)
        if self.parts == 1:
            return nn.functional.pad(queries, (0, self.features - queries.shape[-1]))
        head_dim = get_head_dim(self.attention)
        by_head = queries.unflatten(-1, (-1, head_dim))  # (B, T, H, D)
        return nn.functional.pad(by_head, (0, (self.parts - 1) * head_dim)).flatten(-2)


def find_eager_attention(attention: nn.Module) -> Callable | None:
    """The family's eager attention, which its attention module passes to the attention interface as the default."""
    for cls in type(attention).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None and issubclass(cls, nn.Module):
            return function
    return None


def can_share(attention: nn.Module) -> bool:
    """Whether an echo layer can take over all that an attention does: it knows its call, modules and parameters."""
    has_values = any(hasattr(attention, name) for name in PROJECTIONS if name != "q_proj")
    has_output = any(hasattr(attention, name) for name in OUTPUT_MODULES)
    parts = {name for name, _ in (*attention.named_children(), *attention.named_parameters(recurse=False))}
    return has_values and has_output and parts <= KNOWN_MODULES and find_eager_attention(attention) is not None


def find_shareable(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a decoder that can be shared, by layer."""
    found = {}
    for module in model.modules():
        if hasattr(module, "layer_idx") and can_share(module):
            found.setdefault(module.layer_idx, module)
    return dict(sorted(found.items()))


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The innermost model of a decoder language model, which calls the layers."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)][-1]


def get_head_dim(attention: nn.Module) -> int:
    """The size of the heads of an attention module."""
    return attention.head_dim if hasattr(attention, "head_dim") else attention.head_size


def find_fused_modules(attention: nn.Module) -> dict[str, int]:
    """Projections that make several things at once, each with the features that an echo layer keeps of it."""
    queries, found = attention.config.num_attention_heads * get_head_dim(attention), {}
    for name in (name for name in FUSED_MODULES if hasattr(attention, name)):
        projection = getattr(attention, name)
        features = projection.nf if isinstance(projection, Conv1D) else projection.out_features
        if name != "q_proj":
            found[name] = (features - queries) // 2
        elif features == 2 * queries:  # queries and gates, and not queries alone
            found[name] = queries
    return found


def _share_attention(model: PreTrainedModel, config: EchoAttConfig) -> None:
    """Turn the attention modules of `model` into what `config` plans, in place."""
    config.validate_echo_sources()  # options of `from_pretrained` may have changed the number of layers since it was made
    moves = read_layer_plan(config.plan)
    changed = [layer for layer, (move, _) in enumerate(moves) if move != "plain"]
    attentions = find_shareable(model) if changed else {}
    for layer in (*config.source_layers, *changed):
        if layer not in attentions:
            raise ValueError(
                f"EchoAtt does not support the family {config.text_config.model_type!r} yet: the attention of its layer "
                f"{layer} has not the modules that are expected. Another version of transformers or of echoatt_hf may."
            )
    for layer in config.source_layers:
        _call(attentions[layer], RECORD_ATTENTION, config)
    make = {"echo": _make_echo, "kv": _make_kv, "skip attention": _make_skipped}
    for layer in changed:
        move, source = moves[layer]
        make[move](attentions[layer], source, config)


def _call(attention: nn.Module, implementation: str, config: EchoAttConfig) -> None:
    """Let an attention module call an attention function of ours."""
    attention.eager_attention = find_eager_attention(attention)
    attention.config = View(config.text_config, _attn_implementation=implementation)


def _loaded(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter of a module that may be offloaded: it is on its device only while the module itself is called."""
    parameter = getattr(module, name)
    return module._hf_hook.weights_map[name] if parameter is not None and parameter.is_meta else parameter


class SharedHeadsLinear(nn.Linear):
    """
    A projection some of whose heads have the weights of heads before them: its parameters are those of its own heads alone.

    `head_holders` has for each head the projection with its weights, and the place among that one's own heads.
    """

    head_axis: int
    head_size: int
    head_holders: list[tuple[nn.Linear, int]]  # no modules of this one, which are listed where they are

    def whole(self, name: str) -> torch.Tensor | None:
        """The weight or the bias of all heads."""
        own, axis, size = getattr(self, name), self.head_axis, self.head_size
        if own is None or axis >= own.ndim:  # the bias of an output is no head's
            return own
        pieces = [_loaded(holder, name).narrow(axis, place * size, size) for holder, place in self.head_holders]
        return torch.cat([piece.to(own.device) for piece in pieces], axis)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.whole("weight"), self.whole("bias"))


def tie_heads(model: nn.Module, shared_heads: dict[str, str]) -> None:
    """
    Let heads have the weights of earlier heads, in place, as `shared_heads` of [`EchoAttConfig`] says it. Their own weights
    are gone.

    Raises:
        `ValueError`: the model has not these heads, or projects several things together.
    """
    shared, attentions = read_shared_heads(shared_heads), find_shareable(model)
    projections, heads = {}, {}
    for layer in sorted({layer for pair in shared.items() for layer, _ in pair}):
        attention = attentions.get(layer)
        names = ["q_proj", "k_proj", "v_proj", next((name for name in OUTPUT_MODULES if hasattr(attention, name)), "")]
        projections[layer] = [getattr(attention, name, None) for name in names]
        if not all(type(each) is nn.Linear for each in projections[layer]):
            raise ValueError(
                f"Heads of layer {layer} cannot share weights: it has no linear q_proj, k_proj, v_proj and output of its own."
            )
        heads[layer] = projections[layer][1].out_features // get_head_dim(attention)
    for layer, head in (place for pair in shared.items() for place in pair):
        if head >= heads[layer]:
            raise ValueError(f"shared_heads names head {head} of layer {layer}, which has {heads[layer]} heads.")
    own = {layer: [head for head in range(count) if (layer, head) not in shared] for layer, count in heads.items()}
    sizes = {
        layer: [each.weight.shape[axis] // heads[layer] for axis, each in zip((0, 0, 0, 1), found, strict=True)]
        for layer, found in projections.items()
    }
    for (layer, _), (source, _) in shared.items():
        if sizes[layer] != sizes[source]:
            raise ValueError(
                f"Heads of layer {layer} cannot share weights with those of layer {source}: their sizes differ."
            )
    for layer in sorted({layer for layer, _ in shared}):
        holders = [shared.get((layer, head), (layer, head)) for head in range(heads[layer])]
        for index, projection in enumerate(projections[layer]):
            axis = 1 if index == 3 else 0
            projection.head_axis, projection.head_size = axis, sizes[layer][index]
            projection.head_holders = [
                (projections[source][index], own[source].index(place)) for source, place in holders
            ]
            for name, parameter in list(projection.named_parameters()):
                if axis < parameter.ndim:
                    by_head = parameter.detach().unflatten(axis, (heads[layer], sizes[layer][index]))
                    places = torch.tensor(own[layer], dtype=torch.long, device=parameter.device)  # there may be none
                    kept = by_head.index_select(axis, places)
                    setattr(projection, name, nn.Parameter(kept.flatten(axis, axis + 1), parameter.requires_grad))
            projection.__class__ = SharedHeadsLinear


def _extend_tp_plan(model: PreTrainedModel) -> None:
    """Shard what echo layers keep of fused projections like the whole."""
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    kept = {}
    for rule, style in model.tp_plan.items():
        path, _, name = rule.rpartition(".")
        if f"{path}.{FUSED_MODULES.get(name)}" in names:
            kept[f"{path}.{FUSED_MODULES[name]}"] = style
    model.tp_plan.update(kept)


def _make_echo(attention: nn.Module, source: int, config: EchoAttConfig) -> None:
    """Turn a family's attention module into that of an echo of layer `source`, in place."""
    attention.eager_attention = find_eager_attention(attention)
    attention.echo_source = source
    attention.echo_head_dim = get_head_dim(attention)
    attention.echo_output = next(name for name in OUTPUT_MODULES if hasattr(attention, name))
    attention.echo_clip = getattr(attention.config, "clip_qkv", None)
    # Where a family drops part of its attention's output, an echo layer does too.
    attention.echo_dropout = getattr(attention, "residual_dropout", 0.0)
    if hasattr(attention, "resid_dropout"):
        attention.echo_dropout = attention.resid_dropout.p
    for name, features in find_fused_modules(attention).items():
        _keep_part(attention, name, FUSED_MODULES[name], features)
    attention.echo_gate = next((name for name in _GATE_MODULES if getattr(attention, name, None) is not None), None)
    _remove(attention, _QUERY_KEY_MODULES)
    attention.__class__ = _mix_in(EchoAttention, type(attention))


def _keep_part(attention: nn.Module, name: str, kept: str, features: int) -> None:
    """Put a projection of some features, named `kept`, in the place of the fused projection `name`."""
    fused = getattr(attention, name)
    inputs = fused.nx if isinstance(fused, Conv1D) else fused.in_features
    like = {"device": fused.weight.device, "dtype": fused.weight.dtype}
    delattr(attention, name)
    setattr(attention, kept, nn.Linear(inputs, features, fused.bias is not None, **like))


def _remove(attention: nn.Module, names: Iterable[str]) -> None:
    """Take modules and parameters from an attention module."""
    parameters = [name for name, _ in attention.named_parameters(recurse=False)]
    for name in names:
        if hasattr(attention, name):
            delattr(attention, name)
        if name in parameters:  # the family still initializes it
            setattr(attention, name, torch.empty(0))


def _make_kv(attention: nn.Module, source: int, config: EchoAttConfig) -> None:
    """Turn a family's attention module into one that uses the keys and values of layer `source`, in place."""
    attention.kv_source = source
    for name in ("k_proj", "v_proj"):
        if hasattr(attention, name):
            attention.kv_features = getattr(attention, name).out_features
            delattr(attention, name)
            setattr(attention, name, NoProjection(attention.kv_features))
    queries = attention.config.num_attention_heads * get_head_dim(attention)
    for name, kept in find_fused_modules(attention).items():
        if name != "q_proj":  # queries and gates are its own
            attention.kv_features = kept
            _keep_part(attention, name, "q_proj", queries)
            parts = 3 if name == "query_key_value" else 1
            setattr(attention, name, FusedQueries(attention, queries + 2 * kept, parts))
    for name in _KEY_NORMS:
        if isinstance(getattr(attention, name, None), nn.Module):
            setattr(attention, name, nn.Identity())
    _call(attention, KV_ATTENTION, config)  # last, as the view is no configuration to read
    attention.__class__ = _mix_in(KVAttention, type(attention))


def _make_skipped(attention: nn.Module, source: None, config: EchoAttConfig) -> None:
    """Turn a family's attention module into a constant, in place."""
    output = next(getattr(attention, name) for name in OUTPUT_MODULES if hasattr(attention, name))
    features = output.nf if isinstance(output, Conv1D) else output.out_features
    like = {"device": output.weight.device, "dtype": output.weight.dtype}
    _remove(attention, KNOWN_MODULES)
    attention.constant = nn.Parameter(torch.zeros(features, **like))
    attention.__class__ = SkippedAttention  # not of the family, which may look for what is gone


class EchoAttPreTrainedModel(PreTrainedModel):
    """What the EchoAtt models have in common."""

    config: EchoAttConfig
    config_class = EchoAttConfig
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _family_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments for the family's model: those of the caller and of the configuration."""
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True
        return kwargs

    def _share(self, model: PreTrainedModel) -> PreTrainedModel:
        """Let the layers of the family's model share their attention, and take over what it says about itself."""
        _share_attention(model, self.config)
        if self.config.shared_heads:
            tie_heads(model, self.config.shared_heads)
        if self.config.source_layers:
            # On the decoder, as fused language model heads call it without the family's head.
            last_echoes = {self.config.echo_sources[layer]: layer for layer in self.config.echo_layers}
            last_kv = {source: layer for layer, source in self.config.kv_sources.items()}
            give_records = functools.partial(_give_records, self.config, last_echoes, last_kv)
            find_decoder(model).register_forward_pre_hook(give_records, with_kwargs=True)
        _extend_tp_plan(model)
        # Generation reads here whether a cache cannot go back, and whether it is one of transformers' own.
        for name in ("_is_stateful", "_supports_default_dynamic_cache"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        # The family decides which implementations are its defaults.
        self.config._attn_implementation = model.config._attn_implementation
        self.config._experts_implementation = model.config._experts_implementation
        return model

    # transformers looks for a decorator in this file otherwise.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    # transformers initializes the weights, with its code alone. In custom code it would take modules without weights of
    # their own for initialized, and some families initialize buffers of their layers from there.
    @classmethod
    def is_custom_code(cls) -> bool:
        return False

    # Every way to enable gradient checkpointing leads here.
    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant", False):
            raise ValueError(REENTRANT_ERROR)
        super()._set_gradient_checkpointing(
            enable=enable, gradient_checkpointing_func=gradient_checkpointing_func, **kwargs
        )

    def save_pretrained(self, save_directory, **kwargs):
        """Save the model and the code that loads it without `echoatt_hf`. See [`~PreTrainedModel.save_pretrained`]."""
        if type(self)._auto_class is not None:
            # Saving writes the auto class of the model at hand only; the checkpoint serves all of them.
            self.config.auto_map = dict(_AUTO_MAP)
        # FSDP2 puts a class of its own, from a file of torch, in its place, which would be saved as the code of the model.
        found = type(self)
        self.__class__ = next(each for each in found.__mro__ if not each.__module__.startswith("torch."))
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = found

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Push the model, the code that loads it and, where `echoatt_hf` is installed, a card that says what it is. See
        [`~PreTrainedModel.push_to_hub`].
        """
        try:
            from echoatt_hf.publishing.push import push_model
        except ImportError:
            return super().push_to_hub(repo_id, **kwargs)
        return push_model(self, repo_id, **kwargs)


class EchoAttModel(EchoAttPreTrainedModel):
    """
    The base family's headless model with shared attention.

    Args:
        config (`EchoAttConfig`): configuration; the base family is that of its `text_config`.
    """

    def __init__(self, config: EchoAttConfig):
        super().__init__(config)
        model = self._share(AutoModel.from_config(config.text_config))
        # Under the name that it has in the family's causal language model, so that one checkpoint serves both.
        self._model_name = model.base_model_prefix
        self.add_module(self._model_name, model)
        self.post_init()

    @property
    def family_model(self) -> PreTrainedModel:
        """`PreTrainedModel`: the base family's headless model."""
        return getattr(self, self._model_name)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As the forward pass of the base family: `input_ids` `(B, T)`, `attention_mask` `(B, S)` with 1 = keep."""
        return self.family_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **self._family_kwargs(kwargs),
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.family_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.family_model.set_input_embeddings(value)


class EchoAttForCausalLM(EchoAttPreTrainedModel, GenerationMixin):
    """
    The base family's causal language model with shared attention.

    Args:
        config (`EchoAttConfig`): configuration; the base family is that of its `text_config`.

    Example:

    ```python
    >>> import echoatt_hf
    >>> from transformers import AutoModelForCausalLM

    >>> student = AutoModelForCausalLM.from_pretrained("path/to/student")
    ```
    """

    def __init__(self, config: EchoAttConfig):
        super().__init__(config)
        self.language_model = self._share(AutoModelForCausalLM.from_config(config.text_config))
        # PEFT asks the outermost model for the weights that are tied.
        tied = self.language_model._tied_weights_keys or {}
        self._tied_weights_keys = {f"language_model.{key}": f"language_model.{tied[key]}" for key in tied}
        self.post_init()

    @classmethod
    def from_teacher(
        cls, teacher: "PreTrainedModel | str", plan: Sequence[int], share_weights: bool = False
    ) -> "EchoAttForCausalLM":
        """A student with the weights of a teacher: see [`make_student`] of `echoatt_hf`, and [`convert`] to tune it too."""
        try:
            from echoatt_hf.conversion.student import make_student
        except ImportError as error:
            raise ImportError("from_teacher needs the package: `pip install echoatt-hf`.") from error
        return make_student(teacher, plan, share_weights)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        As the forward pass of the base family: `input_ids` and `labels` `(B, T)`, labels of -100 are not predicted,
        `attention_mask` `(B, S)` with 1 = keep; logits `(B, T, V)`. `token_type_ids` are for the families that have them.
        """
        if token_type_ids is not None and "token_type_ids" in signature(self.language_model.forward).parameters:
            kwargs["token_type_ids"] = token_type_ids
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **self._family_kwargs(kwargs),
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())  # generation reads the signature
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """As the base family does it. See [`~GenerationMixin.prepare_inputs_for_generation`]."""
        return self.language_model.prepare_inputs_for_generation(*args, **kwargs)

    @property
    def base_model(self) -> PreTrainedModel:
        """`PreTrainedModel`: the base family's headless model, which gives hidden states for a head of the caller's."""
        return self.language_model.base_model

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model.get_decoder()

    def set_decoder(self, decoder: PreTrainedModel) -> None:
        self.language_model.set_decoder(decoder)

    # What trainers, and transformers' accessors of embeddings, look for, is the family's.
    @property
    def model(self) -> PreTrainedModel:
        """`PreTrainedModel`: as `base_model`."""
        return self.base_model

    @property
    def lm_head(self) -> nn.Module:
        """`nn.Module`: the family's head."""
        return self.language_model.get_output_embeddings()

    @property
    def vocab_size(self) -> int:
        """`int`: the number of tokens that the family's loss goes by."""
        return self.language_model.vocab_size

    @property
    def loss_function(self) -> Callable:
        """`Callable`: the function that the family's loss is made by."""
        return self.language_model.loss_function

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lm_head":
            self.language_model.set_output_embeddings(value)
        elif "language_model" in vars(self).get("_modules", ()) and self._is_of_family(name, value):
            setattr(self.language_model, name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_family(self, name: str, value: Any) -> bool:
        """Whether an attribute is one that the family's forward pass reads: a number, such as `router_aux_loss_coef`, or its loss."""
        if name in ("vocab_size", "loss_function"):
            return True
        is_own = name in vars(self) or hasattr(type(self), name) or name.startswith("_")
        return isinstance(value, (int, float)) and name in vars(self.language_model) and not is_own


class EchoAttForSequenceClassification(GenericForSequenceClassification, EchoAttPreTrainedModel):
    """
    An [`EchoAttModel`] with a classification head on the last token that is not padding.

    Args:
        config (`EchoAttConfig`): configuration, with `num_labels` and `problem_type`.
    """

    base_model_prefix = "language_model"

    def __init__(self, config: EchoAttConfig):
        EchoAttPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.language_model = EchoAttModel(config)
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class EchoAttForTokenClassification(GenericForTokenClassification, EchoAttPreTrainedModel):
    """
    An [`EchoAttModel`] with a classification head on each token.

    Args:
        config (`EchoAttConfig`): configuration, with `num_labels`. A dropout of `classifier_dropout`, else of
            `hidden_dropout`, else of 0.1 goes before the head.
    """

    base_model_prefix = "language_model"

    def __init__(self, config: EchoAttConfig):
        EchoAttPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.language_model = EchoAttModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels)
        self.post_init()


# Trainers and pipelines go by the names of classes. Without its own a student's labels are not shifted where they are
# smoothed, and it learns to copy its input.
AUTO_CLASSES = {
    "AutoModel": (EchoAttModel, modeling_auto.MODEL_MAPPING_NAMES),
    "AutoModelForCausalLM": (EchoAttForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "AutoModelForSequenceClassification": (
        EchoAttForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "AutoModelForTokenClassification": (
        EchoAttForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
}
_AUTO_MAP = {"AutoConfig": "configuration_echoatt.EchoAttConfig"}
for _auto_class, (_model_class, _class_names) in AUTO_CLASSES.items():
    _model_class.register_for_auto_class(_auto_class)
    _AUTO_MAP[_auto_class] = f"modeling_echoatt.{_model_class.__name__}"
    _class_names.setdefault(EchoAttConfig.model_type, _model_class.__name__)

__all__ = [
    *(model_class.__name__ for model_class, _ in AUTO_CLASSES.values()),
    "EchoAttPreTrainedModel",
    "EchoRecords",
]

"""
Students in vLLM's Transformers modelling backend. Imported by vLLM alone.

vLLM finds the attention of a layer by reading the code of its module, and caches keys and values in an `Attention` of its
own for each. It does not find those of source layers, which call the recorder, and of echo layers, which replay. All that
this module has to do is to name them. An echo layer replays the call of its source in its own `Attention`, which is exact: the
keys are the same, so it caches a copy of them.

A layer that uses the keys and values of another does so in vLLM too: it has no pages, on any device.

With vLLM's CPU attention an echo layer does not cache a copy. There two of them have one page: each keeps its values in one half of it, and reads
the keys in the page of its source. vLLM has pages of one size for all layers, and its kernel takes keys and values with the
same strides; both stay as they are.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.transformers.moe import MoEMixin
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from ..modeling_echoatt import RECORD_ATTENTION, EchoAttention, EchoAttForCausalLM, KVAttention


PREFIX = f"{EchoAttForCausalLM.base_model_prefix}."


@dataclass(kw_only=True)
class EchoFuser(AttentionFuser):
    """What vLLM asks about the attention of an echo layer: scale and sinks are those of its source."""

    source: nn.Module

    def scale(self, module: nn.Module) -> float | None:
        return super().scale(self.source)

    def sinks(self, module: nn.Module) -> nn.Parameter | None:
        return super().sinks(self.source)


def can_share_pages(call: Attention) -> bool:
    """Whether the pages of a layer are laid out as `share_pages` needs them."""
    return type(call.impl) is CPUAttentionBackendImpl and call.kv_cache_dtype == "auto"


def share_pages(call: Attention, source: Attention, owner: Attention, slot: int) -> None:
    """
    Let an echo layer read the keys of its source, and keep its values in one half of a page that two echo layers have.

    Args:
        call: vLLM's attention of the echo layer.
        source: that of its source.
        owner: that of the echo layer for which the page is allocated, the same or an earlier one.
        slot: the half, 0 or 1.
    """
    if call is not owner:
        call.kv_sharing_target_layer_name = owner.layer_name
    call.impl.__class__ = EchoImpl
    call.impl.source, call.impl.slot = source, slot


class EchoPages:
    """Keys of one layer and values of another, as vLLM's CPU attention takes them apart."""

    def __init__(self, kv_cache: torch.Tensor, source: torch.Tensor, slot: int):
        self.shape = source.size()
        blocks, heads, size, _ = self.shape
        keys, pages = (each.view(blocks, heads, size * 2, -1).chunk(2, dim=2) for each in (source, kv_cache))
        self.halves = keys[0], pages[slot]

    def size(self) -> torch.Size:
        return self.shape

    def view(self, shape: tuple) -> "EchoPages":
        return self

    def chunk(self, number: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.halves


class EchoImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention for an echo layer, whose keys are in the pages of its source."""

    def do_kv_cache_update(self, *args, **kwargs) -> None:
        """Done in `forward`: vLLM calls this only for the layer that a page is allocated for."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        if attn_metadata is None:  # warming up
            return output
        pages = EchoPages(kv_cache, self.source.kv_cache, self.slot)
        # Keys are written again, the same ones: vLLM has no call for values alone.
        super().do_kv_cache_update(layer, key, value, pages, attn_metadata.slot_mapping)
        return super().forward(layer, query, key, value, pages, attn_metadata, output, *args, **kwargs)


class FamilyRenaming:
    """How a family's checkpoints name weights differently from its model, for a student, whose names have a prefix."""

    def __init__(self, renamings: list):
        self.renamings = renamings

    def rename_source_key(self, key: str) -> tuple[str, None]:
        key = key.removeprefix(PREFIX)
        for renaming in self.renamings:
            key, _ = renaming.rename_source_key(key)
        return PREFIX + key, None


class EchoAttForVllm(TransformersForCausalLM):
    """A student. See [`EchoAttForCausalLM`]."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = ""):
        return super().__new__(EchoAttMoEForVllm if vllm_config.model_config.is_moe else EchoAttForVllm)

    def _patch_config(self) -> None:
        super()._patch_config()
        # By the name of the family's own model vLLM knows how its weights are named in a checkpoint.
        self.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.text_config.model_type]]

    def _create_hf_to_vllm_mapper(self) -> None:
        super()._create_hf_to_vllm_mapper()
        mapper = self.hf_to_vllm_mapper
        # Nothing in a student's checkpoint is to be ignored, and what is in others' may match too much of it, as of gpt2.
        patterns = {pattern: name for pattern, name in mapper.orig_to_new_regex.items() if name is not None}
        self.hf_to_vllm_mapper = replace(
            mapper, orig_to_new_renaming=[FamilyRenaming(mapper.orig_to_new_renaming)], orig_to_new_regex=patterns
        )

    def recursive_replace(self) -> None:
        super().recursive_replace()
        sources = {}
        for name, module in self.model.named_modules():
            if getattr(getattr(module, "config", None), "_attn_implementation", None) == RECORD_ATTENTION:
                fuser = AttentionFuser.match(None, module)
                sources[module.layer_idx] = fuser, module
                fuser.fuse(module, f"model.{name}", self.vllm_config)
            elif isinstance(module, EchoAttention):
                found, source = sources[module.echo_source]
                fuser = EchoFuser(**vars(found), source=source)
            elif isinstance(module, KVAttention):  # its scale and its sinks are its own
                fuser = AttentionFuser(**vars(sources[module.kv_source][0]))
                fuser.fuse(module, f"model.{name}", self.vllm_config)
            else:
                continue
            self.attention_fusers[module.layer_idx] = f"model.{name}", fuser

    def _create_attention_instances(self, prefix: str = "") -> None:
        super()._create_attention_instances(prefix)
        modules = {layer: self.get_submodule(name) for layer, (name, _) in self.attention_fusers.items()}
        for module in modules.values():
            if isinstance(module, KVAttention):
                module.attn.kv_sharing_target_layer_name = modules[module.kv_source].attn.layer_name
        calls = [module.attn for module in modules.values()]
        # With several windows vLLM has several tables of pages, and that of an echo layer may not be that of its source.
        if not all(can_share_pages(call) for call in calls) or len({call.sliding_window for call in calls}) > 1:
            return
        echoes = [modules[layer] for layer in sorted(modules) if isinstance(modules[layer], EchoAttention)]
        for number, echo in enumerate(echoes):
            owner = echoes[number - number % 2]
            share_pages(echo.attn, modules[echo.echo_source].attn, owner.attn, number % 2)


class EchoAttMoEForVllm(MoEMixin, EchoAttForVllm):
    """A student of a family with a mixture of experts."""

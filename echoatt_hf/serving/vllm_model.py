"""
Students in vLLM's Transformers modelling backend. Imported by vLLM alone.

vLLM finds the attention of a layer by reading the code of its module, and caches keys and values in an `Attention` of its
own for each. It does not find those of source layers, which call the recorder, and of echo layers, which replay. All that
this module does is to name them. An echo layer replays the call of its source in its own `Attention`, which is exact: the
keys are the same, so it caches a copy of them.
"""

from dataclasses import dataclass, replace

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.transformers.moe import MoEMixin

from ..modeling_echoatt import RECORD_ATTENTION, EchoAttention, EchoAttForCausalLM


PREFIX = f"{EchoAttForCausalLM.base_model_prefix}."


@dataclass(kw_only=True)
class EchoFuser(AttentionFuser):
    """What vLLM asks about the attention of an echo layer: scale and sinks are those of its source."""

    source: nn.Module

    def scale(self, module: nn.Module) -> float | None:
        return super().scale(self.source)

    def sinks(self, module: nn.Module) -> nn.Parameter | None:
        return super().sinks(self.source)


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
            else:
                continue
            self.attention_fusers[module.layer_idx] = f"model.{name}", fuser


class EchoAttMoEForVllm(MoEMixin, EchoAttForVllm):
    """A student of a family with a mixture of experts."""

"""
The plugin of vLLM, which loads it by its entry point in each of its processes. A student then runs in vLLM's Transformers
modelling backend, without remote code.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["ARCHITECTURE", "check_vllm_config", "register"]

ARCHITECTURE = "EchoAttForCausalLM"
"""Name of the architecture in a student's `config.json`."""

FAILING_FAMILIES = ("gpt2", "llama4_text", "phimoe")
"""Families that the part of vLLM which students run in, its modelling backend of transformers, does not run unconverted."""

BACKEND = "its modelling backend of transformers"
REFUSAL = "vLLM does not run EchoAtt students of the family"
"""How the refusal of a family begins."""


def register() -> None:
    """Make students known to vLLM. It may run several times in a process."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from .. import registration  # noqa: F401 - the configuration, by which vLLM reads a student's config.json

    class EchoAttChecks(VerifyAndUpdateConfig):
        verify_and_update_config = staticmethod(check_vllm_config)

    # By its name: vLLM imports the module in the processes that need it.
    ModelRegistry.register_model(ARCHITECTURE, "echoatt_hf.serving.vllm_model:EchoAttForVllm")
    MODELS_CONFIG_MAP[ARCHITECTURE] = EchoAttChecks


def check_vllm_config(vllm_config: "VllmConfig") -> None:
    """
    Check that vLLM can run a student as it is told to, before it starts an engine.

    Raises:
        `ValueError`: it cannot.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from ..configuration_echoatt import TYPES_WITHOUT_ATTENTION

    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    family = config.text_config.model_type
    if family in FAILING_FAMILIES:
        raise ValueError(f"{REFUSAL} {family!r}: {BACKEND} does not run it, unconverted either. Use `echoatt serve`.")
    types = {*(getattr(config.text_config, "layer_types", None) or ())}
    if MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]._is_stateful or types & {*TYPES_WITHOUT_ATTENTION}:
        raise ValueError(f"{REFUSAL} {family!r}: {BACKEND} keeps no states of recurrent layers. Use `echoatt serve`.")
    if config.shared_heads:
        raise ValueError("vLLM does not run students whose heads share weights (shared_heads): use `echoatt serve`.")
    if config.layers_without_attention:
        raise ValueError(
            f"vLLM does not run students with layers without attention, such as layer {config.layers_without_attention[0]} of this "
            "one: use `echoatt serve`."
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}, but an echo layer needs the attention of its source "
            "in its own process: use tensor_parallel_size."
        )
    heads = vllm_config.model_config.get_total_num_kv_heads()
    if heads % parallel.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size is {parallel.tensor_parallel_size}, but the student has {heads} key-value heads, which an "
            "echo layer cannot divide among so many: use a divisor of that."
        )

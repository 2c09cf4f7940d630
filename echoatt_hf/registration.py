"""
EchoAtt made known to the Auto classes of transformers and to PEFT.

Importing this module registers the configuration. The model classes take seconds to import: the first configuration, which
every use of an Auto class makes before it looks for a model class, registers them.
"""

import functools

import transformers
from transformers import AutoConfig

from .configuration_echoatt import EchoAttConfig


AutoConfig.register("echoatt", EchoAttConfig, exist_ok=True)


@functools.cache
def register_models() -> None:
    """Register the model classes, and what PEFT adapts of them. Every [`EchoAttConfig`] calls it."""
    from peft.utils import constants
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .modeling_echoatt import AUTO_CLASSES, PROJECTIONS

    for name, (model_class, _) in AUTO_CLASSES.items():
        getattr(transformers, name).register(EchoAttConfig, model_class, exist_ok=True)
    # What an adapter without target modules adapts. Where that is queries and values for most families, as for LoRA, it is
    # these, under the names of all families; else all that the table names for a decoder language model.
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            targets = {
                target for family in table if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for target in table[family]
            }
            is_usual = table.get("llama") == ["q_proj", "v_proj"]
            table.setdefault(EchoAttConfig.model_type, list(PROJECTIONS) if is_usual else sorted(targets))

"""EchoAtt made known to the Auto classes of transformers and to PEFT. Importing this module does it."""

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_echoatt import EchoAttConfig
from .modeling_echoatt import (
    PROJECTIONS,
    EchoAttForCausalLM,
    EchoAttForSequenceClassification,
    EchoAttForTokenClassification,
    EchoAttModel,
)


AutoConfig.register("echoatt", EchoAttConfig, exist_ok=True)
AutoModel.register(EchoAttConfig, EchoAttModel, exist_ok=True)
AutoModelForCausalLM.register(EchoAttConfig, EchoAttForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(EchoAttConfig, EchoAttForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(EchoAttConfig, EchoAttForTokenClassification, exist_ok=True)

# What a `LoraConfig` without target modules adapts, as for most families: queries and values, here each where it is.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("echoatt", list(PROJECTIONS))

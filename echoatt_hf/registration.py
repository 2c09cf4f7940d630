"""EchoAtt made known to the Auto classes of transformers and to PEFT. Importing this module does it."""

from peft.utils import constants
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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

# What an adapter without target modules adapts. Where that is queries and values for most families, as for LoRA, it is
# these, under the names of all families; else all that the table names for a decoder language model.
for _name, _table in vars(constants).items():
    if _name.startswith("TRANSFORMERS_MODELS_TO_") and _name.endswith("_MODULES_MAPPING"):
        _targets = {
            target for family in _table if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for target in _table[family]
        }
        _is_usual = _table.get("llama") == ["q_proj", "v_proj"]
        _table.setdefault(EchoAttConfig.model_type, list(PROJECTIONS) if _is_usual else sorted(_targets))

"""
EchoAtt for Hugging Face: layers of a decoder language model share their attention.

Importing the package registers the architecture with the Auto classes of transformers, and with PEFT. All other names
are imported when they are first used.
"""

import importlib

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_echoatt import ECHOATT_VERSION as __version__
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

_MODULES = {
    "distillation.adapters": ["add_lora", "merge_lora", "share_weights"],
    "conversion.alignment": ["align_heads", "match_heads", "permute_heads"],
    "benchmark.speed": ["format_benchmark", "run_benchmark"],
    "publishing.callbacks": ["PublishingCallback"],
    "conversion.convert": ["ConversionReport", "convert", "count_cache_bytes", "count_kv_bytes_per_token"],
    "text.documents": ["collate_rows", "load_documents", "pack_rows", "split_documents"],
    "distillation.trainer": ["EchoAttTrainer", "EchoAttTrainingArguments"],
    "evaluation.held_out": ["compute_agreement", "compute_perplexity", "evaluate_model", "metric_path"],
    "publishing.push": ["push_student"],
    "pipeline.pipeline": ["compress"],
    "planning.rules": ["plan_from_similarity"],
    "conversion.refit": ["refit_outputs"],
    "search.effect": ["PlanSearch", "search_plan"],
    "settings": [
        "BenchmarkSettings",
        "CalibrationSettings",
        "CompressionSettings",
        "DataSettings",
        "DistillationSettings",
        "PlanSettings",
    ],
    "planning.sharing": ["SharingPlan"],
    "analysis.similarity": ["AttentionSimilarity", "measure_attention_similarity"],
    "distillation.stored_teacher": ["StoredTeacher", "write_stored_teacher"],
    "models.loading": ["builtin_teacher_path", "load_model", "load_tokenizer"],
    "evaluation.zero_shot": ["evaluate_zero_shot"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "EchoAttConfig",
    "EchoAttForCausalLM",
    "EchoAttForSequenceClassification",
    "EchoAttForTokenClassification",
    "EchoAttModel",
    "__version__",
    *sorted(_MODULE_OF),
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

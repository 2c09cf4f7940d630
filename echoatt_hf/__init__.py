"""
EchoAtt for Hugging Face: layers of a decoder language model share their attention.

Importing the package makes the architecture known to the Auto classes of transformers and to PEFT: it registers the
configuration, and the first configuration that is made registers the models. All names below are imported when they are
first used.
"""

import importlib
import sys
from pathlib import Path


# The one list of what is public, and where it is.
_MODULES = {
    "analysis.similarity": ["AttentionSimilarity", "measure_attention_similarity"],
    "benchmark.report": ["format_benchmark"],
    "benchmark.speed": ["run_benchmark"],
    "configuration_echoatt": ["EchoAttConfig"],
    "conversion.alignment": ["align_heads", "match_heads", "permute_heads"],
    "conversion.convert": ["ConversionReport", "convert"],
    "conversion.putting_back": ["StudentSize", "find_sizes", "put_back"],
    "conversion.tuning": ["refit_outputs"],
    "distillation.adapters": ["add_lora", "merge_lora", "share_weights"],
    "distillation.served_teacher": ["ServedTeacher"],
    "distillation.stored_teacher": ["StoredTeacher", "write_stored_teacher"],
    "distillation.trainer": ["EchoAttTrainer", "EchoAttTrainingArguments"],
    "evaluation.continuations": ["evaluate_continuations", "repeated_share"],
    "evaluation.held_out": ["compute_agreement", "compute_perplexity", "evaluate_model", "metric_path"],
    "evaluation.zero_shot": ["evaluate_zero_shot"],
    "modeling_echoatt": [
        "EchoAttForCausalLM",
        "EchoAttForSequenceClassification",
        "EchoAttForTokenClassification",
        "EchoAttModel",
    ],
    "models.loading": ["builtin_teacher_path", "load_model", "load_tokenizer"],
    "models.sizes": ["count_cache_bytes", "count_kv_bytes_per_token"],
    "pipeline.steps": ["compress", "export"],
    "planning.paper": ["plan_like_paper"],
    "planning.rules": ["plan_from_similarity"],
    "planning.sharing": ["SharingPlan"],
    "publishing.callbacks": ["PublishingCallback"],
    "publishing.push": ["push_student"],
    "search.effect": ["PlanSearch", "search_plan"],
    "settings": [
        "BenchmarkSettings",
        "CalibrationSettings",
        "CompressionSettings",
        "DataSettings",
        "DistillationSettings",
        "ExportSettings",
        "PlanSettings",
        "Target",
    ],
    "text.documents": ["load_documents", "split_documents"],
    "text.rows": ["collate_rows", "pack_rows", "slide_rows"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]  # noqa: F822, PLE0604 - found by `__getattr__`


def __getattr__(name: str):
    if name == "__version__":
        return importlib.import_module(".configuration_echoatt", __name__).ECHOATT_VERSION
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether the program is `echoatt`: most of what it does first, such as `--help`, needs no model."""
    name = sys.argv[0] if sys.argv else ""
    is_module = name == "-m" and "echoatt_hf.cli" in sys.orig_argv
    return is_module or Path(name).name in ("echoatt", "echoatt.exe")


if not _is_command_line():  # where `echoatt_hf.models` does it, before any model is loaded
    importlib.import_module(".registration", __name__)

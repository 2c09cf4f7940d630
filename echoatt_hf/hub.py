"""The model card of a student."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .sharing import SharingPlan
from .teachers import BUILTIN_TEACHER


__all__ = ["CITATION", "write_model_card"]

CITATION = """@inproceedings{rajabzadeh2024echoatt,
  title = {EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models},
  author = {Rajabzadeh, Hossein and Jafari, Aref and Sharma, Aman and Jami, Benyamin and Kwon, Hyock Ju and
    Ghodsi, Ali and Chen, Boxing and Rezagholizadeh, Mehdi},
  booktitle = {Proceedings of The 4th NeurIPS Efficient Natural Language and Speech Processing Workshop},
  series = {PMLR},
  volume = {262},
  pages = {259--269},
  year = {2024},
  eprint = {2409.14595},
  archivePrefix = {arXiv}
}"""
"""BibTeX entry of the paper."""


def write_model_card(folder: Path, report: dict, table: str) -> None:
    """
    Write `README.md` of a student from the report of its run. What the report does not know is left out.

    Args:
        folder (`Path`): folder of the student.
        report (`dict`): content of `report.json`.
        table (`str`): results as a Markdown table.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["echoatt", "attention-sharing", "distillation"],
        base_model=_hub_name(_teacher(report["settings"])),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(report, table)}").save(folder / "README.md")


def _body(report: dict, table: str) -> str:
    plan = SharingPlan(report["plan"]["echo_sources"])
    settings, environment = report["settings"], report["environment"]
    training = settings["distillation"]
    tokens = report["tokens_per_step"] * training["steps"]
    versions = ", ".join(f"{name} {value}" for name, value in environment.items() if value and name != "hardware")
    return f"""# EchoAtt student of {_public_name(_teacher(settings))}

A decoder language model in which {len(plan.echo_layers)} of {len(plan)} layers reuse the attention weights of an
earlier layer and have no query and key projection of their own (EchoAtt, arXiv 2409.14595). It was made from its teacher
by `echoatt_hf` and distilled on {tokens:,} tokens of text.

```python
import echoatt_hf  # or trust_remote_code=True below, where the plugin is not installed
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path or repository")
tokenizer = AutoTokenizer.from_pretrained("path or repository")
```

## Sharing plan

`{plan}`, an arrow points to the layer whose attention a layer echoes.
{_start(report)}
## Results

{table}

On {report["results"][0]["tokens"]:,} held-out tokens in rows of {settings["data"]["row_length"]}{_compared(report)}.

## Distillation

Stage 1, from the teacher: {training["steps"] - training["stage2_steps"]} steps; stage 2, on the text alone: {training["stage2_steps"]} steps;
{report["tokens_per_step"]:,} tokens a step. {_describe_training(settings)}All settings and the log are in `report.json`.

Made with {versions}; {environment["hardware"]}.

## Citation

```bibtex
{CITATION}
```
"""


def _describe_training(settings: dict) -> str:
    """What was done beyond the usual, in whole sentences with a space behind; empty where nothing was."""
    sentences, training, stored = [], settings["distillation"], settings.get("stored_teacher")
    if stored:
        sentences.append(
            f"Of the teacher, its {stored['top_k']} likeliest tokens at each position were stored, and the mass of the rest."
        )
    if training["attention_weight"]:
        sentences.append(
            f"Stage 1 also compared the attention outputs of echo layers, with a weight of {training['attention_weight']}."
        )
    if training["lora_rank"]:
        sentences.append(f"Adapters (LoRA) of rank {training['lora_rank']} were trained and merged.")
    return "".join(f"{sentence} " for sentence in sentences)


def _compared(report: dict) -> str:
    return "; agreement and KL are with the teacher" if "kl" in report["results"][0] else ""


def _teacher(settings: dict) -> str:
    """What the student was distilled from; a stored teacher remembers what it was made from."""
    return settings["teacher"] or settings["stored_teacher"]["teacher"]


def _start(report: dict) -> str:
    """How the plan was found and the student tuned before any training, as far as the report knows."""
    sentences, conversion = [], report.get("conversion", {})
    if "search" in report:
        values = ", ".join(f"{value:.3f} by {name}" for name, value in report["search"]["kl"].items())
        sentences.append(
            f"It was searched by its effect on calibration text: KL to the teacher in nats without training, {values}."
        )
    if conversion.get("aligned"):
        sentences.append("Before training, the heads of echo layers were aligned with those of their sources.")
    if conversion.get("refitted"):
        sentences.append("Before training, the output projections of echo layers were refitted in closed form.")
    return f"\n{' '.join(sentences)}\n" if sentences else ""


def _hub_name(teacher: str) -> str | None:
    """The teacher's repository; nothing for a local path, which means nothing to others."""
    is_repository = teacher != BUILTIN_TEACHER and teacher.count("/") == 1 and not Path(teacher).exists()
    return teacher if is_repository else None


def _public_name(teacher: str) -> str:
    if teacher == BUILTIN_TEACHER:
        return "the built-in teacher of echoatt_hf"
    return _hub_name(teacher) or Path(teacher).resolve().name

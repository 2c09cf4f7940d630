"""The model card of a student: what is known of it, and what its owner wrote by hand."""

import json
import math
import re
import shlex
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..conversion.convert import ConversionReport
from ..outputs.files import write_whole
from ..outputs.tables import format_markdown
from ..planning.sharing import SharingPlan
from ..settings import CalibrationSettings, DataSettings, DistillationSettings, PlanSettings, options_of
from .mlx import MLX_FILE


__all__ = [
    "CITATION",
    "USES",
    "count_tokens",
    "find_gaps",
    "format_table",
    "has_own_text",
    "make_card",
    "parse_card",
    "read_card",
    "write_model_card",
]

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

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TRANSFORMERS_FLOOR = "5.17"

_BLOCK = re.compile(r"<!-- echoatt: (\w+) -->\n.*?<!-- /echoatt: \1 -->", re.DOTALL)

USES = {
    "EchoAttForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "EchoAttForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "EchoAttForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "EchoAttModel": ("feature-extraction", "AutoModel"),
}
"""What the Hub calls the use of each model, and the class that loads it."""

_GROUPS = {
    "plan": PlanSettings,
    "calibration": CalibrationSettings,
    "data": DataSettings,
    "distillation": DistillationSettings,
}


def write_model_card(folder: Path, **options) -> None:
    """Write `README.md` of a student, or bring it up to date; see [`make_card`]."""
    write_whole(folder / "README.md", make_card(folder, read_card(folder), **options))


def read_card(folder: Path) -> str | None:
    """The text of `README.md` in a folder, if it is there. Raises `ValueError` if it is not UTF-8."""
    file = folder / "README.md"
    try:
        return file.read_text(encoding="utf-8-sig") if file.exists() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"README.md is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error


def parse_card(text: str) -> ModelCard:
    """A card with its metadata. Raises `ValueError` if they cannot be read."""
    if not text.lstrip().startswith("---"):
        text = f"---\n\n---\n{text}"  # of which the library would warn
    try:
        return ModelCard(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"The metadata of README.md cannot be read ({' '.join(str(error).split())}): write YAML between two lines of "
            "---, such as 'license: mit'."
        ) from error


def make_card(
    folder: Path,
    old: str | None = None,
    *,
    repo_id: str | None = None,
    name: str | None = None,
    title: str | None = None,
    base_model: str | None = None,
    datasets: str | list[str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """
    The model card of a student, from what lies in its folder: `config.json`, `report.json`, `conversion.json`, as `echoatt
    convert` writes it, `zero_shot.json`, as `echoatt zero-shot --output` writes it, and `benchmark.json` from the folder of
    `echoatt benchmark`. What they do not know is left out.

    The base model is the one the student was converted from. A teacher of the distillation is named beside it if it is
    another one.

    Of a card that is there already, the text outside of the marked sections is kept, sections whose marks were removed
    too, and of the metadata what is not known here.

    Args:
        folder (`Path`):
            Folder of the student.
        old (`str`, *optional*):
            The card to bring up to date.
        repo_id (`str`, *optional*):
            Repository of the Hub the card is for.
        name (`str`, *optional*):
            What the folder will be called, if it is not called so yet.
        title, base_model, datasets, license, language, tags (*optional*):
            Facts that take the place of those in the files, or are added to them. The student is declared a `finetune` of
            its base model: of the relations the Hub knows (adapter, finetune, merge, quantized) it is the one in which
            weights are inherited and trained on.

    Returns:
        `str`: the card.
    """
    report, config, zero_shot = (_read(folder / name) for name in ("report.json", "config.json", "zero_shot.json"))
    conversion = report.get("conversion") or _read(folder / "conversion.json")
    own = parse_card(old).data if old else ModelCardData()
    distilled_from = report.get("teacher") or {}
    converted_from = conversion.get("teacher") or distilled_from
    # What the owner of the card says, where the student knows of no repository.
    named = base_model or (own.base_model if not converted_from.get("repository") else None)
    base = {"name": named, "repository": named} if isinstance(named, str) else converted_from
    architecture = report.get("architecture") or config["architectures"][0]
    pipeline_tag, auto_class = USES[architecture]
    results = _eval_results(report, zero_shot, pipeline_tag)
    has_mlx = (folder / MLX_FILE).exists()
    title = title or (f"EchoAtt student of {base['name']}" if base else "EchoAtt student")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["echoatt", "attention-sharing", "distillation", *(["mlx"] if has_mlx else []), *_listed(tags)],
        base_model=base.get("repository"),
        base_model_relation="finetune" if base.get("repository") else None,
        datasets=_listed(datasets) or report.get("data", {}).get("repositories") or None,
        license=license or own.license or base.get("license"),
        language=language or own.language or report.get("data", {}).get("language"),
        model_name=title if results else None,
        eval_results=results or None,
    )
    plan = SharingPlan.from_dict(config if config.get("echo_sources") else report["plan"])
    made = ConversionReport.from_dict(conversion) if conversion else None
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        base=base,
        distilled_from=distilled_from if distilled_from.get("name") != converted_from.get("name") else {},
        plan=plan,
        other_moves=_name_other_moves(plan, made, config.get("shared_heads") or {}),
        repo_id=repo_id,
        folder=name or folder.resolve().name,
        pin=", revision=revision" if repo_id else "",
        auto_class=auto_class,
        conversion=made,
        start=_describe_start(report, conversion),
        has_mlx=has_mlx,
        has_figure=(folder / "similarity.png").exists(),
        transformers_floor=TRANSFORMERS_FLOOR,
        citation=CITATION,
        **_describe_results(report, zero_shot),
        **_describe_speed(_read(folder / "benchmark.json")),
        **_describe_training(report, config.get("text_config", {}).get("hidden_size")),
    )
    return _update(old, str(card)) if old else f"{card}\n"


def has_own_text(card: str) -> bool:
    """Whether a card has text of its owner: anything but the title and the headings of the template outside the marks."""
    template = _own_text(TEMPLATE.read_text(encoding="utf-8"))
    return [line for line in _own_text(card) if line not in template and not line.startswith("# ")] != []


_GAP = re.compile(
    r"\bNone\b(?! of)|(?i:more information needed)|\bTODO\b|\bTBD\b|\{\{.*?\}\}|\{%.*?%\}|path or repository"
)


def find_gaps(card: str) -> list[tuple[int, str]]:
    """
    What a card leaves open outside of its code: `None`, "more information needed", placeholders nobody filled in.

    Args:
        card (`str`): the text of the card.

    Returns:
        `list` of `tuple`: number of the line, and what stands there.
    """
    text = re.sub(r"^```.*?^```", lambda code: "\n" * code.group().count("\n"), card, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, gap.start()) + 1, gap.group()) for gap in _GAP.finditer(text)]


def _own_text(card: str) -> list[str]:
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    return [line for line in _BLOCK.sub("", body).splitlines() if line.strip()]


def _update(old: str, new: str) -> str:
    """`new` in the place of what `old` has between marks; the metadata of both, where they differ that of `new`."""
    card, made = parse_card(old), parse_card(new)
    blocks = {found.group(1): found.group() for found in _BLOCK.finditer(made.text)}
    text = _BLOCK.sub(lambda found: blocks.get(found.group(1), found.group()), card.text)
    before, after = card.data.to_dict(), made.data.to_dict()
    tags = [*after["tags"], *(tag for tag in before.get("tags", []) if tag not in after["tags"])]
    data = ModelCardData(**{**before, **after, "tags": tags})
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


_METHODS = {
    "kvsharer": "[KVSharer](https://arxiv.org/abs/2410.18517)",
    "laco": "[LaCo](https://arxiv.org/abs/2402.11187)",
    "directshare": "[DirectShare](https://arxiv.org/abs/2402.11819)",
}


def _name_other_moves(plan: SharingPlan, made: ConversionReport | None, shared_heads: dict) -> list[str]:
    """What is done to a student beside echoes, also what the plan that it was made with left out."""
    counts = {
        "use the keys and values of an earlier layer": plan.kv_layers,
        "have no attention": plan.layers_without_attention,
    }
    found = [f"{len(layers)} of {len(plan)} layers {what}" for what, layers in counts.items() if layers]
    if shared_heads:
        found.append(
            f"{len(shared_heads)} heads of keys and values, and their queries, use the weights of an earlier one"
        )
    dropped = SharingPlan(list(made.layer_plan)).dropped_layers if made else []
    if dropped:
        what = "merged into the one before them" if made.method.get("method") == "laco" else "left out"
        found.append(f"{len(dropped)} layers of the teacher are {what}")
    return found


def _describe_start(report: dict, conversion: dict) -> list[str]:
    """How the plan was found and the student tuned before any training, in sentences, as far as the report knows."""
    sentences = []
    if "search" in report:
        values = ", ".join(f"{value:.3f} by {name}" for name, value in report["search"]["kl"].items())
        sentences.append(
            f"It was searched by its effect on calibration text: KL to the teacher in nats without training, {values}."
        )
    method = conversion.get("method") or {}
    if method:
        settings = ", ".join(f"{name} {value}" for name, value in method["settings"].items())
        sentences.append(
            f"It was made by the method of {_METHODS[method['method']]}{f' ({settings})' if settings else ''}."
        )
    if conversion.get("aligned"):
        sentences.append("The heads of echo layers were aligned with those of their sources.")
    if conversion.get("refitted"):
        sentences.append("The output projections of echo layers were refitted in closed form.")
    if conversion.get("taken_up"):
        sentences.append("The MLP before a dropped layer was refitted so that it takes up its part.")
    return sentences


def _settings_of(report: dict) -> dict:
    """Settings of the run that a report is of: a distillation, or what put layers back after it."""
    return report["put_back"]["settings"] if "put_back" in report else report["settings"]


def _describe_results(report: dict, zero_shot: dict) -> dict:
    facts = {}
    if report.get("results"):
        facts = {
            "results": format_table(report["results"]),
            "held_out_tokens": f"{report['results'][0]['tokens']:,}",
            "row_length": _settings_of(report)["data"]["row_length"],
            "data": " and ".join(report.get("data", {}).get("names", [])) or "the text",
            "is_compared": "kl" in report["results"][0],
            "kv_bytes_dtype": _name_kv_dtypes(report["results"]),
        }
    elif "eval_loss" in report:
        facts = {"eval_loss": f"{report['eval_loss']:.4f}", "perplexity": f"{math.exp(report['eval_loss']):.3f}"}
    if zero_shot:
        from ..evaluation.zero_shot import format_zero_shot

        limit = f", of the first {zero_shot['limit']} questions of each file" if zero_shot.get("limit") else ""
        facts |= {"zero_shot": format_zero_shot(zero_shot["results"]), "zero_shot_limit": limit}
    return facts


def _name_kv_dtypes(results: list[dict]) -> str:
    """The types in which the KV bytes of results are counted; empty where an earlier version did not say."""
    return " and ".join(dict.fromkeys(entry["kv_bytes_dtype"] for entry in results if "kv_bytes_dtype" in entry))


def _describe_speed(benchmark: dict) -> dict:
    if not benchmark:
        return {}
    from ..benchmark.report import format_benchmark

    settings, hardware = benchmark["settings"], benchmark["environment"]["hardware"]
    return {"speed": format_benchmark(benchmark), "speed_setting": f"{settings['dtype']}, {hardware}"}


def _describe_training(report: dict, hidden_size: int | None) -> dict:
    facts, environment = {"arguments": report.get("arguments", {})}, report.get("environment", {})
    versions = [f"{name} {value}" for name, value in environment.items() if value and name != "hardware"]
    facts["made_with"] = ", ".join(versions) + f"; {environment['hardware']}" if environment else ""
    if "settings" in report:
        settings = report["settings"]["distillation"]
        facts["steps"] = _describe_steps(settings["steps"], settings["stage2_steps"], count_tokens(report))
        facts["command"] = _command(report["settings"], hidden_size)
        facts["stored"] = report["settings"].get("stored_teacher")
    elif report.get("steps"):
        facts["steps"] = _describe_steps(report["steps"], report.get("stage2_steps", 0), report.get("tokens"))
    if "put_back" in report:
        facts["put_back"] = _describe_put_back(report["put_back"])
        facts["command"] = _command(report["put_back"]["settings"], hidden_size)
    return facts


def count_tokens(report: dict) -> int:
    """Tokens that the student of a report was trained on; in reports of earlier versions all steps have as many."""
    if "tokens" in report:
        return report["tokens"]
    return report["tokens_per_step"] * report["settings"]["distillation"]["steps"]


def _describe_put_back(put_back: dict) -> str:
    layers, share = ", ".join(map(str, put_back["layers"])), put_back["teacher_share"]
    drawn = f", and the weights that both have were drawn {share:.1%} of the way to the teacher's" if share else ""
    return f"It is made of a smaller student, into which layers of the teacher were put back, in this order: {layers}{drawn}."


def _describe_steps(steps: int, stage2_steps: int, tokens: int | None) -> str:
    stages = {"from the teacher": steps - stage2_steps, "on the text alone": stage2_steps}
    parts = ", then ".join(f"{count:,} steps {what}" for what, count in stages.items() if count)
    return f"{parts[0].upper()}{parts[1:]}{f', {tokens:,} tokens in all' if tokens else ''}."


def _command(settings: dict, hidden_size: int | None) -> str:
    """
    The command that makes the student, with what differs from its defaults. Of local paths the last part is known. Where the
    hidden size has another name in the configuration, the learning rate is always said.
    """
    words = ["echoatt", "compress", settings["teacher"]]
    if "from_student" in settings:
        words = ["echoatt", "convert", settings["teacher"], "--from-student", settings["from_student"]]
    if "student" in settings:
        words = ["echoatt", "distill", settings["student"]]
        words += ["--teacher", settings["teacher"]] if settings["teacher"] else []
    stored = settings.get("stored_teacher")
    if stored:
        words += ["--stored-teacher", stored["folder"]]
    for group, kind in _GROUPS.items():
        if not (stored and group == "data"):  # a stored teacher brings its own
            words += options_of(kind, settings.get(group, {}), hidden_size)
    if settings.get("dtype", "auto") != "auto":
        words += ["--dtype", settings["dtype"]]
    return shlex.join([*words, "--output", "student"])


def _eval_results(report: dict, zero_shot: dict, task: str) -> list[EvalResult]:
    """Entries of the model index: the last evaluation of the student, and each zero-shot task with its standard error."""
    found, data = [], report.get("data", {})
    names = " and ".join(data.get("names", [])) or "text"
    dataset = {"dataset_name": f"{names}, held out", "dataset_type": next(iter(data.get("repositories", [])), "text")}

    def add(metric: str, value: float | None, name: str, **where: str) -> None:
        if value is not None:
            found.append(
                EvalResult(task_type=task, metric_type=metric, metric_name=name, metric_value=round(value, 6), **where)
            )

    if report.get("results"):
        last = report["results"][-1]
        add("perplexity", last["perplexity"], "perplexity", **dataset)
        add("agreement", last.get("agreement"), "agreement with the teacher", **dataset)
    elif "eval_loss" in report:
        add("perplexity", math.exp(report["eval_loss"]), "perplexity", **dataset)
    for task_name, result in zero_shot.get("results", {}).items():
        where = {"dataset_name": task_name, "dataset_type": task_name}
        for metric in ("acc", "acc_norm", "perplexity"):
            add(metric, result.get(metric), metric, **where)
            add(f"{metric}_stderr", result.get(f"{metric}_stderr"), f"standard error of {metric}", **where)
    return found


def format_table(results: list[dict]) -> str:
    """
    The results of a run as a Markdown table, which also reads well in a terminal.

    Args:
        results (`list[dict]`): entries of `report["results"]`.

    Returns:
        `str`: lines of the table.
    """
    columns = {
        "name": ("", ""),
        "perplexity": ("perplexity", ".3f"),
        "bits_per_byte": ("bits/byte", ".4f"),
        "agreement": ("agreement", ".1%"),
        "kl": ("KL (nats)", ".4f"),
        "answer_loss": ("answers: loss", ".4f"),
        "answer_kl": ("answers: KL", ".4f"),
        "parameters": ("parameters", ","),
        "kv_bytes_per_token": ("KV bytes/token", ","),
    }
    # Without a teacher there is nothing to agree with.
    columns = {key: column for key, column in columns.items() if key in results[0]}
    lines = [[title for title, _ in columns.values()]]
    lines += [[format(entry[key], form) for key, (_, form) in columns.items()] for entry in results]
    return format_markdown(lines)

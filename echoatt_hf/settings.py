"""What a run is made of. One description of every setting, for Python, the command line and `report.json`."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit


__all__ = [
    "BenchmarkSettings",
    "CalibrationSettings",
    "CompressionSettings",
    "DataSettings",
    "DataSource",
    "DistillationSettings",
    "EvaluationSettings",
    "ExportSettings",
    "PlanSettings",
    "ScoringSettings",
    "ServingSettings",
    "StoreSettings",
    "StoredTeacherSettings",
    "StudentSettings",
    "ZeroShotSettings",
]


BUILTIN_TEACHER = "builtin"
"""Name of the teacher that ships with the package."""

GGUF_SUFFIX = ".gguf"
"""What the name of a GGUF file ends with."""

EXPORT_TARGETS = ("mlx",)
"""Names of the runtimes with model code of their own for which students are exported."""

STDLIB = "stdlib"
"""Name of the built-in data: the sources of the standard library of the running Python."""

DIVERGENCES = ("forward", "reverse", "jensen_shannon")
"""Names of the divergences of a student's predictions from its teacher's."""

HIDDEN_DISTANCES = ("relative", "squared")
"""Names of the distances of a student's hidden states from its teacher's."""

HIDDEN_LAYERS = ("all", "blocks")
"""Names of the layers whose hidden states are compared, where they are not listed."""


def name_gguf_file(model: str | None, gguf_file: str | None) -> str | None:
    """
    The one name of a GGUF file in a folder or a repository, as a teacher or model is named everywhere.

    Args:
        model (`str`, *optional*): the folder or the repository, `owner/name` or `owner/name@revision`.
        gguf_file (`str`, *optional*): the file in it; if not given, the model is not of that kind.

    Raises:
        `ValueError`: the file is none, or there is nothing in which it is.
    """
    if gguf_file is None:
        return model
    if not gguf_file.endswith(GGUF_SUFFIX) or Path(gguf_file).is_absolute():
        raise ValueError(
            f"gguf_file is {gguf_file!r}; give the name of a {GGUF_SUFFIX} file in the folder or repository."
        )
    if model is None or model == BUILTIN_TEACHER:
        raise ValueError(f"gguf_file is {gguf_file!r}, but no folder or repository is given in which it is.")
    if Path(model).expanduser().exists():
        return str(Path(model) / gguf_file)
    repository, at, revision = model.partition("@")
    return f"{repository}/{gguf_file}{at}{revision}"


def check_divergence(name: str) -> None:
    """Check the name of a divergence. Raises `ValueError` if it is none."""
    _check_choice("divergence", name, DIVERGENCES)


def check_hidden_distance(name: str) -> None:
    """Check the name of a distance of hidden states. Raises `ValueError` if it is none."""
    _check_choice("hidden_distance", name, HIDDEN_DISTANCES)


def check_server_url(url: str) -> None:
    """Check the address of a server. Raises `ValueError` if it is none; the message has no password of it."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or "@" in url or "?" in url or "#" in url or any(map(str.isspace, url)):
        shown = "an address with more than that" if "@" in url or "?" in url else repr(url)
        raise ValueError(
            f"server is {shown}; it must be http:// or https:// with a host, a port and a path, such as "
            "http://127.0.0.1:8000/v1. A key is taken from the environment variable ECHOATT_SERVER_KEY."
        )


def parse_layers(text: str) -> list[int] | None:
    """
    The layers that `hidden_layers` lists, such as `"3,7"`, `None` if it is a name of `HIDDEN_LAYERS`.

    Raises:
        `ValueError`: it is neither.
    """
    if text in HIDDEN_LAYERS:
        return None
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        layers = []
    if not layers or min(layers) < 0:
        raise ValueError(
            f"hidden_layers is {text!r}; it must be 'all', 'blocks' (the last layer of each), or indices of layers such as 3,7."
        )
    return layers


RECIPES = {
    # Its learning rate follows from the model, see `default_learning_rate`.
    "default": {
        "kl_weight": 1.0,
        "divergence": "forward",
        "hard_label_weight": 0.0,
        "hidden_weight": 0.0,
        "hidden_layers": "all",
        "hidden_distance": "relative",
        "warmup_steps": 20,
        "stage2_steps": lambda settings: settings.steps // 6,
    },
    # The EchoAtt paper's, section 3.2 and table 6. Its 2048 tokens a row and 1024 rows a step are the user's to choose.
    "paper": {
        "learning_rate": 1e-4,
        "stage2_learning_rate": lambda settings: settings.learning_rate,
        "kl_weight": 0.25,
        "divergence": "reverse",
        "hard_label_weight": 0.5,
        "hidden_weight": 0.25,
        "hidden_layers": "blocks",
        "hidden_distance": "squared",
        "warmup_steps": 0.005,
        "stage2_steps": lambda settings: settings.steps // 5,  # a quarter of stage 1
    },
}
"""Named sets of defaults of [`DistillationSettings`]: values, or functions of the settings before them."""


def default_learning_rate(hidden_size: int, lora_rank: int = 0) -> float:
    """
    Peak learning rate of the default recipe, where none is given. `examples/losses_and_memory` has the sweeps.

    With Adam the best rate goes about as 1 / width. 1e-3 is the best of the built-in teacher, whose width is 128. It is the best
    at width 64 too, so narrower models get no more. Adapters get five times as much, as was best on the built-in teacher. Two
    digits are kept, so that the rate can be read and typed as it is.

    Args:
        hidden_size (`int`): width of the model.
        lora_rank (`int`, *optional*, defaults to 0): rank of adapters, 0 if the weights are trained.

    Source: arXiv 2203.03466 (muP), where the rate of Adam for hidden weights goes as 1 / width.
    """
    rate = min(1e-3, 0.128 / hidden_size)
    return float(f"{5 * rate if lora_rank else rate:.2g}")


DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types that weights can be loaded in; `"auto"` is the one of the checkpoint."""

MAY_CHANGE_ON_RESUME = (
    "distillation.batch_size",
    "distillation.accumulation_steps",
    "distillation.gradient_checkpointing",
    "distillation.use_liger_kernel",
    "distillation.torch_compile",
    "distillation.save_steps",
    "distillation.eval_steps",
    "distillation.evaluation_batch_size",
    "store.batch_size",
    "store.server",
)
"""Settings that a resumed run may have others of than it began with: they say what a step needs, not what is made."""


def describe_settings(settings: Any) -> dict[str, Any]:
    """
    Settings as they are kept beside what is made with them, for [`differing_settings`].

    Args:
        settings: a dataclass of settings, or a dictionary of values and such dataclasses.

    Returns:
        `dict`: `settings`, the values as JSON holds them, and `given`, the full names of those that are not at their default.
    """
    values = {name: asdict(value) if is_dataclass(value) else value for name, value in _values_of(settings).items()}
    return json.loads(json.dumps({"settings": values, "given": _list_given(settings)}))


def differing_settings(kept: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """
    The settings that differ between two runs, by their full names: (in the one, in the other).

    The runs may be of two versions of this package: a setting that only one of them has counts as its default in the other.

    Args:
        kept, now (`dict`): of [`describe_settings`]; what is kept may be of any version, see [`upgrade_settings`].
    """
    kept = upgrade_settings(kept)
    return _compare(kept["settings"], now["settings"], kept["given"], now["given"])


def upgrade_settings(kept: dict) -> dict[str, Any]:
    """
    What [`describe_settings`] of any version has written, in today's form. Up to version 0.2.0 that was the values alone: then it is
    not known what was at its default, and all counts as given.
    """
    return kept if "given" in kept else {"settings": kept, "given": list(kept)}


def read_settings(kind: type, kept: dict) -> Any:
    """Settings from values that another version of this package may have kept: those that are no more are left out."""
    names = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in kept.items() if name in names})


def _values_of(settings: Any) -> dict[str, Any]:
    if isinstance(settings, dict):
        return settings
    return {each.name: getattr(settings, each.name) for each in fields(settings)}


def _list_given(settings: Any, prefix: str = "") -> list[str]:
    given = []
    for name, value in _values_of(settings).items():
        if is_dataclass(value):
            given += _list_given(value, f"{prefix}{name}.")
        elif isinstance(settings, dict) or _is_given(settings, name):
            given.append(f"{prefix}{name}")
    return given


def _is_given(settings: Any, name: str) -> bool:
    """Whether a setting would be another if it were left out. Its default may follow from the others."""
    values = _values_of(settings)
    try:
        left_out = type(settings)(**{other: value for other, value in values.items() if other != name})
    except (TypeError, ValueError):  # the others need it
        return True
    return getattr(left_out, name) != values[name]


def _compare(
    one: dict, other: dict, given_in_one: list[str], given_in_other: list[str], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    differing = {}
    for name in {**one, **other}:
        values, full_name = (one.get(name), other.get(name)), f"{prefix}{name}"
        if all(isinstance(value, dict) for value in values):
            differing |= _compare(*values, given_in_one, given_in_other, f"{full_name}.")
        elif values[0] != values[1]:
            given = given_in_one if name in one else given_in_other
            is_given = any(
                f"{each}.".startswith(f"{full_name}.") or full_name.startswith(f"{each}.") for each in given
            )
            if is_given or (name in one and name in other):
                differing[full_name] = values
    return differing


def setting(default: Any, text: str) -> Any:
    """A field with a default and a help text, which the command line shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


MOVES = {"echo": "echo", "kv": "kv", "skip": "skip attention", "drop": "drop"}
"""
What a search may do to a layer, by the name of the setting, and what it is in a plan; from what saves least to what saves most.
"""


@dataclass(frozen=True)
class Target:
    """
    What a student is to cost at most.

    Args:
        quantity (`str`): `"parameters"`, `"kv-bytes"` or `"decode"`.
        share (`float`): of what the teacher costs.
    """

    quantity: str
    share: float

    @property
    def field(self) -> str:
        """`str`: the field of [`PlanCosts`]."""
        return {"parameters": "parameters", "kv-bytes": "kv_bytes_per_token", "decode": "decode_bytes"}[self.quantity]


def parse_target(text: str) -> Target:
    """A target from a text such as `"kv-bytes=-40%"` or `"decode=1.15x"`. Raises `ValueError` for anything else."""
    less = re.fullmatch(r"(parameters|kv-bytes)=-(\d+(?:\.\d+)?)%", text.strip())
    if less and 0 < float(less[2]) < 100:
        return Target(less[1], 1 - float(less[2]) / 100)
    faster = re.fullmatch(r"decode=(\d+(?:\.\d+)?)x", text.strip())
    if faster and float(faster[1]) > 1:
        return Target("decode", 1 / float(faster[1]))
    raise ValueError(
        f"target is {text!r}; it must be parameters=-N% or kv-bytes=-N% with N between 0 and 100, or decode=Nx with N above 1, "
        "such as kv-bytes=-40%."
    )


@dataclass(frozen=True)
class DataSource:
    """
    Where text comes from. Training and held-out text are described alike.

    Args:
        path (`str` or `Path`): a file, a folder, a data set of the Hub, or `"stdlib"`.
        name (`str`, *optional*): configuration of a data set repository.
        split (`str`, *optional*, defaults to `"train"`): split of a data set.
        revision (`str`, *optional*): branch, tag or commit of a data set of the Hub.
        text_column (`str`, *optional*): column that holds the text or the conversation, in tables and data sets; found if
            not given, see [`load_documents`].
        weight (`float`, *optional*): share of the rows, against the weights of the other sources.
    """

    path: str | Path
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str | None = None
    weight: float | None = None


ROW_STARTS = ("bos", "document", "text")
"""What a row of tokens may begin with."""


def check_row_start(name: str) -> None:
    """Check what rows are to begin with. Raises `ValueError` if it is not known."""
    if name not in ROW_STARTS:
        raise ValueError(f"row_start is {name!r}; it must be one of {', '.join(ROW_STARTS)}.")


def check_stride(stride: int, row_length: int) -> None:
    """Check how far rows of an evaluation advance. Raises `ValueError` if a token would have less than half a row before it."""
    if not 1 <= stride <= row_length // 2:
        raise ValueError(
            f"stride is {stride}; it must be from 1 to {row_length // 2}, half of the row length, so that each token has at "
            "least half a row before it."
        )


def check_continuation(prompt_tokens: int, new_tokens: int) -> None:
    """Check how long a prompt and its continuation are. Raises `ValueError` if there is nothing to start from or to count."""
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens is {prompt_tokens}; it must be at least 1.")
    if new_tokens < 4:
        raise ValueError(f"new_tokens is {new_tokens}; it must be at least 4, as 4 tokens in a row are counted.")


@dataclass(frozen=True)
class DataSettings:
    """Which text, and how it becomes rows of tokens. Each field's `metadata["help"]` says what it is for."""

    panel: ClassVar[str] = "Text"

    data: list[str] = setting(
        [STDLIB],
        "Text or conversations: a file, a folder, a data set of the Hub, or 'stdlib', the sources of Python's standard library. May be "
        "repeated; with weights, as in a.txt:3, rows are drawn from each by its share, which is 1 where none is given.",
    )
    data_name: str | None = setting(None, "Configuration of a data set repository.")
    data_split: str = setting("train", "Split of a data set.")
    data_revision: str | None = setting(None, "Branch, tag or commit of a data set of the Hub.")
    text_column: str | None = setting(
        None,
        "Column that holds the text or the conversation, in tables and data sets. If not given, the one that is there of "
        "'text', 'messages', 'conversations', and 'prompt' with 'completion'.",
    )
    held_out_data: list[str] | None = setting(
        None, "Text to evaluate on, given like the data; if not given, some documents of the data."
    )
    held_out_name: str | None = setting(None, "The same for the held-out data; as for the data if not given.")
    held_out_split: str | None = setting(
        None,
        "Split of the held-out data; as for the data if not given. Without held-out data, the split of the data that is "
        "held out.",
    )
    held_out_revision: str | None = setting(None, "The same for the held-out data; as for the data if not given.")
    held_out_text_column: str | None = setting(None, "The same for the held-out data; as for the data if not given.")
    held_out_fraction: float = setting(0.05, "Share of the documents to hold out where no held-out data is given.")
    streaming: bool = setting(False, "Read the data as it goes instead of loading it first.")
    shuffle_buffer: int = setting(
        1000,
        "With streaming: rows that are kept, of which the next one is drawn. The order depends on the seed alone.",
    )
    num_proc: int = setting(
        1,
        "Processes that tokenize data that is not streamed, where all of it is needed, as for training; one uses the "
        "tokenizer's threads.",
    )
    row_length: int = setting(256, "Tokens in a row.")
    row_start: str = setting(
        "bos",
        "What a row begins with: 'bos' (the token with which the tokenizer begins a text, if it has one; the text goes on "
        "from row to row), 'document' (the beginning of a document; what does not fit into its row is left out) or 'text' "
        "(nothing of its own). A row goes on with a conversation by 'text' alone.",
    )
    document_masks: bool | None = setting(
        None,
        "Keep the documents in a row from seeing each other. If not given, where there are conversations and the model can.",
    )
    assistant_only: bool = setting(
        False,
        "Learn from the answers alone: the messages of the assistant, and completions. Plain text counts as a whole. "
        "Evaluations then report answers too.",
    )
    evaluation_rows: int = setting(128, "Most rows to evaluate on, drawn from all held-out text.")

    def __post_init__(self):
        _check_at_least_one(self, "evaluation_rows", "shuffle_buffer", "num_proc")
        check_row_start(self.row_start)
        for source in [*self.sources, *(self.held_out_sources or [])]:
            if source.weight == 0:
                raise ValueError(f"The weight of {source.path!r} is 0; it must be above 0, or leave the text out.")

    @property
    def sources(self) -> list[DataSource]:
        """`list` of [`DataSource`]: the text to train on."""
        options = self.data_name, self.data_split, self.data_revision, self.text_column
        return [DataSource(path, *options, weight) for path, weight in map(_split_weight, _as_list(self.data))]

    @property
    def held_out_sources(self) -> list[DataSource] | None:
        """`list` of [`DataSource`]: the text to evaluate on; `None` if it is documents of the training text."""
        own = self.held_out_name, self.held_out_split, self.held_out_revision, self.held_out_text_column
        if not self.held_out_data and not any(own):
            return None
        common = self.data_name, self.data_split, self.data_revision, self.text_column
        options = [mine or shared for mine, shared in zip(own, common, strict=True)]
        return [
            DataSource(path, *options, weight)
            for path, weight in map(_split_weight, _as_list(self.held_out_data or self.data))
        ]


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _split_weight(text: str) -> tuple[str, float | None]:
    """Path and weight of `path:weight`; no weight if all of it is the name of a file."""
    found = re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", text)
    return (found[1], float(found[2])) if found and not Path(text).exists() else (text, None)


@dataclass(frozen=True)
class CalibrationSettings:
    """How a student is tuned to its teacher before any training. Each field's `metadata["help"]` says what it is for."""

    panel: ClassVar[str] = "Calibration: before any training"

    calibration_rows: int = setting(
        48, "Rows on which similarity is measured, plans are compared and students tuned; a quarter is held out."
    )
    calibration_seed: int = setting(0, "Seed with which these rows are drawn from the training text.")
    align: bool = setting(True, "Align the heads of echo layers with those of their sources.")
    refit: bool = setting(True, "Refit the output projections of echo layers in closed form.")

    def __post_init__(self):
        _check_at_least_one(self, "calibration_rows")


@dataclass(frozen=True)
class PlanSettings:
    """Which layers share. Each field's `metadata["help"]` says what it is for."""

    panel: ClassVar[str] = "Plan: which layers share"

    plan: str = setting(
        "effect",
        "'effect' (searched: what changes the predictions least), 'similarity' (the blocks whose attention is most "
        "similar), 'paper' (the layers most similar to all others, by the EchoAtt paper's rule; its printed lists for "
        "TinyLlama-1.1B at 0.23, 0.41 and 0.77 and LLaMA-160m at 0.33), 'spread' (evenly spread blocks, nothing is "
        "measured; also called 'blocks'), source indices such as 0,1,1,1,4, or a .json file that `echoatt plan` wrote.",
    )
    ratio: float = setting(
        0.41, "Sharing ratio, echo layers / layers, for all rules. With 'paper' and a block size it is not used."
    )
    threshold: float | None = setting(
        None, "With 'similarity': least similarity of an echo to its source, in place of the ratio."
    )
    protected_layers: int = setting(
        1, "Layers at either end that do not echo, for all rules but 'paper', which finds them itself."
    )
    block_size: int | None = setting(
        None,
        "Most layers in a block, its source included, for 'effect' and 'similarity'; their number for 'spread' and 'paper'.",
    )
    target: list[str] | None = setting(
        None,
        "With 'effect', in place of the ratio: what to save, parameters=-10%, kv-bytes=-40% (of the cache) or decode=1.15x (by "
        "the bytes that are read for a token). May be repeated; all are reached.",
    )
    moves: str | None = setting(
        None,
        "With 'effect': what may be done to layers, of echo, kv (keys and values of another, with queries of its own), skip (no "
        "attention) and drop (left out), separated by commas. If not given, echo by ratio, all by target.",
    )
    decode_context: int = setting(2048, "Tokens in the cache for the target decode.")
    from_search: str | None = setting(
        None,
        "The .search.json that `echoatt plan` wrote: the best of what it measured that reaches the target, with these moves and "
        "protected layers, at no cost.",
    )
    search_rows: int = setting(8, "With 'effect' and from a student: rows on which a plan is measured.")
    search_width: int = setting(8, "With 'effect': changes measured in each round, of which the best is kept.")

    def __post_init__(self):
        _check_at_least_one(self, "search_rows", "search_width", "decode_context")
        _check_not_negative(self, "protected_layers")
        if (self.target or self.moves or self.from_search) and self.plan != "effect":
            raise ValueError(f"plan is {self.plan!r}; target, moves and from_search are for the plan 'effect' alone.")
        if self.from_search is not None and not self.target:
            raise ValueError("from_search needs a target: give for instance --target kv-bytes=-40%.")
        if self.block_size is not None and (self.target or (self.moves or "echo") != "echo"):
            raise ValueError(
                "block_size is for plans of echo layers alone: leave it out, or leave target and moves out."
            )
        self.list_targets()
        self.list_moves()
        if self.plan == "blocks":
            object.__setattr__(self, "plan", "spread")

    def list_targets(self) -> list[Target]:
        """What to save. Raises `ValueError` if a target is not understood."""
        targets = [parse_target(text) for text in self.target or []]
        repeated = {
            each.quantity for each in targets if [other.quantity for other in targets].count(each.quantity) > 1
        }
        if repeated:
            raise ValueError(f"target names {sorted(repeated)[0]} more than once: give it once.")
        return targets

    def list_moves(self) -> list[str]:
        """What may be done to layers, as plans name it. Raises `ValueError` if a move is not known."""
        if self.moves is None:
            return list(MOVES.values()) if self.target else ["echo"]
        names = [name.strip() for name in self.moves.split(",")]
        unknown = [name for name in names if name not in MOVES]
        if unknown:
            raise ValueError(f"moves is {self.moves!r}; it must name some of {', '.join(MOVES)}, separated by commas.")
        if not self.target and names != ["echo"]:
            raise ValueError(
                f"moves is {self.moves!r}, but a ratio counts echo layers alone: give a target, such as kv-bytes=-40%."
            )
        return [MOVES[name] for name in dict.fromkeys(names)]


def recipe_setting(name: str, text: str) -> Any:
    """A field whose default is that of the recipe, which the help text tells."""
    values = {recipe: known[name] for recipe, known in RECIPES.items() if not callable(known.get(name, len))}
    told = ", ".join(f"{value} by {recipe!r}" for recipe, value in values.items())
    return setting(None, f"{text} If not given, {told}." if told else text)


@dataclass(frozen=True)
class DistillationSettings:
    """
    How to distil, see [`EchoAttTrainingArguments`]. Each field's `metadata["help"]` says what it is for. What is `None` is
    filled in from the recipe; the learning rate of the default recipe when the model is known, by `for_width`.
    """

    panel: ClassVar[str] = "Distillation: the training"

    recipe: str = setting(
        "default",
        "Defaults of what is not given: 'default', or 'paper', that of the EchoAtt paper: hidden states at the end of each "
        "block, KL(student || teacher) and the teacher's first choice, then a quarter as many steps on the text.",
    )
    steps: int = setting(300, "Steps of both stages: from the teacher, then on the text alone.")
    stage2_steps: int | None = recipe_setting(
        "stage2_steps", "How many of the steps are stage 2; a sixth if not given, a fifth by 'paper'."
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate of stage 1. If not given, 1e-4 by 'paper', otherwise by the hidden size of the model: 0.128 / hidden "
        "size, at most 1e-3, and five times that for adapters.",
    )
    stage2_learning_rate: float | None = recipe_setting(
        "stage2_learning_rate",
        "Peak learning rate of stage 2; a tenth of the learning rate if not given, all of it by 'paper'.",
    )
    kl_weight: float | None = recipe_setting(
        "kl_weight", "Weight of the divergence from the teacher's predictions in stage 1."
    )
    divergence: str | None = recipe_setting(
        "divergence",
        "Which divergence: 'forward' (KL(teacher || student)), 'reverse' (KL(student || teacher)) or 'jensen_shannon'.",
    )
    kl_temperature: float = setting(1.0, "Temperature of the divergence.")
    hard_label_weight: float | None = recipe_setting(
        "hard_label_weight", "Weight of the cross-entropy of the teacher's likeliest token in stage 1."
    )
    ce_weight: float = setting(0.0, "Weight of the cross-entropy of the text in stage 1.")
    hidden_weight: float | None = recipe_setting(
        "hidden_weight", "Weight of the distance of hidden states in stage 1."
    )
    hidden_layers: str | None = recipe_setting(
        "hidden_layers", "Whose hidden states: 'all', 'blocks' (the last layer of each), or layers such as 3,7."
    )
    hidden_distance: str | None = recipe_setting(
        "hidden_distance",
        "Which distance: 'relative' (squared, over the teacher's squared length) or 'squared' (the mean over features).",
    )
    attention_weight: float = setting(
        0.0, "Weight of the distance of the attention outputs of echo layers in stage 1."
    )
    lora_rank: int = setting(
        0,
        "Rank of adapters (LoRA) on all linear layers: they are trained in place of the weights and merged at the end. "
        "0 to train all weights.",
    )
    batch_size: int = setting(8, "Rows in a step, over all accumulation steps and processes.")
    accumulation_steps: int = setting(1, "Micro-batches in a step.")
    warmup_steps: float | None = recipe_setting(
        "warmup_steps", "Steps in which the learning rate rises, in each stage; below 1, the share of its steps."
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW.")
    save_steps: int = setting(200, "Steps between checkpoints.")
    eval_steps: int = setting(0, "Steps between evaluations of the loss on held-out rows; 0 for none on the way.")
    evaluation_batch_size: int = setting(8, "Rows in a forward pass of an evaluation.")
    bf16: bool = setting(
        False,
        "Compute in bfloat16 while training. With or without it the weights that are trained are in float32 meanwhile, "
        "whatever type they are loaded and saved in; weights beside adapters stay in theirs.",
    )
    gradient_checkpointing: bool = setting(
        False, "Keep only the inputs of layers for the backward pass: less memory, one more forward pass."
    )
    torch_compile: bool = setting(False, "Compile the student for training; not with an attention weight.")
    use_liger_kernel: bool = setting(
        False, "On a GPU, compute the losses with the kernels of liger-kernel, which must be installed."
    )
    seed: int = setting(0, "Seed of the order of rows and of dropout.")
    trainer_args: list[str] | None = setting(
        None,
        "Any other argument of transformers' TrainingArguments, as key=value, such as report_to=tensorboard, "
        "logging_steps=1 or lr_scheduler_type=linear, or a .yaml file of them. May be repeated; the last one counts.",
    )

    def __post_init__(self):
        _check_at_least_one(self, "steps", "batch_size", "accumulation_steps", "save_steps", "evaluation_batch_size")
        _check_choice("recipe", self.recipe, RECIPES)
        for settings_field in fields(self):
            name, value = settings_field.name, RECIPES[self.recipe].get(settings_field.name)
            if getattr(self, name) is None:
                object.__setattr__(self, name, value(self) if callable(value) else value)
        check_divergence(self.divergence)
        check_hidden_distance(self.hidden_distance)
        parse_layers(self.hidden_layers)
        _check_not_negative(
            self, "eval_steps", "lora_rank", "warmup_steps", "weight_decay", "stage2_learning_rate", "seed"
        )
        if self.learning_rate is not None and not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        object.__setattr__(self, "trainer_args", _read_trainer_args(self.trainer_args))
        if not 0 <= self.stage2_steps <= self.steps:
            raise ValueError(f"stage2_steps is {self.stage2_steps}; it must be from 0 to steps, {self.steps}.")
        if self.use_liger_kernel and find_spec("liger_kernel") is None:
            raise ValueError(
                "use_liger_kernel is set, but liger-kernel is not installed: install it with `pip install liger-kernel`, or "
                "leave the setting out."
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size is {self.batch_size}, which accumulation_steps {self.accumulation_steps} does not divide."
            )

    @property
    def stage1_steps(self) -> int:
        """`int`: steps of stage 1."""
        return self.steps - self.stage2_steps

    def for_width(self, hidden_size: int) -> "DistillationSettings":
        """The same with the learning rate that a model of this hidden size is trained with."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=default_learning_rate(hidden_size, self.lora_rank))


METHODS = {
    "kvsharer": ("shared_layers", "kv_order", "kv_distance", "keep_above"),
    "laco": ("merge_size", "merge_lowest", "merge_highest", "merge_interval", "merge_rule", "keep_above"),
    "directshare": ("head_rate", "head_parts"),
}
"""Other ways than echoes to make a student, with the settings that each has."""


@dataclass(frozen=True)
class MethodSettings:
    """
    Another way than echoes to make a student. Each field's `metadata["help"]` says what it is for; what is `None` has the
    default of the method.
    """

    panel: ClassVar[str] = "Method: another way than echoes"

    method: str | None = setting(
        None,
        "'kvsharer' (layers use the keys and values of those that theirs differ from most), 'laco' (layers are merged into the "
        "one before them) or 'directshare' (heads use the weights of the heads that they are most like), by the rules of "
        "their papers. Plan and tuning are then left out.",
    )
    shared_layers: int | None = setting(None, "kvsharer: layers that share; a quarter of all if not given.")
    kv_order: str | None = setting(None, "kvsharer: try the most 'dissimilar' layers first, or the most 'similar'.")
    kv_distance: str | None = setting(None, "kvsharer: distance by the authors' 'code' or by the 'paper'.")
    keep_above: float | None = setting(
        None,
        "kvsharer, laco: keep what leaves the last hidden states this similar, a cosine; 0.5 and 0.65 if not given.",
    )
    merge_size: int | None = setting(None, "laco: layers that become one in a merge; 4 if not given.")
    merge_lowest: int | None = setting(None, "laco: first layer that others are merged into; 1 if not given.")
    merge_highest: int | None = setting(None, "laco: layer after the last that is merged; all layers if not given.")
    merge_interval: int | None = setting(None, "laco: layers to go down after a merge; 2 if not given.")
    merge_rule: str | None = setting(None, "laco: merge by the authors' 'code' or by the formula of the 'paper'.")
    head_rate: float | None = setting(None, "directshare: share of heads that use others' weights; 0.3 if not given.")
    head_parts: str | None = setting(None, "directshare: compare heads by 'qk', 'q', 'k', 'v' or 'qkv'.")

    def __post_init__(self):
        if self.method is not None:
            _check_choice("method", self.method, METHODS)
        for name in (each.name for each in fields(self)):
            if name not in ("method", *METHODS.get(self.method, ())) and getattr(self, name) is not None:
                owners = " or ".join(repr(method) for method, names in METHODS.items() if name in names)
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which is for the method {owners}; the method is {self.method!r}."
                )

    def options(self) -> dict[str, Any]:
        """The settings that are given."""
        return {name: getattr(self, name) for name in METHODS[self.method] if getattr(self, name) is not None}


BENCHMARK_PRESETS = {
    "quick": {"measure": ["prefill", "decode", "training"], "length": [128], "batch_size": [1], "context": [128]},
    "paper": {"measure": ["prefill", "training", "distillation"], "length": [2048]},
    "decode": {"measure": ["decode"], "batch_size": [1, 8], "context": [2048]},
    "full": {
        "measure": ["prefill", "decode", "training", "distillation"],
        "length": [512, 2048, 8192],
        "batch_size": [1, 8, 32],
        "context": [128, 2048, 8192],
    },
}
BENCHMARK_CHOICES = {
    "measure": ("prefill", "decode", "training", "distillation", "adapters", "stored"),
    "baseline": ("eager", "layers", "kv", "none"),
    "dtype": ("float32", "bfloat16", "float16"),
    "optimizer": ("sgd", "adamw"),
}


@dataclass(frozen=True)
class BenchmarkSettings:
    """What [`run_benchmark`] measures. Each field's `metadata["help"]` says what it is for."""

    panel: ClassVar[str] = "What is measured"

    preset: str = setting(
        "quick",
        f"What is measured where the options below do not say: {', '.join(map(repr, BENCHMARK_PRESETS))}. 'paper' is "
        "prefill, training and distillation of 2048 tokens, 'decode' 1 and 8 rows after 2048 tokens.",
    )
    measure: list[str] | None = setting(
        None,
        "'prefill', 'decode', 'training' (a step), 'distillation' (the same, with the teacher's part), 'adapters' "
        "(distillation of adapters of rank 16) or 'stored' (distillation from a stored teacher). May be repeated.",
    )
    length: list[int] | None = setting(None, "Tokens in a row, but for decoding. May be repeated.")
    rows: int = setting(1, "Rows, but for decoding.")
    batch_size: list[int] | None = setting(None, "Rows that are decoded together. May be repeated.")
    context: list[int] | None = setting(None, "Tokens before the ones that are decoded. May be repeated.")
    baseline: list[str] = setting(
        ["eager", "layers", "kv"],
        "What else to measure: 'eager' (the teacher in eager attention, the paper's setting), 'layers' (the teacher "
        "without so many layers that it is as small as the student), 'kv' (keys and values shared in the layers that "
        "echo), 'none'. May be repeated.",
    )
    attention: str = setting("sdpa", "Attention implementation of all but the eager teacher.")
    dtype: str = setting("float32", "Type of the weights: 'float32', 'bfloat16' or 'float16'.")
    random_init: bool = setting(
        False, "Random weights in the shape of the teacher, of which the configuration is read."
    )
    layers: int | None = setting(None, "With random weights: layers to make in place of the teacher's own number.")
    optimizer: str = setting("sgd", "'sgd' or 'adamw', whose states need twice the memory of the weights.")
    prompts: str | None = setting(None, "Text to take tokens from, random ones if not given.")
    repeats: int = setting(5, "Rounds that are timed.")
    warmup: int = setting(1, "Rounds before them that are not; in the first memory is measured.")

    def __post_init__(self):
        if self.preset not in BENCHMARK_PRESETS:
            raise ValueError(f"preset is {self.preset!r}; it must be one of {', '.join(BENCHMARK_PRESETS)}.")
        for name in ("measure", "length", "batch_size", "context"):
            if not getattr(self, name):
                object.__setattr__(self, name, BENCHMARK_PRESETS[self.preset].get(name, []))
        for name, choices in BENCHMARK_CHOICES.items():
            values = getattr(self, name)
            for value in [values] if isinstance(values, str) else values:
                if value not in choices:
                    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        _check_at_least_one(self, "rows", "repeats", "warmup")
        if self.layers is not None and self.layers < 3:
            raise ValueError(f"layers is {self.layers}; it must be at least 3, of which the one between can echo.")
        for name in ("length", "batch_size", "context"):
            for value in getattr(self, name):
                if value < (1 if name == "batch_size" else 2):
                    raise ValueError(f"{name} is {value}; it must be at least {1 if name == 'batch_size' else 2}.")
        needed = {"decode": ("batch_size", "context")}
        for measure in self.measure:
            for name in needed.get(measure, ("length",)):
                if not getattr(self, name):
                    raise ValueError(f"measure is {measure!r}, for which the preset has no {name}: give --{name}.")


@dataclass(frozen=True)
class StoredTeacherSettings:
    """What to keep of a teacher's predictions. Each field's `metadata["help"]` says what it is for."""

    panel: ClassVar[str] = "What is stored"

    top_k: int = setting(
        64, "Tokens whose log-probabilities are kept at each position; all others together count as one more."
    )
    rows: int | None = setting(
        None, "Most rows to store, drawn at random, of streamed text with its shuffle buffer; all rows if not given."
    )
    shard_rows: int = setting(512, "Rows in a file, which is what a stopped run can lose.")
    batch_size: int = setting(8, "Rows in a forward pass; with --server, requests at once.")
    seed: int = setting(0, "Seed of the order of rows.")
    server: str | None = setting(
        None,
        "Address of a server that runs the teacher and gives prompt_logprobs, such as vLLM's http://127.0.0.1:8000/v1; it is "
        "not loaded here then. A key is taken from the environment variable ECHOATT_SERVER_KEY.",
    )
    server_model: str | None = setting(None, "What the server calls the teacher, if it has several models.")

    def __post_init__(self):
        _check_at_least_one(self, "top_k", "shard_rows", "batch_size")
        if self.rows is not None:
            _check_at_least_one(self, "rows")
        if self.server is not None:
            check_server_url(self.server)
        elif self.server_model is not None:
            raise ValueError(f"server_model is {self.server_model!r}, but there is no server: give --server too.")


@dataclass(frozen=True)
class ScoringSettings:
    """What is measured, and which tokens of held-out text count. Each field's `metadata["help"]` says what it is for."""

    panel: ClassVar[str] = "What is measured"

    stride: int | None = setting(
        None,
        "Tokens by which rows advance, at most half of --row-length: each token counts once, with at least half a row of its "
        "own document before it, or all that there is; --row-start does not count, as rows that go on with a document begin "
        "with nothing of their own. If not given, the text is cut into rows, and the first tokens of a row have little before "
        "them.",
    )
    position_buckets: int = setting(
        0,
        "Equal ranges of positions in a row for which perplexity, and KL to a teacher, are reported too; 0 for none.",
    )
    continuations: int = setting(
        0,
        "Most prompts, of held-out text, that the model goes on with greedily: how many 4-grams it repeats, beside the "
        "teacher and the text itself; 0 for none. With --output the first 20 are in its .continuations.md, to be read.",
    )
    prompt_tokens: int = setting(64, "Tokens of a prompt, with --continuations.")
    new_tokens: int = setting(128, "Tokens of a continuation; an end of text is a token like any other.")

    def __post_init__(self):
        _check_not_negative(self, "position_buckets", "continuations")
        check_continuation(self.prompt_tokens, self.new_tokens)


@dataclass(frozen=True)
class _RunSettings:
    """
    Settings of a step. A teacher or model is named as for [`load_model`]. Those with a model have a `dtype`, one of `DTYPES`:
    in which its weights are loaded, and in which a student is saved. `"auto"` is the dtype of the checkpoint, bfloat16 of a
    quantized GGUF file; a CPU then computes in float32, but what is saved is in the dtype of the checkpoint. What is trained
    is in float32 meanwhile, see `DistillationSettings.bf16`.
    """

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")

    def to_json(self) -> str:
        """The settings as a JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class CompressionSettings(_RunSettings):
    """All that decides what [`compress`] makes: two runs with equal settings make equal students on one machine."""

    teacher: str = BUILTIN_TEACHER
    data: DataSettings = field(default_factory=DataSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    dtype: str = "auto"


@dataclass(frozen=True)
class StoreSettings(_RunSettings):
    """All that decides what [`store_teacher`] makes."""

    teacher: str = BUILTIN_TEACHER
    data: DataSettings = field(default_factory=DataSettings)
    store: StoredTeacherSettings = field(default_factory=StoredTeacherSettings)
    dtype: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.store.server is not None and self.dtype != "auto":
            raise ValueError(
                f"dtype is {self.dtype!r}, but with --server it is the server that loads the weights: leave it out."
            )


@dataclass(frozen=True)
class StudentSettings(_RunSettings):
    """
    All that decides what [`distill`] makes of a student. `stored_teacher` is a folder that [`store_teacher`] wrote, which
    brings its own text; in a report, also what its manifest says. Without one the teacher is the built-in one if not given.
    """

    student: str
    teacher: str | None = None
    stored_teacher: str | dict | None = None
    data: DataSettings = field(default_factory=DataSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    dtype: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.stored_teacher is None and self.teacher is None:
            object.__setattr__(self, "teacher", BUILTIN_TEACHER)
        if isinstance(self.stored_teacher, str) and self.data != DataSettings():
            raise ValueError("A stored teacher brings its own text: leave out the options of the data.")


@dataclass(frozen=True)
class EvaluationSettings(_RunSettings):
    """What [`evaluate`] measures: of which model, on which text, and against which teacher."""

    model: str
    teacher: str | None = None
    data: DataSettings = field(default_factory=DataSettings)
    batch_size: int = 8
    dtype: str = "auto"
    scoring: ScoringSettings = field(default_factory=ScoringSettings)

    def __post_init__(self):
        super().__post_init__()
        _check_at_least_one(self, "batch_size")
        if self.scoring.stride is not None:
            check_stride(self.scoring.stride, self.data.row_length)
        if self.scoring.position_buckets > self.data.row_length - 1:
            raise ValueError(
                f"position_buckets is {self.scoring.position_buckets}; it must be at most {self.data.row_length - 1}, the "
                "tokens that are predicted in a row."
            )


@dataclass(frozen=True)
class ZeroShotSettings(_RunSettings):
    """What [`zero_shot`] measures: of which model, on which files or folders of questions, by the names of the tasks."""

    model: str
    tasks: dict[str, str]
    limit: int | None = None
    batch_size: int = 16
    dtype: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        _check_at_least_one(self, "batch_size")
        if self.limit is not None:
            _check_at_least_one(self, "limit")


@dataclass(frozen=True)
class ExportSettings:
    """Which student [`export`] writes, a folder or a repository, and for which runtime, one of `EXPORT_TARGETS`."""

    student: str
    to: str = "mlx"

    def __post_init__(self):
        _check_choice("to", self.to, EXPORT_TARGETS)


@dataclass(frozen=True)
class ServingSettings:
    """How [`serve`] runs a model. Each field's `metadata["help"]` says what it is for."""

    panel: ClassVar[str] = "The server"

    host: str = setting(
        "localhost", "Address to listen at. Others than this machine reach it only if you give another."
    )
    port: int = setting(8000, "Port to listen at.")
    device: str = setting(
        "auto", "Where the model runs: 'cpu', 'cuda:0' and the like, or 'auto', on all accelerators that there are."
    )
    dtype: str = setting(
        "auto",
        "Type of the weights: 'float32', 'bfloat16', 'float16', or 'auto', that of the checkpoint, with which a CPU computes "
        "in float32.",
    )
    attention: str | None = setting(None, "Attention implementation, such as 'sdpa' or 'flash_attention_2'.")
    continuous_batching: bool = setting(
        False, "Compute requests together, with a paged cache. Without it one waits for another."
    )
    cache_blocks: int | None = setting(
        None,
        "With continuous batching: blocks of the cache; if not given, what fits into the free memory of accelerators, 64 "
        "on a CPU.",
    )

    def __post_init__(self):
        _check_choice("dtype", self.dtype, DTYPES)
        if not 0 < self.port < 65536:
            raise ValueError(f"port is {self.port}; it must be 1 to 65535.")
        if self.cache_blocks is not None:
            _check_at_least_one(self, "cache_blocks")
            if not self.continuous_batching:
                raise ValueError(
                    f"cache_blocks is {self.cache_blocks}, but only continuous_batching has such a cache."
                )


def options_of(kind: type, given: dict[str, Any], hidden_size: int | None = None) -> list[str]:
    """
    The options of the command line for settings, with what differs from its defaults.

    Args:
        kind (`type`): a dataclass of settings whose fields are options.
        given (`dict`): values of its fields, as `asdict` gives them.
        hidden_size (`int`, *optional*): of the model, by which the default learning rate goes.
    """
    # What other defaults follow from.
    leading = {name: given[name] for name in ("recipe", "steps", "lora_rank", "learning_rate") if name in given}

    def default_beside_others(name: str) -> Any:
        defaults = kind(**{other: value for other, value in leading.items() if other != name})
        if kind is DistillationSettings and hidden_size is not None:
            defaults = defaults.for_width(hidden_size)
        return getattr(defaults, name)

    words = []
    for each in fields(kind):
        value = given.get(each.name)
        if value is None or value == default_beside_others(each.name):
            continue
        name = each.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [
                word for item in (value if isinstance(value, list) else [value]) for word in (f"--{name}", str(item))
            ]
    return words


def default_of(settings_field) -> Any:
    """Default of a dataclass field."""
    return settings_field.default if settings_field.default is not MISSING else settings_field.default_factory()


def _check_at_least_one(settings, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1.")


def _check_not_negative(settings, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be 0 or more.")


def _read_trainer_args(given: list[str] | None) -> list[str] | None:
    """Arguments as sorted `key=value`, the value in JSON: those of a file are read, as the file may change or be lost."""
    if given is None:
        return None
    import yaml

    found = {}
    for argument in given:
        if "=" not in argument and not argument.endswith((".yaml", ".yml")):
            raise ValueError(
                f"trainer_args has {argument!r}; give key=value, such as logging_steps=1, or a .yaml file of them."
            )
        try:
            if "=" in argument:
                key, _, value = argument.partition("=")
                content = {key.strip().replace("-", "_"): yaml.safe_load(value)}
            else:
                content = yaml.safe_load(Path(argument).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
                raise ValueError("it holds no names with values")
            found |= {key: json.dumps(value, sort_keys=True) for key, value in content.items()}
        except (yaml.YAMLError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"trainer_args has {argument!r}, which cannot be read: {reason}.") from error
    return [f"{key}={value}" for key, value in sorted(found.items())]


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")

"""Plan search by effect: which layers echo which, by what it does to the model's predictions."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..conversion.refit import TunedEchoes, hold_out
from ..modeling_echoatt import EchoRecords
from ..models.checks import hash_weights
from ..models.devices import explained_memory_errors
from ..models.inference import inference, sum_logits
from ..outputs.files import write_whole
from ..planning.rules import plan_from_similarity
from ..planning.sharing import SharingPlan, check_block_size, count_echo_layers, inner_groups
from ..text.rows import ROW_COLUMNS, batch_rows


__all__ = ["PlanSearch", "search_plan"]

# Sources of a layer for which its tuned weights are kept: all of them would be many times the weights of a large model.
KEPT_SOURCES = 4


@dataclass(frozen=True)
class PlanSearch:
    """
    A plan found by its measured effect, and how.

    Args:
        plan ([`SharingPlan`]): the plan.
        rounds (`list[dict]`): the echo layer that each round added, its source, and the KL of the plan so far.
        kl (`dict[str, float]`): KL(teacher || student) without training, in nats per token, of this plan (`"effect"`), of
            the one that similarity chooses (`"similarity"`) and of the paper's blocks (`"blocks"`), where they exist.
        forwards (`int`): students that were measured.
        tokens (`int`): tokens in each of these forward passes.
    """

    plan: SharingPlan
    rounds: list[dict]
    kl: dict[str, float]
    forwards: int
    tokens: int

    def to_dict(self) -> dict:
        """Everything as JSON can hold it."""
        return {
            "rounds": self.rounds,
            "kl": self.kl,
            "forwards": self.forwards,
            "tokens": self.tokens,
        }

    def __str__(self) -> str:
        lines = ["echo  source  KL (nats)"]
        lines += [f"{each['echo']:4}  {each['source']:6}  {each['kl']:.4f}" for each in self.rounds]
        others = ", ".join(f"{name} {value:.4f}" for name, value in self.kl.items())
        return "\n".join([*lines, f"KL of plans by {others}; {self.forwards} forwards of {self.tokens:,} tokens"])


def search_plan(
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    similarity: AttentionSimilarity | None = None,
    *,
    ratio: float,
    protected_layers: int = 1,
    block_size: int | None = None,
    search_rows: int = 8,
    width: int = 8,
    align: bool = True,
    refit: bool = True,
    state: Path | None = None,
    progress: bool = False,
) -> PlanSearch:
    """
    Search for the plan that changes a model's predictions least.

    Greedy: each round adds the echo layer, with the source, that raises KL(teacher || student) least. The first round
    measures every pair of an echo and an earlier layer of its type, the following ones the `width` pairs that looked
    best when they were last measured. Students are measured without training, with each echo layer tuned to its source
    by itself, see [`TunedEchoes`].

    Args:
        teacher (`PreTrainedModel`):
            A causal language model of a supported family.
        rows (sequence of `dict`):
            Calibration text: rows with `input_ids` of T tokens, as returned by [`pack_rows`]. Layers are refitted on the
            first three quarters, plans are measured on the rest.
        similarity ([`AttentionSimilarity`], *optional*):
            Of the teacher, for the alignment of heads; measured on the rows if not given.
        ratio (`float`):
            Sharing ratio, echo layers / layers.
        protected_layers (`int`, *optional*, defaults to 1):
            Layers at either end that do not echo. They may be sources, which changes nothing about them.
        block_size (`int`, *optional*):
            Most layers in a block, its source included.
        search_rows (`int`, *optional*, defaults to 8):
            Most rows to measure plans on, whose teacher logits are kept in memory. 8 rows of 256 tokens tell pairs apart.
        width (`int`, *optional*, defaults to 8):
            Pairs measured in each round but the first.
        align, refit (`bool`, *optional*, defaults to `True`):
            Measure with aligned heads, with refitted output projections.
        state (`Path`, *optional*):
            JSON file that keeps what was measured. If it is there, nothing in it is measured again, also for another ratio
            or width. It belongs to a teacher, rows, a similarity, `align` and `refit`.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        [`PlanSearch`]

    Raises:
        `ValueError`: the family is not supported, a number is out of range, the ratio is impossible for the model, or what
            is in `state` was measured on something else.
    """
    for name, value in (("search_rows", search_rows), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    train, held_out = hold_out(rows)
    space, count = make_space(teacher.config, ratio, protected_layers, block_size)
    pairs = space.pairs(list(range(space.num_layers)))
    if similarity is None:
        similarity = measure_on_rows(teacher, rows, progress=progress)
    known = _Known(state, lambda: _describe(teacher, rows, search_rows, similarity, align, refit))
    echoes = TunedEchoes(teacher, similarity, pairs, train, held_out, align=align, refit=refit)
    bar = tqdm(total=len(pairs) + (count - 1) * width, desc="search", disable=not progress, leave=False)
    remedy = f"plans are measured on search_rows {search_rows}, whose logits are kept. Give fewer, or shorter rows"
    with bar, explained_memory_errors(remedy), inference(teacher):
        measure = _Measure(teacher, held_out[:search_rows], echoes, known, bar)
        plan, rounds = list(range(space.num_layers)), []
        increase = dict.fromkeys(pairs, 0.0)  # of KL by each pair, when last measured
        current = 0.0
        for _ in range(count):
            if rounds:
                chosen = sorted(space.pairs(plan), key=increase.__getitem__)[:width]
                results = {pair: measure(_with(plan, *pair)) for pair in chosen}
            else:
                results = measure.all_pairs(plan, pairs)
            increase |= {pair: value - current for pair, value in results.items()}
            if not results:
                raise ValueError(
                    f"Blocks of at most {block_size} layers leave no room for {count} echo layers: {len(rounds)} fit on "
                    "the way of this search. Allow larger blocks or a smaller ratio."
                )
            echo, source = min(results, key=results.get)
            plan, current = _with(plan, echo, source), results[echo, source]
            rounds.append({"echo": echo, "source": source, "kl": current})
        found = {"effect": (SharingPlan(plan, space.layer_types), current)}
        for name, other in space.other_plans(similarity, ratio).items():
            found[name] = (other, measure(list(other)))
    best = min(found.values(), key=lambda item: item[1])[0]
    kl = {name: value for name, (_, value) in found.items()}
    return PlanSearch(best, rounds, kl, len(known.kl), measure.tokens)


def make_space(
    config: PreTrainedConfig, ratio: float, protected_layers: int, block_size: int | None
) -> tuple["PlanSpace", int]:
    """The plans that a search may find for a model, and their number of echo layers. Arguments as in [`search_plan`]."""
    check_block_size(block_size)
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    space = PlanSpace(config.num_hidden_layers, protected_layers, layer_types, block_size)
    return space, count_echo_layers(config.num_hidden_layers, ratio, space.capacity)


class PlanSpace:
    """The plans that are allowed."""

    def __init__(
        self, num_layers: int, protected_layers: int, layer_types: Sequence[str] | None, block_size: int | None
    ):
        self.num_layers, self.layer_types, self._block_size = num_layers, layer_types, block_size
        self._constraints = {
            "protected_layers": protected_layers,
            "layer_types": layer_types,
            "block_size": block_size,
        }
        inner = inner_groups(num_layers, protected_layers, layer_types)
        types = layer_types or [None] * num_layers
        self._sources = {
            echo: [layer for layer in range(echo) if types[layer] == types[echo]] for group in inner for echo in group
        }

    @property
    def capacity(self) -> int:
        """Most layers that can echo, in blocks of any size."""
        return sum(bool(sources) for sources in self._sources.values())

    def pairs(self, plan: list[int]) -> list[tuple[int, int]]:
        """The pairs of an echo and a source that may be added to a plan."""
        most = self._block_size or len(plan)
        return [
            (echo, source)
            for echo, sources in self._sources.items()
            if plan[echo] == echo
            for source in sources
            if plan[source] == source and plan.count(source) + plan.count(echo) <= most
        ]

    def other_plans(self, similarity: AttentionSimilarity, ratio: float) -> dict[str, SharingPlan]:
        """What the other rules choose, where they can."""
        rules = {
            "similarity": lambda: plan_from_similarity(similarity.layers.tolist(), ratio=ratio, **self._constraints),
            "blocks": lambda: SharingPlan.from_ratio(self.num_layers, ratio, **self._constraints),
        }
        plans = {}
        for name, rule in rules.items():
            try:
                plans[name] = rule()
            except ValueError:  # a ratio that only scattered blocks can reach
                continue
        return plans


class _Measure:
    """KL(teacher || student) of plans, in nats per token; what was measured once is remembered."""

    def __init__(
        self, teacher: PreTrainedModel, rows: Sequence[dict], echoes: TunedEchoes, known: "_Known", bar: tqdm
    ):
        self._teacher, self._echoes, self._known, self._bar = teacher, echoes, known, bar
        self._batches = [batch.to(teacher.device) for batch in batch_rows(rows, 8)]
        self.tokens = sum(batch["input_ids"].numel() for batch in self._batches)
        self._logits: list[torch.Tensor] = []  # the teacher's, made when they are needed

    def __call__(self, plan: list[int]) -> float:
        key = _key(plan)
        if key not in self._known.kl:
            self._known.add(key, self._measure(plan))
        self._bar.update()
        return self._known.kl[key]

    def all_pairs(self, plan: list[int], pairs: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """The plan with each of the pairs added. What is needed of the pairs that look best is kept in memory."""
        results = {}
        for echo, group in groupby(pairs, key=itemgetter(0)):
            plans = {source: _with(plan, echo, source) for _, source in group}
            self._echoes.tune(echo, [source for source, each in plans.items() if _key(each) not in self._known.kl])
            found = {source: self(each) for source, each in plans.items()}
            self._echoes.keep(echo, sorted(found, key=found.get)[:KEPT_SOURCES])
            results |= {(echo, source): value for source, value in found.items()}
        return results

    def _measure(self, plan: list[int]) -> float:
        if not self._logits:
            self._logits = [self._teacher(**batch, use_cache=False).logits for batch in self._batches]
        total = tokens = 0
        with self._echoes.in_place(plan):
            for batch, expected in zip(self._batches, self._logits, strict=True):
                logits = self._teacher(**batch, use_cache=False, echo_records=EchoRecords()).logits
                total += sum_logits(logits, expected, batch["input_ids"])[1].item()
                tokens += batch["input_ids"][:, 1:].numel()
        return total / tokens


class _Known:
    """What was measured, by plan, kept in a file if there is one, which belongs to what it was measured on."""

    def __init__(self, file: Path | None, describe: Callable[[], dict]):
        self._file, self._measured_on, self.kl = file, None, {}
        if file is None:
            return
        self._measured_on = describe()
        if not file.exists():
            return
        try:
            kept = json.loads(file.read_text())
            measured_on, self.kl = kept["measured_on"], kept["kl"]
            differing = [
                name for name, value in self._measured_on.items() if not _is_same(measured_on.get(name), value)
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{str(file)!r} does not hold what a search has measured: give another file.") from None
        if differing:
            raise ValueError(
                f"What {str(file)!r} holds was measured with another {', '.join(differing)}: give a file of its own to each "
                "search of another teacher, text or tuning."
            )

    def add(self, key: str, value: float) -> None:
        self.kl[key] = value
        if self._file is not None:
            write_whole(self._file, json.dumps({"measured_on": self._measured_on, "kl": self.kl}))


def _describe(
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    search_rows: int,
    similarity: AttentionSimilarity,
    align: bool,
    refit: bool,
) -> dict:
    """What the KL of a plan depends on."""
    columns = [{name: np.asarray(row[name]).tolist() for name in ROW_COLUMNS if name in row} for row in rows]
    return {
        "teacher": hash_weights(teacher),
        "dtype": str(teacher.dtype),
        "rows": hashlib.sha256(json.dumps(columns).encode()).hexdigest(),
        "search_rows": search_rows,
        "similarity": [[round(value, 4) for value in row] for row in similarity.layers.tolist()],
        "align": align,
        "refit": refit,
    }


def _is_same(one: object, other: object) -> bool:
    """Whether two values of a description are equal; of numbers that may have been measured again, nearly."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = np.asarray(one), np.asarray(other)
        return one.shape == other.shape and np.allclose(one, other, atol=1e-3)
    return one == other


def _key(plan: list[int]) -> str:
    return ",".join(map(str, plan))


def _with(plan: list[int], echo: int, source: int) -> list[int]:
    """The plan with one more echo layer. What echoed it echoes its source now."""
    return [source if other == echo else other for other in plan]

"""Plan search by effect: which layers echo which, by what it does to the model's predictions."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..conversion.pairs import Pair, TunedPairs, sample_gradients
from ..conversion.tuning import hold_out
from ..modeling_echoatt import EchoRecords
from ..models.checks import hash_weights
from ..models.devices import explained_memory_errors
from ..models.heads import OutputHead, predict
from ..models.inference import inference
from ..models.layerwise import find_layers, keep_layer_outputs, starting_at
from ..models.predictions import sum_predictions
from ..outputs.files import write_whole
from ..planning.paper import plan_like_paper, published_plan
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
            those by similarity (`"similarity"`), by the paper's rule (`"paper"`) and of evenly spread blocks (`"spread"`), where they
            exist. The best of them is the plan.
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

    Every pair of an echo and an earlier layer of its type is tuned by itself, see [`TunedPairs`], and what it is expected to do
    to the predictions is estimated to second order, from four backward passes of the teacher. Then the search is greedy: each
    round measures the `width` pairs that promise least KL(teacher || student), in the student that has the echoes found so
    far, and adds the best one. Nothing is trained.

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
            Most rows to measure plans on. What the teacher predicts on them is kept in memory: its last hidden states, or its
            logits where its head cannot be called alone. 8 rows of 256 tokens tell pairs apart.
        width (`int`, *optional*, defaults to 8):
            Pairs measured in each round.
        align, refit (`bool`, *optional*, defaults to `True`):
            Measure with aligned heads, with refitted output projections.
        state (`Path`, *optional*):
            JSON file that keeps what was measured. If it is there, nothing in it is measured again.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        [`PlanSearch`]

    Raises:
        `ValueError`: the family is not supported, a number is out of range, or the ratio is impossible for the model.
    """
    for name, value in (("search_rows", search_rows), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    train, held_out = hold_out(rows)
    space, count = make_space(teacher.config, ratio, protected_layers, block_size)
    pairs = space.pairs(list(range(space.num_layers)))
    if similarity is None:
        similarity = measure_on_rows(teacher, rows, progress=progress)
    kept = _State(state, lambda: _describe(teacher, rows, search_rows, similarity, align, refit))
    tuned = TunedPairs(teacher, similarity, pairs, train, held_out, align=align, refit=refit)
    batches = [batch.to(teacher.device) for batch in batch_rows(held_out[:search_rows], 8)]
    tuned.tune(pairs, progress=progress)
    layers = sorted({echo for echo, _ in pairs})
    expected = tuned.effects(pairs, batches, sample_gradients(teacher, batches, layers))
    others = space.other_plans(similarity, ratio, teacher.config)
    tuned.keep(_shortlist(expected, [list(plan) for plan in others.values()]))
    bar = tqdm(total=count * width + len(others), desc="search", disable=not progress, leave=False)
    remedy = f"plans are measured on search_rows {search_rows}, of which the layer outputs are kept. Give fewer, or shorter rows"
    with bar, explained_memory_errors(remedy), inference(teacher):
        measure = _Measure(teacher, batches, tuned, kept, bar)
        plan, rounds, current = list(range(space.num_layers)), [], 0.0
        measured: dict[Pair, float] = {}  # increase of KL by each pair, when last measured
        for _ in range(count):
            # What was expected of pairs is scaled by what came out of those that were measured.
            scale = sum(measured.values()) / sum(map(expected.get, measured)) if measured else 1.0
            increase = {pair: measured.get(pair, scale * expected[pair]) for pair in space.pairs(plan)}
            chosen = sorted(increase, key=increase.get)[:width]
            if not chosen:
                raise ValueError(
                    f"Blocks of at most {block_size} layers leave no room for {count} echo layers: {len(rounds)} fit on "
                    "the way of this search. Allow larger blocks or a smaller ratio."
                )
            measure.start(plan)
            results = {pair: measure(with_pair(plan, pair)) for pair in chosen}
            measured |= {pair: value - current for pair, value in results.items()}
            best_pair = min(results, key=results.get)
            plan, current = with_pair(plan, best_pair), results[best_pair]
            rounds.append({"echo": best_pair[0], "source": best_pair[1], "kl": current})
        found = {"effect": (SharingPlan(plan, space.layer_types), current)}
        for name, other in others.items():
            found[name] = (other, measure(list(other)))
    best = min(found.values(), key=lambda item: item[1])[0]
    kl = {name: value for name, (_, value) in found.items()}
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return PlanSearch(best, rounds, kl, len(kept.known), tokens)


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
        """Most layers that can echo."""
        if self._block_size is None:
            return sum(bool(sources) for sources in self._sources.values())
        room, echoes = {}, 0  # for echoes in the blocks of the sources so far, by type of layer
        for layer in range(self.num_layers):
            kind = self.layer_types[layer] if self.layer_types else None
            if layer in self._sources and room.get(kind, 0):
                room[kind] -= 1
                echoes += 1
            else:
                room[kind] = room.get(kind, 0) + self._block_size - 1
        return echoes

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

    def other_plans(
        self, similarity: AttentionSimilarity, ratio: float, config: PreTrainedConfig
    ) -> dict[str, SharingPlan]:
        """What the other rules choose, where they can."""

        def paper() -> SharingPlan:
            plan = published_plan(config, ratio)
            if plan is None and similarity.flattened is None:
                raise ValueError("The similarity is that of an earlier version, without the paper's measure.")
            plan = plan or plan_like_paper(similarity.flattened.tolist(), ratio, layer_types=self.layer_types)
            most = self._block_size or self.num_layers
            if not {*plan.echo_layers} <= {*self._sources} or max(map(len, plan.blocks)) > most:
                raise ValueError("The paper's rule knows neither protected layers nor a largest block.")
            return plan

        rules = {
            "similarity": lambda: plan_from_similarity(similarity.layers.tolist(), ratio=ratio, **self._constraints),
            "paper": paper,
            "spread": lambda: SharingPlan.from_ratio(self.num_layers, ratio, **self._constraints),
        }
        plans = {}
        for name, rule in rules.items():
            try:
                plans[name] = rule()
            except ValueError:  # a ratio that only scattered blocks can reach, or the like
                continue
        return plans


class _Measure:
    """
    KL(teacher || student) of plans, in nats per token. What was measured once is remembered, and a forward pass begins at the
    first layer that differs from the plan it was started with.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        batches: Sequence[BatchEncoding],
        tuned: TunedPairs,
        state: "_State",
        bar: tqdm,
    ):
        self._teacher, self._batches, self._tuned, self._state, self._bar = teacher, batches, tuned, state, bar
        self._layers = find_layers(teacher)
        self._head = OutputHead.find(teacher, among_processes=False)
        self._logits = [predict(teacher, self._head, batch) for batch in batches]
        self._plan: list[int] = []
        self._kept: list[tuple[EchoRecords, list]] = []

    def start(self, plan: list[int]) -> None:
        """Keep what the layers of a plan give, to start from in the measurements that follow."""
        self._plan, self._kept = plan, []

    def __call__(self, plan: list[int]) -> float:
        if plan not in self._state:
            self._state[plan] = self._measure(plan)
        self._bar.update()
        return self._state[plan]

    def _measure(self, plan: list[int]) -> float:
        if self._layers is not None and not self._kept:
            with self._tuned.in_place(self._plan, record_all=True):
                self._kept = [self._keep(batch) for batch in self._batches]
        first = next((layer for layer, source in enumerate(plan) if self._plan[layer] != source), 0)
        if self._layers is None:
            first = 0
        total = tokens = 0
        with self._tuned.in_place(plan):
            for index, (batch, expected) in enumerate(zip(self._batches, self._logits, strict=True)):
                records, output = EchoRecords(), None
                if first:
                    kept, outputs = self._kept[index]
                    output = outputs[first - 1]
                    records.by_layer |= {layer: kept.by_layer[layer] for layer in kept.by_layer if layer < first}
                with starting_at(self._layers, first, output):
                    logits = predict(self._teacher, self._head, batch, echo_records=records)
                total += sum_predictions(logits, expected, batch["input_ids"])[1].item()
                tokens += batch["input_ids"][:, 1:].numel()
        return total / tokens

    def _keep(self, batch: BatchEncoding) -> tuple[EchoRecords, list]:
        records = EchoRecords()
        with keep_layer_outputs(self._layers) as outputs:
            self._teacher(**batch, use_cache=False, echo_records=records, logits_to_keep=1)
        return records, outputs


class _State:
    """KL of the plans that were measured, by plan; in a file too, if there is one, with what they were measured on."""

    def __init__(self, file: Path | None, describe: Callable[[], dict]):
        self._file, self._measured_on, self.known = file, None, {}
        if file is None:
            return
        self._measured_on = describe()
        if not file.exists():
            return
        try:
            content = json.loads(file.read_text())
            measured_on, self.known = content["measured_on"], content["kl"]
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

    def __contains__(self, plan: list[int]) -> bool:
        return _key(plan) in self.known

    def __getitem__(self, plan: list[int]) -> float:
        return self.known[_key(plan)]

    def __setitem__(self, plan: list[int], value: float) -> None:
        self.known[_key(plan)] = value
        if self._file is not None:
            write_whole(self._file, json.dumps({"measured_on": self._measured_on, "kl": self.known}))


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


def _shortlist(expected: dict[Pair, float], plans: list[list[int]]) -> list[Pair]:
    """The most promising sources of each echo, and the pairs of some plans."""
    kept = [(echo, source) for plan in plans for echo, source in enumerate(plan) if echo != source]
    for _, group in groupby(expected, key=itemgetter(0)):
        kept += sorted(group, key=expected.get)[:KEPT_SOURCES]
    return kept


def with_pair(plan: list[int], pair: Pair) -> list[int]:
    """The plan with one more echo layer. What echoed it echoes its source now."""
    echo, source = pair
    return [source if other == echo else other for other in plan]

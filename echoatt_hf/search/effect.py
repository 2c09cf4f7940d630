"""Plan search by effect: which layers echo which, by what it does to the model's predictions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..conversion.refit import TunedEchoes, hold_out
from ..modeling_echoatt import EchoRecords
from ..models.inference import inference, sum_logits
from ..outputs.files import write_whole
from ..planning.paper import plan_like_paper, published_plan
from ..planning.rules import plan_from_similarity
from ..planning.sharing import SharingPlan, check_block_size, count_echo_layers, inner_groups
from ..text.rows import batch_rows


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
    echoes = TunedEchoes(teacher, similarity, pairs, train, held_out, align=align, refit=refit)
    bar = tqdm(total=len(pairs) + (count - 1) * width, desc="search", disable=not progress, leave=False)
    with bar, inference(teacher):
        measure = _Measure(teacher, held_out[:search_rows], echoes, state, bar)
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
        for name, other in space.other_plans(similarity, ratio, teacher.config).items():
            found[name] = (other, measure(list(other)))
    best = min(found.values(), key=lambda item: item[1])[0]
    kl = {name: value for name, (_, value) in found.items()}
    return PlanSearch(best, rounds, kl, len(measure.known), measure.tokens)


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
    """KL(teacher || student) of plans, in nats per token; what was measured once is remembered."""

    def __init__(
        self, teacher: PreTrainedModel, rows: Sequence[dict], echoes: TunedEchoes, state: Path | None, bar: tqdm
    ):
        self._teacher, self._echoes, self._state, self._bar = teacher, echoes, state, bar
        self._batches = [batch.to(teacher.device) for batch in batch_rows(rows, 8)]
        self.tokens = sum(batch["input_ids"].numel() for batch in self._batches)
        self._logits: list[torch.Tensor] = []  # the teacher's, made when they are needed
        self.known: dict[str, float] = json.loads(state.read_text()) if state is not None and state.exists() else {}

    def __call__(self, plan: list[int]) -> float:
        key = _key(plan)
        if key not in self.known:
            self.known[key] = self._measure(plan)
            if self._state is not None:
                write_whole(self._state, json.dumps(self.known))
        self._bar.update()
        return self.known[key]

    def all_pairs(self, plan: list[int], pairs: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """The plan with each of the pairs added. What is needed of the pairs that look best is kept in memory."""
        results = {}
        for echo, group in groupby(pairs, key=itemgetter(0)):
            plans = {source: _with(plan, echo, source) for _, source in group}
            self._echoes.tune(echo, [source for source, each in plans.items() if _key(each) not in self.known])
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


def _key(plan: list[int]) -> str:
    return ",".join(map(str, plan))


def _with(plan: list[int], echo: int, source: int) -> list[int]:
    """The plan with one more echo layer. What echoed it echoes its source now."""
    return [source if other == echo else other for other in plan]

"""Plan search by effect: what is done to which layer, by what it does to the model's predictions and what it saves."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from operator import itemgetter
from pathlib import Path

from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel

from ..analysis.similarity import AttentionSimilarity, measure_on_rows
from ..configuration_echoatt import read_entry
from ..conversion.pairs import Pair, TunedPairs, sample_gradients
from ..conversion.student import make_student
from ..conversion.tuning import hold_out
from ..modeling_echoatt import EchoRecords
from ..models.checks import hash_weights
from ..models.devices import explained_memory_errors
from ..models.heads import OutputHead, predict
from ..models.inference import inference
from ..models.layerwise import find_layers, keep_layer_outputs, starting_at
from ..models.predictions import sum_predictions
from ..outputs.measured import Measured
from ..planning.from_settings import identify_model
from ..planning.paper import plan_like_paper, published_plan
from ..planning.rules import plan_from_similarity
from ..planning.sharing import SharingPlan, check_block_size, count_echo_layers, inner_groups
from ..settings import MOVES, Target
from ..text.rows import batch_rows, hash_rows
from .budget import Budget, PlanCosts, PlanCounter, are_met, check_targets


__all__ = ["PlanSearch", "search_plan"]

_ORDER = tuple(MOVES.values())

# Sources of a layer for which its tuned weights are kept: all of them would be many times the weights of a large model.
KEPT_SOURCES = 4


@dataclass(frozen=True)
class PlanSearch:
    """
    A plan found by its measured effect, and how.

    Args:
        plan ([`SharingPlan`]): the plan.
        rounds (`list[dict]`): the layer that each round changed, its entry in the plan, and the KL of the plan so far.
        kl (`dict[str, float]`): KL(teacher || student) without training, in nats per token, of this plan (`"effect"`), of
            those by similarity (`"similarity"`), by the paper's rule (`"paper"`) and of evenly spread blocks (`"spread"`), where they
            exist. The best of them is the plan.
        forwards (`int`): students that were measured.
        tokens (`int`): tokens in each of these forward passes.
        teacher (`dict[str, int]`): what the teacher costs, of [`PlanCosts`].
        frontier (`list[dict]`): of the plans that were measured those that no other one beats in KL and in all costs:
            `layer_plan`, `kl` and the costs, the smallest KL first.
        model (`dict`): what model the teacher is, by its configuration.
        decode_context (`int`, *optional*): tokens in the cache with which `decode_bytes` were counted.
    """

    plan: SharingPlan
    rounds: list[dict]
    kl: dict[str, float]
    forwards: int
    tokens: int
    teacher: dict[str, int] = field(default_factory=dict)
    frontier: list[dict] = field(default_factory=list)
    model: dict[str, int | str] = field(default_factory=dict)
    decode_context: int | None = None

    def plot(self, path: Path) -> None:
        """Plot the frontier, KL against what is saved, to a PNG file."""
        from .figure import plot_frontier

        plot_frontier(self.teacher, self.frontier, path)

    def to_dict(self) -> dict:
        """Everything as JSON can hold it."""
        return {
            "rounds": self.rounds,
            "kl": self.kl,
            "forwards": self.forwards,
            "tokens": self.tokens,
            "teacher": self.teacher,
            "frontier": self.frontier,
            "model": self.model,
            "decode_context": self.decode_context,
        }

    def __str__(self) -> str:
        lines = ["layer  becomes         KL (nats)  parameters  KV bytes  decoding"]
        for each in self.rounds:
            becomes = f"echo of {each['entry']}" if isinstance(each["entry"], int) else each["entry"]
            changes = [f"{each[name] / value - 1:+.1%}" for name, value in self.teacher.items()]
            lines.append(
                f"{each['layer']:5}  {becomes:14}  {each['kl']:9.4f}  {changes[0]:>10}  {changes[1]:>8}  {changes[2]:>8}"
            )
        others = ", ".join(f"{name} {value:.4f}" for name, value in self.kl.items())
        return "\n".join([*lines, f"KL of plans by {others}; {self.forwards} forwards of {self.tokens:,} tokens"])


def search_plan(
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    similarity: AttentionSimilarity | None = None,
    *,
    ratio: float | None = None,
    targets: Sequence[Target] = (),
    moves: Sequence[str] = ("echo",),
    decode_context: int = 2048,
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

    Every change of a layer, such as an echo of an earlier layer of its type, is tuned by itself, see [`TunedPairs`], and what it
    is expected to do to the predictions is estimated to second order, from four backward passes of the teacher. Then the
    search is greedy: each round measures the `width` changes that promise least KL(teacher || student) for what they save, in
    the student that has the changes found so far, and adds the best one. With targets a layer may change again, to what
    saves more. Nothing is trained.

    Args:
        teacher (`PreTrainedModel`):
            A causal language model of a supported family.
        rows (sequence of `dict`):
            Calibration text: rows with `input_ids` of T tokens, as returned by [`pack_rows`]. Layers are refitted on the
            first three quarters, plans are measured on the rest.
        similarity ([`AttentionSimilarity`], *optional*):
            Of the teacher, for the alignment of heads; measured on the rows if not given.
        ratio (`float`, *optional*):
            Sharing ratio, echo layers / layers. Echo layers save alike, whichever they are.
        targets (sequence of [`Target`], *optional*):
            What is to be saved, in place of the ratio.
        moves (sequence of `str`, *optional*, defaults to `("echo",)`):
            What may be done to a layer: `"echo"`, and with targets `"kv"`, `"skip attention"` and `"drop"`.
        decode_context (`int`, *optional*, defaults to 2048):
            Tokens in the cache, for a target of decoding.
        protected_layers (`int`, *optional*, defaults to 1):
            Layers at either end that stay as they are. They may be sources, which changes nothing about them.
        block_size (`int`, *optional*):
            Most layers in a block, its source included.
        search_rows (`int`, *optional*, defaults to 8):
            Most rows to measure plans on. In memory are kept for each of their tokens what the teacher predicts, its last hidden
            states, or its logits where its head cannot be called alone, and four gradients of the hidden size for each layer,
            eight if layers may be dropped. 8 rows of 256 tokens tell pairs apart.
        width (`int`, *optional*, defaults to 8):
            Pairs measured in each round.
        align, refit (`bool`, *optional*, defaults to `True`):
            Measure with aligned heads, with refitted output projections.
        state (`Path`, *optional*):
            JSON file that keeps what was estimated of changes and measured of plans. If it is there, nothing in it is found
            again; changes are tuned again where a plan that has them is measured.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        [`PlanSearch`]

    Raises:
        `ValueError`: the family is not supported, a number is out of range, the ratio or a move is impossible for the model, or
            a target cannot be counted.
    """
    for name, value in (("search_rows", search_rows), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    train, held_out = hold_out(rows)
    space, count = make_space(teacher.config, ratio, protected_layers, block_size, moves if targets else ("echo",))
    unchanged = list(range(space.num_layers))
    pairs = space.pairs(unchanged)
    check_targets(teacher, targets)
    if dropped := next((pair for pair in pairs if pair[1] == "drop"), None):
        make_student(teacher, with_pair(unchanged, dropped), share_weights=True)  # refuses a family that cannot
    if similarity is None:
        similarity = measure_on_rows(teacher, rows, progress=progress)
    elif align:
        similarity.between(0, 0)  # refuses one without heads
    kept = _State(state, lambda: _describe(teacher, rows, search_rows, similarity, align, refit))
    tuned = TunedPairs(teacher, similarity, pairs, train, held_out, align=align, refit=refit)
    counter = PlanCounter(teacher, tuned.count_parameters, decode_context)
    teacher_costs = counter(unchanged)
    budget = Budget(counter, teacher_costs, count, targets)
    batches = [batch.to(teacher.device) for batch in batch_rows(held_out[:search_rows], 8)]
    others = space.other_plans(similarity, ratio, teacher.config) if count is not None else {}
    remedy = (
        f"changes are estimated by gradients of each layer for each token of search_rows {search_rows}, and the weights of "
        f"{KEPT_SOURCES} tuned sources of each layer and move are kept. Give fewer moves, and fewer or shorter rows"
    )
    with explained_memory_errors(remedy):
        _estimate(teacher, tuned, pairs, batches, kept, [list(plan) for plan in others.values()], progress)
    expected = {pair: kept.expected[pair] for pair in pairs}
    total = (count or space.num_layers) * width + len(others)
    bar = tqdm(total=total, desc="search", disable=not progress, leave=False)
    remedy = f"plans are measured on search_rows {search_rows}, of which the layer outputs are kept. Give fewer, or shorter rows"
    with bar, explained_memory_errors(remedy), inference(teacher):
        measure = _Measure(teacher, batches, tuned, kept, bar)
        plan, rounds, current, left = unchanged, [], 0.0, budget.left(unchanged)
        measured: dict[Pair, float] = {}  # increase of KL by each change, when last measured
        while left > 0:
            # What was expected of changes is scaled by what came out of those that were measured.
            foreseen = sum(map(expected.get, measured))  # 0 where layers that do nothing were measured
            scale = max(sum(measured.values()), 0.0) / foreseen if foreseen > 0 else 1.0
            prices = {}
            for pair in space.pairs(plan):
                gain = left - budget.left(with_pair(plan, pair))
                if gain > 0:
                    rise = scale * max(expected[pair] - expected.get((pair[0], plan[pair[0]]), 0.0), 0.0)
                    prices[pair] = (measured.get(pair, rise) if plan[pair[0]] == pair[0] else rise, gain)
            chosen = sorted(prices, key=lambda pair: _price(*prices[pair]))[:width]
            if not chosen:
                raise ValueError(_out_of_moves(block_size, count, rounds, budget, counter(plan), teacher_costs))
            measure.start(plan, [with_pair(plan, pair) for pair in chosen])
            results = {pair: measure(with_pair(plan, pair)) for pair in chosen}
            measured |= {pair: value - current for pair, value in results.items() if plan[pair[0]] == pair[0]}
            best = min(results, key=lambda pair: _price(results[pair] - current, prices[pair][1]))
            plan, current = with_pair(plan, best), results[best]
            left = budget.left(plan)
            rounds.append({"layer": best[0], "entry": best[1], "kl": current} | asdict(counter(plan)))
        if targets:  # a plan that was measured on the way may save as much and more
            plan, current = min(measure.all, key=lambda each: (not are_met(budget.limits, counter(each[0])), each[1]))
        found = {"effect": (SharingPlan(plan, space.layer_types), current)}
        for name, other in others.items():
            found[name] = (other, measure(list(other)))
    best = min(found.values(), key=lambda item: item[1])[0]
    kl = {name: value for name, (_, value) in found.items()}
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    frontier = find_frontier([{"layer_plan": plan, "kl": kl} | asdict(counter(plan)) for plan, kl in measure.all])
    model = identify_model(teacher.config)
    return PlanSearch(
        best, rounds, kl, len(kept.known), tokens, asdict(teacher_costs), frontier, model, decode_context
    )


def _estimate(
    teacher: PreTrainedModel,
    tuned: TunedPairs,
    pairs: Sequence[Pair],
    batches: Sequence[BatchEncoding],
    kept: "_State",
    others: list[list[int | str]],
    progress: bool,
) -> None:
    """Estimate the effects of the changes that are not known, see [`TunedPairs.effects`], as soon as they are tuned."""
    unknown = [pair for pair in pairs if pair not in kept.expected]
    if not unknown:
        return
    blocks = sorted({layer for layer, entry in unknown if entry == "drop"})
    attentions = sorted({layer for layer, entry in unknown if entry != "drop"})
    gradients = sample_gradients(teacher, batches, attentions, blocks)

    def estimate(group: list[Pair]) -> None:
        kept.expect(tuned.effects(group, batches, gradients))
        tuned.keep(_shortlist({pair: kept.expected[pair] for pair in pairs if pair in kept.expected}, others))

    tuned.tune(unknown, after_group=estimate, progress=progress)


def _price(rise: float, gain: float) -> float:
    """KL for what is saved. Of changes that lower KL the one that saves most is the cheapest."""
    return rise / gain if rise > 0 else rise * gain


def _out_of_moves(
    block_size: int | None, count: int | None, rounds: list[dict], budget: Budget, costs: PlanCosts, teacher: PlanCosts
) -> str:
    if count is not None:
        return (
            f"Blocks of at most {block_size} layers leave no room for {count} echo layers: {len(rounds)} fit on "
            "the way of this search. Allow larger blocks or a smaller ratio."
        )
    missed = [name for name, limit in budget.limits.items() if getattr(costs, name) > limit]
    reached = ", ".join(f"{name} {getattr(costs, name) / getattr(teacher, name) - 1:+.1%}" for name in missed)
    return (
        f"The target is out of reach on the way of this search: with all changes that are left, {reached}. Allow more moves, "
        "fewer protected layers, or a smaller target."
    )


def find_frontier(points: Sequence[dict]) -> list[dict]:
    """
    The plans that no other one beats in KL and in all costs.

    Args:
        points (sequence of `dict`): `kl`, the costs of [`PlanCosts`], and what else is known of them.

    Returns:
        `list[dict]`: those points, the smallest KL first.
    """
    names = [field.name for field in fields(PlanCosts)]
    kept: list[dict] = []
    for point in sorted(points, key=lambda point: (point["kl"], *(point[name] for name in names))):
        if not any(all(other[name] <= point[name] for name in names) for other in kept):
            kept.append(point)
    return kept


def make_space(
    config: PreTrainedConfig,
    ratio: float | None,
    protected_layers: int,
    block_size: int | None,
    moves: Sequence[str] = ("echo",),
) -> tuple["PlanSpace", int | None]:
    """
    The plans that a search may find for a model, and their number of echo layers, if there is a ratio. Arguments as in
    [`search_plan`].
    """
    check_block_size(block_size)
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    space = PlanSpace(config.num_hidden_layers, protected_layers, layer_types, block_size, moves)
    return space, count_echo_layers(config.num_hidden_layers, ratio, space.capacity) if ratio is not None else None


class PlanSpace:
    """The plans that are allowed."""

    def __init__(
        self,
        num_layers: int,
        protected_layers: int,
        layer_types: Sequence[str] | None,
        block_size: int | None,
        moves: Sequence[str] = ("echo",),
    ):
        self.num_layers, self.layer_types, self._block_size = num_layers, layer_types, block_size
        self._moves = [move for move in _ORDER if move in moves]
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

    def pairs(self, plan: list[int | str]) -> list[Pair]:
        """The changes that may be added to a plan: of layers that stay as they are, and to what saves more."""
        most = self._block_size or len(plan)
        users = dict.fromkeys(range(len(plan)), 0)
        for layer, entry in enumerate(plan):
            source = read_entry(layer, entry)[1]
            if source is not None:
                users[source] += 1
        found = []
        for layer, sources in self._sources.items():
            own = read_entry(layer, plan[layer])[0]
            free = [source for source in sources if plan[source] == source]
            # Those that use a layer use its source once it has one.
            free = [source for source in free if users[source] + 1 + users[layer] + 1 <= most]
            for move in self._moves:
                if own != "plain" and _ORDER.index(move) <= _ORDER.index(own):
                    continue
                if move in ("echo", "kv"):
                    found += [(layer, source if move == "echo" else f"kv {source}") for source in free]
                elif sources and not users[layer]:  # the first of a type stays: caches take their length from it
                    found.append((layer, move))
        return found

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
        self.all: list[tuple[list[int | str], float]] = []
        self._plan: list[int | str] = []
        self._kept: list[tuple[EchoRecords, list]] = []

    def start(self, plan: list[int | str], candidates: Sequence[list[int | str]]) -> None:
        """Keep what the layers of a plan give, to start from in the measurements of `candidates`, which are tuned together."""
        self._plan, self._kept = plan, []
        if unknown := [candidate for candidate in candidates if _key(candidate) not in self._state]:
            pairs = dict.fromkeys(pair for each in (plan, *unknown) for pair in pairs_of(each))
            self._tuned.tune(sorted(pairs, key=itemgetter(0)))

    def __call__(self, plan: list[int | str]) -> float:
        key = _key(plan)
        if key not in self._state:
            self._state[key] = self._measure(plan)
        self._bar.update()
        self.all.append((plan, self._state[key]))
        return self._state[key]

    def _measure(self, plan: list[int]) -> float:
        if self._layers is not None and not self._kept:
            with self._tuned.in_place(self._plan, record_all=True):
                self._kept = [self._keep(batch) for batch in self._batches]
        first = self._tuned.first_difference(self._plan, plan) if self._layers is not None else 0
        total = tokens = 0
        with self._tuned.in_place(plan):
            for index, (batch, expected) in enumerate(zip(self._batches, self._logits, strict=True)):
                records, output = EchoRecords(), None
                if first:
                    kept, outputs = self._kept[index]
                    output = outputs[first - 1]
                    records.by_layer |= {layer: kept.by_layer[layer] for layer in kept.by_layer if layer < first}
                    records.keys_values |= {
                        layer: kept.keys_values[layer] for layer in kept.keys_values if layer < first
                    }
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


class _State(Measured):
    """KL of the plans that were measured, by plan, and what is expected of changes."""

    def __init__(self, file: Path | None, describe: Callable[[], dict]):
        self.expected: dict[Pair, float] = {}
        remedy = "give a file of its own to each search of another teacher, text or tuning"
        # A setting that the version before did not have counts as its default.
        defaults = {name: each.default for name, each in signature(search_plan).parameters.items()}
        super().__init__(file, describe, remedy, defaults)

    def expect(self, effects: dict[Pair, float]) -> None:
        """Keep what is expected of some more changes."""
        self.expected |= effects
        self._write()

    def _read(self, content: dict) -> None:
        super()._read(content)
        self.expected = {(layer, entry): value for layer, entry, value in content.get("expected", [])}

    def _content(self) -> dict:
        return {"expected": [[*pair, value] for pair, value in self.expected.items()], **super()._content()}


def _describe(
    teacher: PreTrainedModel,
    rows: Sequence[dict],
    search_rows: int,
    similarity: AttentionSimilarity,
    align: bool,
    refit: bool,
) -> dict:
    """What the KL of a plan depends on."""
    return {
        "teacher": hash_weights(teacher),
        "dtype": str(teacher.dtype),
        "rows": hash_rows(rows),
        "search_rows": search_rows,
        "similarity": [[round(value, 4) for value in row] for row in similarity.layers.tolist()],
        "align": align,
        "refit": refit,
    }


def _key(plan: list[int]) -> str:
    return ",".join(map(str, plan))


def _shortlist(expected: dict[Pair, float], plans: list[list[int]]) -> list[Pair]:
    """The most promising sources of each layer and move, and the pairs of some plans."""
    kept = [pair for plan in plans for pair in pairs_of(plan)]
    groups: dict[tuple[int, str], list[Pair]] = {}
    for layer, entry in expected:
        groups.setdefault((layer, read_entry(layer, entry)[0]), []).append((layer, entry))
    for group in groups.values():
        kept += sorted(group, key=expected.get)[:KEPT_SOURCES]
    return kept


def pairs_of(plan: Sequence[int | str]) -> list[Pair]:
    """The changes of a plan, by layer."""
    return [(layer, entry) for layer, entry in enumerate(plan) if entry != layer]


def with_pair(plan: list[int | str], pair: Pair) -> list[int | str]:
    """The plan with one more change. What used the layer uses its source now."""
    changed, entry = pair
    source = read_entry(changed, entry)[1]
    moved = {changed: source, f"kv {changed}": f"kv {source}"}
    return [entry if layer == changed else moved.get(other, other) for layer, other in enumerate(plan)]

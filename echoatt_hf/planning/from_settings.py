"""The sharing plan that settings describe, for a model that need not be loaded."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from ..analysis.similarity import AttentionSimilarity
from ..configuration_echoatt import read_entry
from ..settings import MOVES, PlanSettings, Target
from .paper import plan_like_paper, published_plan
from .rules import plan_from_similarity
from .sharing import SharingPlan


__all__ = ["make_plan"]

_IDENTITY = ("model_type", "num_hidden_layers", "hidden_size")


def make_plan(
    settings: PlanSettings, config: PreTrainedConfig, similarity: AttentionSimilarity | None = None
) -> SharingPlan:
    """
    The sharing plan for a model that need not be loaded: by any rule but `"effect"`.

    Args:
        settings ([`PlanSettings`]):
            The rule, indices or file.
        config (`PreTrainedConfig`):
            Configuration of the teacher.
        similarity ([`AttentionSimilarity`], *optional*):
            Needed for the plans `"similarity"` and `"paper"`, see [`needs_similarity`].

    Raises:
        `ValueError`: the plan cannot be read, or does not fit the model.
    """
    config = config.get_text_config()
    num_layers, layer_types = config.num_hidden_layers, getattr(config, "layer_types", None)
    _check_rule(settings)
    constraints = {
        "protected_layers": settings.protected_layers,
        "block_size": settings.block_size,
        "layer_types": layer_types,
    }
    if similarity is None and needs_similarity(settings, config):
        raise ValueError(f"The plan {settings.plan!r} needs a measured similarity: run `echoatt analyze` first.")
    if settings.from_search is not None:
        return SharingPlan(_read_search(settings, config), layer_types)
    if settings.plan == "paper":
        return _plan_like_paper(settings, config, similarity)
    if settings.plan == "similarity":
        return plan_from_similarity(
            similarity.layers.tolist(),
            ratio=settings.ratio if settings.threshold is None else None,
            threshold=settings.threshold,
            **constraints,
        )
    if settings.plan == "spread":
        return SharingPlan.from_ratio(num_layers, settings.ratio, **constraints)
    is_file = settings.plan.endswith(".json")
    entries = list(SharingPlan.from_json(settings.plan)) if is_file else parse_entries(settings.plan)
    if len(entries) != num_layers:
        raise ValueError(f"The plan has {len(entries)} layers and the model {num_layers}: give one source per layer.")
    return SharingPlan(entries, layer_types)


def is_searched(settings: PlanSettings) -> bool:
    """Whether a plan needs a search: it is by effect, and not one that an earlier search has measured."""
    return settings.plan == "effect" and settings.from_search is None


def identify_model(config: PreTrainedConfig) -> dict[str, int | str]:
    """What tells the plans of one model from those of another, by its configuration."""
    config = config.get_text_config()
    return {name: getattr(config, name) for name in _IDENTITY}


def _read_search(settings: PlanSettings, config: PreTrainedConfig) -> list[int | str]:
    """The plan with the smallest KL of those that a search has measured and that settings allow."""
    file, targets = settings.from_search, settings.list_targets()
    try:
        search = json.loads(Path(file).read_text(encoding="utf-8"))
        teacher, frontier = search["teacher"], search["frontier"]
        # Those of before this was written say neither of what model they are nor of which context.
        found = search.get("model") or {"num_hidden_layers": len(frontier[0]["layer_plan"])}
        for name, value in identify_model(config).items():
            if found.get(name, value) != value:
                raise ValueError(
                    f"The search {file!r} is of a model with {name} {found[name]!r}; this one has {value!r}."
                )
        context = search.get("decode_context") or settings.decode_context
        if context != settings.decode_context and any(target.quantity == "decode" for target in targets):
            raise ValueError(
                f"decode_context is {settings.decode_context}, but the search {file!r} counted decoding with {context} tokens in "
                f"the cache: give --decode-context {context}, or search again."
            )
        return choose_from_frontier(teacher, frontier, targets, settings.list_moves(), settings.protected_layers)
    except (AttributeError, IndexError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file!r} does not hold what a search has found: give the .search.json that `echoatt plan` wrote."
        ) from error


def choose_from_frontier(
    teacher: dict[str, int],
    frontier: Sequence[dict],
    targets: Sequence[Target],
    moves: Sequence[str] = tuple(MOVES.values()),
    protected_layers: int = 0,
) -> list[int | str]:
    """
    The plan with the smallest KL of those a search has measured that reach targets.

    Args:
        teacher, frontier:
            Of [`PlanSearch`].
        targets (sequence of [`Target`]):
            What is to be saved.
        moves, protected_layers:
            What may be done to which layers, as in [`search_plan`]; all that was done if not given.

    Raises:
        `ValueError`: none of them does.
    """

    def is_allowed(plan: list[int | str]) -> bool:
        changed = {layer: read_entry(layer, entry)[0] for layer, entry in enumerate(plan) if entry != layer}
        return {*changed.values()} <= {*moves} and {*changed} <= {
            *range(protected_layers, len(plan) - protected_layers)
        }

    limits = {target.field: target.share * teacher[target.field] for target in targets}
    allowed = [point for point in frontier if is_allowed(point["layer_plan"])]
    for point in allowed:
        if all(point[name] <= limit for name, limit in limits.items()):
            return point["layer_plan"]
    those = "No plan that this search has measured"
    if len(allowed) < len(frontier):
        those += f" with moves of {', '.join(moves)} alone and {protected_layers} protected layers at either end"
    if not allowed:
        raise ValueError(f"{those} is there: allow more of --moves, fewer of --protected-layers, or search again.")
    least = ", ".join(f"{name} {min(each[name] for each in allowed) / teacher[name] - 1:+.1%}" for name in limits)
    raise ValueError(f"{those} reaches the target; it came to {least}. Search again.")


def needs_similarity(settings: PlanSettings, config: PreTrainedConfig) -> bool:
    """Whether a plan follows from a measured similarity of layers alone. The paper's own plans need none."""
    if settings.plan == "paper":
        return settings.block_size is not None or published_plan(config, settings.ratio) is None
    return settings.plan == "similarity"


def _plan_like_paper(
    settings: PlanSettings, config: PreTrainedConfig, similarity: AttentionSimilarity | None
) -> SharingPlan:
    if not needs_similarity(settings, config):
        return published_plan(config, settings.ratio)
    if similarity.flattened is None:
        raise ValueError(
            "The plan 'paper' needs the paper's similarity, of flattened attention weights, which the similarity file of an "
            "earlier version lacks: run `echoatt analyze` again."
        )
    size = {"ratio": settings.ratio} if settings.block_size is None else {"block_size": settings.block_size}
    return plan_like_paper(similarity.flattened.tolist(), **size, layer_types=getattr(config, "layer_types", None))


def _check_rule(settings: PlanSettings) -> None:
    if settings.threshold is not None and settings.plan != "similarity":
        raise ValueError("A threshold needs the plan 'similarity'.")


def parse_entries(text: str) -> list[int | str]:
    """Entries of a plan from a text such as `"0,1,1,kv 1,4"`. Raises `ValueError` for anything else."""
    parts = [part.strip() for part in text.split(",")]
    entries = [int(part) if part.isdecimal() else part for part in parts]
    if None in [read_entry(layer, entry) for layer, entry in enumerate(entries)]:
        raise ValueError(
            f"The plan {text!r} is not understood: give 'effect', 'similarity', 'paper', 'spread', source indices such as "
            "0,1,1,1,4 (also 'kv N', 'skip attention' or 'drop' for a layer), or a .json file."
        )
    return entries

"""The sharing plan that settings describe, for a model that need not be loaded."""

from transformers import PreTrainedConfig

from ..analysis.similarity import AttentionSimilarity
from ..settings import PlanSettings
from .paper import plan_like_paper, published_plan
from .rules import plan_from_similarity
from .sharing import SharingPlan


__all__ = ["make_plan"]


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
    sources = list(SharingPlan.from_json(settings.plan)) if is_file else parse_sources(settings.plan)
    if len(sources) != num_layers:
        raise ValueError(f"The plan has {len(sources)} layers and the model {num_layers}: give one source per layer.")
    return SharingPlan(sources, layer_types)


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


def parse_sources(text: str) -> list[int]:
    """Source indices from a text such as `"0,1,1,1,4"`. Raises `ValueError` for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"The plan {text!r} is not understood: give 'effect', 'similarity', 'paper', 'spread', source indices such as "
            "0,1,1,1,4, or a .json file."
        ) from None

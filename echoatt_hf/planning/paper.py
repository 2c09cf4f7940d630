"""The plans of the EchoAtt paper: its rule, and the layers that it printed for two models."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from ..analysis.ranking import find_kept_layers, rank_layers
from ..configuration_echoatt import TYPES_WITHOUT_ATTENTION
from .sharing import SharingPlan, check_block_size, check_ratio


__all__ = ["plan_like_paper", "published_plan"]

# Of the configurations of the two models, what their fine-tuned descendants keep.
_TINYLLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
_LLAMA_160M = {
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
# Table 6 of the paper: echo layers in the order that is printed there. At 41 % it prints eight of the nine layers that its
# parameter count needs; the ninth, layer 8, is the next of the longer list.
_PUBLISHED = [
    (_TINYLLAMA, [2, 5, 4, 3, 7]),
    (_TINYLLAMA, [2, 5, 4, 3, 7, 6, 18, 9, 8]),
    (_TINYLLAMA, [2, 5, 4, 3, 7, 6, 18, 9, 8, 11, 12, 1, 17, 10, 14, 13, 16]),
    (_LLAMA_160M, [4, 6, 8, 10]),
]


def plan_like_paper(
    similarity: Sequence[Sequence[float]],
    ratio: float | None = None,
    *,
    block_size: int | None = None,
    layer_types: Sequence[str] | None = None,
) -> SharingPlan:
    """
    The plan that the EchoAtt paper would make of a measured similarity.

    Layers are sorted by their mean similarity to all others and cut at the largest gap: the layers below it, which must be
    among the first or last, are kept as they are, see [`find_kept_layers`]. With a ratio, the layers at the head of that
    order echo. With a block size k, every k consecutive layers between the kept ones form a block.

    This much is printed. Our reading is that

    - the published lists of echo layers are this order, cut at three lengths;
    - an echo has the nearest earlier layer that does not echo as its source, of its own attention type where a family mixes
      them. The first layer of a type has none, and stays as it is;
    - the first layer of a block of k is its source, and layers that are left over behind the last whole block stay as they
      are. In families that mix attention types, blocks are consecutive among the layers of one type.

    Args:
        similarity (matrix `(L, L)`):
            Similarity of layers; the paper's is [`AttentionSimilarity.flattened`].
        ratio (`float`, *optional*):
            Sharing ratio, echo layers / layers; rounded to whole layers.
        block_size (`int`, *optional*):
            Layers in a block, its source included. Exactly one of `ratio` and `block_size` is needed.
        layer_types (sequence of `str`, *optional*):
            Attention type of each layer.

    Returns:
        [`SharingPlan`]

    Raises:
        `ValueError`: both or none of ratio and block size are given, or more layers would have to echo than are not kept.

    Source: arXiv 2409.14595, sections 2 and 3.1, and table 6.
    """
    if (ratio is None) == (block_size is None):
        raise ValueError("Give either a ratio or a block_size.")
    check_block_size(block_size)
    num_layers, kept = len(similarity), find_kept_layers(similarity)
    if layer_types is not None and len(layer_types) != num_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for {num_layers} layers: give one per layer.")
    types = layer_types or [None] * num_layers
    ranking = [
        layer for layer in rank_layers(similarity) if layer not in kept and types[layer] not in TYPES_WITHOUT_ATTENTION
    ]
    if block_size is not None:
        return SharingPlan(_cut_into_blocks(sorted(ranking), types, block_size, kept), layer_types)
    candidates = [layer for layer in ranking if types[layer] in types[:layer]]
    count = check_ratio(num_layers, ratio)
    if count > len(candidates):
        raise ValueError(
            f"ratio {ratio} of {num_layers} layers is {count} echo layers, but by the paper's rule at most "
            f"{len(candidates) / num_layers:.3f}, {len(candidates)} layers can echo: the layers {kept or 'none'} are kept, as "
            "they are least like the others, and the first layer of each type has no source. Use a smaller ratio or another plan."
        )
    return SharingPlan(_with_nearest_sources(candidates[:count], types), layer_types)


def published_plan(config: PreTrainedConfig, ratio: float) -> SharingPlan | None:
    """
    The plan that the paper printed for a model, at a ratio: TinyLlama-1.1B at 0.23, 0.41 and 0.77, LLaMA-160m at 0.33.

    The models are recognised by the shape in their configuration. The echo layers are those of table 6, counted from 0;
    their sources are not printed, see [`plan_like_paper`].

    Args:
        config (`PreTrainedConfig`): configuration of the teacher.
        ratio (`float`): sharing ratio, echo layers / layers.

    Returns:
        [`SharingPlan`] or `None`: nothing for other models and other ratios.
    """
    config = config.get_text_config()
    for shape, echoes in _PUBLISHED:
        is_shape = all(getattr(config, name, None) == value for name, value in shape.items())
        if is_shape and round(config.num_hidden_layers * ratio) == len(echoes):
            return SharingPlan(_with_nearest_sources(echoes, [None] * config.num_hidden_layers))
    return None


def _with_nearest_sources(echoes: Sequence[int], types: Sequence[str | None]) -> list[int]:
    """Each echo layer with the nearest earlier layer of its type that is none."""
    return [
        max(other for other in range(layer) if other not in echoes and types[other] == types[layer])
        if layer in echoes
        else layer
        for layer in range(len(types))
    ]


def _cut_into_blocks(
    layers: list[int], types: Sequence[str | None], block_size: int, kept: Sequence[int]
) -> list[int]:
    sources = list(range(len(types)))
    for kind in dict.fromkeys(types[layer] for layer in layers):
        group = [layer for layer in layers if types[layer] == kind]
        for start in range(0, len(group) - block_size + 1, block_size):
            for layer in group[start : start + block_size]:
                sources[layer] = group[start]
    if sources == list(range(len(types))):
        raise ValueError(
            f"A block of {block_size} layers does not fit: {len(layers)} of {len(types)} layers can share, as the paper's rule "
            f"keeps the layers {list(kept) or 'none'} and blocks are of one attention type. Use smaller blocks."
        )
    return sources

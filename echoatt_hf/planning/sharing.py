"""Sharing plans: which layer uses whose attention weights. Pure Python, no model needed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..configuration_echoatt import TYPES_WITHOUT_ATTENTION, check_echo_sources


__all__ = ["SharingPlan", "count_echo_layers"]


@dataclass(frozen=True)
class SharingPlan(Sequence):
    """
    For each layer the layer whose attention weights it uses.

    A *source layer* is used by others, an *echo layer* uses another, a *plain layer* is neither; a *block* is a source
    with its echoes. The plan is a sequence of source indices, so it can be handed to
    [`EchoAttForCausalLM.from_teacher`] and `EchoAttConfig(echo_sources=list(plan))` as it is.

    Args:
        echo_sources (sequence of `int`):
            For each layer the 0-based index of its source, its own index for source and plain layers.
        layer_types (sequence of `str`, *optional*):
            Attention type of each layer, for families that mix them: an echo must have the type of its source.

    Raises:
        `ValueError`: a source follows its echo, is itself an echo, or has another layer type.

    Example:

    ```python
    >>> from echoatt_hf import SharingPlan

    >>> print(SharingPlan.from_ratio(8, 0.4))
    0 1 2→1 3 4→3 5 6→5 7  (3 of 8 layers echo)
    ```
    """

    echo_sources: tuple[int, ...]
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "echo_sources", tuple(self.echo_sources))
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            if len(self.layer_types) != len(self.echo_sources):
                raise ValueError(
                    f"layer_types has {len(self.layer_types)} entries for a plan of {len(self.echo_sources)} layers."
                )
        check_echo_sources(list(self.echo_sources), len(self.echo_sources), self.layer_types)

    @classmethod
    def from_ratio(
        cls,
        num_layers: int,
        ratio: float | None = None,
        *,
        block_size: int | None = None,
        protected_layers: int = 1,
        layer_types: Sequence[str] | None = None,
    ) -> "SharingPlan":
        """
        Evenly spread blocks: consecutive inner layers share, the first and last layers stay plain. The plan `"spread"`.

        It needs no measurement. It is not the rule of the EchoAtt paper, which is [`plan_like_paper`].

        With a ratio alone, the echo layers are spread over as many blocks as fit (pairs, up to half of the inner
        layers), as even in size as possible and centred in the model. With a block size alone, as many whole blocks
        as fit are made. With both, blocks of that size until the ratio is reached, the last one shorter.

        Args:
            num_layers (`int`):
                Layers of the model.
            ratio (`float`, *optional*):
                Sharing ratio, echo layers / layers; rounded to whole layers. 22 layers at 0.41 give 9 echo layers.
            block_size (`int`, *optional*):
                Layers in a block, its source included; at least 2.
            protected_layers (`int`, *optional*, defaults to 1):
                Layers kept plain at either end.
            layer_types (sequence of `str`, *optional*):
                Attention type of each layer. Blocks are made of layers of one type.

        Raises:
            `ValueError`: neither ratio nor block size is given, or they are impossible for the depth.
        """
        if ratio is None and block_size is None:
            raise ValueError("Give a ratio, a block_size, or both.")
        check_block_size(block_size)
        groups = inner_groups(num_layers, protected_layers, layer_types)
        if ratio is None:
            counts = [len(group) // block_size * (block_size - 1) for group in groups]
        else:
            capacities = [len(group) - 1 for group in groups]
            counts = _spread(count_echo_layers(num_layers, ratio, sum(capacities)), capacities)
        if not any(counts):
            raise ValueError(
                f"A block of {block_size} layers does not fit: {num_layers} layers with {protected_layers} protected "
                f"at either end leave at most {max(len(group) for group in groups)} inner layers of one type."
            )
        sources = list(range(num_layers))
        for group, count in zip(groups, counts, strict=True):
            for block in _blocks(group, count, block_size):
                for layer in block:
                    sources[layer] = block[0]
        return cls(sources, layer_types)

    @property
    def echo_layers(self) -> list[int]:
        """`list[int]`: layers that use the attention weights of another."""
        return [layer for layer, source in enumerate(self.echo_sources) if layer != source]

    @property
    def source_layers(self) -> list[int]:
        """`list[int]`: layers whose attention weights others use."""
        return sorted({self.echo_sources[layer] for layer in self.echo_layers})

    @property
    def plain_layers(self) -> list[int]:
        """`list[int]`: layers that are neither source nor echo."""
        used = {*self.echo_layers, *self.source_layers}
        return [layer for layer in range(len(self)) if layer not in used]

    @property
    def blocks(self) -> list[list[int]]:
        """`list[list[int]]`: each source with its echoes."""
        return [
            [layer for layer, other in enumerate(self.echo_sources) if other == source]
            for source in self.source_layers
        ]

    @property
    def ratio(self) -> float:
        """`float`: sharing ratio, echo layers / layers."""
        return len(self.echo_layers) / len(self)

    def __len__(self) -> int:
        return len(self.echo_sources)

    def __getitem__(self, index):
        return self.echo_sources[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.echo_sources)

    def __str__(self) -> str:
        """A line of layers: plain ones as numbers, source and echo layers with an arrow to their source."""
        words = [str(layer) if layer == source else f"{layer}→{source}" for layer, source in enumerate(self)]
        return f"{' '.join(words)}  ({len(self.echo_layers)} of {len(self)} layers echo)"

    def to_dict(self) -> dict:
        """The plan and what follows from it, as JSON can hold it."""
        return {
            "num_layers": len(self),
            "echo_sources": list(self.echo_sources),
            "echo_layers": self.echo_layers,
            "source_layers": self.source_layers,
            "plain_layers": self.plain_layers,
            "ratio": self.ratio,
        }

    def to_json(self) -> str:
        """The plan as a JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> "SharingPlan":
        """Read a plan that [`SharingPlan.to_json`] wrote. Raises `ValueError` if the file is not one."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            sources = list(content["echo_sources"])
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{str(path)!r} is not a sharing plan: it needs a list 'echo_sources' in JSON."
            ) from error
        return cls(sources)


def check_block_size(block_size: int | None) -> None:
    """Check that a block has room for a source and an echo. Raises `ValueError` if it has not."""
    if block_size is not None and block_size < 2:
        raise ValueError(f"block_size is {block_size}; it must be at least 2, a source and one echo.")


def count_echo_layers(num_layers: int, ratio: float, capacity: int) -> int:
    """
    Number of echo layers at a sharing ratio.

    Args:
        num_layers (`int`): layers of the model.
        ratio (`float`): echo layers / layers, in (0, 1).
        capacity (`int`): most echo layers the model can have.

    Raises:
        `ValueError`: the ratio is out of range, rounds to no layer, or to more than the capacity.
    """
    wanted = check_ratio(num_layers, ratio)
    if wanted > capacity:
        possible = f"at most {capacity / num_layers:.3f}, {capacity} layers" if capacity else "no layer"
        raise ValueError(
            f"ratio {ratio} of {num_layers} layers is {wanted} echo layers, but {possible} can echo here: the first "
            "and last layers stay plain, and every block needs a source of its type."
        )
    return wanted


def check_ratio(num_layers: int, ratio: float) -> int:
    """The number of echo layers at a sharing ratio. Raises `ValueError` if the ratio is none, or rounds to no layer."""
    if not 0 < ratio < 1:
        raise ValueError(f"ratio is {ratio}; it must be between 0 and 1, both excluded, such as 0.41.")
    wanted = round(num_layers * ratio)
    if wanted < 1:
        raise ValueError(
            f"ratio {ratio} is under half a layer of {num_layers}: the smallest possible is {1 / num_layers:.3f}."
        )
    return wanted


def inner_groups(num_layers: int, protected_layers: int, layer_types: Sequence[str] | None) -> list[list[int]]:
    """
    The layers that may share, grouped by attention type.

    Args:
        num_layers (`int`): layers of the model.
        protected_layers (`int`): layers kept plain at either end.
        layer_types (sequence of `str`, *optional*): attention type of each layer.

    Raises:
        `ValueError`: no two layers are left.
    """
    if protected_layers < 0:
        raise ValueError(f"protected_layers is {protected_layers}; it must be 0 or more.")
    inner = range(protected_layers, num_layers - protected_layers)
    if len(inner) < 2:
        raise ValueError(
            f"{num_layers} layers with {protected_layers} protected at either end leave {len(inner)} to share; two are "
            "needed. Use a deeper model or fewer protected layers."
        )
    if layer_types is None:
        return [list(inner)]
    if len(layer_types) != num_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for {num_layers} layers: give one per layer.")
    kinds = sorted({layer_types[layer] for layer in inner} - {*TYPES_WITHOUT_ATTENTION})
    groups = [[layer for layer in inner if layer_types[layer] == kind] for kind in kinds]
    if not groups:
        raise ValueError(
            f"None of the inner layers has attention to share; their types are "
            f"{', '.join(layer_types[layer] for layer in inner)}."
        )
    return groups


def _spread(total: int, capacities: list[int]) -> list[int]:
    """Divide `total` among groups in proportion to their capacities, by largest remainders."""
    shares = [total * capacity / sum(capacities) for capacity in capacities]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda group: counts[group] - shares[group])
    for group in by_remainder[: total - sum(counts)]:
        counts[group] += 1
    return counts


def _blocks(group: list[int], echoes: int, block_size: int | None) -> list[list[int]]:
    """Consecutive blocks with `echoes` echo layers in all, centred in the group."""
    if echoes == 0:
        return []
    if block_size is None:
        blocks = min(echoes, len(group) - echoes)
        sizes = [1 + echoes // blocks + (index < echoes % blocks) for index in range(blocks)]
    else:
        full, rest = divmod(echoes, block_size - 1)
        sizes = [block_size] * full + ([rest + 1] if rest else [])
        if sum(sizes) > len(group):
            raise ValueError(
                f"{echoes} echo layers in blocks of {block_size} need {sum(sizes)} layers, but only {len(group)} inner "
                "layers are there: use larger blocks or a smaller ratio."
            )
    start = (len(group) - sum(sizes)) // 2
    blocks_of_layers = []
    for size in sizes:
        blocks_of_layers.append(group[start : start + size])
        start += size
    return blocks_of_layers

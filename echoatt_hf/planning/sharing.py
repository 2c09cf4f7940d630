"""Plans: which layer uses whose attention, and which do without. Pure Python, no model needed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..configuration_echoatt import TYPES_WITHOUT_ATTENTION, check_layer_plan, find_echo_sources, read_layer_plan


__all__ = ["SharingPlan", "count_echo_layers"]


@dataclass(frozen=True)
class SharingPlan(Sequence):
    """
    What each layer does: whose attention it uses, or that it is left out.

    A *source layer* is used by others, an *echo layer* uses the attention weights of another, a *plain layer* is neither; a
    *block* is a source with the layers that use it. The plan is a sequence of its entries, so it can be handed to
    [`EchoAttForCausalLM.from_teacher`] and `EchoAttConfig(layer_plan=list(plan))` as it is.

    Args:
        layers (sequence of `int` or `str`):
            For each layer its own 0-based index where it stays as it is, the index of its source where it echoes, `"kv N"`
            where it uses the keys and values of layer N with queries of its own, `"skip attention"` where it is to have
            none, and `"drop"` where the whole layer is to be left out.
        layer_types (sequence of `str`, *optional*):
            Attention type of each layer, for families that mix them: a layer must have the type of its source.

    Raises:
        `ValueError`: a source follows a layer that uses it, does not compute its own attention, or has another layer type.

    Example:

    ```python
    >>> from echoatt_hf import SharingPlan

    >>> print(SharingPlan.from_ratio(8, 0.4))
    0 1 2→1 3 4→3 5 6→5 7  (3 of 8 layers echo)
    >>> print(SharingPlan([0, 1, 1, "kv 1", "skip attention", "drop", 6]))
    0 1 2→1 3→kv1 4:skip 5:drop 6  (1 of 7 layers echo, 1 use keys and values, 1 skip attention, 1 are dropped)
    ```
    """

    layers: tuple[int | str, ...]
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            if len(self.layer_types) != len(self.layers):
                raise ValueError(
                    f"layer_types has {len(self.layer_types)} entries for a plan of {len(self.layers)} layers."
                )
        check_layer_plan(self.layers, len(self.layers), self.layer_types)

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
    def moves(self) -> list[tuple[str, int | None]]:
        """`list[tuple]`: for each layer its move and its source, see [`read_layer_plan`]."""
        return read_layer_plan(self.layers)

    @property
    def echo_sources(self) -> list[int]:
        """`list[int]`: for each layer the layer whose attention weights it uses, itself where it echoes none."""
        return find_echo_sources(self.layers)

    @property
    def echo_layers(self) -> list[int]:
        """`list[int]`: layers that use the attention weights of another."""
        return self._find("echo")

    @property
    def kv_layers(self) -> list[int]:
        """`list[int]`: layers that use the keys and values of another."""
        return self._find("kv")

    @property
    def layers_without_attention(self) -> list[int]:
        """`list[int]`: layers whose attention is left out."""
        return self._find("skip attention")

    @property
    def dropped_layers(self) -> list[int]:
        """`list[int]`: layers that are left out."""
        return self._find("drop")

    @property
    def kept_layers(self) -> list[int]:
        """`list[int]`: layers that are not left out."""
        return [layer for layer, (move, _) in enumerate(self.moves) if move != "drop"]

    def _find(self, wanted: str) -> list[int]:
        return [layer for layer, (move, _) in enumerate(self.moves) if move == wanted]

    @property
    def changed_layers(self) -> list[int]:
        """`list[int]`: layers that do not stay as they are."""
        return [layer for layer, (move, _) in enumerate(self.moves) if move != "plain"]

    @property
    def source_layers(self) -> list[int]:
        """`list[int]`: layers whose attention weights, or keys and values, others use."""
        return sorted({source for _, source in self.moves if source is not None})

    @property
    def plain_layers(self) -> list[int]:
        """`list[int]`: layers that stay as they are and that no other uses."""
        return [layer for layer in self._find("plain") if layer not in self.source_layers]

    @property
    def blocks(self) -> list[list[int]]:
        """`list[list[int]]`: each source with the layers that use it."""
        return [
            [source, *(layer for layer, (_, other) in enumerate(self.moves) if other == source)]
            for source in self.source_layers
        ]

    @property
    def ratio(self) -> float:
        """`float`: sharing ratio, echo layers / layers."""
        return len(self.echo_layers) / len(self)

    def with_kv(self) -> "SharingPlan":
        """The plan whose layers use the keys and values of their sources, with queries of their own, in place of echoing them."""
        entries = [
            f"kv {source}" if move == "echo" else self[layer] for layer, (move, source) in enumerate(self.moves)
        ]
        return SharingPlan(entries, self.layer_types)

    def without_dropped(self) -> "SharingPlan":
        """The plan of the layers that are left, numbered anew, as the student has them."""
        if not self.dropped_layers:
            return self
        kept = self.kept_layers
        number = {layer: index for index, layer in enumerate(kept)}
        entries = {"plain": lambda layer, source: number[layer], "echo": lambda layer, source: number[source]}
        entries["kv"] = lambda layer, source: f"kv {number[source]}"
        entries["skip attention"] = lambda layer, source: "skip attention"
        types = [self.layer_types[layer] for layer in kept] if self.layer_types is not None else None
        return SharingPlan([entries[self.moves[layer][0]](layer, self.moves[layer][1]) for layer in kept], types)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index):
        return self.layers[index]

    def __iter__(self) -> Iterator[int | str]:
        return iter(self.layers)

    def __str__(self) -> str:
        """A line of layers: those that stay as numbers, those that use another with an arrow to it."""
        forms = {
            "plain": "{0}",
            "echo": "{0}→{1}",
            "kv": "{0}→kv{1}",
            "skip attention": "{0}:skip",
            "drop": "{0}:drop",
        }
        words = [forms[move].format(layer, source) for layer, (move, source) in enumerate(self.moves)]
        counts = {
            "use keys and values": self.kv_layers,
            "skip attention": self.layers_without_attention,
            "are dropped": self.dropped_layers,
        }
        others = "".join(f", {len(layers)} {what}" for what, layers in counts.items() if layers)
        return f"{' '.join(words)}  ({len(self.echo_layers)} of {len(self)} layers echo{others})"

    def to_dict(self) -> dict:
        """The plan and what follows from it, as JSON can hold it."""
        others = {
            "layer_plan": list(self.layers),
            "kv_layers": self.kv_layers,
            "layers_without_attention": self.layers_without_attention,
            "dropped_layers": self.dropped_layers,
        }
        return {
            "num_layers": len(self),
            "echo_sources": self.echo_sources,
            **(others if self.echo_sources != list(self.layers) else {}),
            "echo_layers": self.echo_layers,
            "source_layers": self.source_layers,
            "plain_layers": self.plain_layers,
            "ratio": self.ratio,
        }

    def to_json(self) -> str:
        """The plan as a JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, content: dict) -> "SharingPlan":
        """The plan of what [`SharingPlan.to_dict`] returned."""
        return cls(content.get("layer_plan") or content["echo_sources"])

    @classmethod
    def from_json(cls, path: str | Path) -> "SharingPlan":
        """Read a plan that [`SharingPlan.to_json`] wrote. Raises `ValueError` if the file is not one."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = list(content.get("layer_plan") or content["echo_sources"])
        except (AttributeError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{str(path)!r} is not a sharing plan: it needs a list 'echo_sources' or 'layer_plan' in JSON."
            ) from error
        return cls(layers)


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

"""How similarly layers attend: cosine similarity of attention weights between all layers and all heads."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling_echoatt import AttentionRecord, EchoRecords
from ..models.families import find_attention_modules
from ..models.inference import inference
from ..models.recording import compute_attention_weights, recording
from ..outputs.files import write_whole
from ..text.rows import batch_rows


__all__ = ["AttentionSimilarity", "measure_attention_similarity", "measure_on_rows"]

_INPUTS = ("input_ids", "attention_mask", "position_ids")
# Of the attention rows of all layers that exist at a time, in float32. Smaller blocks leave out more of what no query sees,
# and stay in a processor's cache; larger ones are fewer calls.
BLOCK_BYTES = 2**23
# Rows of a product of a matrix with itself that are made at once: what lies below them is left out, as it is symmetric.
PRODUCT_ROWS = 128
MEASURES = {
    "layers": "mean cosine of single attention rows, of heads with the same number",
    "flattened": "cosine of attention weights flattened over heads and both positions, mean over samples",
}
"""What the two similarities of layers are, as `similarity.json` says it."""


@dataclass(frozen=True)
class AttentionSimilarity:
    """
    How similarly the layers of a model attend, by two measures, and how similarly its heads do.

    Pairs of layers of which one has no attention, or whose numbers of heads differ, cannot share and have 0 throughout.

    Args:
        heads (`torch.Tensor` of shape `(L, L, H, H)`, float64, or `None`):
            `heads[i, j, g, h]`: head g of layer i against head h of layer j, the mean over rows of the cosine of the
            two rows of attention weights. `None` if a file was read without them. Heads are aligned by it.
        rows (`int`):
            Attention rows that were compared, per head.
        layers (`torch.Tensor` of shape `(L, L)`, *optional*):
            The mean over heads of the similarity of heads with the same number, taken from `heads` if not given. Plans by
            similarity use it.
        flattened (`torch.Tensor` of shape `(L, L)`, *optional*):
            The similarity of the EchoAtt paper: for each sample, a row of the batch, the cosine of two layers' attention
            weights, each flattened over heads and both positions; the mean over samples. The paper's plan uses it.
        samples (`int`, *optional*, defaults to 0):
            Samples that were compared.
        num_heads (sequence of `int`, *optional*):
            Heads of each layer where they differ; `heads` is filled up with 0.
    """

    heads: torch.Tensor | None
    rows: int
    layers: torch.Tensor | None = None
    flattened: torch.Tensor | None = None
    samples: int = 0
    num_heads: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.layers is None:
            object.__setattr__(self, "layers", self.heads.diagonal(dim1=2, dim2=3).mean(-1))

    def between(self, first: int, second: int) -> torch.Tensor:
        """
        Similarity `(H, H)` of the heads of two layers.

        Raises:
            `ValueError`: the file it was read from has lost them.
        """
        if self.heads is None:
            raise ValueError(
                "The similarity of heads is not known: keep similarity.safetensors beside the similarity.json of `echoatt "
                "analyze`, or do without alignment."
            )
        if self.num_heads is None:
            return self.heads[first, second]
        return self.heads[first, second, : self.num_heads[first], : self.num_heads[second]]

    def to_dict(self) -> dict:
        """Everything but the heads, as JSON can hold it."""
        known = {name: _rounded(getattr(self, name)) for name in MEASURES if getattr(self, name) is not None}
        return {
            "measures": {name: MEASURES[name] for name in known},
            "rows": self.rows,
            "samples": self.samples,
            "num_heads": self.num_heads,
            **known,
        }

    def to_json(self) -> str:
        """The similarities of layers as a JSON text, rounded to six decimals."""
        return json.dumps(self.to_dict()) + "\n"

    def save(self, path: str | Path) -> None:
        """
        Write `similarity.json`, and the similarities of heads beside it, in a file of the same name with the suffix
        `.safetensors`: those of the pairs of layers i <= j in one tensor `(pairs, H, H)`, float32.
        """
        path = Path(path)
        if self.heads is not None:
            first, second = torch.triu_indices(*self.layers.shape)
            pairs = self.heads[first, second].float().contiguous()
            write_whole(_heads_file(path), save({"heads": pairs}))
        write_whole(path, self.to_json())

    @classmethod
    def from_json(cls, path: str | Path) -> "AttentionSimilarity":
        """
        Read what [`AttentionSimilarity.save`] wrote, or earlier versions, which kept the heads in the JSON itself.

        Raises:
            `ValueError`: the file is something else, or the one beside it belongs to another.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, num_heads = content["rows"], content.get("num_heads")
            found = {name: _matrix(content[name], 2) for name in MEASURES if name in content}
            heads = _matrix(content["heads"], 4) if "heads" in content else None
            if heads is None and _heads_file(path).exists():
                heads = _read_heads(_heads_file(path), found["layers"])
            return cls(
                heads=heads,
                rows=rows,
                layers=None if "heads" in content else found["layers"],
                flattened=found.get("flattened"),
                samples=content.get("samples", 0),
                num_heads=tuple(num_heads) if num_heads else None,
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{str(path)!r} is not a similarity file ({error}): give the similarity.json of `echoatt analyze`."
            ) from error

    def plot(self, path: str | Path, plan: Iterable[int] | None = None) -> None:
        """
        Write a figure as PNG: the mean similarity of each layer to all others, and the heat map of all pairs.

        These are figures 1 and 2 of the EchoAtt paper where its measure is known. See [`plot_similarity`].

        Args:
            path (`str` or `Path`):
                File to write.
            plan (`SharingPlan`, *optional*):
                Sharing plan, whose pairs of echo and source are framed.
        """
        from .figure import plot_similarity

        is_flattened = self.flattened is not None
        matrix, name = (self.flattened, "flattened") if is_flattened else (self.layers, "layers")
        counted = f"{self.samples:,} samples" if is_flattened else f"{self.rows:,} rows per head"
        plot_similarity(matrix.tolist(), path, f"{MEASURES[name]}; {counted}", plan)


def measure_attention_similarity(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], *, progress: bool = False
) -> AttentionSimilarity:
    """
    Measure how similarly the layers of a model attend.

    One eager forward pass of the decoder a batch, in which queries and keys of every layer are kept. The attention weights
    of all layers are then made once, for a block of queries at a time, so that beyond the forward pass memory grows neither
    with the square of the length, nor with the number of batches. Padding is left out, and so are, where single rows are compared, queries
    that can only attend to one token, which are alike in every layer.

    Args:
        model (`PreTrainedModel`):
            Causal language model or headless decoder of a supported family.
        batches (iterable of `dict`):
            Batches with `input_ids` `(B, T)` and optionally either `attention_mask` `(B, T)`, 1 = keep, or `position_ids`
            `(B, T)` that start again with each document of a row. The paper's samples are rows of 512 tokens.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        [`AttentionSimilarity`]

    Raises:
        `ValueError`: the family is not supported, or there is nothing to measure on.

    Source: arXiv 2409.14595, section 2 (cosine similarity of attention weights between layers).
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    modules = find_attention_modules(model)
    groups: list[_Group] | None = None
    rows = samples = 0
    with inference(model), _eager_attention(model), recording(modules.values()):
        for batch in tqdm(batches, desc="analyze", disable=not progress, leave=False):
            inputs = {name: batch[name].to(model.device) for name in _INPUTS if name in batch}
            records = EchoRecords()
            model.base_model(**inputs, use_cache=False, echo_records=records)  # no logits are needed
            if groups is None:
                groups = _group_by_heads(modules, records)
            tokens, compared = _compared_rows(inputs)
            for sample in compared.any(-1).nonzero().flatten().tolist():
                for group in groups:
                    group.add(records, sample, tokens[sample].nonzero().flatten(), compared[sample])
                samples += 1
            rows += int(compared.sum())
    if rows == 0:
        raise ValueError("There is no attention row to compare: give batches with rows of at least two tokens.")
    return _collect(groups, num_layers, rows, samples)


def measure_on_rows(model: PreTrainedModel, rows: Sequence[dict], *, progress: bool = False) -> AttentionSimilarity:
    """
    [`measure_attention_similarity`] on packed rows.

    Args:
        model (`PreTrainedModel`):
            Causal language model or headless decoder of a supported family.
        rows (sequence of `dict`):
            Rows with `input_ids` of T tokens, as returned by [`pack_rows`].
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
    """
    return measure_attention_similarity(model, list(batch_rows(rows, 4)), progress=progress)


def _compared_rows(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which queries are tokens, and which of these can attend to another one, both `(B, T)`, bool."""
    if "position_ids" in inputs:
        return torch.ones_like(inputs["position_ids"], dtype=torch.bool), inputs["position_ids"] > 0
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return mask.bool(), mask.bool() & (mask.cumsum(-1) > 1)


class _Group:
    """
    The layers with one number of heads, which are compared with each other, and their sums.

    Args:
        modules (`dict[int, nn.Module]`): attention modules of L layers.
        num_heads (`int`): heads of each of them, H.
    """

    def __init__(self, modules: dict[int, torch.nn.Module], num_heads: int):
        self.modules, self.num_heads = modules, num_heads
        size = len(modules)
        # Of cosines of rows, by layer and head, the upper triangle alone; and of cosines of flattened weights, by layer.
        self.heads = torch.zeros(size * num_heads, size * num_heads, dtype=torch.float64)
        self.flattened = torch.zeros(size, size, dtype=torch.float64)

    def add(self, records: EchoRecords, sample: int, tokens: torch.Tensor, compared: torch.Tensor) -> None:
        """Add a row of the batch, whose queries are `tokens` `(N,)`; single rows are compared where `compared` `(T,)`."""
        device = tokens.device
        calls = {layer: records.get(layer, device) for layer in self.modules}
        bounds = _visible_columns(calls.values(), sample)
        length = next(iter(calls.values())).key.shape[2]
        size = len(self.modules)
        heads = torch.zeros(self.heads.shape, device=device)
        flattened = torch.zeros(size, size, device=device)
        for block in tokens.cpu().split(max(1, BLOCK_BYTES // (4 * len(heads) * length))):
            columns = slice(int(bounds[0, block].min()), int(bounds[1, block].max()))
            first, last = int(block[0]), int(block[-1])
            rows = slice(first, last + 1) if last - first + 1 == len(block) else block.to(device)
            weights = torch.empty(
                size, self.num_heads, len(block), columns.stop - columns.start, device=device
            )  # (L, H, R, S)
            for place, (layer, module) in enumerate(self.modules.items()):
                weights[place] = compute_attention_weights(module, calls[layer], sample, rows, columns)
            _add_products(flattened, weights.flatten(1))
            weights *= compared[rows][:, None] / weights.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            _add_products(heads, weights.flatten(0, 1).flatten(1))
        self.heads += heads.cpu().double()
        flattened = _symmetric(flattened.cpu().double())
        lengths = flattened.diagonal().sqrt()
        self.flattened += flattened / torch.outer(lengths, lengths)


def _group_by_heads(modules: dict[int, torch.nn.Module], records: EchoRecords) -> list[_Group]:
    groups: dict[int, dict[int, torch.nn.Module]] = {}
    for layer, module in modules.items():
        count = records.by_layer[layer].query.shape[1]
        groups.setdefault(count, {})[layer] = module
    return [_Group(group, count) for count, group in groups.items()]


def _collect(groups: list[_Group], num_layers: int, rows: int, samples: int) -> AttentionSimilarity:
    """Means in place of sums, in matrices of all layers."""
    most = max(group.num_heads for group in groups)
    heads = torch.zeros(num_layers, num_layers, most, most, dtype=torch.float64)
    layers, flattened = torch.zeros(2, num_layers, num_layers, dtype=torch.float64)
    num_heads = [0] * num_layers
    for group in groups:
        index = torch.tensor(list(group.modules))
        count, places = group.num_heads, (index[:, None], index)
        means = _symmetric(group.heads).div_(rows).view(len(index), count, len(index), count).transpose(1, 2)
        heads[(*places, slice(count), slice(count))] = means
        layers[places] = means.diagonal(dim1=2, dim2=3).mean(-1)
        flattened[places] = group.flattened / samples
        for layer in group.modules:
            num_heads[layer] = count
    return AttentionSimilarity(heads, rows, layers, flattened, samples, tuple(num_heads) if len(groups) > 1 else None)


def _visible_columns(calls: Iterable[AttentionRecord], sample: int) -> torch.Tensor:
    """For each query the first key that a layer lets it attend to, and the first after the last one, `(2, T)`."""
    calls = list(calls)
    length = calls[0].key.shape[2]
    bounds = torch.tensor([[length], [0]]).expand(2, calls[0].query.shape[2])
    for mask in {id(call.attention_mask): call.attention_mask for call in calls}.values():
        if mask is None:
            return torch.tensor([[0], [length]]).expand_as(bounds)
        mask = mask[sample if len(mask) > 1 else 0]  # (H or 1, T, S), what is hidden has the least number, or -inf
        seen = (mask > torch.finfo(mask.dtype).min / 2).any(0).to(torch.uint8)
        found = torch.stack([seen.argmax(-1), length - seen.flip(-1).argmax(-1)]).cpu()
        bounds = torch.stack([torch.minimum(bounds[0], found[0]), torch.maximum(bounds[1], found[1])])
    return bounds


def _add_products(total: torch.Tensor, vectors: torch.Tensor) -> None:
    """Add the products of vectors `(N, K)` with each other to the upper triangle of `total` `(N, N)`."""
    for start in range(0, len(vectors), PRODUCT_ROWS):
        part = slice(start, start + PRODUCT_ROWS)
        total[part, start:].addmm_(vectors[part], vectors[start:].T)


def _symmetric(upper: torch.Tensor) -> torch.Tensor:
    """The whole of a symmetric matrix whose upper triangle is given."""
    upper = upper.triu()
    return upper + upper.triu(1).T


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention, whose masks and weights every family defines; the model's own at the end."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _heads_file(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _read_heads(file: Path, layers: torch.Tensor) -> torch.Tensor:
    pairs = load_file(file)["heads"].double()
    first, second = torch.triu_indices(*layers.shape)
    if pairs.ndim != 3 or len(pairs) != len(first):
        raise ValueError(
            f"{file.name!r} beside it has the shape {tuple(pairs.shape)}, for {len(first)} pairs of layers"
        )
    heads = pairs.new_zeros(*layers.shape, *pairs.shape[1:])
    heads[second, first] = pairs.mT
    heads[first, second] = pairs
    return heads


def _matrix(values: list, dimensions: int) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.float64)
    if tensor.ndim != dimensions:
        raise ValueError(f"a matrix has {tensor.ndim} dimensions in place of {dimensions}")
    return tensor


def _rounded(tensor: torch.Tensor) -> list:
    return (tensor * 1e6).round().div(1e6).tolist()

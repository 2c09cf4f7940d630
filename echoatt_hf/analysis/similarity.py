"""How similar layers attend: cosine similarity of attention rows between all layers and all heads."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling_echoatt import EchoRecords, find_attention_modules
from ..models.inference import inference
from ..models.recording import compute_attention_weights, recording
from ..text.rows import batch_rows


__all__ = ["AttentionSimilarity", "measure_attention_similarity", "measure_on_rows"]

_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class AttentionSimilarity:
    """
    Mean cosine similarity of attention rows.

    Args:
        heads (`torch.Tensor` of shape `(L, L, H, H)`, float64):
            `heads[i, j, g, h]`: head g of layer i against head h of layer j, the mean over rows of the cosine of the
            two rows of attention weights. 0 for layers without attention.
        rows (`int`):
            Attention rows that were compared, per head.
    """

    heads: torch.Tensor
    rows: int

    @property
    def layers(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(L, L)`: mean over heads of the similarity of heads with the same number."""
        return self.heads.diagonal(dim1=2, dim2=3).mean(-1)

    def to_dict(self) -> dict:
        """Everything as JSON can hold it."""
        return {
            "measure": "mean cosine similarity of attention rows",
            "rows": self.rows,
            "layers": _rounded(self.layers),
            "heads": _rounded(self.heads),
        }

    def to_json(self) -> str:
        """The similarities as a JSON text, rounded to six decimals."""
        return json.dumps(self.to_dict()) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> "AttentionSimilarity":
        """Read what [`AttentionSimilarity.to_json`] wrote. Raises `ValueError` if the file is something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            heads = torch.tensor(content["heads"], dtype=torch.float64)
            if heads.ndim != 4:
                raise ValueError(f"'heads' has {heads.ndim} dimensions")
            return cls(heads=heads, rows=content["rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is not a similarity file ({error}): give the similarity.json of `echoatt analyze`."
            ) from error

    def plot(self, path: str | Path, plan: Iterable[int] | None = None) -> None:
        """
        Write a heat map of the layers as PNG.

        Args:
            path (`str` or `Path`):
                File to write.
            plan (`SharingPlan`, *optional*):
                Sharing plan, whose pairs of echo and source are framed.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        layers = self.layers.numpy()
        size = len(layers)
        figure, axes = pyplot.subplots(figsize=(2.5 + 0.42 * size, 2 + 0.42 * size), layout="constrained")
        image = axes.imshow(layers, vmin=0, vmax=1, cmap="viridis")
        axes.set(
            title=f"Attention similarity between layers\nmean cosine of rows, {self.rows:,} rows per head",
            xlabel="layer",
            ylabel="layer",
            xticks=range(size),
            yticks=range(size),
        )
        if size <= 40:
            for row in range(size):
                for column in range(size):
                    value = layers[row, column]
                    axes.text(
                        column,
                        row,
                        f"{value:.2f}".removeprefix("0"),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="black" if value > 0.6 else "white",
                    )
        for echo, source in enumerate(plan or []):
            if echo != source:
                frame = pyplot.Rectangle((source - 0.5, echo - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2)
                axes.add_patch(frame)
        if plan is not None:
            axes.set_xlabel("layer (red frames: row echoes column)")
        figure.colorbar(image, ax=axes, shrink=0.8)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def measure_attention_similarity(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], *, progress: bool = False
) -> AttentionSimilarity:
    """
    Measure how similarly the layers of a model attend.

    Queries and keys of every layer are kept for one batch; attention matrices are made from them when needed, two
    layers' at a time, so memory grows neither with the number of batches nor, quadratically in length, with the depth.
    Rows of padding are left out, and rows that can only attend to a single token, which are alike in every layer.

    Args:
        model (`PreTrainedModel`):
            Causal language model or headless decoder of a supported family.
        batches (iterable of `dict`):
            Batches with `input_ids` `(B, T)` and optionally either `attention_mask` `(B, T)`, 1 = keep, or `position_ids`
            `(B, T)` that start again with each document of a row.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        [`AttentionSimilarity`]

    Raises:
        `ValueError`: the family is not supported, its layers differ in their number of heads, or there is nothing to
            measure on.

    Source: arXiv 2409.14595, section 2 (cosine similarity of attention matrices between layers).
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    modules = find_attention_modules(model)
    total, rows = None, 0
    with inference(model), _eager_attention(model), recording(modules.values()):
        for batch in tqdm(batches, desc="analyze", disable=not progress, leave=False):
            inputs = {name: batch[name].to(model.device) for name in _INPUTS if name in batch}
            records = EchoRecords()
            model(**inputs, use_cache=False, echo_records=records)
            compared = _compared_rows(inputs)
            if total is None:
                total = _empty_total(num_layers, modules, records)
            rows += int(compared.sum())
            for first in modules:
                first_rows = _unit_rows(modules[first], records, compared)
                for second in (layer for layer in modules if layer >= first):
                    second_rows = first_rows if second == first else _unit_rows(modules[second], records, compared)
                    product = (first_rows @ second_rows.T).cpu().double()  # some devices have no float64
                    total[first, second] += product
                    if second != first:
                        total[second, first] += product.T
    if rows == 0:
        raise ValueError("There is no attention row to compare: give batches with rows of at least two tokens.")
    return AttentionSimilarity(heads=total / rows, rows=rows)


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


def _compared_rows(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Attention rows whose query is a token and which can attend to another one, `(B, T)`."""
    if "position_ids" in inputs:
        return inputs["position_ids"] > 0
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return mask.bool() & (mask.cumsum(-1) > 1)


def _unit_rows(module: torch.nn.Module, records: EchoRecords, compared: torch.Tensor) -> torch.Tensor:
    """Attention rows of one layer, each of length 1, as `(H, rows x S)`."""
    weights = compute_attention_weights(module, records)  # (B, H, T, S)
    weights = F.normalize(weights.float(), dim=-1) * compared[:, None, :, None]
    return weights.transpose(0, 1).flatten(1)


def _empty_total(num_layers: int, modules: dict[int, torch.nn.Module], records: EchoRecords) -> torch.Tensor:
    heads = {records.get(layer, torch.device("cpu")).query.shape[1] for layer in modules}
    if len(heads) != 1:
        raise ValueError(f"The layers have different numbers of heads ({sorted(heads)}): they cannot be compared.")
    size = heads.pop()
    return torch.zeros(num_layers, num_layers, size, size, dtype=torch.float64)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention, whose masks and weights every family defines; the model's own at the end."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _rounded(tensor: torch.Tensor) -> list:
    return (tensor * 1e6).round().div(1e6).tolist()

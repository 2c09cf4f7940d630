"""What the methods have in common that try a change and keep it if the model still says nearly the same."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..models.inference import inference
from ..models.layerwise import run_to_call
from ..text.rows import stack_rows


__all__ = ["LastStates", "check_threshold"]


def check_threshold(threshold: float) -> None:
    """Raise `ValueError` if `threshold` is no bound of a cosine."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be a cosine, from -1 to 1.")


class LastStates:
    """
    The last hidden states of a model, after its final norm, to compare those of changed models with.

    Args:
        model (`PreTrainedModel`): causal language model as it is before it is changed.
        rows (sequence of `dict`): rows with `input_ids`, such as sentences; their lengths may differ.

    Raises:
        `ValueError`: there are no rows.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[dict]):
        if not len(rows):
            raise ValueError("There are no rows to compare hidden states on: give at least one.")
        self._rows = rows
        self._expected = self._of(model)

    def similarity(self, model: PreTrainedModel) -> float:
        """The cosine of a changed model's states, flattened over the positions of a row, with these; mean over rows."""
        cosines = [
            torch.cosine_similarity(found, expected, dim=0)
            for found, expected in zip(self._of(model), self._expected, strict=True)
        ]
        return torch.stack(cosines).mean().item()

    def _of(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """What a model's output head is given for each row, `(T * hidden size,)`, float32, on the CPU."""
        states = []
        with inference(model):
            for row in self._rows:
                inputs = stack_rows([row]).to(model.device)
                args, _ = run_to_call(model.get_output_embeddings(), lambda: model(**inputs, use_cache=False))  # noqa: B023
                states.append(args[0].flatten().float().cpu())
        return states

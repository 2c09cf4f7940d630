"""Which layers to leave out of a model."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..conversion.dropping import drop_layers
from ..models.predictions import compare_predictions


__all__ = ["choose_layers_to_drop"]


def choose_layers_to_drop(teacher: PreTrainedModel, rows: Sequence[dict], parameters: int) -> list[int]:
    """
    Inner layers to leave out, until at least so many parameters are saved. Greedy: each time the one without which
    KL(teacher || student) is smallest.

    Args:
        teacher (`PreTrainedModel`): the model to take layers from; the first and the last one stay.
        rows (sequence of `dict`): rows with `input_ids` of T tokens to measure on.
        parameters (`int`): parameters to save.

    Raises:
        `ValueError`: the inner layers have fewer parameters.
    """
    dropped: list[int] = []
    while teacher.num_parameters() - drop_layers(teacher, dropped, True).num_parameters() < parameters:
        inner = range(1, teacher.config.get_text_config().num_hidden_layers - 1)
        left = [layer for layer in inner if layer not in dropped]
        if not left:
            raise ValueError(f"The inner layers together have fewer than the {parameters:,} parameters to save.")
        kl = {
            layer: compare_predictions(drop_layers(teacher, [*dropped, layer], True), rows, teacher).kl
            for layer in left
        }
        dropped.append(min(kl, key=kl.get))
    return sorted(dropped)

"""Perplexity and bits per byte of a causal language model on texts, as an `evaluate` metric."""

import datasets
import evaluate

from echoatt_hf.evaluation.held_out import compute_perplexity
from echoatt_hf.publishing.card import CITATION


_DESCRIPTION = """
Token perplexity and bits per byte of a causal language model, EchoAtt students included. The texts are packed, one
after the other and separated by the end-of-sequence token, into rows; in each row every token but the first is
predicted. Bits per byte compares models with different tokenizers, perplexity does not.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`):
        Texts, each a document.
    model_id (`str`, *optional*):
        Path or name of the model, loaded without remote code, to a GPU if there is one.
    model (`PreTrainedModel`, *optional*):
        The model already loaded; `model_id` then only tells where its tokenizer is.
    tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*):
        Its tokenizer; by default the one under `model_id`.
    row_length (`int`, *optional*, defaults to 256):
        Tokens in a row, at most the model's context. What does not fill a last row is left out.
    batch_size (`int`, *optional*, defaults to 8):
        Rows in a forward pass.

Returns:
    `dict`: `tokens` predicted; `loss`, in nats per token; `perplexity`, its exponential; `bits_per_byte`.

Examples:

    >>> perplexity = evaluate.load(echoatt_hf.metric_path("echoatt_perplexity"))
    >>> perplexity.compute(predictions=texts, model_id="path/to/student")
"""


# Not `EchoAtt...`: `evaluate` makes the name of the metric from the name of the class.
@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class EchoattPerplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2409.14595"],
        )

    def _compute(self, predictions, model_id=None, model=None, tokenizer=None, row_length=256, batch_size=8):
        return compute_perplexity(
            predictions,
            model_id if model is None else model,
            model_id if tokenizer is None else tokenizer,
            row_length=row_length,
            batch_size=batch_size,
        )

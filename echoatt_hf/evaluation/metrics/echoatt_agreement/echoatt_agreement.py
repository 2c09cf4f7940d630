"""Agreement of a causal language model with its teacher on texts, as an `evaluate` metric."""

import datasets
import evaluate

from echoatt_hf.evaluation.held_out import compute_agreement
from echoatt_hf.publishing.card import CITATION


_DESCRIPTION = """
How closely a student follows its teacher on texts: the share of tokens for which both rank the same token first, and
the mean KL(teacher || student) of their next-token distributions. The texts are packed, one after the other and
separated by the end-of-sequence token, into rows; in each row every token but the first is predicted.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`):
        Texts, each a document.
    model_id (`str`, *optional*):
        Path or name of the student, loaded without remote code, to a GPU if there is one.
    teacher_id (`str`, *optional*):
        Path or name of the teacher, which has the same vocabulary.
    model (`PreTrainedModel`, *optional*):
        The student already loaded; `model_id` then only tells where its tokenizer is.
    teacher (`PreTrainedModel`, *optional*):
        The teacher already loaded, instead of `teacher_id`.
    tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*):
        The tokenizer of both; by default the one under `model_id`.
    row_length (`int`, *optional*, defaults to 256):
        Tokens in a row, at most the models' context. What does not fill a last row is left out.
    batch_size (`int`, *optional*, defaults to 8):
        Rows in a forward pass.

Returns:
    `dict`: `tokens` compared; `kl`, in nats per token; `agreement`, in [0, 1].

Examples:

    >>> agreement = evaluate.load(echoatt_hf.metric_path("echoatt_agreement"))
    >>> agreement.compute(predictions=texts, model_id="path/to/student", teacher_id="path/to/teacher")
"""


# Not `EchoAtt...`: `evaluate` makes the name of the metric from the name of the class.
@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class EchoattAgreement(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2409.14595"],
        )

    def _compute(
        self,
        predictions,
        model_id=None,
        teacher_id=None,
        model=None,
        teacher=None,
        tokenizer=None,
        row_length=256,
        batch_size=8,
    ):
        return compute_agreement(
            predictions,
            model_id if model is None else model,
            teacher_id if teacher is None else teacher,
            model_id if tokenizer is None else tokenizer,
            row_length=row_length,
            batch_size=batch_size,
        )

"""Predictions are compared from the logits of a chunk of tokens at a time, wherever a head can be called alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_teacher, plan_of
from families import FAMILIES
from test_losses import HEADS, PositionedLlama, WordyLlama
from transformers import BatchEncoding

from echoatt_hf import EchoAttForCausalLM
from echoatt_hf.models import heads
from echoatt_hf.models.checks import relative_error
from echoatt_hf.models.heads import OutputHead, predict, token_chunks
from echoatt_hf.models.predictions import compare_predictions


pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def rows():
    return [{"input_ids": row.tolist()} for row in make_batch(5, 12)["input_ids"]]


@pytest.fixture
def few_tokens(monkeypatch):
    """Five tokens in a chunk, which divide neither a row nor a batch."""
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * make_teacher("llama").config.vocab_size * 5)


def compare_naively(model, rows, teacher, vocab_size: int | None = None) -> tuple[float, float, float]:
    """Loss, KL and agreement from the logits of whole rows, in float64, on the first tokens of the vocabulary."""
    sums = torch.zeros(3, dtype=torch.float64)
    for row in rows:
        tokens = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits, expected = (
                each(tokens, use_cache=False).logits[0, :-1, :vocab_size].double() for each in (model, teacher)
            )
        log_probs, expected = logits.log_softmax(-1), expected.log_softmax(-1)
        kl = (expected.exp() * (expected - log_probs)).sum()
        same = (log_probs.argmax(-1) == expected.argmax(-1)).sum()
        sums += torch.stack([F.nll_loss(log_probs, tokens[0, 1:], reduction="sum"), kl, same])
    return tuple((sums / (len(rows) * 11)).tolist())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi", "cohere", "granite", "opt"])
def test_chunks_give_what_all_logits_give(family, rows, few_tokens):
    """With a soft cap, a scale, a bias and tied embeddings."""
    teacher = make_teacher(family, attention=FAMILIES[family].attention, **HEADS[family])
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family)).eval()
    made = []
    hooks = [
        each.register_forward_hook(lambda _, args, output: made.append(output.logits)) for each in (teacher, student)
    ]
    found = compare_predictions(student, rows, teacher, batch_size=3)
    for hook in hooks:
        hook.remove()
    assert (found.loss, found.kl, found.agreement) == pytest.approx(
        compare_naively(student, rows, teacher), rel=1e-5, abs=1e-6
    )
    assert found.tokens == 55
    assert max(logits.shape[1] for logits in made[-4:]) == 1, "no logits of a batch"


@pytest.mark.parametrize("model_class", [PositionedLlama, WordyLlama])
def test_heads_that_cannot_be_called_alone_give_all_logits(model_class, rows, few_tokens):
    teacher = make_teacher("llama")
    model = model_class(teacher.config).eval()
    found = compare_predictions(model, rows, teacher, batch_size=3)
    expected = compare_naively(model, rows, teacher)
    assert (found.loss, found.kl, found.agreement) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_tokens_that_heads_suppress(few_tokens):
    """As the padding of a vocabulary, by a bias of -inf, of the teacher or of both."""
    teacher = make_teacher("phi")
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("phi"))
    rows = [{"input_ids": (row % 89).tolist()} for row in make_batch(5, 12)["input_ids"]]
    with torch.no_grad():
        teacher.lm_head.bias[89:] = -torch.inf
        assert OutputHead.find(teacher) is not None
        found = compare_predictions(student, rows, teacher)
        student.get_output_embeddings().bias[89:] = -torch.inf
        both = compare_predictions(student, rows, teacher)
    assert both.kl < found.kl < float("inf")
    expected = compare_naively(student, rows, teacher, 89)
    assert (both.loss, both.kl, both.agreement) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@torch.no_grad()
def test_what_is_kept_of_predictions_are_the_states():
    teacher = make_teacher("gemma2", attention="eager", final_logit_softcapping=0.5)
    batch = make_batch(2, 12)
    kept = predict(teacher, OutputHead.find(teacher), BatchEncoding(batch))
    assert kept.states.shape == (24, teacher.config.hidden_size)
    expected = teacher(**batch, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(kept(slice(3, 9)), expected[3:9], rtol=1e-5, atol=1e-6)


def test_chunks_are_larger_on_an_accelerator(few_tokens):
    size = make_teacher("llama").config.vocab_size
    lengths = [next(token_chunks(20, size, torch.device(device))).stop for device in ("cpu", "cuda")]
    assert lengths == [5, 20]


def test_outputs_that_are_not_finite_are_compared():
    expected = torch.tensor([3.0, 4.0, -torch.inf])
    assert relative_error(expected.clone(), expected) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5, -torch.inf]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, 4.0, 0.0]), expected) == math.inf
    assert relative_error(torch.tensor([3.0, -torch.inf, -torch.inf]), expected) == math.inf
    assert math.isnan(relative_error(torch.tensor([3.0, torch.nan, -torch.inf]), expected))

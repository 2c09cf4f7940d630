"""Losses against slow twins, and losses in chunks against those of all logits at once."""

import contextlib
import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINTING, FP32_TOLERANCE, make_batch, make_teacher, plan_of, positions_with_target
from families import FAMILIES, VOCAB_SIZE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from echoatt_hf import EchoAttForCausalLM
from echoatt_hf.distillation import losses
from echoatt_hf.distillation.adapters import add_lora
from echoatt_hf.distillation.head_losses import compute_losses
from echoatt_hf.distillation.losses import (
    DIVERGENCES,
    HardLabelLoss,
    KeptLogits,
    LogitLosses,
    NextTokenLoss,
    TeacherDivergence,
    chunked_loss,
    hard_labels_from_stored,
    keep_top,
    relative_distance,
    squared_distance,
    target_mask,
)
from echoatt_hf.models import heads
from echoatt_hf.models.heads import OutputHead


pytestmark = pytest.mark.once

VOCAB = 48
# What comes after the decoder must matter: caps, scales, biases, weights that are not and are the embeddings'.
HEADS = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # a bias
    "gpt2": {},  # tied
    "nanochat": {"final_logit_softcapping": 0.5},
    "mixtral": {},
    "opt": {},  # its decoder lies deeper
    "biogpt": {},
    "falcon_h1": {"lm_head_multiplier": 0.3},  # which the decoder has
}


def random_batch(seed=0, batch=3, length=7):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCAB, (batch, length), generator=generator)
    labels[0, 4:] = -100
    labels[1, :3] = -100
    student = torch.randn(batch, length, VOCAB, generator=generator, dtype=torch.float64)
    teacher = torch.randn(batch, length, VOCAB, generator=generator, dtype=torch.float64)
    return student.float(), teacher.float(), labels


@pytest.fixture
def chunks_of(monkeypatch):
    """Set how many tokens a chunk may have."""
    return lambda tokens, vocab_size=VOCAB_SIZE: monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * vocab_size * tokens)


# Against slow twins that loop over tokens.


def test_target_mask_is_that_of_the_next_label():
    _, _, labels = random_batch()
    assert target_mask(labels).nonzero().tolist() == [list(place) for place in positions_with_target(labels)]


def test_cross_entropy_equals_loop():
    logits, _, labels = random_batch()
    places = positions_with_target(labels)
    expected = -sum(F.log_softmax(logits[b, t], -1)[labels[b, t + 1]] for b, t in places) / len(places)
    found = LogitLosses({"ce": NextTokenLoss(labels)}, {}, labels, len(places)).parts(logits.flatten(0, 1))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def kl(p, q):
    return (p * (p / q).log()).sum().item()


TWINS = {
    "forward": lambda teacher, student: kl(teacher, student),
    "reverse": lambda teacher, student: kl(student, teacher),
    "jensen_shannon": lambda teacher, student: (
        kl(teacher, (teacher + student) / 2) / 2 + kl(student, (teacher + student) / 2) / 2
    ),
}


def divergence(name, student, teacher, labels, num_tokens, temperature=1.0):
    loss = TeacherDivergence(name, lambda tokens: teacher.flatten(0, 1)[tokens], temperature)
    return LogitLosses({"kl": loss}, {}, labels, num_tokens).parts(student.flatten(0, 1))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_equals_loop(name, temperature):
    student, teacher, labels = random_batch()
    expected = 0.0
    for b, t in positions_with_target(labels):
        p, q = F.softmax(teacher[b, t] / temperature, -1), F.softmax(student[b, t] / temperature, -1)
        expected += TWINS[name](p, q) * temperature**2
    found = divergence(name, student, teacher, labels, 5, temperature)
    assert found.item() == pytest.approx(expected / 5, abs=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_of_equal_logits_is_zero(name):
    student, _, labels = random_batch()
    assert abs(divergence(name, student, student.clone(), labels, 1).item()) < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_tokens_that_a_head_suppresses(name, temperature):
    """As the padding of a vocabulary, by a logit of -inf: what is left is compared."""
    student, teacher, labels = random_batch()
    expected = divergence(name, student[..., :-2], teacher[..., :-2], labels, 5, temperature)
    for logits in (student, teacher):
        logits[..., -2:] = -torch.inf
    student.requires_grad_()
    found = divergence(name, student, teacher, labels, 5, temperature)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.isfinite().all() and gradient[..., :-2].any() and not gradient[..., -2:].any()


def test_jensen_shannon_of_disjoint_distributions_is_ln_2():
    logits = torch.tensor([[40.0, 0.0]])
    found = losses.jensen_shannon(logits, F.log_softmax(-logits, -1))
    assert found.item() == pytest.approx(math.log(2))


def test_relative_distance_equals_loop():
    generator = torch.Generator().manual_seed(1)
    _, _, labels = random_batch()
    students = [torch.randn(3, 7, 5, generator=generator) for _ in range(2)]
    teachers = [torch.randn(3, 7, 5, generator=generator) * 10**layer for layer in range(2)]
    expected = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        for b, t in positions_with_target(labels):
            expected += ((student[b, t] - teacher[b, t]).norm() ** 2 / teacher[b, t].norm() ** 2).item()
    actual = relative_distance(students, teachers, labels, 4)
    assert actual.item() == pytest.approx(expected / 2 / 4, rel=1e-5)


def test_squared_distance_equals_loop():
    generator = torch.Generator().manual_seed(1)
    _, _, labels = random_batch()
    students, teachers = torch.randn(2, 2, 3, 7, 5, generator=generator)
    expected = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        for b, t in positions_with_target(labels):
            expected += sum((student[b, t, d] - teacher[b, t, d]).item() ** 2 for d in range(5)) / 5
    actual = squared_distance(list(students), list(teachers), labels, 4)
    assert actual.item() == pytest.approx(expected / 2 / 4, rel=1e-5)


@pytest.mark.parametrize("is_stored", [False, True], ids=["live", "stored"])
def test_hard_label_loss_equals_loop(is_stored):
    """The cross-entropy of what the teacher finds likeliest, not of the text."""
    student, teacher, labels = random_batch()
    places = positions_with_target(labels)
    expected = -sum(F.log_softmax(student[b, t], -1)[int(teacher[b, t].argmax())] for b, t in places) / 5
    loss = HardLabelLoss(lambda tokens: teacher.flatten(0, 1)[tokens])
    if is_stored:
        loss = hard_labels_from_stored(keep_top(teacher, 3)[1])
    found = LogitLosses({"hard_label": loss}, {}, labels, 5).parts(student.flatten(0, 1))
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    on_text = LogitLosses({"ce": NextTokenLoss(labels)}, {}, labels, 5).parts(student.flatten(0, 1))
    assert abs(on_text.item() - expected.item()) > 0.1


def test_two_losses_of_a_chunk_ask_the_teacher_once():
    asked = []

    def logits_of(tokens):
        asked.append(tokens)
        return torch.zeros(tokens.stop - tokens.start, VOCAB)

    kept = KeptLogits(logits_of)
    for tokens in (slice(0, 4), slice(0, 4), slice(4, 6), slice(4, 6), slice(0, 4)):
        assert len(kept(tokens)) == tokens.stop - tokens.start
    assert asked == [slice(0, 4), slice(4, 6), slice(0, 4)]


def test_relative_distance_leaves_out_padding_without_length():
    _, _, labels = random_batch()
    student, teacher = torch.ones(3, 7, 5, requires_grad=True), torch.ones(3, 7, 5)
    teacher[~target_mask(labels)] = 0.0
    value = relative_distance([student], [teacher], labels, 1)
    value.backward()
    assert value.item() == 0 and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", ["ce", "hidden", *DIVERGENCES])
def test_all_masked_batch_is_zero_with_finite_gradients(loss):
    logits, teacher, labels = random_batch()
    labels[:] = -100
    logits.requires_grad_(True)
    if loss == "hidden":
        value = relative_distance([logits], [teacher], labels, 1)
    elif loss == "ce":
        value = LogitLosses({"ce": NextTokenLoss(labels)}, {}, labels, 1).parts(logits.flatten(0, 1)).sum()
    else:
        value = divergence(loss, logits, teacher, labels, 1).sum()
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(logits.grad).all() and (logits.grad == 0).all()


# In chunks.


@pytest.mark.parametrize("name", [*DIVERGENCES, "ce", "hard_label"])
def test_gradients_of_chunks_are_those_of_finite_differences(name, chunks_of):
    """Also with a bias, a cap, and tokens that the chunks do not divide."""
    chunks_of(2, vocab_size=6)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[1, 2, -100, 5], [3, 0, 4, -100]])
    teacher = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    loss = NextTokenLoss(labels)
    if name == "hard_label":
        loss = HardLabelLoss(lambda tokens: teacher[tokens])
    elif name != "ce":
        loss = TeacherDivergence(name, lambda tokens: teacher[tokens], 1.5)
    of_batch = LogitLosses({"loss": loss}, {"loss": 0.7}, labels, 3)

    def function(states, weight, bias):
        def logits_of(chunk):
            return 2 * torch.tanh((chunk @ weight + bias) / 2)

        return chunked_loss(of_batch, states, logits_of, [weight, bias], 6)[0]

    shapes = (2, 4, 3), (3, 6), (6,)
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("tokens", [7, 1])
def test_chunks_are_even_and_within_the_bound(tokens, chunks_of):
    chunks_of(tokens)
    for number in (1, 6, 7, 8, 21, 24):
        chunks = list(heads.token_chunks(number, VOCAB_SIZE, torch.device("cpu")))
        assert [place for chunk in chunks for place in range(number)[chunk]] == list(range(number))
        assert len(chunks) == math.ceil(number / tokens) and max(c.stop - c.start for c in chunks) <= tokens


def models_of(family, **overrides):
    attention = FAMILIES[family].attention
    teacher = make_teacher(family, attention=attention, **overrides)
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family))
    return student.train(), teacher.requires_grad_(False)


def labelled_batch():
    batch = make_batch(2, 12, padding=(3,))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, 5:7] = -100
    return batch, labels


def losses_of(batch, labels, teacher_logits, name="forward"):
    parts = {"kl": TeacherDivergence(name, teacher_logits, 2.0), "ce": NextTokenLoss(labels)}
    return LogitLosses(parts, {"kl": 0.7, "ce": 0.3}, labels, 13)


def plain_loss(student, teacher, batch, labels, name="forward", context=contextlib.nullcontext):
    with context():
        teacher_logits = teacher(**batch, use_cache=False).logits.flatten(0, 1)
        logits = student(**batch, use_cache=False).logits.flatten(0, 1)
    of_batch = losses_of(batch, labels, lambda tokens: teacher_logits[tokens], name)
    parts = of_batch.parts(logits)
    return of_batch.total(parts), parts


def loss_in_chunks(student, teacher, batch, labels, name="forward", context=contextlib.nullcontext, with_liger=False):
    head, teacher_head = (OutputHead.find(model, with_liger) for model in (student, teacher))
    with context():
        with torch.no_grad(), teacher_head.last_states() as kept:
            teacher(**batch, use_cache=False, logits_to_keep=1)
        of_batch = losses_of(batch, labels, teacher_head.logits(kept), name)
        with head.computes(partial(compute_losses, of_batch), context) as parts:
            outputs = student(**batch, use_cache=False, logits_to_keep=1)
    assert outputs.logits.shape[1] == 1
    return outputs.loss, parts[0]


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_equal_in_chunks(student, teacher, labels_changed=None, **options):
    batch, labels = labelled_batch()
    if labels_changed is not None:
        labels = labels_changed(labels)
    (expected, expected_parts), (found, parts) = (
        how(student, teacher, batch, labels, **options) for how in (plain_loss, loss_in_chunks)
    )
    torch.testing.assert_close(found, expected, **FP32_TOLERANCE)
    torch.testing.assert_close(parts, expected_parts, **FP32_TOLERANCE)
    expected, found = gradients_of(expected, student), gradients_of(found, student)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, **FP32_TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
    return expected


@pytest.mark.parametrize("family", HEADS)
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(family, chunks_of):
    chunks_of(5)  # which does not divide the 24 tokens
    gradients = assert_equal_in_chunks(*models_of(family, **HEADS[family]))
    assert any(value.abs().max() > 1e-3 for value in gradients.values())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_in_chunks(name, chunks_of):
    chunks_of(5)
    assert_equal_in_chunks(*models_of("phi"), name=name)


def test_chunks_without_a_target(chunks_of):
    chunks_of(5)
    gradients = assert_equal_in_chunks(
        *models_of("llama"), labels_changed=lambda labels: torch.full_like(labels, -100)
    )
    assert all((value == 0).all() for value in gradients.values())


def test_chunks_with_checkpointed_layers(chunks_of):
    chunks_of(5)
    student, teacher = models_of("llama")
    getattr(student, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    assert_equal_in_chunks(student, teacher)


def test_frozen_head_gets_no_gradient(chunks_of):
    chunks_of(5)
    student, teacher = models_of("phi")
    student.get_output_embeddings().requires_grad_(False)
    assert not any("lm_head" in name for name in assert_equal_in_chunks(student, teacher))


def test_adapters_in_chunks(chunks_of):
    chunks_of(5)
    student, teacher = models_of("llama")
    torch.manual_seed(0)
    adapted = add_lora(student, 2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert all("lora" in name for name in assert_equal_in_chunks(adapted, teacher))


def test_chunks_in_mixed_precision(chunks_of):
    chunks_of(5)
    student, teacher = models_of("llama")
    batch, labels = labelled_batch()

    def bf16():
        return torch.autocast("cpu", torch.bfloat16)

    expected, _ = plain_loss(student, teacher, batch, labels, context=bf16)
    expected_gradients = gradients_of(expected, student)
    found, _ = loss_in_chunks(student, teacher, batch, labels, context=bf16)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    for name, gradient in gradients_of(found, student).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected_gradients[name]).norm() <= 2e-2 * expected_gradients[name].norm() + 1e-6, name


class CountedCasts(TorchDispatchMode):
    """How often a tensor of a shape is cast to bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += kwargs.get("dtype") == torch.bfloat16
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_head_is_cast_once_for_all_chunks(chunks_of, is_frozen):
    chunks_of(5)
    student, teacher = models_of("llama", tie_word_embeddings=False)
    head = student.get_output_embeddings().weight
    head.requires_grad_(not is_frozen)
    batch, labels = labelled_batch()
    with CountedCasts(head.shape) as casts:
        loss, _ = loss_in_chunks(
            student, teacher, batch, labels, context=partial(torch.autocast, "cpu", torch.bfloat16)
        )
    # In the pass of each model for one token's logits, which autocast keeps with gradients, and for all chunks.
    assert casts.count <= 2 * 2
    loss.backward()
    assert (head.grad is None) == is_frozen and teacher.lm_head.weight.dtype == head.dtype == torch.float32


def test_gradients_of_a_bfloat16_head_are_added_up_in_float32(chunks_of):
    chunks_of(1, vocab_size=2)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(2, 3, dtype=torch.bfloat16))
    states = torch.randn(1, 2000, 3, dtype=torch.bfloat16)
    labels = torch.randint(0, 2, (1, 2000))
    of_batch = LogitLosses({"ce": NextTokenLoss(labels)}, {"ce": 1.0}, labels, 2000)
    chunked_loss(of_batch, states, lambda chunk: F.linear(chunk, weight), [weight], 2)[0].backward()
    found, weight.grad = weight.grad, None
    of_batch.parts(F.linear(states, weight).flatten(0, 1)).sum().backward()
    assert found.dtype == torch.bfloat16
    assert (found - weight.grad).norm() < 0.01 * weight.grad.norm()


def test_hooks_of_the_head_are_gone_also_after_a_failure():
    student, teacher = models_of("llama")
    head = OutputHead.find(student)
    batch, labels = labelled_batch()

    def fail(logits, tokens):
        raise ZeroDivisionError

    of_batch = LogitLosses({"kl": fail}, {"kl": 1.0}, labels, 1)
    with pytest.raises(ZeroDivisionError), head.computes(partial(compute_losses, of_batch), contextlib.nullcontext):
        student(**batch, logits_to_keep=1)
    assert not any(module._forward_hooks for module in student.modules())
    assert student(**batch).loss is None and student(**batch).logits.shape[1] == 12


class PositionedLlama(LlamaForCausalLM):
    """Its logits depend on more than the hidden state."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * torch.arange(1, 1 + output.logits.shape[1])[:, None]
        return output


class StubbornLlama(LlamaForCausalLM):
    """It cannot do without its decoder's layers."""

    def forward(self, *args, **kwargs):
        assert self.model.layers is not None
        return super().forward(*args, **kwargs)


class WordyLlama(LlamaForCausalLM):
    """It has no `logits_to_keep`."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("model_class", [PositionedLlama, StubbornLlama, WordyLlama])
def test_head_that_does_not_fit_is_found_out(model_class, caplog):
    config = copy.deepcopy(make_teacher("llama").config)
    assert OutputHead.find(model_class(config).train()) is None
    assert f"The output head of {model_class.__name__} cannot be called on some tokens" in caplog.text


def test_finding_the_head_changes_nothing():
    student, _ = models_of("llama")
    student.language_model.model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    assert OutputHead.find(student) is not None
    assert [module.training for module in student.modules()] == modes
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if family.refused is None], ids=lambda f: f.name
)
def test_heads_of_all_families(family):
    if not family.is_known:
        pytest.skip("this transformers does not have the family")
    assert OutputHead.find(make_teacher(family.name, attention=family.attention)) is not None

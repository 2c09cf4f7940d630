"""Closed-form refit: against least squares, and where it must keep its hands off."""

import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_teacher, plan_of
from echoatt_hf.conversion.refit import TunedEchoes, refit_outputs
from transformers.pytorch_utils import Conv1D

from echoatt_hf import AttentionSimilarity, EchoAttForCausalLM, align_heads, convert, evaluate_model
from echoatt_hf.analysis.similarity import measure_attention_similarity
from echoatt_hf.conversion import refit as refit_module
from echoatt_hf.modeling_echoatt import EchoRecords, find_attention_modules, find_output_projection


def make_rows(count, length=16, seed=0):
    return [{"input_ids": row.tolist()} for row in make_batch(count, length, seed=seed)["input_ids"]]


def outputs_of(model, layer, rows):
    """Inputs and outputs of a layer's output projection for all tokens, in float64."""
    inner = model.language_model if isinstance(model, EchoAttForCausalLM) else model
    found = []
    handle = find_output_projection(find_attention_modules(inner)[layer]).register_forward_hook(
        lambda module, args, output: found.append((args[0].flatten(0, -2).double(), output.flatten(0, -2).double()))
    )
    with torch.no_grad():
        model(torch.tensor([row["input_ids"] for row in rows]))
    handle.remove()
    return found[0]


def relative_error(student, teacher, layer, rows):
    return (outputs_of(teacher, layer, rows)[1] - outputs_of(student, layer, rows)[1]).square().sum().item()


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "phi", "gemma3_text", "olmo2", "afmoe", "qwen3_next without linear attention"]
)
def test_without_regularisation_it_is_least_squares(family, monkeypatch):
    monkeypatch.setattr(refit_module, "RIDGES", (1e-13,))
    teacher, plan = make_teacher(family, attention=None), plan_of(family)
    rows, held_out = make_rows(96), make_rows(24, seed=1)
    student = EchoAttForCausalLM.from_teacher(teacher, plan)
    before = {layer: relative_error(student, teacher, layer, held_out) for layer in student.config.echo_layers}
    first = student.config.echo_layers[0]
    inputs, _ = outputs_of(student, first, rows)
    _, target = outputs_of(teacher, first, rows)
    errors = refit_outputs(student, teacher, rows, held_out)

    projection = find_output_projection(find_attention_modules(student.language_model)[first])
    if projection.bias is not None:
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=-1)
    expected = torch.linalg.lstsq(inputs, target).solution
    weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
    bias = [] if projection.bias is None else [projection.bias[None]]
    found = torch.cat([weight, *bias]).double()
    # What they predict: weights of features that hardly vary are free.
    torch.testing.assert_close(inputs @ found, inputs @ expected, rtol=1e-3, atol=1e-3)
    # The first error says how much is left on what was held out; later layers see other inputs than before.
    assert errors[first] == pytest.approx(relative_error(student, teacher, first, held_out) / before[first], rel=1e-3)
    assert 0 < errors[first] < 1


def test_layers_are_refitted_from_below():
    """Each on what the refitted ones below it give: refitting again finds nothing to do."""
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 1, 1, 5])
    rows, held_out = make_rows(64), make_rows(16, seed=1)
    first = refit_outputs(student, teacher, rows, held_out)
    second = refit_outputs(student, teacher, rows, held_out)
    assert all(error < 0.95 for error in first.values()), first
    assert all(error > 0.999 for error in second.values()), second


def test_what_does_not_help_is_kept_as_it_was(monkeypatch):
    """Two tokens determine nothing: fitted to them without regularisation a layer is worse on others."""
    monkeypatch.setattr(refit_module, "RIDGES", (1e-13,))
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3, 4, 5])
    weight = student.language_model.model.layers[2].self_attn.o_proj.weight
    assert refit_outputs(student, teacher, make_rows(1, 8), make_rows(16, seed=1)) == {2: 1.0}
    assert student.language_model.model.layers[2].self_attn.o_proj.weight is weight


def test_teacher_modes_and_hooks_stay_as_they_were():
    teacher = make_teacher("llama").train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3, 4, 5], share_weights=True).train()
    refit_outputs(student, teacher, make_rows(8), make_rows(4, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.training and student.training
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())
    refitted = student.language_model.model.layers[2].self_attn.o_proj.weight
    assert not torch.equal(refitted, before["model.layers.2.self_attn.o_proj.weight"])


def test_rows_are_needed():
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3, 4, 5])
    with pytest.raises(ValueError, match="there are 2 and 0"):
        refit_outputs(student, teacher, make_rows(2), [])
    with pytest.raises(ValueError, match="at least 2 rows, some of them held out; there are 1"):
        convert(teacher, [0, 1, 1, 3, 4, 5], make_rows(1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "afmoe"])
def test_pairs_are_tuned_as_a_student_with_one_echo_is(family):
    """With a single echo layer the inputs are the teacher's: both ways give the same weights."""
    teacher = make_teacher(family, attention=None)
    rows, held_out = make_rows(16), make_rows(4, seed=1)
    batches = [{"input_ids": torch.tensor([row["input_ids"] for row in rows])}]
    similarity = measure_attention_similarity(teacher, batches)
    echo = next(layer for layer, source in enumerate(plan_of(family)) if layer != source)
    source = plan_of(family)[echo]
    plan = [source if layer == echo else layer for layer in range(6)]
    student, _ = convert(teacher, plan)
    align_heads(student, similarity)
    refit_outputs(student, teacher, rows, held_out)
    echoes = TunedEchoes(teacher, similarity, [(echo, source)], rows, held_out)
    echoes.tune(echo, [source])
    tuned = echoes.parameters[echo, source]
    expected = dict(find_attention_modules(student.language_model)[echo].named_parameters())
    assert tuned.keys() == expected.keys()
    for name, parameter in tuned.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_next"])
def test_teacher_with_echoes_in_place_is_the_student_and_comes_back(family):
    teacher, plan = make_teacher(family, attention=None), plan_of(family)
    ids = make_batch()["input_ids"]
    before = teacher(ids, use_cache=False).logits
    modules = list(teacher.modules())
    similarity = measure_attention_similarity(teacher, [{"input_ids": ids}])
    pairs = [(echo, source) for echo, source in enumerate(plan) if echo != source]
    echoes = TunedEchoes(teacher, similarity, pairs, [], [], align=False, refit=False)
    student = EchoAttForCausalLM.from_teacher(teacher, plan)
    with echoes.in_place(plan):
        found = teacher(ids, use_cache=False, echo_records=EchoRecords()).logits
    torch.testing.assert_close(found, student(ids, use_cache=False).logits, **FP32_TOLERANCE)
    assert list(teacher.modules()) == modules
    assert torch.equal(teacher(ids, use_cache=False).logits, before)
    with pytest.raises(KeyError), echoes.in_place(plan):
        raise KeyError
    assert list(teacher.modules()) == modules


# What `convert` makes of both.


def test_convert_keeps_what_lowers_the_kl():
    teacher = make_teacher("llama")
    rows = make_rows(64)
    student, report = convert(teacher, [0, 1, 1, 3, 3, 5], rows)
    assert list(report.kl) == ["copied", "aligned", "refitted"]
    assert evaluate_model(student, rows[48:], teacher=teacher)["kl"] == pytest.approx(
        min(report.kl.values()), rel=1e-6
    )
    assert report.refitted.keys() == {2, 4} and "outputs refitted" in str(report)


def test_convert_undoes_an_alignment_that_does_not_help():
    """By a similarity that knows nothing: where it hurts, the student is the copied one, bit for bit."""
    teacher, rows = make_teacher("llama"), make_rows(16)
    torch.manual_seed(0)
    similarity = AttentionSimilarity(torch.rand(6, 6, 4, 4, dtype=torch.float64), 1)
    outcomes = set()
    for echo, source in ((1, 0), (2, 1), (3, 2), (4, 3), (3, 0), (4, 1)):
        plan = [source if layer == echo else layer for layer in range(6)]
        state = convert(teacher, plan)[0].state_dict()
        student, report = convert(teacher, plan, rows, similarity=similarity, refit=False)
        is_kept = report.kl["aligned"] < report.kl["copied"]
        is_copy = all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
        assert is_copy != is_kept
        assert bool(report.aligned) == is_kept and ("(not kept)" in str(report)) != is_kept
        outcomes.add(is_kept)
    assert outcomes == {True, False}


@pytest.mark.real_weights
def test_alignment_and_refit_of_real_weights(stories260k):
    """On stories: copied 0.68, aligned 0.42, both 0.31 nats per token."""
    from echoatt_hf import load_documents, load_model, load_tokenizer, pack_rows

    teacher = load_model(stories260k)
    tokenizer = load_tokenizer(stories260k, teacher)
    documents = load_documents([str(stories260k.parents[1] / "tinystories" / "stories.txt")])
    rows = list(pack_rows(documents, tokenizer, 256).take(64))
    kl = convert(teacher, [0, 1, 2, 2, 2], rows)[1].kl
    assert kl["aligned"] < 0.8 * kl["copied"]
    assert kl["refitted"] < 0.85 * kl["aligned"]

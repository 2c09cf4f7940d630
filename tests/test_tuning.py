"""Tuning in closed form: against least squares, layer by layer, pair by pair, and where it must keep its hands off."""

import pytest
import torch
from conftest import FP32_TOLERANCE, effect_by_hand, make_batch, make_teacher, plan_of
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

from echoatt_hf import AttentionSimilarity, EchoAttForCausalLM, align_heads, convert, evaluate_model
from echoatt_hf.analysis.similarity import measure_attention_similarity
from echoatt_hf.conversion import regression, tuning
from echoatt_hf.conversion.pairs import TunedPairs, sample_gradients
from echoatt_hf.conversion.tuning import refit_outputs, tune_student
from echoatt_hf.modeling_echoatt import EchoRecords
from echoatt_hf.models.families import find_attention_modules, find_output_projection


pytestmark = pytest.mark.once


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
    monkeypatch.setattr(regression, "RIDGES", (1e-13,))
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
    monkeypatch.setattr(regression, "RIDGES", (1e-13,))
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
    tune_student(student, teacher, rows, held_out, similarity)
    pairs = TunedPairs(teacher, similarity, [(echo, source)], rows, held_out)
    pairs.tune([(echo, source)])
    tuned = pairs.parameters[echo, source]
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
    echoes = TunedPairs(teacher, similarity, pairs, [], [], align=False, refit=False)
    student = EchoAttForCausalLM.from_teacher(teacher, plan)
    with echoes.in_place(plan):
        found = teacher(ids, use_cache=False, echo_records=EchoRecords()).logits
    torch.testing.assert_close(found, student(ids, use_cache=False).logits, **FP32_TOLERANCE)
    assert list(teacher.modules()) == modules
    assert torch.equal(teacher(ids, use_cache=False).logits, before)
    with pytest.raises(KeyError), echoes.in_place(plan):
        raise KeyError
    assert list(teacher.modules()) == modules


def test_one_pass_gives_what_a_pass_for_each_layer_does(monkeypatch):
    """A pass that goes on from the layer where the last one stopped, and one that begins anew each time."""
    teacher, plan = make_teacher("llama"), [0, 1, 1, 0, 4, 4]
    rows, held_out = make_rows(24), make_rows(8, seed=1)
    whole, layers, of_teacher = {}, [], [0] * 6
    for index, layer in enumerate(teacher.model.layers):

        def add_to_teacher(*_, index=index):
            of_teacher[index] += 1

        layer.mlp.register_forward_hook(add_to_teacher)
    for name in ("kept", "anew"):
        if name == "anew":
            monkeypatch.setattr(tuning, "find_layers", lambda model: None)
        student = EchoAttForCausalLM.from_teacher(teacher, plan)
        count = [0] * 6
        for index, layer in enumerate(student.language_model.model.layers):

            def add(*_, count=count, index=index):
                count[index] += 1

            layer.mlp.register_forward_hook(add)
        of_teacher[:] = [0] * 6
        tune_student(student, teacher, rows, held_out, batch_size=8)
        assert name == "anew" or of_teacher == [4, 4, 4, 4, 4, 4]
        whole[name], layers = {n: p.detach() for n, p in student.named_parameters()}, [*layers, count]
    torch.testing.assert_close(whole["kept"], whole["anew"], **FP32_TOLERANCE)
    assert layers[0] == [4, 4, 4, 4, 4, 0] and layers[1] == [12, 12, 8, 4, 4, 0]


def test_no_more_is_kept_of_the_models_than_the_layer_needs(monkeypatch):
    """Neither what the teacher puts out at other layers, nor records of sources that no layer uses again."""
    teacher, plan, rows = make_teacher("llama"), [0, 0, 2, 2, 4, "kv 4"], make_rows(24)
    student = EchoAttForCausalLM.from_teacher(teacher, plan)
    made, alive, recorded, add, advance = [], [], set(), tuning.LayerTuning.add, tuning._BatchState.advance
    for attention in find_attention_modules(teacher).values():
        find_output_projection(attention).register_forward_hook(
            lambda module, args, output: made.append(StorageWeakRef(output.untyped_storage()))
        )

    def count(self, *given):
        alive.append(sum(not each.expired() for each in made))
        return add(self, *given)

    def note(self, student, layer, module):
        found = advance(self, student, layer, module)
        recorded.add((layer, tuple(self._records.by_layer), tuple(self._records.keys_values)))
        return found

    monkeypatch.setattr(tuning.LayerTuning, "add", count)
    monkeypatch.setattr(tuning._BatchState, "advance", note)
    tune_student(student, teacher, rows, make_rows(8, seed=1), batch_size=4)
    assert len(made) == 6 * 8 and len(alive) == 3 * 8
    assert max(alive) <= 2  # of this layer and, until it is replaced, of the batch before
    assert recorded == {(1, (0,), (0,)), (3, (2,), (2,)), (5, (4,), (4,))}


def test_each_layer_has_the_order_of_heads_that_is_better_when_it_is_fitted():
    teacher, rows, held_out = make_teacher("llama"), make_rows(64), make_rows(16, seed=1)
    torch.manual_seed(0)
    similarity = AttentionSimilarity(torch.rand(6, 6, 4, 4, dtype=torch.float64), 1)
    orders = []
    for echo, source in ((1, 0), (2, 1), (3, 2), (4, 3), (3, 0), (4, 1)):
        plan = [source if layer == echo else layer for layer in range(6)]
        errors = {}
        for is_aligned in (False, True):
            student = EchoAttForCausalLM.from_teacher(teacher, plan)
            if is_aligned:
                align_heads(student, similarity)
            refit_outputs(student, teacher, rows, held_out)
            errors[is_aligned] = relative_error(student, teacher, echo, held_out)
        student = EchoAttForCausalLM.from_teacher(teacher, plan)
        found = tune_student(student, teacher, rows, held_out, similarity)[0][echo]
        assert relative_error(student, teacher, echo, held_out) == pytest.approx(min(errors.values()), rel=1e-3)
        assert found.error == pytest.approx(min(errors.values()), rel=1e-3)
        orders.append(found.order is not None)
        assert orders[-1] == (errors[True] < errors[False])
    assert {*orders} == {True, False}


def test_ridges_in_one_eigenbasis_are_the_plain_ones():
    torch.manual_seed(0)
    weights = torch.randn(12, 5, dtype=torch.float64)

    def equations(tokens):
        inputs = torch.randn(tokens, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
        missing = inputs @ weights + torch.randn(tokens, 5, dtype=torch.float64)
        found = regression.NormalEquations()
        found.add(torch.nn.Linear(12, 5, bias=False), inputs, missing)
        return found, inputs, missing

    (train, _, _), (held_out, inputs, missing) = equations(30), equations(20)
    plain = {}
    for ridge in regression.RIDGES:
        scale = train.gram.diagonal().mean()
        change = torch.linalg.solve(train.gram + ridge * scale * torch.eye(12, dtype=torch.float64), train.cross)
        plain[(missing - inputs @ change).square().sum().item()] = change
    change, error = regression.solve_ridge(train, held_out)
    assert error == pytest.approx(min(plain) / missing.square().sum().item(), rel=1e-6)
    torch.testing.assert_close(change, plain[min(plain)], rtol=1e-6, atol=1e-9)


def test_pairs_in_groups_are_those_of_one_pass(monkeypatch):
    teacher, rows, held_out = make_teacher("llama"), make_rows(16), make_rows(4, seed=1)
    ids = torch.tensor([row["input_ids"] for row in rows])
    similarity = measure_attention_similarity(teacher, [{"input_ids": ids}])
    pairs, found = [(1, 0), (2, 0), (2, 1), (4, 3)], []
    for budget in (1e9, 1.0):
        monkeypatch.setattr("echoatt_hf.conversion.pairs._memory_budget", lambda device, budget=budget: budget)
        tuned = TunedPairs(teacher, similarity, pairs, rows, held_out)
        tuned.tune(pairs)
        found.append(tuned.parameters)
    assert found[0].keys() == found[1].keys() == {*pairs}
    for pair in pairs:
        for name, value in found[0][pair].items():
            torch.testing.assert_close(value, found[1][pair][name], **FP32_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_expected_effects_as_by_hand(family, monkeypatch):
    """Gradients by finite differences, with the tokens of the text in place of drawn ones, and the sum written out."""
    teacher, rows = make_teacher(family, attention=None).double(), make_rows(3)
    ids = torch.tensor([row["input_ids"] for row in rows])
    similarity = measure_attention_similarity(teacher, [{"input_ids": ids}])
    plan = plan_of(family)
    pairs = [(echo, source) for echo, source in enumerate(plan) if echo != source][:2]
    tuned = TunedPairs(teacher, similarity, pairs, [], [], align=False, refit=False)
    tuned.tune(pairs)
    drawn = iter(ids[:, 1:])
    monkeypatch.setattr(torch, "multinomial", lambda probs, samples, **_: next(drawn)[:, None].expand(-1, samples))
    trainable = [parameter.requires_grad for parameter in teacher.parameters()]
    gradients = sample_gradients(teacher, [BatchEncoding({"input_ids": ids})], [echo for echo, _ in pairs], samples=2)
    assert torch.is_grad_enabled()  # the training that follows needs them
    assert [parameter.requires_grad for parameter in teacher.parameters()] == trainable
    found = tuned.effects(pairs, [BatchEncoding({"input_ids": ids})], gradients)

    for pair, value in found.items():
        expected, changed = (outputs_of(model, pair[0], rows)[1] for model in (teacher, student_of(teacher, pair)))
        projection = find_output_projection(find_attention_modules(teacher)[pair[0]])
        by_hand = effect_by_hand(teacher, projection, ids, changed - expected)
        assert value == pytest.approx(by_hand, rel=0.02)


def student_of(teacher, pair):
    return EchoAttForCausalLM.from_teacher(teacher, [pair[1] if each == pair[0] else each for each in range(6)])


# What `convert` makes of it.


def test_convert_keeps_what_lowers_the_kl():
    teacher = make_teacher("llama")
    rows = make_rows(64)
    student, report = convert(teacher, [0, 1, 1, 3, 3, 5], rows)
    assert list(report.kl) == ["copied", "tuned"] and report.kl["tuned"] < report.kl["copied"]
    found = evaluate_model(student, rows[48:], teacher=teacher)["kl"]
    assert found == pytest.approx(report.kl["tuned"], rel=1e-6)
    assert report.refitted.keys() == {2, 4} and "2 refitted" in str(report)


def test_convert_keeps_an_order_of_heads_only_where_it_helps():
    """By a similarity that knows nothing: where it hurts, the student is the copied one, bit for bit."""
    teacher, rows = make_teacher("llama"), make_rows(16)
    torch.manual_seed(0)
    similarity = AttentionSimilarity(torch.rand(6, 6, 4, 4, dtype=torch.float64), 1)
    outcomes = set()
    for echo, source in ((1, 0), (2, 1), (3, 2), (4, 3), (3, 0), (4, 1)):
        plan = [source if layer == echo else layer for layer in range(6)]
        state = convert(teacher, plan)[0].state_dict()
        student, report = convert(teacher, plan, rows, similarity=similarity, refit=False)
        is_copy = all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
        is_kept = report.kl["tuned"] < report.kl["copied"]
        assert is_copy != is_kept and bool(report.aligned) == is_kept
        assert ("(not kept)" in str(report)) != is_kept and not report.refitted
        outcomes.add(is_kept)
    assert outcomes == {True, False}


@pytest.mark.real_weights
def test_alignment_and_refit_of_real_weights(stories260k):
    """On stories: copied 0.68, both 0.31 nats per token."""
    from echoatt_hf import load_documents, load_model, load_tokenizer, pack_rows

    teacher = load_model(stories260k)
    tokenizer = load_tokenizer(stories260k, teacher)
    documents = load_documents([str(stories260k.parents[1] / "tinystories" / "stories.txt")])
    rows = list(pack_rows(documents, tokenizer, 256).take(64))
    copied = convert(teacher, [0, 1, 2, 2, 2], rows)[1].kl["copied"]
    found = {}
    for options in ((True, False), (False, True), (True, True)):
        student, report = convert(teacher, [0, 1, 2, 2, 2], rows, align=options[0], refit=options[1])
        found[options] = report.kl["tuned"]
    assert found[True, False] < 0.8 * copied and found[True, True] < 0.85 * found[True, False]
    assert found[True, True] < found[False, True]

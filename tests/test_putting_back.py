"""Layers of the teacher put back into a distilled student: which, in which order, and what comes of it."""

import copy
import json

import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_teacher, plan_of
from peft import LoraConfig, get_peft_model
from test_pipeline import (  # noqa: F401
    FAST,
    LAYERS,
    assert_one_line_error,
    echoatt,
    files_of,
    run_in_process,
    workplace,
)
from transformers import AutoModelForCausalLM

from echoatt_hf import EchoAttConfig, EchoAttForCausalLM, StudentSize, find_sizes, permute_heads, put_back
from echoatt_hf.conversion import putting_back
from echoatt_hf.conversion.alignment import find_changed
from echoatt_hf.evaluation.held_out import evaluate_model
from echoatt_hf.models import dtypes
from echoatt_hf.models.predictions import compare_predictions
from echoatt_hf.pipeline import sizes
from echoatt_hf.publishing.card import find_gaps


pytestmark = pytest.mark.once


PLAN = [0, 1, 1, 1, 0]


def distilled(teacher, plan, seed=0, noise=0.05):
    """A student whose weights are a training away from its teacher's."""
    student = EchoAttForCausalLM.from_teacher(teacher, plan)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            change = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.abs().mean() * change)
    return student


def rows_of(count=6, length=24):
    return [{"input_ids": row} for row in make_batch(count, length)["input_ids"].tolist()]


def logits_of(model):
    with torch.no_grad():
        return model(**make_batch(2, 12), use_cache=False).logits


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(model, weights):
    found = model.state_dict()
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gemma3_text"])
def test_whole_layers_come_back_and_the_rest_stays(family):
    teacher, plan = make_teacher(family), plan_of(family)
    student = distilled(teacher, plan)
    before, of_teacher = weights_of(student), weights_of(teacher)
    layer, *left = student.config.echo_layers
    larger = put_back(student, teacher, [layer])
    assert larger.config.echo_layers == left
    state = larger.language_model.state_dict()
    is_back = {name: f".{layer}." in name for name in state}
    assert sum(is_back.values()) > 4
    for name, value in state.items():
        expected = of_teacher[name] if is_back[name] else before[f"language_model.{name}"]
        assert torch.equal(value, expected), name
    for parameter in larger.parameters():  # weights of its own
        assert parameter.requires_grad
        parameter.data.zero_()
    assert_same_weights(student, before)
    assert_same_weights(teacher, of_teacher)


def test_heads_in_another_order_do_not_matter(tiny_teacher):
    """The values of an aligned echo do not fit attention weights of its own; the whole layer of the teacher does."""
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)
    before = logits_of(student)
    for attention in find_changed(student).values():
        permute_heads(attention, [3, 2, 1, 0])
    assert not torch.allclose(logits_of(student), before, atol=1e-3)
    larger = put_back(student, tiny_teacher, [2, 3, 4])
    torch.testing.assert_close(logits_of(larger), logits_of(tiny_teacher), **FP32_TOLERANCE)


def test_share_of_the_teacher_draws_all_but_the_attention_of_echoes(tiny_teacher):
    student = distilled(tiny_teacher, PLAN)
    larger = put_back(student, tiny_teacher, [3], 0.25)
    own, theirs = student.language_model.state_dict(), tiny_teacher.state_dict()
    for name, value in larger.language_model.state_dict().items():
        if ".layers.3." in name:
            expected = theirs[name]
        elif any(f".layers.{layer}.self_attn." in name for layer in (2, 4)):
            expected = own[name]
        else:
            expected = own[name] + 0.25 * (theirs[name] - own[name])
        torch.testing.assert_close(value, expected, **FP32_TOLERANCE)
    embeddings, head = larger.get_input_embeddings().weight, larger.get_output_embeddings().weight
    assert embeddings is head  # which are tied in the teacher
    everything = put_back(student, tiny_teacher, [2, 3, 4], 1.0)
    torch.testing.assert_close(logits_of(everything), logits_of(tiny_teacher), **FP32_TOLERANCE)


def test_each_time_the_best_layer_comes_back(tiny_teacher):
    student, rows = distilled(tiny_teacher, PLAN, noise=0.4), rows_of()
    sizes = find_sizes(student, tiny_teacher, rows)
    assert [len(size.layers) for size in sizes] == [0, 1, 2]
    assert sizes[0] == StudentSize(PLAN, [], 0.0, sizes[0].kl)
    for size in sizes:
        model = put_back(student, tiny_teacher, size.layers, size.teacher_share)
        assert model.config.plan == size.layer_plan
        assert compare_predictions(model, rows, tiny_teacher).kl == pytest.approx(size.kl, rel=1e-4)
    kl = {
        layer: compare_predictions(put_back(student, tiny_teacher, [layer]), rows, tiny_teacher).kl
        for layer in student.config.echo_layers
    }
    assert sizes[1].layers == [min(kl, key=kl.get)]
    assert sizes[2].layers[0] == sizes[1].layers[0]
    # The weights of this student are the teacher's with noise, of which any share of the teacher takes some away.
    assert 0 < sizes[1].teacher_share <= sizes[2].teacher_share
    assert sizes[1].kl < min(kl.values())
    assert json.loads(json.dumps(sizes[1].to_dict()))["layers"] == sizes[1].layers


def test_a_search_that_was_stopped_goes_on(tiny_teacher, tmp_path, monkeypatch):
    student, rows, state = distilled(tiny_teacher, PLAN, noise=0.4), rows_of(), tmp_path / "measured.json"
    expected = find_sizes(student, tiny_teacher, rows)
    measure, left = putting_back._Measure._measure, [2, 1000]

    def measure_some(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(putting_back._Measure, "_measure", measure_some)
    with pytest.raises(KeyboardInterrupt):
        find_sizes(student, tiny_teacher, rows, state=state)
    assert len(json.loads(state.read_text())["kl"]) == 2
    left[0] = 1000
    assert find_sizes(student, tiny_teacher, rows, state=state) == expected
    measured = len(json.loads(state.read_text())["kl"])
    assert left[0] == 1000 - (measured - 2)
    assert find_sizes(student, tiny_teacher, rows, state=state) == expected and left[0] == 1000 - (measured - 2)
    with pytest.raises(ValueError, match=r"measured.json' holds was measured with another rows_sha256: delete it"):
        find_sizes(student, tiny_teacher, rows_of(5), state=state)
    with pytest.raises(ValueError, match=r"measured.json' holds was measured with another student: delete it"):
        find_sizes(distilled(tiny_teacher, PLAN, noise=0.3), tiny_teacher, rows, state=state)
    state.write_text("{}")
    with pytest.raises(ValueError, match=r"measured.json' does not hold what a search has measured"):
        find_sizes(student, tiny_teacher, rows, state=state)


def test_models_are_as_before_after_a_search(tiny_teacher):
    student = distilled(tiny_teacher, PLAN).train()
    before, of_teacher = weights_of(student), weights_of(tiny_teacher)
    find_sizes(student, tiny_teacher, rows_of(2))
    assert_same_weights(student, before)
    assert_same_weights(tiny_teacher, of_teacher)
    assert student.training and all(parameter.requires_grad for parameter in student.parameters())


def test_larger_student_is_saved_and_loaded_as_any_other(tiny_teacher, tmp_path):
    larger = put_back(distilled(tiny_teacher, PLAN), tiny_teacher, [2], 0.5)
    larger.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits_of(loaded), logits_of(larger))


def test_type_of_the_student_stays(tiny_teacher):
    student = distilled(tiny_teacher, PLAN).to(torch.bfloat16)
    larger = put_back(student, tiny_teacher, [2], 0.5)
    assert {parameter.dtype for parameter in larger.parameters()} == {torch.bfloat16}
    assert larger.dtype == larger.config.dtype == torch.bfloat16


def test_tensors_that_a_family_keeps_in_float32_stay_so(tmp_path):
    make_teacher("glm4_moe").save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    distilled(teacher, plan_of("glm4_moe")).save_pretrained(tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    kept = {name for name, value in student.language_model.state_dict().items() if value.dtype == torch.float32}
    assert kept
    size = find_sizes(student, teacher, rows_of())[1]
    larger = put_back(student, teacher, size.layers, 0.5).language_model.state_dict()
    assert {name for name, value in larger.items() if value.dtype == torch.float32} == kept


def test_bad_input_is_refused(tiny_teacher):
    student, rows = distilled(tiny_teacher, PLAN), rows_of(2)
    with pytest.raises(ValueError, match=r"does not change layers \[1, 7\]: put back some of \[2, 3, 4\]"):
        put_back(student, tiny_teacher, [1, 2, 7])
    other = EchoAttForCausalLM(EchoAttConfig(text_config=tiny_teacher.config, shared_heads={"2.1": "1.0"}))
    with pytest.raises(ValueError, match="heads that share weights"):
        put_back(other, tiny_teacher, [2])
    with pytest.raises(ValueError, match=r"teacher_share is 1.5; it must be from 0 to 1"):
        put_back(student, tiny_teacher, [2], 1.5)
    with pytest.raises(ValueError, match="no rows to measure on"):
        find_sizes(student, tiny_teacher, [])
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, not an EchoAtt student"):
        find_sizes(tiny_teacher, tiny_teacher, rows)
    with pytest.raises(ValueError, match="has no echo layers"):
        find_sizes(EchoAttForCausalLM.from_teacher(tiny_teacher, range(5)), tiny_teacher, rows)
    with pytest.raises(ValueError, match="already an EchoAtt student"):
        find_sizes(student, copy.deepcopy(student), rows)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_student_with_adapters_is_refused(tiny_teacher):
    student = distilled(tiny_teacher, PLAN)
    adapted = get_peft_model(copy.deepcopy(student), LoraConfig(target_modules=["v_proj"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match="student has adapters in it: merge them"):
            put_back(model, tiny_teacher, [2])
    put_back(adapted.merge_and_unload(), tiny_teacher, [2])


def test_student_of_another_teacher_is_refused(tiny_teacher):
    student = distilled(tiny_teacher, PLAN)
    torch.manual_seed(1)
    stranger = AutoModelForCausalLM.from_config(tiny_teacher.config)
    with pytest.raises(
        ValueError, match=r"unlike the teacher's \(cosine -?0\.\d\d.* Give the teacher the student was made"
    ):
        put_back(student, stranger, [2])
    with pytest.raises(ValueError, match="student has 5 layers and the teacher 6"):
        put_back(student, make_teacher("llama"), [2])
    wider = make_teacher("llama", num_hidden_layers=5, intermediate_size=56)
    with pytest.raises(ValueError, match=r"mlp.*student has \[.*\] and a student of the teacher \["):
        put_back(student, wider, [2])


SPREAD = ["--plan", "0,1,1,1,1,5", "--no-align", "--no-refit"]


@pytest.fixture(scope="module")
def student(workplace):  # noqa: F811
    """A student with three echo layers, distilled by the command line."""
    text = ["--data", workplace / "text"]
    echoatt("compress", workplace / "teacher", *SPREAD, *text, *FAST, "--steps", 6, "--output", workplace / "smallest")
    return workplace / "smallest"


def test_command_writes_the_student_of_the_ratio(workplace, student, tmp_path):  # noqa: F811
    teacher, text = workplace / "teacher", ["--data", workplace / "text", *FAST[:6]]
    before = files_of(student)
    command = ["convert", teacher, "--from-student", student, "--ratio", 0.33, *text]
    result = echoatt(*command, "--output", tmp_path / "larger")
    report = json.loads((tmp_path / "larger" / "report.json").read_text())
    sizes = report["put_back"]["sizes"]
    assert [size["ratio"] for size in sizes] == [pytest.approx(count / LAYERS) for count in (3, 2, 1)]
    for size in sizes:
        assert f"{size['perplexity']:.3f}" in result.stdout and {"kl", "calibration_kl"} <= {*size}
    assert files_of(student) == before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
    assert len(model.config.echo_layers) == 2 and model.config.echo_sources == sizes[1]["layer_plan"]
    assert report["plan"]["echo_sources"] == model.config.echo_sources
    # It is the student that was measured.
    evaluate = ["evaluate", tmp_path / "larger", "--teacher", teacher, *text[:-2], "--output", tmp_path / "found.json"]
    echoatt(*evaluate)
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("perplexity", "kl"):
        assert found[name] == pytest.approx(sizes[1][name], rel=1e-5) == report["results"][-1][name]
    card = (tmp_path / "larger" / "README.md").read_text()
    assert find_gaps(card) == []
    assert f"put back, in this order: {sizes[1]['layers'][0]}" in card and "--from-student smallest" in card
    assert "5 steps from the teacher, then 1 steps on the text alone" in card and "was not trained" not in card
    # It distils on as any other.
    distill = ["distill", tmp_path / "larger", "--teacher", teacher, *text[:-2], "--batch-size", 4, "--steps", 2]
    echoatt(*distill, "--warmup-steps", 1, "--output", tmp_path / "distilled")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "distilled").config.echo_sources == sizes[1]["layer_plan"]


def test_what_is_saved_is_evaluated(tiny_teacher):
    """On a CPU weights are in float32, in which those that are drawn to the teacher's have digits that bfloat16 has not."""
    student, rows = distilled(tiny_teacher, PLAN), rows_of()
    dtypes.cast_weights(student, torch.bfloat16)
    dtypes.cast_weights(student, torch.float32)
    size = StudentSize([0, 1, 1, 3, 0], [3], 0.3, 0.1)
    found = sizes._evaluate(size, student, tiny_teacher, rows, None, torch.bfloat16)
    model = put_back(student, tiny_teacher, size.layers, size.teacher_share)
    in_memory = evaluate_model(model, rows, teacher=tiny_teacher)
    dtypes.cast_weights(model, torch.bfloat16)
    dtypes.cast_weights(model, torch.float32)
    saved = evaluate_model(model, rows, teacher=tiny_teacher)
    assert found["loss"] == saved["loss"] != in_memory["loss"]
    assert found["kl"] == saved["kl"] != in_memory["kl"]


def test_command_that_was_stopped_goes_on(workplace, student, tmp_path, monkeypatch, run_in_process):  # noqa: F811
    evaluate, calls = sizes._evaluate, tmp_path / "calls"

    def evaluate_some(*arguments):
        with calls.open("a") as file:
            file.write(".")
        if calls.stat().st_size == 2:
            raise OSError("No space left on device")
        return evaluate(*arguments)

    monkeypatch.setattr(sizes, "_evaluate", evaluate_some)
    command = [
        "convert",
        workplace / "teacher",
        "--from-student",
        student,
        "--ratio",
        0.33,
        "--data",
        workplace / "text",
    ]
    command += [*FAST[:6], "--output", tmp_path / "larger"]
    assert run_in_process(*command).returncode == 2
    kept = tmp_path / "larger.partial"
    assert {"evaluations.json", "measured.json"} <= {path.name for path in kept.iterdir()}
    assert_one_line_error(run_in_process(*command), "holds an unfinished run: continue it with --resume")
    assert_one_line_error(run_in_process(*command, "--search-rows", 2, "--resume"), "search_rows was 8 and is 2")
    assert run_in_process(*command, "--resume").returncode == 0
    assert calls.stat().st_size == 4 and not kept.exists()  # the first of three sizes once, the second twice
    report = json.loads((tmp_path / "larger" / "report.json").read_text())
    assert [size["ratio"] for size in report["put_back"]["sizes"]] == [pytest.approx(n / LAYERS) for n in (3, 2, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.5"], "ratio is 0.5, 3 of 6 layers; it must be below that of the student, 0.50"),
        (["--ratio", "0.01"], "under half a layer"),
        (["--plan", "spread", "--ratio", "0.33"], "--plan spread is given, but the student has its plan"),
        (["--no-refit", "--ratio", "0.33"], "--no-refit is given"),
        (["--similarity", "similarity.json"], "similarity is given"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_command_refuses_what_does_not_fit(workplace, student, tmp_path, options, message, run_in_process):  # noqa: F811
    command = ["convert", workplace / "teacher", "--from-student", student, "--data", workplace / "text", *FAST[:6]]
    result = run_in_process(*command, *options, "--output", tmp_path / "out")
    assert_one_line_error(result, message)
    assert not (tmp_path / "out").exists()


def test_command_refuses_what_is_no_student(workplace, tmp_path, run_in_process):  # noqa: F811
    teacher = workplace / "teacher"
    result = run_in_process("convert", teacher, "--from-student", teacher, "--output", tmp_path / "out")
    assert_one_line_error(result, "is of type 'llama', not an EchoAtt student")
    result = run_in_process("convert", teacher, "--from-student", tmp_path / "no", "--output", tmp_path / "out")
    assert_one_line_error(result, "no")

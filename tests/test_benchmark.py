"""The benchmark measures what it says, beside what it says; and bad input is refused in one line."""

import json
import subprocess
import weakref

import pytest
import torch
from conftest import make_batch, make_teacher, plan_of, train_byte_level_bpe
from processes import run_python
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from echoatt_hf import BenchmarkSettings, EchoAttForCausalLM, format_benchmark, run_benchmark
from echoatt_hf.benchmark import speed, steps
from echoatt_hf.benchmark.contenders import Contender
from echoatt_hf.benchmark.costs import count_costs
from echoatt_hf.benchmark.report import plot_benchmark, write_benchmark


pytestmark = pytest.mark.once

PLAN = "0,1,1,1,4,4"
SMALL = {"length": [8], "batch_size": [1, 2], "context": [12], "repeats": 2}
EVERYTHING = ["prefill", "decode", "training", "distillation", "adapters", "stored"]
NAMES = ["teacher", "student", "eager teacher", "layers dropped", "KV sharing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny teacher, its tokenizer, a student and text."""
    folder = tmp_path_factory.mktemp("models")
    teacher = make_teacher("llama", vocab_size=300, tie_word_embeddings=False)
    teacher.save_pretrained(folder / "teacher")
    EchoAttForCausalLM.from_teacher(teacher, plan_of("llama")).save_pretrained(folder / "student")
    text = "a few words of text, and then some more of them. " * 20
    (folder / "text.txt").write_text(text)
    tokenizer = train_byte_level_bpe([text], 290, ["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "teacher")
    return folder


def test_everything_is_measured(folder):
    settings = BenchmarkSettings(measure=EVERYTHING, **SMALL)
    results = run_benchmark(settings, str(folder / "teacher"), PLAN)
    assert list(results["models"]) == NAMES
    teacher = make_teacher("llama", vocab_size=300, tie_word_embeddings=False)
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 1, 4, 4])
    models = results["models"]
    assert models["teacher"]["parameters"] == models["eager teacher"]["parameters"] == teacher.num_parameters()
    assert models["student"]["parameters"] == student.num_parameters()
    assert (
        models["layers dropped"]["parameters"] <= student.num_parameters() and models["layers dropped"]["layers"] == 5
    )
    assert [each["attention"] for each in models.values()] == ["sdpa", "sdpa", "eager", "sdpa", "sdpa"]
    per_layer = 2 * 2 * 8 * 4
    kv_bytes = [6 * per_layer, 6 * per_layer - 3 * per_layer // 2, 6 * per_layer, 5 * per_layer, 3 * per_layer]
    assert [each["kv_bytes_per_token"] for each in models.values()] == kv_bytes
    cells = [(cell["measure"], cell["batch_size"], cell["tokens"], cell["bound"]) for cell in results["cells"]]
    assert cells == [
        ("prefill", 1, 8, "operations"),
        ("decode", 1, 12, "bytes"),
        ("decode", 2, 12, "bytes"),
        ("training", 1, 8, "operations"),
        ("distillation", 1, 8, "operations"),
        ("adapters", 1, 8, "operations"),
        ("stored", 1, 8, "operations"),
    ]
    for cell in results["cells"]:
        assert list(cell["models"]) == NAMES
        for found in cell["models"].values():
            assert len(found["seconds"]) == 2 and all(0 < seconds < 60 for seconds in found["seconds"])
        assert cell["models"]["teacher"]["speedup"]["median"] == 1
        assert cell["models"]["eager teacher"]["speedup_over_eager"]["median"] == 1
        assert cell["models"]["eager teacher"]["ceiling"] == 1
        over_training = cell["models"]["student"]["speedup_over_training"]
        assert (over_training is None) == (cell["measure"] in ("prefill", "decode"))
        assert cell["measure"] != "training" or over_training["median"] == 1
    before, after = count_costs(teacher), count_costs(student)
    ceilings = [cell["models"]["student"]["ceiling"] for cell in results["cells"]]
    # In sdpa attention a student decodes with the weights of its sources, and replays all else.
    ratio = before.forward_operations(1, 8) / after.forward_operations(1, 8, replays=True)
    ways = [cell["models"]["student"]["echoes"] for cell in results["cells"]]
    assert ways == ["replay", "kept weights", "kept weights", *["replay"] * 4]
    assert all(cell["models"]["teacher"]["echoes"] is None for cell in results["cells"])
    expected = [ratio, *(before.decode_bytes(rows, 12) / after.decode_bytes(rows, 12) for rows in (1, 2)), ratio]
    asked = before.forward_operations(1, 8)
    with_adapters = [each.training_operations(1, 8, replays=True, frozen=True) for each in (before, after)]
    adapters = (asked + with_adapters[0]) / (asked + with_adapters[1])
    assert ceilings == pytest.approx([*expected, 4 / (1 + 3 / ratio), adapters, ratio])
    assert results["environment"]["torch"] == torch.__version__
    assert str(folder) not in json.dumps(results)


@pytest.mark.parametrize(
    ("plan", "saved", "reason"),
    [
        ("0,1,1,drop,4,5", False, None),
        ("0,1,1,drop,4,5", True, "it is not known which layers of the teacher the student lacks"),
        ("0,1,kv 1,3,4,5", False, "no layer of the student echoes"),
        ("0,1,kv 1,skip attention,drop,5", True, "no layer of the student echoes"),
    ],
)
def test_students_of_other_moves(folder, tmp_path, plan, saved, reason):
    student, entries = plan, [int(entry) if entry.isdigit() else entry for entry in plan.split(",")]
    made = EchoAttForCausalLM.from_teacher(AutoModelForCausalLM.from_pretrained(folder / "teacher"), entries)
    if saved:
        made.save_pretrained(student := tmp_path / "student")
    settings = BenchmarkSettings(measure=["prefill"], length=[8], repeats=1, baseline=["kv", "layers"])
    results = run_benchmark(settings, str(folder / "teacher"), str(student))
    models = results["models"]
    assert models["student"]["parameters"] == made.num_parameters()
    assert models["student"]["layers"] == len(made.config.plan)
    if reason is None:
        assert models["KV sharing"]["layer_plan"] == [0, 1, "kv 1", 3, 4] and results["left_out"] == {}
    else:
        assert "KV sharing" not in models and reason in results["left_out"]["KV sharing"]
        assert f"KV sharing is left out: {reason}" in format_benchmark(results)


def test_the_ratio_is_the_median_of_rounds():
    """Not the ratio of medians: what disturbs a round disturbs all models in it."""
    ratios = speed._ratios([1.0, 10.0, 4.0], [0.5, 8.0, 4.0])
    assert ratios == {"median": 1.25, "low": 1.125, "high": 1.625}


def test_each_model_takes_its_turn(folder, monkeypatch):
    """In another order each round, in its own attention implementation, and so often as asked for."""
    seen = []

    def time(step, device):
        step()
        seen[-1][1] = True
        return 1.0

    def prefill(settings, contender, teacher, prompt):
        def step():
            seen.append([contender.name, False, contender.model.config._attn_implementation])

        return step

    monkeypatch.setattr(speed, "_time", time)
    monkeypatch.setitem(steps.STEPS, "prefill", prefill)
    settings = BenchmarkSettings(measure=["prefill"], length=[8], repeats=3, warmup=2, baseline=["eager"])
    run_benchmark(settings, str(folder / "teacher"), PLAN)
    assert [name for name, *_ in seen[:9]] == [
        *("teacher", "student", "eager teacher"),
        *("student", "eager teacher", "teacher"),
        *("eager teacher", "teacher", "student"),
    ]
    assert [timed for _, timed, _ in seen] == [False] * 6 + [True] * 9
    assert {(name, attention) for name, _, attention in seen} == {
        ("teacher", "sdpa"),
        ("student", "sdpa"),
        ("eager teacher", "eager"),
    }


def test_training_steps_of_all_kinds_take_turns(folder, monkeypatch):
    seen = []
    for name in ("prefill", *(kinds := ("training", "stored", "distillation"))):

        def make(settings, contender, teacher, prompt, name=name):
            return lambda: seen.append((name, contender.name, prompt.shape[1]))

        monkeypatch.setitem(steps.STEPS, name, make)
    settings = BenchmarkSettings(
        measure=["prefill", *kinds], length=[8, 9], repeats=1, warmup=1, baseline=["none"], preset="quick"
    )
    results = run_benchmark(settings, str(folder / "teacher"), PLAN)
    measured = [(cell["measure"], cell["tokens"]) for cell in results["cells"]]
    assert measured == [("prefill", 8), ("prefill", 9), *((kind, length) for length in (8, 9) for kind in kinds)]
    turns = [(kind, name, 8) for kind in kinds for name in ("teacher", "student")]
    assert seen[8:20] == turns + turns[1:] + turns[:1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("context", [12, 200])
def test_decoding_starts_after_the_context(family, context):
    """Of whole attention the cache is filled by repeating, of sliding windows by a prefill."""
    teacher = make_teacher(family, max_position_embeddings=256)
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family))
    prompt = make_batch(3, context)["input_ids"]
    lengths = []

    def remember(module, args, kwargs):
        lengths.append((kwargs["past_key_values"].get_seq_length(), tuple(args[0].shape)))

    student.register_forward_pre_hook(remember, with_kwargs=True)
    step = steps.decode(BenchmarkSettings(), Contender("student", student, "sdpa"), teacher, prompt)
    lengths.clear()
    step()
    step()
    assert lengths == [(context + index, (3, 1)) for index in range(2 * steps.DECODED_TOKENS)]


def test_there_is_the_cache_of_one_model_at_a_time(folder, monkeypatch):
    alive, counts = weakref.WeakSet(), []

    class Counted(DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.add(self)
            counts.append(len(alive))

    monkeypatch.setattr(steps, "DynamicCache", Counted)
    settings = BenchmarkSettings(measure=["decode"], context=[12], batch_size=[1, 2], repeats=2, baseline=["eager"])
    run_benchmark(settings, str(folder / "teacher"), PLAN)
    assert counts == [1] * 2 * 3 * 3


def test_training_leaves_the_weights_the_models_share():
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"), share_weights=True)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for make in (steps.train, steps.distill_adapters, steps.distill):
        step = make(BenchmarkSettings(), Contender("student", student, "sdpa"), teacher, make_batch()["input_ids"])
        step()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not any("lora_" in name for name, _ in student.named_modules())


@pytest.mark.parametrize(("make", "adapters_alone"), [(steps.distill_adapters, True), (steps.distill, False)])
def test_what_a_step_trains(monkeypatch, make, adapters_alone):
    """Whatever a step of another measure did to the flags of the weights that they share."""
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"), share_weights=True)
    trained = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: trained.append(self.param_groups[0]["params"]))
    contender, ids = Contender("student", student, "sdpa"), make_batch()["input_ids"]
    step = make(BenchmarkSettings(), contender, teacher, ids)
    for flag in (True, False):
        student.requires_grad_(flag)
        step()
    weights = {id(parameter) for parameter in student.parameters()}
    for parameters in trained:
        found = {id(parameter) for parameter in parameters}
        assert found and (not found & weights if adapters_alone else found == weights)
        assert all(parameter.requires_grad for parameter in parameters)
    assert any(parameter.requires_grad for parameter in student.parameters()) != adapters_alone


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_model_that_runs_out_of_memory_is_reported_and_the_rest_goes_on(folder, monkeypatch, error):
    train = steps.STEPS["training"]

    def fail_for_eager(settings, contender, teacher, prompt):
        if contender.name == "eager teacher":
            raise error
        return train(settings, contender, teacher, prompt)

    monkeypatch.setitem(steps.STEPS, "training", fail_for_eager)
    settings = BenchmarkSettings(measure=["training", "prefill"], length=[8], repeats=2)
    results = run_benchmark(settings, str(folder / "teacher"), PLAN)
    prefill, training = (cell["models"] for cell in results["cells"])
    assert training["eager teacher"] == {"error": f"out of memory: {error}"}
    assert training["student"]["speedup_over_eager"] is None and training["student"]["speedup"]["median"] > 0
    assert all("seconds" in found for name, found in [*training.items(), *prefill.items()] if name != "eager teacher")
    assert "seconds" in prefill["eager teacher"]
    assert "out of memory" in format_benchmark(results)


def test_what_will_not_fit_is_not_tried(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "available_memory", lambda: 1000)
    results = run_benchmark(BenchmarkSettings(**SMALL), str(folder / "teacher"), PLAN)
    errors = {found["error"] for cell in results["cells"] for found in cell["models"].values()}
    assert errors and all(error.startswith("out of memory: about 0.0 GiB needed") for error in errors)
    write_benchmark(results, tmp_path)


def test_an_error_that_is_not_about_memory_is_one(folder, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("something else")

    monkeypatch.setitem(steps.STEPS, "prefill", fail)
    with pytest.raises(RuntimeError, match="something else"):
        run_benchmark(BenchmarkSettings(**SMALL), str(folder / "teacher"), PLAN)


def test_students_plans_ratios_and_text(folder, tmp_path):
    (tmp_path / "plan.json").write_text('{"echo_sources": [0, 1, 1, 1, 4, 4]}')
    settings = {"measure": ["prefill"], "length": [8], "repeats": 1, "baseline": ["none"]}
    plans = {}
    for student in (str(folder / "student"), str(tmp_path / "plan.json"), PLAN, "0.34"):
        results = run_benchmark(
            BenchmarkSettings(**settings, prompts=str(folder / "text.txt")), str(folder / "teacher"), student
        )
        assert list(results["models"]) == ["teacher", "student"]
        plans[student] = results["models"]["student"]["layer_plan"]
    assert list(plans.values()) == [plan_of("llama"), [0, 1, 1, 1, 4, 4], [0, 1, 1, 1, 4, 4], [0, 1, 1, 3, 3, 5]]


def test_prompts_are_the_tokens_of_the_text(folder):
    teacher = make_teacher("llama", vocab_size=300)
    settings = BenchmarkSettings(prompts=str(folder / "text.txt"))
    rows = speed._make_prompt(settings, str(folder / "teacher"), teacher, speed.Cell("decode", 3, 6))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "teacher")
    expected = tokenizer((folder / "text.txt").read_text(), return_tensors="pt")["input_ids"][0, :18].view(3, 6)
    assert torch.equal(rows, expected)


def test_random_weights_of_fewer_layers(folder):
    settings = BenchmarkSettings(
        measure=["prefill"], length=[8], repeats=1, baseline=["none"], random_init=True, layers=4, dtype="bfloat16"
    )
    results = run_benchmark(settings, str(folder / "teacher"), "0,1,1,3")
    assert results["models"]["student"]["layers"] == 4
    assert results["models"]["teacher"]["weight_bytes"] == 2 * results["models"]["teacher"]["parameters"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "fast"}, "preset is 'fast'; it must be one of quick, paper, decode, full"),
        (
            {"measure": ["prefil"]},
            "measure is 'prefil'; it must be one of prefill, decode, training, distillation, adapters, stored",
        ),
        ({"baseline": ["eager", "lora"]}, "baseline is 'lora'; it must be one of eager, layers, kv, none"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, bfloat16, float16"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of sgd, adamw"),
        ({"repeats": 0}, "repeats is 0; it must be at least 1"),
        ({"warmup": 0}, "warmup is 0; it must be at least 1"),
        ({"layers": 2}, "layers is 2; it must be at least 3"),
        ({"context": [1]}, "context is 1; it must be at least 2"),
        ({"batch_size": [0]}, "batch_size is 0; it must be at least 1"),
        ({"preset": "decode", "measure": ["training"]}, "measure is 'training', for which the preset has no length"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**options)


def test_options_go_before_the_preset():
    settings = BenchmarkSettings(preset="decode", context=[64])
    assert (settings.measure, settings.batch_size, settings.context) == (["decode"], [1, 8], [64])


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ("0,1,1", {}, "The plan has 3 layers and the model 6"),
        ("1.5", {}, "ratio is 1.5; it must be between 0 and 1"),
        ("teacher", {}, "is a LlamaForCausalLM, not a student: give one, or a plan"),
        ("other", {}, "is none of this teacher's: its num_hidden_layers is 7, the teacher's 6"),
        ("wider", {}, "is none of this teacher's: its intermediate_size is 64, the teacher's 48"),
        ("nowhere/at/all", {}, "There is no model folder"),
        (PLAN, {"layers": 4}, "layers is given, which needs a model with random weights"),
        (PLAN, {"attention": "flash_attention_9"}, "attention is 'flash_attention_9', which this model cannot use"),
    ],
)
def test_bad_input(folder, student, options, message, monkeypatch):
    others = {"other": {"num_hidden_layers": 7}, "wider": {"num_hidden_layers": 5, "intermediate_size": 64}}
    if student in others:
        other = make_teacher("llama", **others[student])
        plan = [0, 1, 1, *range(3, other.config.num_hidden_layers)]
        EchoAttForCausalLM.from_teacher(other, plan).save_pretrained(folder / student)
    student = str(folder / student) if student in ("teacher", *others) else student
    with pytest.raises((ValueError, OSError), match=message):
        run_benchmark(BenchmarkSettings(**SMALL, **options), str(folder / "teacher"), student)


def test_prompts_need_a_tokenizer(folder):
    settings = BenchmarkSettings(prompts=str(folder / "text.txt"))
    with pytest.raises(ValueError, match="the shape 'SmolLM2-135M' has no tokenizer"):
        speed._make_prompt(settings, "SmolLM2-135M", None, speed.Cell("prefill", 1, 8))


def echoatt(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return run_python("-m", "echoatt_hf.cli", "benchmark", *arguments, cwd=cwd)


def test_command(folder, tmp_path):
    options = [
        "--length",
        "8",
        "--batch-size",
        "2",
        "--context",
        "8",
        "--repeats",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    result = echoatt("teacher", PLAN, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [cell["measure"] for cell in results["cells"]] == ["prefill", "decode", "training"]
    assert format_benchmark(results) in result.stdout
    assert (tmp_path / "out" / "benchmark.md").read_text() == format_benchmark(results) + "\n"
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_leaves_the_backend_to_its_caller(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setattr(matplotlib, "use", lambda *_, **__: pytest.fail("the backend is the caller's"))
    found = {"speedup": {"median": 1.1, "low": 1.0, "high": 1.2}, "ceiling": 1.3}
    cell = {"measure": "prefill", "batch_size": 1, "tokens": 8, "models": {"teacher": {}, "student": found}}
    plot_benchmark({"models": {"teacher": {}, "student": {}}, "cells": [cell]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses_in_one_line(folder):
    result = echoatt("teacher", "0,1", cwd=folder)
    assert result.returncode == 2
    assert result.stderr.startswith("echoatt: error: The plan has 2 layers") and result.stderr.count("\n") == 1

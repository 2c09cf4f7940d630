"""The pipeline and the command line, end to end on a tiny teacher and real files."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import write_workplace
from processes import ForkedPython, run_python
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from echoatt_hf import EchoAttTrainer
from echoatt_hf.distillation.two_stages import make_training_arguments
from echoatt_hf.evaluation.held_out import evaluate_model
from echoatt_hf.outputs.files import (
    beside,
    check_output_file,
    check_output_folder,
    replace_folder,
    whole_folder,
    write_whole,
)
from echoatt_hf.publishing.card import find_gaps
from echoatt_hf.settings import DistillationSettings


LAYERS = 6
TEXT = [
    f"Story {n}. Once upon a time there were {n} small bears who ate {n * 3} pots of honey.\n" * 6 for n in range(24)
]
FAST = ["--row-length", "32", "--evaluation-rows", "8", "--calibration-rows", "4", "--batch-size", "4"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny teacher and some text."""
    folder = tmp_path_factory.mktemp("workplace")
    tokenizer = write_workplace(folder, TEXT)
    tokenizer.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
        initializer_range=0.3,  # attention that differs between layers, as that of a trained model does
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    return folder


def echoatt(*arguments, cwd=None, check=True, new_interpreter=False):
    """Run the command line in a process of its own."""
    arguments = ["-m", "echoatt_hf.cli", *arguments]
    result = run_python(*arguments, cwd=cwd, new_interpreter=new_interpreter, COLUMNS="200")
    if check:
        assert result.returncode == 0, result.stderr
    return result


@contextmanager
def cut_short(monkeypatch, step):
    """A training that fails at a step."""
    log = EchoAttTrainer.log

    def fail(self, *args):
        if self.state.global_step == step:
            raise OSError("cut short")
        log(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(EchoAttTrainer, "log", fail)
        yield


def assert_one_line_error(result, message):
    assert result.returncode == 2, (result.returncode, result.stderr)
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("echoatt: error: "), result.stderr
    assert message in errors[0], errors[0]
    assert "Traceback" not in result.stderr


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def compressed(workplace):
    """A student made by the command line."""
    result = echoatt(
        "compress", "teacher", "--data", "text", "--steps", 24, "--learning-rate", 3e-3, "--warmup-steps", 1, "--ratio", 0.34, *FAST,
        "--output", "student", cwd=workplace, new_interpreter=True,
    )  # fmt: skip
    return workplace / "student", result


WORSE = "The student is worse than before its training"


@pytest.mark.parametrize(
    "recipe, rate, is_worse", [("default", "3", True), ("paper", "3", True), ("default", "3e-3", False)]
)
def test_training_that_makes_a_student_worse_is_said(recipe, rate, is_worse, workplace, tmp_path):
    result = echoatt(
        "compress", "teacher", "--data", "text", "--steps", 8, "--learning-rate", rate, "--ratio", 0.34, "--plan", "spread", *FAST,
        "--recipe", recipe, "--output", tmp_path / "student", cwd=workplace,
    )  # fmt: skip
    results = json.loads((tmp_path / "student" / "report.json").read_text())["results"]
    assert (results[-1]["kl"] > results[1]["kl"]) is (results[-1]["loss"] > results[1]["loss"]) is is_worse
    assert result.stderr.count(WORSE) == is_worse
    if is_worse:
        said = " ".join(result.stderr.split())
        assert "more steps than 8 (--steps)" in said and f"lower learning rate than {rate} (--learning-rate)" in said
        assert ("less weight of hard labels than 0.5" in said) is (recipe == "paper")


def test_compress_writes_a_whole_student(compressed):
    folder, result = compressed
    expected = {
        "README.md", "config.json", "configuration_echoatt.py", "generation_config.json", "model.safetensors",
        "modeling_echoatt.py", "report.json", "sharing_plan.json", "similarity.json", "similarity.png",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert set(files_of(folder)) == expected
    assert [path.name for path in folder.parent.iterdir() if "student" in path.name] == ["student"]
    for stage in ("teacher", "converted", "stage 1", "stage 2"):
        assert stage in result.stdout


def test_report_agrees_with_the_model(compressed):
    folder, _ = compressed
    report = json.loads((folder / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [entry["name"] for entry in report["results"]] == ["teacher", "converted", "stage 1", "stage 2"]
    assert report["plan"]["echo_sources"] == model.config.echo_sources
    assert len(model.config.echo_layers) == 2
    teacher, _, _, last = report["results"]
    assert teacher["agreement"] == 1 and abs(teacher["kl"]) < 1e-6
    assert last["parameters"] == model.num_parameters() < teacher["parameters"]
    assert last["kv_bytes_per_token"] * 12 == teacher["kv_bytes_per_token"] * 10
    assert report["training_log"][-1]["step"] == 20


def test_student_generates_and_equals_its_evaluation(compressed, workplace):
    folder, _ = compressed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once upon", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] >= ids["input_ids"].shape[1] + 1
    output = workplace / "evaluation.json"
    echoatt(
        "evaluate", "student", "--teacher", "teacher", "--data", "text", *FAST[:4], "--output", output, cwd=workplace
    )
    last = json.loads((folder / "report.json").read_text())["results"][-1]
    evaluated = json.loads(output.read_text())
    for name in ("perplexity", "kl", "agreement", "bits_per_byte"):
        assert evaluated[name] == pytest.approx(last[name], rel=1e-5)


def test_evaluate_on_a_text_of_its_own(compressed, workplace, run_in_process, monkeypatch):
    monkeypatch.chdir(workplace)
    evaluate = ["evaluate", "student", *FAST[:4]]
    result = run_in_process(*evaluate, "--held-out-data", "text/3.txt")
    assert result.returncode == 0 and "perplexity" in result.stdout and "agreement" not in result.stdout
    assert_one_line_error(run_in_process(*evaluate, "--data", "text/3.txt"), "single document")


def test_card_has_no_gaps(compressed):
    from huggingface_hub import ModelCard

    folder, _ = compressed
    card = (folder / "README.md").read_text()
    assert find_gaps(card) == []
    assert "searched by its effect" in card and "by similarity" in card and "refitted in closed form" in card
    assert "base_model" not in card  # a local path means nothing to others
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "text-generation"


def test_steps_one_by_one_equal_the_pipeline(compressed, workplace):
    folder, _ = compressed
    run = {"cwd": workplace}
    echoatt("analyze", "teacher", "--data", "text", *FAST[:6], "--output", "analysis", **run)
    result = echoatt(
        "plan", "teacher", "--similarity", "analysis/similarity.json", "--ratio", 0.34, "--data", "text", *FAST[:6],
        "--output", "plan.json", **run,
    )  # fmt: skip
    assert "layers echo" in result.stdout and "KL of plans by effect" in result.stdout
    plan = json.loads((workplace / "plan.json").read_text())
    assert plan == json.loads((folder / "sharing_plan.json").read_text())
    result = echoatt(
        "convert", "teacher", "--plan", "plan.json", "--similarity", "analysis/similarity.json", "--data", "text", *FAST[:6],
        "--output", "converted", **run,
    )  # fmt: skip
    assert "dropped" in result.stdout and "parameters" in result.stdout and " refitted" in result.stdout
    conversion = json.loads((workplace / "converted" / "conversion.json").read_text())
    assert conversion == json.loads((folder / "report.json").read_text())["conversion"]
    echoatt(
        "distill", "converted", "--teacher", "teacher", "--data", "text", "--steps", 24, "--learning-rate", 3e-3, "--warmup-steps", 1, *FAST[:4],
        "--batch-size", 4, "--output", "distilled", **run,
    )  # fmt: skip
    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, workplace / "distilled"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_stopped_search_resumes_to_the_same_plan(workplace, tmp_path, monkeypatch, run_in_process):
    from echoatt_hf.search import effect as search

    command = ["plan", workplace / "teacher", "--data", workplace / "text", *FAST[:6], "--ratio", 0.5]
    whole = run_in_process(*command)
    assert whole.returncode == 0, whole.stderr
    output, measure, measured = tmp_path / "plan.json", search._Measure._measure, []

    def stop(self, plan):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(plan)
        return measure(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(search._Measure, "_measure", stop)
        stopped = run_in_process(*command, "--output", output)
        converted = run_in_process("convert", *command[1:], "--output", tmp_path / "student")
    assert converted.returncode == 130 and "--resume" in converted.stderr
    resumed = run_in_process("convert", *command[1:], "--output", tmp_path / "student", "--resume")
    assert resumed.returncode == 0 and not (tmp_path / "student.partial").exists(), resumed.stderr
    of_student = json.loads((tmp_path / "student" / "sharing_plan.json").read_text())["echo_sources"]
    shutil.rmtree(tmp_path / "student")
    assert stopped.returncode == 130 and "--resume" in stopped.stderr
    assert not output.exists() and (tmp_path / "plan.json.partial").exists()
    assert_one_line_error(run_in_process(*command, "--output", output), "continue it with --resume")
    assert_one_line_error(
        run_in_process(*command, "--search-width", 1, "--output", output, "--resume"), "other settings"
    )
    resumed = run_in_process(*command, "--output", output, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[:5] == whole.stdout.splitlines()[:5]
    assert (
        json.loads(output.read_text())["echo_sources"]
        == json.loads(whole.stdout[whole.stdout.index("{") :])["echo_sources"]
        == of_student
    )
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.search.json", "plan.search.png"}


def test_a_search_is_kept_until_its_plan_is_written(workplace, tmp_path, monkeypatch, run_in_process):
    from echoatt_hf.search import effect as search

    output = tmp_path / "plan.json"
    command = ["plan", workplace / "teacher", "--data", workplace / "text", *FAST[:6], "--ratio", 0.5]
    command += ["--search-rows", 1, "--search-width", 1, "--output", output]

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(search.PlanSearch, "plot", fail)
        assert_one_line_error(run_in_process(*command), "No space left on device")
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json.partial", "plan.search.json"}
    assert_one_line_error(run_in_process(*command), "continue it with --resume")
    with monkeypatch.context() as patch:
        patch.setattr(search._Measure, "_measure", lambda *_: pytest.fail("measured again"))
        resumed = run_in_process(*command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.search.json", "plan.search.png"}


@pytest.mark.parametrize("suffix", [".search.json", ".search.png"])
def test_a_search_replaces_nothing_beside_its_plan(workplace, tmp_path, monkeypatch, run_in_process, suffix):
    from echoatt_hf.pipeline import steps

    monkeypatch.setattr(steps, "plan_teacher", lambda *_: pytest.fail("searched"))
    command = ["plan", workplace / "teacher", "--data", workplace / "text", "--output"]
    for output, name in (("plan.json", "plan"), ("plan-0.41", "plan-0.41")):
        (tmp_path / (name + suffix)).write_text("mine")
        for resume in ([], ["--resume"]):
            result = run_in_process(*command, tmp_path / output, *resume)
            assert_one_line_error(result, f"{name}{suffix}' exists: choose another file")
    assert files_of(tmp_path) == {f"{name}{suffix}": b"mine" for name in ("plan", "plan-0.41")}


def test_files_beside_another():
    assert beside(Path("a/plan.json"), ".search.json") == Path("a/plan.search.json")
    assert beside(Path("plan-0.41"), ".search.json") == Path("plan-0.41.search.json")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_stopped_run_resumes_to_the_same_student(workplace, tmp_path, how):
    arguments = [
        "compress", workplace / "teacher", "--data", workplace / "text", "--plan", "blocks", "--ratio", 0.34,
        "--steps", 60, "--save-steps", 5, *FAST,
    ]  # fmt: skip
    echoatt(*arguments, "--output", tmp_path / "whole")
    output = tmp_path / "stopped"
    process = ForkedPython("-m", "echoatt_hf.cli", *arguments, "--output", output)
    work = output.with_name("stopped.partial")
    deadline = time.time() + 200
    while not list(work.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.is_running() and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    stopped = process.wait(timeout=100)
    assert not output.exists() and work.exists()
    if how == signal.SIGINT:
        assert stopped.returncode == 130
        assert "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
    # The same command without --resume says what to do, with other settings it refuses to mix runs.
    assert_one_line_error(echoatt(*arguments, "--output", output, check=False), "--resume")
    assert_one_line_error(
        echoatt(*arguments, "--seed", 3, "--resume", "--output", output, check=False), "other settings"
    )
    echoatt(*arguments, "--resume", "--output", output)
    assert not work.exists()
    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    results = [json.loads((tmp_path / name / "report.json").read_text())["results"] for name in ("whole", "stopped")]
    assert results[0] == results[1]
    # The teacher and the text were given by absolute paths, which are nobody's business.
    for file in output.iterdir():
        assert str(workplace).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("plan", ["spread", "effect"])
def test_resuming_nothing_replaces_no_student(workplace, tmp_path, run_in_process, plan):
    command = [
        "convert",
        workplace / "teacher",
        "--data",
        workplace / "text",
        *FAST[:6],
        "--ratio",
        0.5,
        "--plan",
        plan,
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert_one_line_error(run_in_process(*command, "--output", tmp_path / "out", "--resume"), "--overwrite")
    assert files_of(tmp_path / "out") == {"mine": b"mine"}


def test_full_disk_at_the_end_keeps_the_old_student_and_the_run(workplace, tmp_path, monkeypatch, run_in_process):
    from echoatt_hf.pipeline import training

    output = tmp_path / "out"
    arguments = [
        "compress", workplace / "teacher", "--data", workplace / "text", "--plan", "blocks", "--ratio", 0.34, "--steps", 3,
        "--save-steps", 1, *FAST, "--output", output,
    ]  # fmt: skip
    output.mkdir()
    (output / "old").write_text("old")

    def full(folder, *_):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_student", full)
        assert_one_line_error(run_in_process(*arguments, "--overwrite"), "No space left on device")
    assert files_of(output) == {"old": b"old"}
    assert run_in_process(*arguments, "--resume").returncode == 0
    assert not (output / "old").exists()
    AutoModelForCausalLM.from_pretrained(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_streamed_text_trains(workplace, tmp_path, run_in_process):
    result = run_in_process(
        "compress", workplace / "teacher", "--data", workplace / "text", "--streaming", "--plan", "0,1,1,3,3,5",
        "--held-out-fraction", 0.2, "--steps", 3, "--eval-steps", 1, *FAST, "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["plan"]["echo_layers"] == [2, 4]
    assert [entry["step"] for entry in report["training_log"] if "eval_loss" in entry] == [1, 2, 3]


@pytest.mark.parametrize("rank", [0, 2])
def test_results_of_mixed_precision_are_those_of_the_student_that_is_saved(workplace, tmp_path, run_in_process, rank):
    data = ["--data", workplace / "text", *FAST[:4]]
    result = run_in_process(
        "compress", workplace / "teacher", *data, *FAST[4:], "--plan", "0,1,1,3,3,5", "--steps", 6, "--learning-rate", 1e-2,
        "--warmup-steps", 1, "--lora-rank", rank, "--bf16", "--gradient-checkpointing", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["distillation"]["bf16"] is True
    run_in_process(
        "evaluate", tmp_path / "out", "--teacher", workplace / "teacher", *data, "--output", tmp_path / "results.json"
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert report["results"][-1]["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert report["results"][-1]["kl"] == pytest.approx(found["kl"], rel=1e-4)


def test_adapters_are_merged_into_a_plain_student(workplace, tmp_path, run_in_process, monkeypatch):
    arguments = [
        "compress", workplace / "teacher", "--data", workplace / "text", "--plan", "0,1,1,1,1,5", "--steps", 24,
        "--learning-rate", 1e-2, "--warmup-steps", 1, "--save-steps", 6, "--lora-rank", 4, "--attention-weight", 0.1, *FAST,
    ]  # fmt: skip
    assert run_in_process(*arguments, "--output", tmp_path / "whole").returncode == 0
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    teacher, converted, stage1, last = report["results"]
    assert stage1["kl"] < 0.95 * converted["kl"]
    assert stage1["parameters"] == last["parameters"] == converted["parameters"] < teacher["parameters"]
    assert all("attention_loss" in entry for entry in report["training_log"] if entry["stage"] == 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert type(model).__name__ == "EchoAttForCausalLM" and not (tmp_path / "whole" / "adapter_config.json").exists()
    assert model.num_parameters() == last["parameters"]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "--lora-rank 4" in card and "--attention-weight 0.1" in card
    evaluate = ["evaluate", tmp_path / "whole", "--teacher", workplace / "teacher", "--data", workplace / "text"]
    assert run_in_process(*evaluate, *FAST[:4], "--output", tmp_path / "evaluation.json").returncode == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["kl"] == pytest.approx(last["kl"], rel=1e-4)

    # Stopped in stage 1, the run goes on from adapters alone to the same student.
    stopped = tmp_path / "stopped.partial"
    with cut_short(monkeypatch, step=10):
        result = run_in_process(*arguments, "--output", tmp_path / "stopped")
    assert result.returncode == 2 and "cut short" in result.stderr  # behind a progress bar
    names = {path.name for path in stopped.glob("checkpoints/checkpoint-6/*")}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert run_in_process(*arguments, "--resume", "--output", tmp_path / "stopped").returncode == 0
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "stopped")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())


def test_tokens_are_counted_by_the_size_of_each_step(workplace, tmp_path, run_in_process, monkeypatch):
    arguments = [
        "compress", workplace / "teacher", "--data", workplace / "text", "--plan", "0,1,1,1,1,5", "--no-align", "--no-refit",
        "--steps", 12, "--warmup-steps", 1, "--save-steps", 3, *FAST[:-2], "--output", tmp_path / "out",
    ]  # fmt: skip
    with cut_short(monkeypatch, step=10):
        assert run_in_process(*arguments, "--batch-size", 4).returncode == 2
    assert run_in_process(*arguments, "--batch-size", 2, "--resume").returncode == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tokens"] == (9 * 4 + 3 * 2) * 32  # the last checkpoint was that of step 9
    assert f"{report['tokens']:,} tokens in all" in (tmp_path / "out" / "README.md").read_text()
    assert all("loss" in entry for entry in report["training_log"])


def test_adapters_on_a_student_that_is_there(workplace, tmp_path, run_in_process):
    teacher = ["--teacher", workplace / "teacher"]
    convert = ["convert", workplace / "teacher", "--plan", "0,1,1,1,1,5", "--no-align", "--no-refit"]
    assert run_in_process(*convert, "--output", tmp_path / "converted").returncode == 0
    before = files_of(tmp_path / "converted")
    distill = ["distill", tmp_path / "converted", *teacher, "--data", workplace / "text", "--steps", 6, *FAST[:4]]
    result = run_in_process(*distill, "--batch-size", 4, "--lora-rank", 2, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "converted") == before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name in model.state_dict())


def test_rows_in_a_forward_pass_of_an_evaluation(workplace, tmp_path, run_in_process, monkeypatch):
    def remember(*args, **options):
        with (tmp_path / "seen").open("a") as file:
            file.write(f"{options['batch_size']} ")
        return evaluate_model(*args, **options)

    monkeypatch.setattr("echoatt_hf.pipeline.training.evaluate_model", remember)
    convert = ["convert", workplace / "teacher", "--plan", "0,1,1,1,1,5", "--no-align", "--no-refit"]
    assert run_in_process(*convert, "--output", tmp_path / "converted").returncode == 0
    distill = ["distill", tmp_path / "converted", "--teacher", workplace / "teacher", "--data", workplace / "text"]
    distill += [*FAST[:4], "--batch-size", 4, "--steps", 2, "--stage2-steps", 1, "--evaluation-batch-size", 3]
    result = run_in_process(*distill, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "seen").read_text() == "3 3 3 3 "
    settings = DistillationSettings(evaluation_batch_size=3).for_width(32)
    assert make_training_arguments(settings, tmp_path).per_device_eval_batch_size == 3


# Bad input: one line, exit code 2, nothing written.

BAD_INPUT = {
    "missing data": (["--data", "nowhere/text.txt"], "nowhere/text.txt"),
    "empty text": (["--data", "empty.txt"], "no text"),
    "missing teacher": (["./no-teacher"], "no-teacher"),
    "teacher without config": (["text"], "config.json"),
    "encoder": (["bert"], "not a decoder language model"),
    "encoder-decoder": (["t5"], "not a decoder language model"),
    "evaluation without rows": (["--evaluation-batch-size", "0"], "evaluation_batch_size is 0; it must be at least 1"),
    "ratio above 1": (["--ratio", "1.5"], "ratio is 1.5"),
    "ratio of 0": (["--ratio", "0"], "ratio is 0.0"),
    "ratio impossible for the depth": (["--ratio", "0.9"], "at most"),
    "ratio under a layer": (["--ratio", "0.01"], "smallest possible"),
    "plan of the wrong length": (["--plan", "0,1,1"], "3 layers"),
    "plan that is none": (["--plan", "blokcs"], "'blokcs'"),
    "plan that chains": (["--plan", "0,1,1,2,4,5"], "itself an echo"),
    "plan file that is none": (["--plan", "plan-broken.json"], "not a sharing plan"),
    "plan file that is missing": (["--plan", "plan-missing.json"], "plan-missing.json"),
    "threshold nobody reaches": (["--plan", "similarity", "--threshold", "2"], "Lower the threshold"),
    "threshold without similarity": (["--threshold", "0.5"], "needs the plan 'similarity'"),
    "one row to calibrate on": (["--calibration-rows", "1"], "at least 2 rows"),
    "no row to search on": (["--search-rows", "0"], "search_rows is 0"),
    "block of one": (["--block-size", "1"], "block_size is 1"),
    "row longer than the context": (["--row-length", "65"], "context is 64"),
    "no steps": (["--steps", "0"], "steps is 0"),
    "batch that cannot be split": (["--batch-size", "4", "--accumulation-steps", "3"], "does not divide"),
    "weight below 0": (["--kl-weight", "-1"], "kl_weight is -1"),
    "divergence that is none": (["--divergence", "backward"], "divergence is 'backward'"),
    "attention weight below 0": (["--attention-weight", "-1"], "attention_weight is -1"),
    "attention weight without echo layers": (["--plan", "0,1,2,3,4,5", "--attention-weight", "1"], "no echo layers"),
    "rank below 0": (["--lora-rank", "-1"], "lora_rank is -1"),
    "output not empty": (["--output", "text"], "--overwrite"),
    "output is a file": (["--output", "empty.txt"], "is a file"),
    "output without a name": (["--output", "."], "give a folder in it, such as 'out'"),
    "output above": (["--output", "..", "--overwrite"], "'..' has no name of its own"),
}


@pytest.fixture(scope="module")
def bad_workplace(workplace):
    from transformers import BertConfig, T5Config

    (workplace / "empty.txt").write_text("\n \n")
    (workplace / "plan-broken.json").write_text("{}")
    BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2).save_pretrained(workplace / "bert")
    T5Config(d_model=32, num_layers=2).save_pretrained(workplace / "t5")
    return workplace


@pytest.fixture
def run_in_process(monkeypatch, capfd):
    """The command line in this process: as the real one, but without the seconds an import takes."""
    from typer.testing import CliRunner

    from echoatt_hf.cli.app import app

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return run


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(bad_workplace, monkeypatch, run_in_process, case):
    monkeypatch.chdir(bad_workplace)
    arguments, message = BAD_INPUT[case]
    before = sorted(path.name for path in bad_workplace.iterdir())
    arguments = list(arguments)
    if arguments[0].startswith("--"):
        arguments = ["teacher", *arguments]
    if "--data" not in arguments:
        arguments += ["--data", "text"]
    if "--output" not in arguments:
        arguments += ["--output", "out"]
    if "--row-length" not in arguments:
        arguments += ["--row-length", "32"]
    assert_one_line_error(run_in_process("compress", *arguments), message)
    assert sorted(path.name for path in bad_workplace.iterdir()) == before


@pytest.mark.parametrize("rule", ["effect", "similarity", "blocks", "0,1,1"])
def test_impossible_plans_are_refused_before_anything_is_measured(workplace, monkeypatch, run_in_process, rule):
    from echoatt_hf.pipeline import preparation
    from echoatt_hf.pipeline import steps as pipeline

    monkeypatch.chdir(workplace)
    for module in (pipeline, preparation):
        monkeypatch.setattr(module, "measure_on_rows", lambda *_, **__: pytest.fail("measured"))
    for command in ("compress", "plan", "convert"):
        arguments = [command, "teacher", "--plan", rule, "--ratio", "0.9", "--data", "text", *FAST[:6]]
        assert_one_line_error(run_in_process(*arguments, "--output", "out"), "3 layers" if "," in rule else "at most")


def test_tokenizer_that_does_not_fit_is_refused(workplace, tmp_path, run_in_process):
    model = AutoModelForCausalLM.from_pretrained(workplace / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "teacher")
    tokenizer.add_tokens([f"<extra {number}>" for number in range(5)])
    model.save_pretrained(tmp_path / "misfit")
    tokenizer.save_pretrained(tmp_path / "misfit")
    result = run_in_process(
        "compress", tmp_path / "misfit", "--data", workplace / "text", "--output", tmp_path / "out"
    )
    assert_one_line_error(result, f"{model.config.vocab_size + 5} tokens")


def test_overwrite_replaces_and_a_student_cannot_be_a_teacher(compressed, workplace, tmp_path, run_in_process):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    blocks = ["--plan", "blocks", "--ratio", "0.34", "--data", workplace / "text", *FAST[:6]]
    convert = ["convert", workplace / "teacher", *blocks, "--output", tmp_path / "out"]
    assert_one_line_error(run_in_process(*convert), "--overwrite")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    assert run_in_process(*convert, "--overwrite").returncode == 0
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert (tmp_path / "out" / "config.json").exists()
    again = ["convert", tmp_path / "out", *blocks, "--output", tmp_path / "again"]
    assert_one_line_error(run_in_process(*again), "already an EchoAtt student")


@pytest.mark.parametrize(
    "command", ["", "compress", "analyze", "plan", "convert", "store-teacher", "distill", "evaluate", "push", "env"]
)
def test_help(run_in_process, command):
    result = run_in_process(*([command] if command else []), "--help")
    assert result.returncode == 0 and "Usage" in result.stdout


def test_env_names_the_versions(run_in_process):
    import transformers

    result = run_in_process("env")
    assert result.returncode == 0
    assert f"transformers: {transformers.__version__}" in result.stdout


def test_unknown_option_exits_with_2(run_in_process):
    assert run_in_process("compress", "--no-such-option").returncode == 2


# Outputs.


def test_failed_write_leaves_the_old_folder(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(OSError, match="No space"), whole_folder(output, overwrite=True) as folder:
        (folder / "new").write_text("new")
        raise OSError(28, "No space left on device")
    assert files_of(output) == {"old": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_replacement_puts_the_old_folder_back(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(OSError):
        replace_folder(tmp_path / "missing", output)
    assert files_of(output) == {"old": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("busy", ["old folder", "finished folder"])
def test_what_is_finished_stays_if_it_cannot_be_put_in_its_place(tmp_path, monkeypatch, busy):
    output, replace = tmp_path / "out", os.replace
    output.mkdir()
    (output / "old").write_text("old")

    def fail(source, target):
        if (source == output) == (busy == "old folder") and ".old." not in str(source):
            raise OSError(16, "Device or resource busy", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    said = "Device or resource busy.*cannot be replaced. What was made is whole"
    with pytest.raises(OSError, match=said) as error, whole_folder(output, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert files_of(folder) == {"new": b"new"} and repr(str(folder)) in str(error.value)
    assert files_of(output) == {"old": b"old"}
    assert {*tmp_path.iterdir()} == {output, folder}


def test_outputs_that_cannot_be_renamed_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(
        ValueError, match="is a mount point, so that no finished folder.*give a folder in it, such as .*out'"
    ):
        check_output_folder(tmp_path, overwrite=True)
    check_output_folder(tmp_path / "out", overwrite=False)
    for name in (".", "..", "a/.."):
        with pytest.raises(ValueError, match="has no name of its own"):
            check_output_folder(Path(name), overwrite=True)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="link' is a file"):
        check_output_folder(tmp_path / "link", overwrite=True)
    file = tmp_path / "file.json"
    file.write_text("mounted")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == file)
    with pytest.raises(ValueError, match="is a mount point, which cannot be replaced: choose another file"):
        check_output_file(file, overwrite=True)


@pytest.mark.parametrize("command", ["compress", "analyze", "convert", "store-teacher", "export"])
def test_every_folder_needs_a_name(bad_workplace, monkeypatch, run_in_process, command):
    monkeypatch.chdir(bad_workplace)
    for name in (".", ".."):
        result = run_in_process(command, "teacher", "--output", name, "--overwrite")
        assert_one_line_error(result, f"'{name}' has no name of its own")


def test_a_distillation_checks_its_output_before_it_reads_a_stored_teacher(tmp_path, monkeypatch, run_in_process):
    from echoatt_hf.pipeline import steps

    monkeypatch.setattr(steps, "StoredTeacher", lambda *_, **__: pytest.fail("read"))
    distill = ["distill", tmp_path / "student", "--stored-teacher", tmp_path / "store", "--output"]
    assert_one_line_error(run_in_process(*distill, "."), "has no name of its own")
    assert_one_line_error(run_in_process(*distill, tmp_path.parent), "is not empty")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    write_whole(file, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert files_of(tmp_path) == {"file.json": b"old"}


def test_full_disk_while_saving_keeps_the_old_student(workplace, tmp_path, monkeypatch, run_in_process):
    from echoatt_hf import EchoAttForCausalLM

    output = tmp_path / "out"
    convert = [
        "convert", workplace / "teacher", "--plan", "blocks", "--ratio", "0.34", "--no-align", "--no-refit",
        "--output", output,
    ]  # fmt: skip
    assert run_in_process(*convert).returncode == 0
    before = files_of(output)

    def full(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EchoAttForCausalLM, "save_pretrained", full)
    assert_one_line_error(run_in_process(*convert, "--overwrite"), "No space left on device")
    assert files_of(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

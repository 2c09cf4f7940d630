"""Two processes train as one does, and write what one writes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import FP32_TOLERANCE, make_teacher, plan_of, process_environment
from distributed_runs import IdTokenizer, make_trainer, rows_of_ids
from processes import run_python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from echoatt_hf import EchoAttForCausalLM, evaluate_continuations, evaluate_model


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate"
SCRIPT = ROOT / "tests" / "distributed_runs.py"


def launch(*arguments, cwd, config="ddp_cpu2.yaml", precision="no"):
    environment = process_environment(DS_ACCELERATOR="cpu")
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(ROOT / "tests")])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    command += ["--main_process_port", "0", "--num_processes", "2", "--mixed_precision", precision]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def needs_deepspeed(name):
    missing = importlib.util.find_spec("deepspeed") is None
    return pytest.param(
        name, marks=[pytest.mark.slow, pytest.mark.skipif(missing, reason="deepspeed is not installed")]
    )


LAYOUTS = ["ddp_cpu2", "fsdp2", needs_deepspeed("zero2"), needs_deepspeed("zero3")]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A trainer that has trained in one process, and its folder of checkpoints."""
    folder = tmp_path_factory.mktemp("one_process")
    trainer = make_trainer(folder, 1, save_strategy="steps", save_steps=2)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    state = trainer.model.state_dict()
    assert any((state[name] - start[name]).abs().max() > 1e-3 for name in state)
    return trainer, folder


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, one_process, tmp_path_factory):
    """The folder of what two processes did, named after the configuration that they were launched with."""
    folder = tmp_path_factory.mktemp("two_processes") / request.param
    folder.mkdir()
    checkpoint = one_process[1] / "checkpoint-2"
    result = launch(SCRIPT, folder, checkpoint, cwd=folder, config=f"{request.param}.yaml")
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


def assert_same_state(found, expected):
    for name, value in expected.items():
        if name in found:  # tied weights are saved once
            torch.testing.assert_close(
                found[name], value, **FP32_TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert len(found) >= len(expected) - 1


def facts_of(folder, kind):
    return [json.loads((folder / f"facts{rank}.json").read_text())[kind] for rank in range(2)]


def test_two_processes_train_to_the_weights_of_one(layout, one_process):
    trainer = one_process[0]
    assert_same_state(load_file(layout / "trained" / "model.safetensors"), trainer.model.state_dict())
    first, second = facts_of(layout, "rows")
    assert not set(first) & set(second) and sorted(first + second) == sorted(trainer.seen)


def test_head_with_a_bias_in_two_processes(layout, tmp_path):
    trainer = make_trainer(tmp_path, 1, family="phi")
    trainer.train()
    assert_same_state(load_file(layout / "phi" / "model.safetensors"), trainer.model.state_dict())


def skip_where_transformers_cannot_resume(layout):
    facts = json.loads((layout / "facts0.json").read_text())
    if layout.name == "ddp_cpu2" and "tagged with cpu:0" in facts.get("resumed", ""):
        pytest.skip("this version of transformers reads no optimizer states in several processes on CPUs")


def test_checkpoint_goes_on_in_two_processes(layout, one_process):
    skip_where_transformers_cannot_resume(layout)
    assert_same_state(load_file(layout / "resumed" / "model.safetensors"), one_process[0].model.state_dict())


def test_checkpoint_of_the_last_step_in_two_processes(layout, one_process):
    assert_same_state(load_file(layout / "finished" / "model.safetensors"), one_process[0].model.state_dict())


def test_checkpoints_of_two_processes_and_of_one(layout, one_process, tmp_path):
    trainer, checkpoint = make_trainer(tmp_path, 1), str(layout / "runs" / "checkpoint-2")
    expected = one_process[0].model.state_dict()
    if layout.name == "ddp_cpu2":
        trainer.train(resume_from_checkpoint=checkpoint)
        assert_same_state(trainer.model.state_dict(), expected)
        skip_where_transformers_cannot_resume(layout)
        assert_same_state(load_file(layout / "from_one" / "model.safetensors"), expected)
        return
    known, neither = "FSDP" if layout.name == "fsdp2" else "DeepSpeed", "neither FSDP nor DeepSpeed"
    message = (
        "The checkpoint 'checkpoint-2' was saved with {}, and this run has {}, which cannot read its optimizer states"
    )
    with pytest.raises(ValueError, match=message.format(known, neither)):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert all(message.format(neither, known) in found for found in facts_of(layout, "from_one"))


def test_teacher_is_divided_as_the_student_is(layout):
    whole = make_teacher("llama").num_parameters()
    names, numbers = zip(*facts_of(layout, "teacher"), strict=True)
    if layout.name == "fsdp2":
        assert set(names) == {"FSDPLlamaForCausalLM"} and sum(numbers) < 1.1 * whole
    elif layout.name == "zero3":
        assert set(names) == {"DeepSpeedEngine"}
    else:
        assert set(names) == {"LlamaForCausalLM"} and set(numbers) == {whole}


def test_saved_files_are_those_of_one_process(layout, one_process, tmp_path):
    one_process[0].save_model(str(tmp_path))
    expected = {file.name for file in tmp_path.iterdir()}
    for name in ("trained", "finished"):
        assert {file.name for file in (layout / name).iterdir()} | {"training_args.bin"} == expected
        config = json.loads((layout / name / "config.json").read_text())
        assert config["auto_map"] == json.loads((tmp_path / "config.json").read_text())["auto_map"]
        model = AutoModelForCausalLM.from_pretrained(layout / name)
        assert_same_state(model.state_dict(), one_process[0].model.state_dict())


@pytest.mark.parametrize("layout", ["ddp_cpu2"], indirect=True)
def test_processes_agree_on_the_head(layout):
    assert facts_of(layout, "heads") == [[True, True]] * 2


@pytest.mark.parametrize("layout", ["ddp_cpu2"], indirect=True)
def test_streamed_rows_are_divided(layout):
    first, second = facts_of(layout, "streamed")
    assert len(first) == len(second) == 8
    assert sorted(first + second) == list(range(1, 17))  # two steps of eight; three rows were not asked for


@pytest.mark.parametrize("layout", ["ddp_cpu2"], indirect=True)
def test_an_evaluation_is_divided_and_the_text_read_once(layout, tmp_path):
    evaluated, reads, rows, written = (facts_of(layout, kind) for kind in ("evaluated", "reads", "text", "written"))
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))
    for count, results in zip((1, 5), zip(*evaluated, strict=True), strict=True):
        expected = evaluate_model(student, rows_of_ids()[:count], teacher=teacher)
        for found, forwards in results:
            assert found == pytest.approx(expected, rel=1e-5)
            assert forwards == (1 if count == 1 else 2)  # of batches of two rows: five rows are three, then two
    for count, results in zip((1, 5), zip(*written, strict=True), strict=True):
        lengths = {"prompt_tokens": 4, "new_tokens": 8}
        expected = evaluate_continuations(student, rows_of_ids()[:count], IdTokenizer(), **lengths)
        assert [*results] == [expected] * 2  # in the order of the rows, whoever went on with them
    assert reads == [{"text": 1, "files": 2}, {"text": 0, "files": 0}]
    assert rows[0] == rows[1] and len(rows[0][0]) > 2 and len(rows[0][1]) == 2


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_configurations(file):
    config = load_config_from_file(str(file))
    assert set(yaml.safe_load(file.read_text())) <= set(vars(config))
    assert config.num_processes > 1


DISTILL = [
    "--dtype",
    "float32",
    "--stage2-steps",
    "2",
    "--batch-size",
    "4",
    "--row-length",
    "32",
    "--evaluation-rows",
    "4",
]


def run_alone(folder, *arguments):
    run_python("-m", "echoatt_hf.cli", *arguments, cwd=folder).check_returncode()


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The folder of a converted student, and of what `echoatt distill` made of it in one process."""
    folder = tmp_path_factory.mktemp("distilled")
    plan = ["--plan", "0,1,1,1,4,4,4,4,8,9,10,11", "--no-align", "--no-refit", "--calibration-rows", "4"]
    run_alone(folder, "convert", *plan, "--row-length", "32", "--output", "converted")
    run_alone(folder, "distill", "converted", "--steps", "4", "--save-steps", "2", *DISTILL, "--output", "one")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", LAYOUTS)
def test_distill_command_in_two_processes_is_that_of_one(distilled, tmp_path, config):
    arguments = ["echoatt", "distill", distilled / "converted", "--steps", "4", "--save-steps", "2", *DISTILL]
    result = launch(SCRIPT, *arguments, "--output", "two", cwd=tmp_path, config=f"{config}.yaml")
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.count("written to two") == 1
    folders = [distilled / "one", tmp_path / "two"]
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    expected, found = (load_file(folder / "model.safetensors") for folder in folders)
    assert_same_state(found, expected)
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    for expected, found in zip(*(report["results"] for report in reports), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", LAYOUTS)
def test_distill_command_in_bfloat16(distilled, tmp_path, config):
    arguments = ["echoatt", "distill", distilled / "converted", "--steps", "4", *DISTILL, "--output", "two"]
    result = launch(SCRIPT, *arguments, cwd=tmp_path, config=f"{config}.yaml", precision="bf16")
    assert result.returncode == 0, result.stderr[-5000:]
    expected, found = (
        json.loads((folder / "report.json").read_text())["results"][-1]["loss"]
        for folder in (distilled / "one", tmp_path / "two")
    )
    assert found == pytest.approx(expected, rel=1e-2) and found != expected


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_cpu2", needs_deepspeed("zero2")])
def test_adapters_in_two_processes(distilled, tmp_path, config):
    arguments = ["distill", distilled / "converted", "--steps", "4", *DISTILL, "--lora-rank", "4"]
    arguments += ["--learning-rate", "2e-2"]
    run_alone(tmp_path, *arguments, "--output", "one")
    result = launch(SCRIPT, "echoatt", *arguments, "--output", "two", cwd=tmp_path, config=f"{config}.yaml")
    assert result.returncode == 0, result.stderr[-5000:]
    folders = tmp_path / "two", tmp_path / "one", distilled / "converted"
    found, expected, start = (load_file(folder / "model.safetensors") for folder in folders)
    assert_same_state(found, expected)
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", needs_deepspeed("zero3")])
def test_adapters_need_undivided_weights(distilled, tmp_path, config):
    arguments = ["echoatt", "distill", distilled / "converted", "--steps", "4", *DISTILL, "--lora-rank", "4"]
    result = launch(SCRIPT, *arguments, "--output", "two", cwd=tmp_path, config=f"{config}.yaml")
    assert result.returncode != 0 and "divides the weights that adapters are merged into" in result.stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compress", "--output", "out"],
            "2 processes were launched, but `echoatt compress` is the work of one",
        ),
        (
            ["store-teacher", "--output", "out"],
            "2 processes were launched, but `echoatt store-teacher` is the work of one",
        ),
        (
            ["distill", "student", "--output", "out", "--batch-size", "3"],
            "batch_size is 3, which 2 processes with accumulation_steps 1 do not divide",
        ),
    ],
    ids=["compress", "store", "batch"],
)
def test_what_two_processes_cannot_do_is_said(tmp_path, arguments, message):
    result = launch("-m", "echoatt_hf.cli", *arguments, cwd=tmp_path)
    assert result.returncode != 0 and message in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

"""Two processes train as one does, and write what one writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import FP32_TOLERANCE, process_environment
from distributed_runs import FAMILIES, descend, make_trainer
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate"


def launch(*arguments, cwd, config="ddp_cpu2.yaml"):
    environment = process_environment()
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(ROOT / "tests")])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    command += ["--main_process_port", "0"]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    result = launch(ROOT / "tests" / "distributed_runs.py", folder, cwd=folder)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


def assert_same_state(found, expected):
    for name, value in expected.items():
        if name in found:  # tied weights are saved once
            torch.testing.assert_close(
                found[name], value, **FP32_TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert len(found) >= len(expected) - 1


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("one_process"), 1)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    state = trainer.model.state_dict()
    assert any((state[name] - start[name]).abs().max() > 1e-3 for name in state)
    return trainer, state


def seen_by(folder, kind):
    return [json.loads((folder / f"seen{rank}.json").read_text())[kind] for rank in range(2)]


def test_ddp_trains_to_the_weights_of_one_process(two_processes, one_process):
    trainer, expected = one_process
    assert_same_state(load_file(two_processes / "trained" / "model.safetensors"), expected)
    first, second = seen_by(two_processes, "rows")
    assert not set(first) & set(second) and sorted(first + second) == sorted(trainer.seen)


def test_checkpoint_of_two_processes_goes_on_in_one(two_processes, one_process, tmp_path):
    trainer = make_trainer(tmp_path, 1)
    trainer.train(resume_from_checkpoint=str(two_processes / "ddp" / "checkpoint-2"))
    assert_same_state(trainer.model.state_dict(), one_process[1])


def test_processes_agree_on_the_head(two_processes):
    assert seen_by(two_processes, "heads") == [[True, True]] * 2


def test_streamed_rows_are_divided(two_processes):
    first, second = seen_by(two_processes, "streamed")
    assert len(first) == len(second) == 8
    assert sorted(first + second) == list(range(1, 17))  # two steps of eight; three rows were not asked for


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_train_to_the_weights_of_one_process(two_processes, tmp_path, family):
    trainer = make_trainer(tmp_path, 1, family)
    model = trainer.model.train()
    for step in range(3):
        descend(trainer, model, step)
    assert_same_state(torch.load(two_processes / f"{family}.pt"), model.state_dict())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_configurations(file):
    config = load_config_from_file(str(file))
    assert set(yaml.safe_load(file.read_text())) <= set(vars(config))
    assert config.num_processes > 1


DISTILL = ["--stage2-steps", "2", "--batch-size", "4", "--row-length", "32", "--evaluation-rows", "4"]


@pytest.mark.slow
def test_distill_command_in_two_processes_is_that_of_one(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "echoatt_hf.cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=process_environment(), capture_output=True, text=True, timeout=300, check=True
        )

    plan = ["--plan", "0,1,1,1,4,4,4,4,8,9,10,11", "--no-align", "--no-refit", "--calibration-rows", "4"]
    run("convert", *plan, "--row-length", "32", "--output", "converted")
    arguments = ["distill", "converted", "--steps", "4", "--save-steps", "2", *DISTILL]
    run(*arguments, "--output", "one")
    result = launch("-m", "echoatt_hf.cli", *arguments, "--output", "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.count("written to two") == 1
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == sorted(
        file.name for file in (tmp_path / "one").iterdir()
    )
    assert_same_state(*(load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")))
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    for expected, found in zip(*(report["results"] for report in reports), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compress", "--output", "out"],
            "2 processes were launched, but planning and conversion are the work of one",
        ),
        (
            ["distill", "student", "--output", "out", "--batch-size", "3"],
            "batch_size is 3, which 2 processes with accumulation_steps 1 do not divide",
        ),
    ],
    ids=["compress", "batch"],
)
def test_what_two_processes_cannot_do_is_said(tmp_path, arguments, message):
    result = launch("-m", "echoatt_hf.cli", *arguments, cwd=tmp_path)
    assert result.returncode != 0 and message in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

"""What happens when a run is killed, the disk is full, a file is damaged, or a loss is not finite."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import write_workplace
from datasets import Dataset
from processes import run_python
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from echoatt_hf import EchoAttForCausalLM, collate_rows
from echoatt_hf.distillation.checkpoints import train_from_last_checkpoint
from echoatt_hf.distillation.trainer import EchoAttTrainer, EchoAttTrainingArguments
from echoatt_hf.outputs.files import last_complete_checkpoint, seal_folder


TEXT = [f"Story {n}. Once upon a time {n} small bears ate {n * 3} pots of honey.\n" * 6 for n in range(24)]

# Runs the command line in a process that has a fault: at the n-th call of a function it is killed, for good, before or
# halfway through what the function does, or the function meets a full disk.
FAULTY = """
import importlib, os, signal, sys

where, number, fault = sys.argv[1:4]
sys.argv[1:4] = []
module, _, path = where.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
function, calls = getattr(owner, name), []

def faulty(*arguments, **keywords):
    calls.append(None)
    if len(calls) == int(number):
        if fault == "after":
            function(*arguments, **keywords)
        if fault == "disk":
            raise OSError(28, "No space left on device")
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **keywords)

setattr(owner, name, faulty)
from echoatt_hf.cli import main
main()
"""


def run(folder, *arguments, fault=None, preamble="", **how):
    """The command line in a process of its own; `fault` is (module:function, which call, "before", "after" or "disk")."""
    start = (
        ["-c", FAULTY, *map(str, fault)] if fault else ["-c", f"{preamble}\nfrom echoatt_hf.cli import main\nmain()"]
    )
    return run_python(*start, *arguments, cwd=folder, **how)


def assert_one_line_error(result, *messages):
    assert result.returncode == 2, (result.returncode, result.stderr)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("echoatt: error: ") and "Traceback" not in result.stderr, result.stderr
    for message in messages:
        assert message in line, line


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_same_weights(one, other):
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, other))
    assert all(torch.equal(value, other[name]) for name, value in one.items()) and len(one) == len(other)


def make_teacher(vocab_size):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.3, eos_token_id=0, pad_token_id=0,
        bos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


STORE = [
    "store-teacher", "teacher", "--data", "text", "--row-length", 32, "--evaluation-rows", 4, "--top-k", 8, "--rows", 24,
    "--shard-rows", 8, "--batch-size", 4,
]  # fmt: skip
DISTILL = [
    "distill", "student", "--stored-teacher", "store", "--steps", 8, "--stage2-steps", 2, "--save-steps", 2,
    "--batch-size", 4,
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny teacher, a converted student, text, a store, and the student an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("workplace")
    tokenizer = write_workplace(folder, TEXT)
    teacher = make_teacher(len(tokenizer))
    for model, name in ((teacher, "teacher"), (EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3]), "student")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for command, output in ((STORE, "store"), (DISTILL, "distilled")):
        result = run(folder, *command, "--output", output, new_interpreter=True)
        assert result.returncode == 0, result.stderr
    return folder


# Killed.

ASK, WRITE = "echoatt_hf.distillation.stored_teacher:_ask", "echoatt_hf.distillation.stored_teacher:write_whole"
STEP, REPLACE = (
    "echoatt_hf.distillation.trainer:EchoAttTrainer.training_step",
    "echoatt_hf.pipeline.unfinished:replace_folder",
)

KILLED_STORES = {  # the fault, shards in place, and shards recorded in the manifest
    "while the teacher answers": ((ASK, 4, "before"), 1, 1),
    "when a shard is half written": (("os:replace", 4, "before"), 1, 1),  # after settings, shard and manifest
    "between a shard and its record": ((WRITE, 3, "after"), 2, 1),
    "before the manifest is finished": ((WRITE, 8, "before"), 3, 3),
    "before the store is in place": ((REPLACE, 1, "before"), 3, 3),
}


@pytest.mark.faults
@pytest.mark.parametrize("when", KILLED_STORES)
def test_killed_store_goes_on_to_the_same_store(workplace, tmp_path, when):
    fault, in_place, recorded = KILLED_STORES[when]
    output, work = tmp_path / "store", tmp_path / "store.partial" / "store"
    assert run(workplace, *STORE, "--output", output, fault=fault).returncode == -9
    assert not output.exists()
    times = {path.name: path.stat().st_mtime_ns for path in work.glob("shard-*")}
    finished = [shard["file"] for shard in json.loads((work / "manifest.json").read_text())["shards"]]
    assert (len(times), len(finished)) == (in_place, recorded)
    assert bool(list(work.glob(".shard-*"))) == ("half" in when)
    result = run(workplace, *STORE, "--output", output, "--resume")
    assert result.returncode == 0, result.stderr
    assert files_of(output) == files_of(workplace / "store")
    assert all((output / name).stat().st_mtime_ns == times[name] for name in finished)  # kept, not made anew
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


KILLED_RUNS = {  # the fault, and the last checkpoint that is whole
    "in a step": ((STEP, 4, "before"), 2),
    "between the files of a checkpoint": (("torch:save", 6, "before"), 2),  # the second checkpoint's optimizer
    "before a checkpoint is sealed": (("echoatt_hf.distillation.checkpoints:seal_folder", 2, "before"), 2),
    "after a checkpoint is sealed": (("echoatt_hf.distillation.checkpoints:seal_folder", 2, "after"), 4),
    "before the student is in place": ((REPLACE, 1, "before"), 8),
    "after the student is in place": ((REPLACE, 1, "after"), 8),
}


@pytest.mark.faults
@pytest.mark.parametrize("when", KILLED_RUNS)
def test_killed_run_goes_on_to_the_same_student(workplace, tmp_path, when):
    fault, step = KILLED_RUNS[when]
    output, checkpoints = tmp_path / "out", tmp_path / "out.partial" / "checkpoints"
    assert run(workplace, *DISTILL, "--output", output, fault=fault).returncode == -9
    assert output.exists() == when.startswith("after the student")
    assert last_complete_checkpoint(checkpoints) == str(checkpoints / f"checkpoint-{step}")
    # Killed again if it made a step that the checkpoint has.
    result = run(workplace, *DISTILL, "--output", output, "--resume", fault=(STEP, 8 - step + 1, "before"))
    assert result.returncode == 0, result.stderr
    assert_same_weights(output, workplace / "distilled")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The disk is full.


@pytest.mark.faults
def test_full_disk_while_storing(workplace, tmp_path):
    output = tmp_path / "store"
    output.mkdir()
    (output / "old").write_text("old")
    result = run(workplace, *STORE, "--output", output, "--overwrite", fault=(WRITE, 3, "disk"))
    assert_one_line_error(result, "No space left on device", str(output), "MiB left", "--resume")
    assert files_of(output) == {"old": b"old"}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    result = run(workplace, *STORE, "--output", output, "--resume", preamble=limit)
    assert_one_line_error(result, "File too large", str(output))
    assert files_of(output) == {"old": b"old"}
    assert run(workplace, *STORE, "--output", output, "--resume").returncode == 0
    assert files_of(output) == files_of(workplace / "store")


@pytest.mark.faults
@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_file_that_may_not_grow_while_a_checkpoint_is_saved(workplace, tmp_path, part):
    size = (workplace / "student" / "model.safetensors").stat().st_size
    limit = size // 2 if part == "weights" else size * 3 // 2  # safetensors, and torch, whose error says nothing
    preamble = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    result = run(workplace, *DISTILL, "--output", tmp_path / "out", preamble=preamble)
    reason = "File too large" if part == "weights" else "Input/output error"
    assert_one_line_error(result, reason, str(tmp_path / "out"), "cannot be written", "--resume")
    assert not (tmp_path / "out").exists()
    assert run(workplace, *DISTILL, "--output", tmp_path / "out", "--resume").returncode == 0
    assert_same_weights(tmp_path / "out", workplace / "distilled")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1.2 MiB: two checkpoints of half a MiB fit, three do not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "none", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.faults
def test_full_disk_while_a_checkpoint_is_saved(workplace, small_disk):
    output = small_disk / "out"
    output.mkdir()
    (output / "old").write_text("old")
    result = run(workplace, *DISTILL, "--output", output, "--overwrite")
    assert_one_line_error(result, "No space left on device", str(output), "MiB left", "--resume")
    assert files_of(output) == {"old": b"old"}
    checkpoint = last_complete_checkpoint(small_disk / "out.partial" / "checkpoints")
    assert checkpoint is not None
    # Nothing helps but room.
    assert_one_line_error(run(workplace, *DISTILL, "--output", output, "--resume"), "No space left on device")
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    step = int(checkpoint.rpartition("-")[2])
    result = run(workplace, *DISTILL, "--output", output, "--resume", fault=(STEP, 8 - step + 1, "before"))
    assert result.returncode == 0, result.stderr
    assert_same_weights(output, workplace / "distilled")


# Damaged files.


@pytest.mark.faults
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_damaged_checkpoint_is_named_and_the_one_before_serves(workplace, tmp_path, name):
    output, checkpoints = tmp_path / "out", tmp_path / "out.partial" / "checkpoints"
    assert run(workplace, *DISTILL, "--output", output, fault=(STEP, 7, "before")).returncode == -9
    file = checkpoints / "checkpoint-6" / name
    file.write_bytes(file.read_bytes()[:-9])
    result = run(workplace, *DISTILL, "--output", output, "--resume")
    assert_one_line_error(result, str(file.parent), f"{name!r} is corrupt", "--resume")
    shutil.rmtree(file.parent)
    result = run(workplace, *DISTILL, "--output", output, "--resume", fault=(STEP, 5, "before"))
    assert result.returncode == 0, result.stderr
    assert_same_weights(output, workplace / "distilled")


@pytest.mark.faults
def test_damaged_shard_is_named(workplace, tmp_path):
    shutil.copytree(workplace / "store", tmp_path / "store")
    file = tmp_path / "store" / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    arguments = ["--stored-teacher", tmp_path / "store", "--output", tmp_path / "out"]
    assert_one_line_error(run(workplace, "distill", "student", *arguments), str(file), "corrupt")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_seal_finds_what_changed(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "inner").mkdir(parents=True)
        (folder / "a").write_text("a")
        (folder / "inner" / "b").write_text("b")
    assert last_complete_checkpoint(tmp_path) is None
    seal_folder(tmp_path / "checkpoint-5")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    seal_folder(folder)
    assert last_complete_checkpoint(tmp_path) == str(folder)
    (folder / "inner" / "b").write_text("c")
    with pytest.raises(ValueError, match=r"checkpoint-10.*'inner/b' is corrupt"):
        last_complete_checkpoint(tmp_path)
    (folder / "inner" / "b").unlink()
    with pytest.raises(ValueError, match=r"'inner/b' is missing"):
        last_complete_checkpoint(tmp_path)
    (folder / "checksums.json").write_text("{")
    with pytest.raises(ValueError, match=r"'checksums.json' is corrupt"):
        last_complete_checkpoint(tmp_path)


def test_nothing_is_trained_from_the_checkpoint_of_the_last_step(tmp_path, rows):
    teacher = make_teacher(48)

    def run():
        arguments = EchoAttTrainingArguments(
            str(tmp_path), stage1_steps=3, per_device_train_batch_size=4, save_steps=3, logging_steps=1,
            report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3])
        trainer = EchoAttTrainer(
            model=student, teacher=teacher, args=arguments, train_dataset=rows, data_collator=collate_rows
        )
        train_from_last_checkpoint(trainer)
        return student.state_dict(), trainer.state

    whole, _ = run()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    again, state = run()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert state.global_step == 3 and state.log_history


# Losses that are not finite.


def train(student, teacher, rows, folder, **changes):
    arguments = EchoAttTrainingArguments(
        str(folder), stage1_steps=6, per_device_train_batch_size=4, save_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True, **{"learning_rate": 1e-3, **changes},
    )  # fmt: skip
    trainer = EchoAttTrainer(
        model=student, teacher=teacher, args=arguments, train_dataset=rows, data_collator=collate_rows
    )
    before = []

    def remember(self, *given):
        before.append({name: value.clone() for name, value in student.state_dict().items()})
        return EchoAttTrainer.training_step(self, *given)

    trainer.training_step = remember.__get__(trainer)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    after = student.state_dict().items()
    assert all(torch.equal(value.nan_to_num(), before[-1][name].nan_to_num()) for name, value in after)
    return trainer, str(error.value)


@pytest.fixture
def rows():
    ids = torch.randint(1, 40, (16, 12), generator=torch.Generator().manual_seed(0))
    ids[9, 5] = 41  # in no other row
    return Dataset.from_list([{"input_ids": row} for row in ids.tolist()])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_row_without_a_finite_loss_stops_the_run_and_is_named(tmp_path, rows, accumulation):
    teacher = make_teacher(48)
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3])
    with torch.no_grad():
        teacher.model.embed_tokens.weight[41] = torch.inf
    trainer, message = train(student, teacher, rows, tmp_path, gradient_accumulation_steps=accumulation)
    step = trainer.state.global_step
    assert f"loss of step {step + 1} (stage 1) is nan, for 1 of the 4 rows" in message
    assert " ".join(map(str, rows[9]["input_ids"][:8])) in message and "look at these rows" in message
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == sorted(
        f"checkpoint-{number}" for number in range(1, step + 1)
    )


def test_weights_that_overflow_stop_the_run(tmp_path, rows):
    teacher = make_teacher(48)
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3])
    trainer, message = train(student, teacher, rows, tmp_path, learning_rate=1e38, max_grad_norm=0.0)
    assert trainer.state.global_step >= 1
    assert "4 of the 4 rows" in message and "lower the learning rate" in message


@pytest.mark.faults
def test_loss_that_is_not_finite_is_one_line(workplace, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    result = run(workplace, *DISTILL, "--learning-rate", 1e38, "--warmup-steps", 0, "--output", output, "--overwrite")
    assert_one_line_error(result, "The loss of step", "rows in the batch", "lower the learning rate")
    assert files_of(output) == {"old": b"old"}

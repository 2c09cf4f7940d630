"""The scripts in `examples/` run, on very little."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import process_environment
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[1]
TINY = [
    "--layers", "2", "--hidden-size", "16", "--intermediate-size", "24", "--heads", "2", "--kv-heads", "1",
    "--vocab-size", "300", "--row-length", "16", "--batch-size", "4", "--tokens", str(20 * 4 * 16), "--save-steps", "5",
]  # fmt: skip


def train_teacher(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_teacher.py"), *map(str, arguments)],
        cwd=cwd, env=process_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 20)
    return tmp_path


def test_train_teacher_makes_a_model_folder_and_does_not_overwrite_it(text):
    arguments = ["--output", "teacher", "--data", "text", *TINY, "--save-dtype", "bfloat16"]
    result = train_teacher(*arguments, cwd=text)
    assert result.returncode == 0, result.stderr
    folder = text / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == len(tokenizer) <= 300
    assert model.config.use_cache
    results = json.loads((folder / "results.json").read_text())
    assert results["tokens"] == 20 * 4 * 16
    assert f"{results['held_out']['bits_per_byte']:.4f}" in (folder / "README.md").read_text()
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    again = train_teacher(*arguments, cwd=text)
    assert again.returncode == 1 and "holds a finished teacher" in again.stderr


def test_train_teacher_resumes(text):
    arguments = ["--output", "teacher", "--data", "text", *TINY]
    assert train_teacher(*arguments, cwd=text).returncode == 0
    whole = AutoModelForCausalLM.from_pretrained(text / "teacher").state_dict()
    # As if it had been killed after the checkpoint of step 15.
    (text / "teacher" / "results.json").unlink()
    for file in (text / "teacher" / "checkpoints" / "checkpoint-20").iterdir():
        file.unlink()
    (text / "teacher" / "checkpoints" / "checkpoint-20").rmdir()
    refused = train_teacher(*arguments, cwd=text)
    assert refused.returncode == 1 and "--resume" in refused.stderr
    result = train_teacher(*arguments, "--resume", cwd=text)
    assert result.returncode == 0, result.stderr
    resumed = AutoModelForCausalLM.from_pretrained(text / "teacher").state_dict()
    assert all((whole[name] == resumed[name]).all() for name in whole)

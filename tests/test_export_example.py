"""`examples/export.py`: programs of a student give the student's logits, where what they need is installed."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
from conftest import make_teacher, plan_of

from echoatt_hf import EchoAttForCausalLM


pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")

# torch and transformers about each other
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the script for a tiny student and returns the cells of its rows by the name of the program."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    script = importlib.import_module("export")
    EchoAttForCausalLM.from_teacher(make_teacher(), plan_of("llama")).save_pretrained(tmp_path / "student")

    def run(*programs):
        options = [option for name in programs for option in ("--program", name)]
        script.main([str(tmp_path / "student"), "--output", str(tmp_path / "made"), *options])
        rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return script, {name.strip(): found.strip() for name, found, _ in rows[2:]}

    return run


def test_torch_export_gives_the_logits_of_the_student_at_any_length(run, tmp_path):
    script, found = run("torch.export")
    assert float(found["torch.export"]) < 1e-5
    assert script.files_of("torch.export", tmp_path / "made")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler g++")
def test_aot_inductor_gives_the_logits_of_the_student(run):
    _, found = run("AOTInductor")
    assert float(found["AOTInductor"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("program", ["ONNX", "ONNX, any length", "ONNX with cache"])
def test_onnx_gives_the_logits_of_the_student(run, program):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install onnx onnxscript onnxruntime")
    _, found = run(program)
    assert float(found[program]) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own imports
def test_executorch_gives_the_logits_of_the_student(run):
    pytest.importorskip("executorch", reason="executorch is not installed")
    _, found = run("ExecuTorch with cache")
    assert float(found["ExecuTorch with cache"]) < 1e-5


def test_what_is_not_installed_is_left_out_with_the_reason(run, monkeypatch):
    script, _ = run("torch.export")
    monkeypatch.setattr(script, "find_spec", lambda name: None if name.startswith("onnx") else name)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    _, found = run("AOTInductor", "ONNX with cache")
    assert found["AOTInductor"] == "left out: there is no compiler g++"
    assert re.fullmatch(r"left out: onnx, onnxscript, onnxruntime not installed", found["ONNX with cache"])


def test_a_comparison_finds_what_differs(run):
    script, _ = run("torch.export")
    model, other = (
        EchoAttForCausalLM.from_teacher(make_teacher(family), plan_of(family)).eval()
        for family in ("llama", "mistral")
    )
    assert script.compare(model, other, lambda: script.make_inputs(model, 2, 12)) > 0.01
    assert script.compare(model, model, lambda: script.make_inputs(model, 2, 4, past=9)) == 0

"""The commands and snippets of the README run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import process_environment

import echoatt_hf


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def command_after(marker):
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*)\n```", README)
    assert found, f"the README has no command marked {marker!r}, or it is not a single line"
    return found.group(1)


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The main job of the README, from the command to the student, with fewer steps; set-up is `.ci/run`'s part."""
    folder = tmp_path_factory.mktemp("readme")
    job = (
        command_after("main command")
        .split(" && ")[-1]
        .replace(".venv/bin/echoatt", f"{sys.executable} -m echoatt_hf.cli")
    )
    few = "--steps 6 --evaluation-rows 4 --calibration-rows 4"
    result = subprocess.run(
        shlex.split(f"{job} {few}"), cwd=folder, env=process_environment(), capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.mark.readme
def test_main_command_makes_a_student(main_job):
    folder, output = main_job
    assert (folder / "student" / "model.safetensors").exists()
    assert "| stage 2 " in output


@pytest.mark.readme
def test_snippet_generates_text_with_the_student(main_job):
    folder, _ = main_job
    snippet = next(code for code in snippets("python") if '"student"' in code)
    result = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=folder,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def main(") and len(result.stdout) > 20


@pytest.mark.readme
def test_pipeline_generates_text_with_the_student(main_job):
    from transformers import pipeline

    folder, _ = main_job
    generate = pipeline("text-generation", model=str(folder / "student"), device="cpu")
    text = generate("import os\n", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("import os\n") and len(text) > 12


def test_set_up_is_the_same_in_both_commands_but_for_the_extra():
    main, test = (command_after(marker).split(" && ") for marker in ("main command", "test command"))
    assert main[:2] == test[:2]
    assert main[2].removesuffix(" .") == test[2].removesuffix(' -e ".[test]"')
    assert test[3] == ".venv/bin/python -m pytest -n 2 --dist loadfile"


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    extraction = re.search(r"test_command=\$\((.*)\)", script).group(1)
    result = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == command_after("test command")


@pytest.mark.parametrize("snippet", snippets("python"), ids=lambda code: code.splitlines()[0][:40])
def test_names_in_snippets_exist(snippet):
    for module, names in re.findall(r"^from (echoatt_hf[\w.]*) import (.*)$", snippet, re.MULTILINE):
        assert module == "echoatt_hf"
        for name in names.split(", "):
            assert hasattr(echoatt_hf, name), name


COMMANDS = sorted(
    {
        line.strip()
        for line in re.findall(
            r"echoatt (?:\w+)[^`\n]*", "\n".join([*snippets("bash"), *re.findall(r"`(echoatt [^`]*)`", README)])
        )
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_commands_exist(command):
    import typer

    from echoatt_hf.cli.app import app

    name, *arguments = shlex.split(command)[1:]
    subcommand = typer.main.get_command(app).commands[name]
    known = {option for parameter in subcommand.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in known, f"{command}: no option {argument}"


def test_layout_lists_what_is_there():
    layout = next(code for code in snippets("text") if "configuration_echoatt.py" in code)
    listed = {name.strip("/") for name in re.findall(r"^  ([\w/.]+)", layout, re.MULTILINE)}
    hidden = {"__init__.py", "__pycache__", "py.typed"}
    assert listed == {path.name for path in (ROOT / "echoatt_hf").iterdir()} - hidden

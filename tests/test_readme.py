"""The README's main commands run as they stand; every command, snippet and link of the README and the guides is checked."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import process_environment
from families import FAMILIES, SUPPORTED

import echoatt_hf


pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STUDIES = sorted(ROOT.glob("examples/*/README.md"))
GUIDES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "examples" / "README.md",
    *STUDIES,
    *sorted(ROOT.glob("model_cards/*/*.md")),
]
MOST_LINES = 220


def command_after(marker):
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*)\n```", README)
    assert found, f"the README has no command marked {marker!r}, or it is not a single line"
    return found.group(1)


def snippets(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_fences(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def with_guide(find):
    """A parameter for each thing that `find` finds in a guide's text, named after the guide."""
    return [
        pytest.param(guide, found, id=f"{guide.relative_to(ROOT)}: {found.splitlines()[0][:60]}")
        for guide in GUIDES
        for found in dict.fromkeys(find(guide.read_text()))
    ]


def block_commands(text):
    """Commands of the guide's blocks, lines that go on joined."""
    lines = "".join(snippets("bash", text)).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def commands(text):
    """Commands of the guide's blocks, and those within its sentences."""
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_fences(text))]
    return block_commands(text) + [code for code in inline if re.match(r"(echoatt|python|accelerate|bash) \S", code)]


def echoatt_arguments(command):
    """What follows `echoatt` in a command, or `None` if it is another."""
    found = re.search(r"(?:^|/)echoatt (.*)|-m echoatt_hf\.cli (.*)", command)
    return found and shlex.split(found.group(1) or found.group(2))


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


@pytest.mark.parametrize(("guide", "snippet"), with_guide(lambda text: snippets("python", text)))
def test_names_in_snippets_exist(guide, snippet):
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "echoatt_hf":
            assert node.module == "echoatt_hf"
            for name in node.names:
                assert hasattr(echoatt_hf, name.name), name.name


@pytest.mark.parametrize(
    ("guide", "command"), with_guide(lambda text: [each for each in commands(text) if echoatt_arguments(each)])
)
def test_options_of_commands_exist(guide, command):
    import typer

    from echoatt_hf.cli.app import app

    name, *arguments = echoatt_arguments(command)
    if name in ("--help", "--debug"):
        return
    known = typer.main.get_command(app).commands
    assert name in known, f"no command echoatt {name}"
    options = {option for each in known[name].params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in options, f"{command}: no option {argument}"
    if command in block_commands(guide.read_text()):  # a whole command: values and what is required are checked too
        known[name].make_context(name, arguments)


@pytest.mark.parametrize(
    ("guide", "command"), with_guide(lambda text: [each for each in commands(text) if " examples/" in each])
)
def test_files_of_commands_exist(guide, command):
    arguments = shlex.split(command)
    for argument in arguments:
        if argument.startswith("examples/"):
            assert (ROOT / argument).exists(), argument
    script = next((argument for argument in arguments if argument.endswith(".py")), None)
    for argument in arguments[arguments.index(script) :] if script else []:
        if argument.startswith("--"):
            assert f'"{argument}"' in (ROOT / script).read_text(), f"{script}: no option {argument}"


@pytest.mark.parametrize(
    ("guide", "command"), with_guide(lambda text: [each for each in commands(text) if "-m pytest" in each])
)
def test_markers_and_files_of_test_commands_exist(guide, command):
    known = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    arguments = shlex.split(command)[shlex.split(command).index("pytest") + 1 :]
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option == "-m":
            assert set(re.findall(r"\w+", value)) <= {*known, "not", "and", "or"}, value
    for argument in arguments:
        if argument.startswith("tests/"):
            files = subprocess.run(["bash", "-c", f"echo {argument}"], capture_output=True, text=True, check=True)
            for file in files.stdout.split():
                assert (ROOT / file.split("::")[0]).exists(), file
        if argument.startswith("--update"):
            assert f'"{argument}"' in (ROOT / "tests" / "conftest.py").read_text(), argument


def anchors(text):
    """The anchors that a page of the Hub or of GitHub gives the headings of a text."""
    headings = re.findall(r"^#+ (.*)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    found = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", without_fences(text))
    return [link for pair in found for link in pair if link and "://" not in link]


@pytest.mark.parametrize(("guide", "link"), with_guide(links))
def test_links_lead_somewhere(guide, link):
    path, _, anchor = link.partition("#")
    target = guide.parent / path if path else guide
    assert target.exists(), f"no file {path}"
    if anchor:
        assert anchor in anchors(target.read_text()), f"{target}: no heading #{anchor}"


def test_readme_stays_short():
    assert len(README.splitlines()) <= MOST_LINES, "move what is long into a guide in examples/"


@pytest.mark.parametrize("guide", STUDIES, ids=lambda guide: guide.parent.name)
def test_a_guide_opens_with_what_to_run(guide):
    code = re.search(r"^```(bash|python)$", guide.read_text(), re.MULTILINE)
    assert code and guide.read_text()[: code.start()].count("\n") <= 5


def test_index_lists_every_guide_and_script():
    index = (ROOT / "examples" / "README.md").read_text()
    assert {(ROOT / "examples" / link).resolve() for link in links(index)} >= {guide.resolve() for guide in STUDIES}
    for script in ROOT.glob("examples/*.py"):
        assert f"`{script.name}`" in index, script.name


def test_main_table_is_that_of_the_card():
    card = (ROOT / "model_cards" / "builtin_student_041" / "README.md").read_text()
    rows = re.findall(r"^\| (?:teacher|converted|stage \d) .*$", card, re.MULTILINE)
    assert len(rows) == 4
    for row in rows:
        assert row in README


def test_every_family_is_in_its_table():
    table = (ROOT / "FAMILIES.md").read_text().split("<!-- families -->")[1]
    assert set(re.findall(r"`([^`]+)`", table)) == set(FAMILIES)
    assert "more than 70 families" in README and len(SUPPORTED) > 70


def test_layout_lists_what_is_there():
    layout = next(code for code in snippets("text") if "configuration_echoatt.py" in code)
    listed = {name.strip("/") for name in re.findall(r"^  ([\w/.]+)", layout, re.MULTILINE)}
    hidden = {"__init__.py", "__pycache__", "py.typed"}
    assert listed == {path.name for path in (ROOT / "echoatt_hf").iterdir()} - hidden

"""Imports point one way: a room of the package knows the rooms before it, and nothing of those after it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import process_environment

import echoatt_hf


pytestmark = pytest.mark.once

PACKAGE = Path(echoatt_hf.__file__).parent

# In the order of the pipeline. A module imports from its own room and from those above it.
ROOMS = [
    "configuration_echoatt",
    "modeling_echoatt",
    "registration",
    "settings",
    "text",
    "models",
    "outputs",
    "analysis",
    "planning",
    "conversion",
    "search",
    "distillation",
    "evaluation",
    "baselines",
    "benchmark",
    "publishing",
    "serving",
    "pipeline",
    "cli",
]

# What a user does with a model or a trainer at hand needs a later stage. Imported when it is called, and not before.
EXCEPTIONS = {
    ("modeling_echoatt", "conversion.student"): "EchoAttForCausalLM.from_teacher",
    ("modeling_echoatt", "publishing.push"): "push_to_hub of a student",
    ("distillation.trainer", "publishing.callbacks"): "push_to_hub of a trainer",
}


def module_name(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {
    module_name(file): file for file in PACKAGE.rglob("*.py") if "metrics" not in file.parts and file.parent != PACKAGE
} | {
    name: PACKAGE / f"{name}.py" for name in ("configuration_echoatt", "modeling_echoatt", "registration", "settings")
}


def imports_of(name):
    """Modules of the package that a module imports, anywhere in it, and whether when it is itself imported."""
    file = MODULES[name]
    package = file.relative_to(PACKAGE).parent.parts
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "echoatt_hf"):
            base = package[: len(package) - node.level + 1] if node.level else ()
            path = [*base, *(node.module.split(".") if node.module else [])]
            path = path if node.level else path[1:]
            for alias in node.names:
                whole = ".".join([*path, alias.name])
                yield (whole if whole in MODULES else ".".join(path)), node in tree.body
        elif isinstance(node, ast.Import):
            yield from ((alias.name, True) for alias in node.names if alias.name.startswith("echoatt_hf"))


def room_of(name):
    return name.split(".")[0]


def test_every_module_is_in_a_room():
    assert {room_of(name) for name in MODULES} == {*ROOMS}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_from_a_later_room(name):
    for imported, is_at_import in imports_of(name):
        if (name, imported) in EXCEPTIONS:
            assert not is_at_import, f"{name} imports {imported}, a later room, when it is imported"
            continue
        assert imported in MODULES, f"{name} imports {imported!r}, which is no module"
        assert ROOMS.index(room_of(imported)) <= ROOMS.index(room_of(name)), f"{name} imports {imported}, a later room"


def test_exceptions_are_needed():
    found = {(name, imported) for name in MODULES for imported, _ in imports_of(name)}
    assert EXCEPTIONS.keys() <= found


def test_no_circle_inside_a_room():
    seen, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in seen:
            return
        path.append(name)
        for imported, _ in imports_of(name):
            if (name, imported) not in EXCEPTIONS and imported != name:
                visit(imported)
        seen.add(path.pop())

    for name in MODULES:
        visit(name)


# What a program has imported of the package when it has done so much, and of the libraries that take seconds.
LOADED = {
    "echoatt --help": ({"cli", "settings"}, set()),
    "echoatt --version": ({"cli", "settings"}, set()),
    "echoatt distill --help": ({"cli", "settings"}, set()),
    "import echoatt_hf": ({"configuration_echoatt", "registration"}, {"torch", "transformers"}),
    "from echoatt_hf import SharingPlan": (
        {"configuration_echoatt", "registration", "planning"},
        {"torch", "transformers"},
    ),
    "from echoatt_hf import EchoAttConfig; EchoAttConfig()": (
        {"configuration_echoatt", "modeling_echoatt", "registration"},
        {"torch", "transformers", "peft"},
    ),
    "from echoatt_hf import EchoAttTrainer": (
        {
            "configuration_echoatt",
            "modeling_echoatt",
            "registration",
            "settings",
            "text",
            "models",
            "outputs",
            "distillation",
        },
        {"torch", "transformers", "peft", "datasets"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", LOADED)
def test_what_is_loaded(program):
    rooms, libraries = LOADED[program]
    code = program
    if program.startswith("echoatt"):
        code = f"import sys; sys.argv = {program.split()!r}; from echoatt_hf.cli import main\ntry: main()\nexcept SystemExit: pass"
    code = f"{code}\nimport sys; print('loaded', *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True, check=True
    )
    loaded = result.stdout.splitlines()[-1].split()
    assert loaded[0] == "loaded"
    assert {name.split(".")[1] for name in loaded if name.startswith("echoatt_hf.")} == rooms
    heavy = {"torch", "transformers", "peft", "datasets", "matplotlib.pyplot", "evaluate"}
    assert heavy & {*loaded} <= libraries

"""
The test suites of transformers and PEFT, from their source distributions, as modules that can be imported.

A distribution is looked for in `upstream/` beside the tests, or where `ECHOATT_UPSTREAM` says: `transformers-5.23.0`, which
may be a checkout of the repository, or `transformers-5.23.0.tar.gz`.
"""

import ast
import importlib
import importlib.machinery
import os
import sys
import tarfile
import types
from importlib.metadata import version
from pathlib import Path


FOLDER = Path(os.environ.get("ECHOATT_UPSTREAM", Path(__file__).parents[1] / "upstream"))


def find_tests(package: str) -> Path | None:
    """The folder of tests in the source distribution of the version of `package` that is installed, unpacked if needed."""
    name = f"{package}-{version(package)}"
    archive = FOLDER / f"{name}.tar.gz"
    if not (FOLDER / name).exists() and archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(FOLDER, filter="data")
    return FOLDER / name / "tests" if (FOLDER / name / "tests").is_dir() else None


def import_tests(folder: Path, module: str, stand_ins: dict[str, tuple[str, ...]], constants: dict[str, object]):
    """
    Import a test module of a source distribution.

    Args:
        folder (`Path`): of the tests.
        module (`str`): its name in the folder.
        stand_ins (`dict[str, tuple[str, ...]]`):
            Modules that it imports and that may not be there, each with the names of classes that stand in for what is taken of it,
            without any test. Those of the folder begin with a dot.
        constants (`dict[str, object]`): values of constants of the module, known before its tests are parametrized with them.
    """
    package = f"upstream_{folder.parent.name.partition('-')[0]}"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    for name, classes in stand_ins.items():
        whole = package + name if name.startswith(".") else name
        try:
            importlib.import_module(whole)
        except ModuleNotFoundError:
            parts = whole.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                if parent not in sys.modules:
                    sys.modules[parent] = types.ModuleType(parent)
                    sys.modules[parent].__path__ = []
                    sys.modules[parent].__spec__ = importlib.machinery.ModuleSpec(parent, None)
            for each in classes:
                setattr(sys.modules[whole], each, type(each, (), {}))
    path = folder / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = set(constants)
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in constants:
            missing.discard(node.targets[0].id)
            node.value = ast.copy_location(ast.Constant(constants[node.targets[0].id]), node.value)
    assert not missing, f"{path} has no {sorted(missing)} any more"
    found = sys.modules[f"{package}.{module}"] = types.ModuleType(f"{package}.{module}")
    found.__package__, found.__file__ = package, str(path)
    exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), vars(found))
    return found

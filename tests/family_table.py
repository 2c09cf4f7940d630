"""The table of families and features that `python -m pytest -m families` prints and keeps in FAMILIES.md."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import transformers
from families import FAMILIES, SUPPORTED, Family
from packaging.version import Version


ROOT = Path(__file__).parents[1]
TABLE = ROOT / "FAMILIES.md"
MARKERS = ("<!-- families -->\n", "<!-- /families -->\n")

# Columns of the table in FAMILIES.md, by the test and variants they stand for.
COLUMNS = {
    "eager": ["logits eager"],
    "sdpa": ["logits sdpa", "gradients sdpa"],
    "flex": ["logits flex_attention"],
    "bfloat16": ["bf16"],
    "training": ["gradients eager", "gradients checkpointed"],
    "caches": ["cache dynamic", "cache dynamic-without-config", "cache static", "cache_bytes"],
    "generation": [
        f"generation {how}"
        for how in (
            "greedy",
            "sampling",
            "beams",
            "beam-sampling",
            "prompt-lookup",
            "assisted",
            "chunked-prefill",
            "static",
            "static-beams",
        )
    ],
    "continuous batching": ["continuous_batching"],
    "packed rows": ["packed_rows"],
    "outputs": ["output attentions", "output hidden_states"],
    "files": ["save_and_load"],
}


def family_of(item) -> Family | None:
    """The family a test is about."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return next((value for value in parameters.values() if isinstance(value, Family)), None)


def is_always_run(item) -> bool:
    """Whether a test of a family runs without `-m families`: those of representative ones, and the cheap ones."""
    family = family_of(item)
    always = item.get_closest_marker("families").kwargs.get("always", False)
    return always or (family is not None and family.representative)


class FamilyTable:
    """Collects the results of the tests of families, as a plugin of pytest."""

    def __init__(self):
        self.cells: dict[str, dict[str, str]] = defaultdict(dict)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item):
        report = (yield).get_result()
        family = family_of(item)
        if family is None or not item.get_closest_marker("families"):
            return
        feature = item.originalname.removeprefix("test_")
        if "variant" in item.callspec.params:
            feature = f"{feature} {item.callspec.params['variant']}"
        if report.skipped:
            cell = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            cell = "FAILED"
        elif report.when == "call":
            reason = dict(report.user_properties).get("refused")
            cell = f"refused: {reason}" if reason else "ok"
        else:
            return
        if self.cells[family.name].get(feature) != "FAILED":  # of two students of a family
            self.cells[family.name][feature] = cell

    def pytest_terminal_summary(self, terminalreporter, config):
        if "families" in config.option.markexpr and self.cells:
            terminalreporter.section("families")
            terminalreporter.write_line(self.describe())

    @property
    def features(self) -> list[str]:
        return list(dict.fromkeys(feature for row in self.cells.values() for feature in row if feature != "refused"))

    def describe(self) -> str:
        """The whole table as text: a row for each family, a column for each feature, then what is not simply ok."""
        features = self.features
        width = max(map(len, self.cells))
        lines = [f"{'':{width}} {number:3d} {feature}" for number, feature in enumerate(features, 1)]
        lines.append(f"{'':{width}} {' '.join(f'{number:>4d}' for number in range(1, len(features) + 1))}")
        reasons = defaultdict(list)
        for name, row in self.cells.items():
            first, *others = set(row.values())
            if not others and first not in ("ok", "FAILED"):
                lines.append(f"{name:{width}} {first}")
                continue
            marks = [{"ok": "ok", "FAILED": "FAIL", None: ""}.get(row.get(feature), "-") for feature in features]
            lines.append(f"{name:{width}} {' '.join(f'{mark:>4}' for mark in marks)}".rstrip())
            for feature, mark in zip(features, marks, strict=True):
                if mark == "-":
                    reasons[row[feature], feature].append(name)
        for (cell, feature), names in reasons.items():
            lines.append(f"- {feature}: {cell} ({', '.join(names)})")
        return "\n".join(lines)

    def why_not_for_the_file(self) -> str | None:
        """Why the results at hand are not those that FAMILIES.md tells, or `None` if they are."""
        pinned = re.findall(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        newest = max(pinned, key=Version)
        if transformers.__version__ != newest:
            return f"{TABLE.name} tells the results with transformers {newest}"
        columns = {feature for group in COLUMNS.values() for feature in group}
        if set(self.cells) != set(FAMILIES) or any(columns - set(self.cells[each.name]) for each in SUPPORTED):
            return f"{TABLE.name} tells the results of all families: -m families"
        return None

    def check_file(self, update: bool) -> None:
        """Compare the table in FAMILIES.md with the results, or write it."""
        text = TABLE.read_text()
        before, rest = text.split(MARKERS[0])
        table, after = rest.split(MARKERS[1])
        found = self.render()
        if update:
            TABLE.write_text(before + MARKERS[0] + found + MARKERS[1] + after)
        else:
            assert found == table, f"{TABLE.name} is out of date: run with --update-readme"

    def render(self) -> str:
        """The tables of the file: families with the same results in one row, and the refused ones with the reason."""
        rows, refused, notes = defaultdict(list), defaultdict(list), []
        for name in sorted(self.cells):
            row = self.cells[name]
            if "refused" in row:
                refused[_shorten(row["refused"])].append(f"`{name}`")
                continue
            cells = []
            for features in COLUMNS.values():
                missing = dict.fromkeys(row[feature] for feature in features if row[feature] != "ok")
                for note in missing:
                    if note not in notes:
                        notes.append(note)
                marks = ", ".join(str(notes.index(note) + 1) for note in missing)
                cells.append(f"no ({marks})" if missing else "yes")
            rows[tuple(cells)].append(f"`{name}`")
        lines = [f"| family | {' | '.join(COLUMNS)} |", "|---|" + ":-:|" * len(COLUMNS)]
        for cells, names in sorted(rows.items(), key=lambda row: -len(row[1])):
            lines.append(f"| {', '.join(names)} | {' | '.join(cells)} |")
        lines += ["", *(f"({number}) {note}.  " for number, note in enumerate(notes, 1))]
        lines += ["", "| refused | because |", "|---|---|"]
        lines += [f"| {', '.join(names)} | {reason} |" for reason, names in sorted(refused.items(), key=str)]
        return "\n".join(lines) + "\n"


def _shorten(cell: str) -> str:
    """The reason in the message of a refusal."""
    reason = cell.removeprefix("refused: ")
    reason = re.sub(r"^EchoAtt does not support the family '.*?' yet: ", "", reason).removesuffix(".")
    return re.sub(r"^its attention \w+ ", "its attention ", reason)

"""Runs that another version of the package, with more or fewer settings, began."""

import importlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import pytest

from echoatt_hf.pipeline.unfinished import unfinished_run
from echoatt_hf.settings import (
    RECIPES,
    CompressionSettings,
    DataSettings,
    DistillationSettings,
    StudentSettings,
    describe_settings,
    differing_settings,
    read_settings,
)


NOW = CompressionSettings(distillation=DistillationSettings(recipe="paper", steps=40))


@dataclass(frozen=True)
class NextDistillation(DistillationSettings):
    """With settings that are new: one with a default of its own, one with that of the recipe, one that follows from another."""

    depth: int = 3
    pace: float | None = None
    rounds: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, default in (("pace", {"default": 0.1, "paper": 0.2}[self.recipe]), ("rounds", self.steps // 4)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)


@dataclass(frozen=True)
class NextGroup:
    flavour: str = "plain"


@dataclass(frozen=True)
class NextSettings(CompressionSettings):
    group: NextGroup = field(default_factory=NextGroup)


def as_next(settings, group=None, **changes):
    """The settings as the version after this one has them."""
    distillation = NextDistillation(**asdict(settings.distillation), **changes)
    values = {each.name: getattr(settings, each.name) for each in fields(settings)} | {"distillation": distillation}
    return NextSettings(**values, **({"group": group} if group else {}))


CHANGES = {
    "at their defaults": ({}, set()),
    "given": ({"depth": 4}, {"distillation.depth"}),
    "given against the recipe": ({"pace": 0.1}, {"distillation.pace"}),
    "given against what follows": ({"rounds": 2}, {"distillation.rounds"}),
    "a group": ({"group": NextGroup("sour")}, {"group"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_setting_that_one_version_lacks_counts_as_its_default(case):
    changes, names = CHANGES[case]
    one, other = (describe_settings(each) for each in (NOW, as_next(NOW, **changes)))
    assert {*differing_settings(one, other)} == names  # it was added
    assert {*differing_settings(other, one)} == names  # it was removed


def test_what_both_versions_have_is_compared_whatever_its_default_is(monkeypatch):
    """A default that has changed makes another run."""
    kept = describe_settings(CompressionSettings())
    monkeypatch.setitem(RECIPES["default"], "learning_rate", 5e-4)
    now = describe_settings(CompressionSettings())
    assert kept["given"] == now["given"] == []
    assert differing_settings(kept, now) == {"distillation.learning_rate": (1e-3, 5e-4)}


def test_settings_kept_by_an_earlier_version_are_compared():
    """Up to version 0.2.0 the values alone were kept."""
    kept = json.loads(NOW.to_json())
    for name in ("target", "moves", "from_search", "decode_context"):
        del kept["plan"][name]
    assert differing_settings(kept, describe_settings(NOW)) == {}
    wanted = replace(NOW, plan=replace(NOW.plan, target=["kv-bytes=-10%"]))
    assert {*differing_settings(kept, describe_settings(wanted))} == {"plan.target"}
    kept["plan"]["speed"] = 2  # whether that was its default is not known
    assert differing_settings(kept, describe_settings(NOW)) == {"plan.speed": (2, None)}


def test_what_a_stored_teacher_is_made_of_is_given():
    """It is said in a dictionary, not by settings with defaults."""
    one, other = (
        describe_settings(StudentSettings("student", stored_teacher={"folder": "store"} | more))
        for more in ({}, {"top_k": 8})
    )
    assert differing_settings(one, other) == {"stored_teacher.top_k": (None, 8)}


def test_settings_that_are_no_more_are_left_out_where_text_is_described():
    kept = asdict(DataSettings(row_length=32)) | {"colour": "red"}
    assert read_settings(DataSettings, kept) == DataSettings(row_length=32)


def begin(output, settings, **options):
    with unfinished_run(output, settings, False, **options) as work:
        (work / "checkpoints").mkdir(exist_ok=True)
        raise KeyboardInterrupt


def test_a_run_goes_on_in_the_next_version(tmp_path):
    output, file = tmp_path / "out", tmp_path / "out.partial" / "settings.json"
    with pytest.raises(KeyboardInterrupt):
        begin(output, NOW, resume=False)
    with pytest.raises(
        ValueError, match=r"distillation.depth was None and is 4.*only distillation.batch_size, .* may differ"
    ):
        begin(output, as_next(NOW, depth=4), resume=True)
    with pytest.raises(KeyboardInterrupt):
        begin(output, as_next(NOW), resume=True)
    assert json.loads(file.read_text())["settings"]["distillation"]["depth"] == 3
    with pytest.raises(KeyboardInterrupt):
        begin(output, NOW, resume=True)


def test_a_study_goes_on_in_the_next_version(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    made = importlib.import_module("reproduce_paper")
    study = made.Study(made.parse_arguments(["--output", str(tmp_path), "--scale", "tiny"]))
    run = made.Run("paper", 0.4, made.Start(), "paper", DistillationSettings(steps=6))
    study._claim(run.folder, run)
    file = tmp_path / run.folder / "settings.json"
    claimed = json.loads(file.read_text())
    assert study._check(run.folder, run) == file.parent
    later = replace(run, distillation=NextDistillation(**asdict(run.distillation)))
    study._check(later.folder, later)
    with pytest.raises(ValueError, match="made with other settings"):
        study._check(run.folder, replace(later, distillation=replace(later.distillation, depth=4)))
    # As studies were kept before: the values alone.
    file.write_text(json.dumps(claimed["settings"], indent=2) + "\n")
    study._check(later.folder, later)
    with pytest.raises(ValueError, match="made with other settings"):
        study._check(run.folder, replace(run, distillation=DistillationSettings(steps=7)))

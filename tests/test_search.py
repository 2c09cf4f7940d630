"""Plan search by effect: greedy, within its constraints, resumable."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import kl_of, make_batch, make_teacher, similarity_of

from echoatt_hf import (
    AttentionSimilarity,
    plan_like_paper,
    search_plan,
)
from echoatt_hf.conversion import pairs as pairs_module
from echoatt_hf.conversion.pairs import TunedPairs
from echoatt_hf.search import effect as search_module
from echoatt_hf.settings import MOVES, parse_target


pytestmark = pytest.mark.once

UNTUNED = {"align": False, "refit": False}


@pytest.fixture(scope="module")
def rows():
    return [{"input_ids": row.tolist()} for row in make_batch(16, 16)["input_ids"]]


@pytest.fixture(scope="module")
def llama(rows):
    teacher = make_teacher("llama", num_hidden_layers=7)
    return teacher, similarity_of(teacher, rows)


def test_greedy_as_by_hand(llama, rows):
    teacher, similarity = llama
    plan, measured = list(range(7)), rows[12:]
    for _ in range(3):
        options = [
            (echo, source)
            for echo in range(1, 6)
            for source in range(echo)
            if plan[echo] == echo and plan[source] == source
        ]
        candidates = [[source if each == echo else each for each in plan] for echo, source in options]
        plan = min(candidates, key=lambda candidate: kl_of(teacher, candidate, measured))
    found = search_plan(teacher, rows, similarity, ratio=0.43, width=100, **UNTUNED)
    assert found.kl["effect"] == pytest.approx(kl_of(teacher, plan, measured), rel=1e-4)
    assert found.rounds[-1]["kl"] == found.kl["effect"]
    greedy = list(range(7))
    for each in found.rounds:
        greedy = [each["entry"] if source == each["layer"] else source for source in greedy]
    assert greedy == plan
    assert found.tokens == 4 * 16
    # The best of all rules wins, and each value is the measured one.
    assert min(found.kl, key=found.kl.get) == "effect" or list(found.plan) != plan
    assert kl_of(teacher, list(found.plan), measured) == pytest.approx(min(found.kl.values()), rel=1e-4)


def test_tuning_is_part_of_what_is_measured(llama, rows):
    teacher, similarity = llama
    copied = search_plan(teacher, rows, similarity, ratio=0.15, width=1, **UNTUNED)
    tuned = search_plan(teacher, rows, similarity, ratio=0.15, width=1)
    assert tuned.kl["effect"] < copied.kl["effect"]


def test_what_is_forgotten_is_tuned_again(llama, rows, monkeypatch):
    """Memory is bounded, and the plan does not depend on it."""
    teacher, similarity = llama
    whole = search_plan(teacher, rows, similarity, ratio=0.43, width=4)
    monkeypatch.setattr(search_module, "_shortlist", lambda expected, plans: [])
    found = search_plan(teacher, rows, similarity, ratio=0.43, width=4)
    assert found.plan == whole.plan and found.kl == pytest.approx(whole.kl, rel=1e-3)


def test_a_pass_that_begins_at_a_layer_is_the_whole_one(llama, rows, monkeypatch):
    teacher, similarity = llama
    whole = search_plan(teacher, rows, similarity, ratio=0.43, width=4)
    monkeypatch.setattr(search_module, "find_layers", lambda model: None)
    found = search_plan(teacher, rows, similarity, ratio=0.43, width=4)
    assert found.plan == whole.plan and found.kl == pytest.approx(whole.kl, rel=1e-4)
    for one, other in zip(found.rounds, whole.rounds, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4)


def test_width_bounds_the_cost(llama, rows):
    teacher, similarity = llama
    found = search_plan(teacher, rows, similarity, ratio=0.43, width=2, **UNTUNED)
    assert found.forwards <= 3 * 2 + 3  # three rounds, three other rules
    assert f"{found.forwards} forwards of 64 tokens" in str(found)
    assert torch.is_grad_enabled()


def test_other_rules_are_candidates(llama, rows):
    """The paper's too, unless it breaks what was asked for."""
    teacher, similarity = llama
    found = search_plan(teacher, rows, similarity, ratio=0.29, width=1, protected_layers=0, **UNTUNED)
    plan = plan_like_paper(similarity.flattened.tolist(), 0.29)
    assert found.kl["paper"] == pytest.approx(kl_of(teacher, plan, rows[12:]), rel=1e-4)
    assert [*found.kl] == ["effect", "similarity", "paper", "spread"]
    bounded = search_plan(teacher, rows, similarity, ratio=0.15, width=1, protected_layers=2, **UNTUNED)
    allowed = all(2 <= echo < 5 for echo in plan_like_paper(similarity.flattened.tolist(), 0.15).echo_layers)
    assert ("paper" in bounded.kl) == allowed
    old = AttentionSimilarity(similarity.heads, similarity.rows)
    assert "paper" not in search_plan(teacher, rows, old, ratio=0.29, width=1, protected_layers=0, **UNTUNED).kl


@pytest.mark.parametrize("protected", [0, 1, 2])
def test_protected_layers_do_not_echo(llama, rows, protected):
    teacher, similarity = llama
    found = search_plan(teacher, rows, similarity, ratio=0.29, width=2, protected_layers=protected, **UNTUNED)
    assert all(protected <= each["layer"] < 7 - protected for each in found.rounds)
    assert len(found.plan.echo_layers) == 2


def test_blocks_are_no_longer_than_allowed(llama, rows):
    teacher, similarity = llama
    found = search_plan(teacher, rows, similarity, ratio=0.43, width=3, block_size=2, **UNTUNED)
    assert len(found.plan.echo_layers) == 3
    assert all(len(block) == 2 for block in found.plan.blocks)
    with pytest.raises(ValueError, match="5 echo layers, but at most 0.429, 3 layers can echo"):
        search_plan(teacher, rows, similarity, ratio=0.71, width=3, block_size=2, **UNTUNED)


def test_echoes_have_the_type_of_their_source(rows):
    teacher = make_teacher("gemma3_text")
    found = search_plan(teacher, rows, similarity_of(teacher, rows), ratio=0.5, width=3)
    types = teacher.config.layer_types
    assert len(found.plan.echo_layers) == 3
    assert all(types[echo] == types[source] for echo, source in enumerate(found.plan))


def test_what_was_measured_is_not_measured_again(llama, rows, tmp_path, monkeypatch):
    teacher, similarity = llama
    options = {"ratio": 0.43, "width": 5, "state": tmp_path / "measured.json", **UNTUNED}
    whole = search_plan(teacher, rows, similarity, **{**options, "state": None})
    measure, measured = search_module._Measure._measure, []

    def stop_after(self, plan, count):
        if len(measured) == count:
            raise KeyboardInterrupt
        measured.append(plan)
        return measure(self, plan)

    monkeypatch.setattr(search_module._Measure, "_measure", lambda self, plan: stop_after(self, plan, 9))
    with pytest.raises(KeyboardInterrupt):
        search_plan(teacher, rows, similarity, **options)
    assert len(json.loads((tmp_path / "measured.json").read_text())["kl"]) == 9
    monkeypatch.setattr(search_module._Measure, "_measure", lambda self, plan: stop_after(self, plan, 1000))
    resumed = search_plan(teacher, rows, similarity, **options)
    assert resumed == whole
    assert len(measured) == whole.forwards


@pytest.mark.parametrize(
    "options", [{"ratio": 0.43}, {"targets": [parse_target("parameters=-25%")], "moves": [*MOVES.values()]}]
)
def test_changes_are_not_estimated_again(llama, rows, tmp_path, monkeypatch, options):
    """Each is estimated as soon as it is tuned. After a stop what is measured then is tuned again, and nothing else."""
    teacher, similarity = llama
    options = {**options, "width": 4, "state": tmp_path / "measured.json"}
    monkeypatch.setattr(pairs_module, "_memory_budget", lambda device: 0)  # each change is tuned in a pass of its own
    whole = search_plan(teacher, rows, similarity, **{**options, "state": None})
    done, tuned, stop_at = {"effects": [], "_measure": []}, [], {}

    def stopping(owner, name):
        work = getattr(owner, name)

        def stop(self, what, *given):
            if len(done[name]) == stop_at.get(name):
                raise KeyboardInterrupt
            done[name] += what if name == "effects" else [what]
            return work(self, what, *given)

        monkeypatch.setattr(owner, name, stop)

    def note(self, pairs, **more):
        before = {*self.parameters}
        tune(self, pairs, **more)
        tuned.extend({*self.parameters} - before)

    stopping(TunedPairs, "effects")
    stopping(search_module._Measure, "_measure")
    for stop_at in ({"effects": 10}, {"_measure": 6}):  # noqa: B007 - which `stop` reads
        with pytest.raises(KeyboardInterrupt):
            search_plan(teacher, rows, similarity, **options)
        content = json.loads(options["state"].read_text())
        assert [len(content[name]) for name in ("expected", "kl")] == [len(found) for found in done.values()]
    stop_at, tune = {}, TunedPairs.tune
    monkeypatch.setattr(TunedPairs, "tune", note)
    monkeypatch.setattr(search_module, "sample_gradients", None)  # nothing is left to estimate
    assert search_plan(teacher, rows, similarity, **options) == whole
    assert len(done["_measure"]) == whole.forwards
    assert len(done["effects"]) == len({*done["effects"]}) > len(tuned) == len({*tuned})


def test_a_state_of_the_version_before_counts_as_made_with_defaults(llama, rows, tmp_path):
    """Of a setting that it does not have. Nor does it have what is expected of changes."""
    teacher, similarity = llama
    options = {"ratio": 0.15, "width": 1, "state": tmp_path / "measured.json"}
    whole = search_plan(teacher, rows, similarity, **options)
    content = json.loads(options["state"].read_text())
    del content["measured_on"]["align"], content["measured_on"]["search_rows"], content["expected"]
    options["state"].write_text(json.dumps(content))
    for changes, name in (({"align": False}, "align"), ({"search_rows": 2}, "search_rows")):
        with pytest.raises(ValueError, match=f"measured with another {name}:"):
            search_plan(teacher, rows, similarity, **{**options, **changes})
    assert search_plan(teacher, rows, similarity, **options) == whole


def test_what_was_measured_on_something_else_is_refused(llama, rows, tmp_path):
    teacher, similarity = llama
    options = {"ratio": 0.15, "width": 1, "state": tmp_path / "measured.json", **UNTUNED}
    first = search_plan(teacher, rows, similarity, **options)
    # Another ratio and width need no other measurements.
    assert search_plan(teacher, rows, similarity, **{**options, "ratio": 0.29}).forwards > first.forwards
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    changed_rows = [*rows[:-1], {"input_ids": rows[0]["input_ids"]}]
    cases = {
        "teacher": (other, rows, {}),
        "rows": (teacher, changed_rows, {}),
        "search_rows": (teacher, rows, {"search_rows": 2}),
        "align": (teacher, rows, {"align": True}),
    }
    before = options["state"].read_text()
    for name, (model, text, changes) in cases.items():
        with pytest.raises(ValueError, match=rf"measured.json' holds was measured with another {name}:"):
            search_plan(model, text, similarity, **{**options, **changes})
    with pytest.raises(ValueError, match="another rows, similarity"):
        search_plan(teacher, changed_rows, similarity_of(teacher, changed_rows), **options)
    assert options["state"].read_text() == before
    options["state"].write_text('{"0,1,1,3,4,5,6": 0.1}')
    with pytest.raises(ValueError, match="does not hold what a search has measured"):
        search_plan(teacher, rows, similarity, **options)


def test_impossible_numbers_are_refused(llama, rows):
    teacher, similarity = llama
    for options, message in (
        ({"ratio": 0.99}, "at most 0.714, 5 layers can echo"),
        ({"ratio": 0.43, "width": 0}, "width is 0"),
        ({"ratio": 0.43, "search_rows": 0}, "search_rows is 0"),
        ({"ratio": 0.43, "block_size": 1}, "block_size is 1"),
        ({"ratio": 0.43, "protected_layers": 3}, "two are needed"),
    ):
        with pytest.raises(ValueError, match=message):
            search_plan(teacher, rows, similarity, **options)
    with pytest.raises(ValueError, match="at least 2 rows"):
        search_plan(teacher, rows[:1], similarity, ratio=0.43)


def test_a_teacher_that_is_spread_over_devices_stays_so(llama, rows):
    """The layers of one have a forward pass of accelerate's, which moves what they are given."""
    teacher, similarity = copy.deepcopy(llama[0]), llama[1]
    for layer in teacher.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    forwards = [vars(layer)["forward"] for layer in teacher.model.layers]
    found = search_plan(teacher, rows, similarity, ratio=0.29, width=2)
    assert [vars(layer).get("forward") for layer in teacher.model.layers] == forwards
    expected = search_plan(llama[0], rows, similarity, ratio=0.29, width=2)
    assert found.plan == expected.plan and found.kl == pytest.approx(expected.kl, rel=1e-4)


def test_the_search_keeps_no_logits_of_rows(llama, rows, monkeypatch):
    teacher, similarity = llama
    made = []
    hook = teacher.register_forward_hook(lambda module, args, output: made.append(output.logits.shape[1]))
    monkeypatch.setattr(search_module, "sample_gradients", lambda *args: None)
    monkeypatch.setattr(search_module.TunedPairs, "effects", lambda self, pairs, *args: dict.fromkeys(pairs, 1.0))
    search_plan(teacher, rows, similarity, ratio=0.29, width=2, **UNTUNED)
    hook.remove()
    assert 1 in made and max(made) <= 4 < 16, "a conversion is checked on four tokens"


def test_layers_that_do_nothing_are_echoes_first(rows):
    """Nothing is expected of them, and nothing comes of them: the ratio of the two is 0 / 0."""
    teacher = make_teacher("llama", num_hidden_layers=12)
    with torch.no_grad():
        teacher.model.layers[9].self_attn.o_proj.weight.zero_()
    found = search_plan(teacher, rows, ratio=0.3, width=8, **UNTUNED)
    assert found.rounds[0]["layer"] == 9 and found.rounds[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert len(found.plan.echo_layers) == 4


def test_a_family_that_cannot_drop_layers_is_refused_before_the_search(rows, monkeypatch):
    """Every second layer of it has experts, by index. So the configuration of fewer layers gives others."""
    monkeypatch.setattr(search_module, "measure_on_rows", None)
    teacher = make_teacher("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2)
    options = {"targets": [parse_target("parameters=-5%")], **UNTUNED}
    with pytest.raises(
        ValueError, match="cannot be dropped from the family 'qwen3_moe'.*Leave `drop` out of the moves"
    ):
        search_plan(teacher, rows, moves=("echo", "drop"), **options)


def test_bytes_read_are_not_counted_of_experts(rows, monkeypatch):
    monkeypatch.setattr(search_module, "measure_on_rows", None)
    teacher = make_teacher("qwen3_moe", num_hidden_layers=6)
    with pytest.raises(ValueError, match="of the experts of this model a token reads a few"):
        search_plan(teacher, rows, targets=[parse_target("decode=1.1x")], **UNTUNED)


def test_a_similarity_without_heads_is_refused_at_once(llama, rows, monkeypatch):
    teacher, similarity = llama
    monkeypatch.setattr(search_module, "TunedPairs", None)
    without = replace(similarity, heads=None)
    with pytest.raises(ValueError, match="The similarity of heads is not known"):
        search_plan(teacher, rows, without, ratio=0.3)


def test_memory_that_runs_out_while_changes_are_estimated_is_explained(llama, rows, monkeypatch):
    def run_out(*arguments):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(search_module, "sample_gradients", run_out)
    with pytest.raises(MemoryError, match="gradients of each layer for each token of search_rows 8"):
        search_plan(*llama[:1], rows, llama[1], ratio=0.3, **UNTUNED)

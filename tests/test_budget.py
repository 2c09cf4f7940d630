"""Search by budget: what plans cost, what changes are expected to do, and the plans that a search takes and keeps."""

import json

import pytest
import torch
from conftest import FP32_TOLERANCE, effect_by_hand, kl_of, make_batch, make_teacher, similarity_of
from transformers import BatchEncoding
from typer.testing import CliRunner

from echoatt_hf import EchoAttForCausalLM, SharingPlan, convert, count_kv_bytes_per_token, search_plan
from echoatt_hf.benchmark.costs import count_costs
from echoatt_hf.cli.app import app
from echoatt_hf.conversion.pairs import TunedPairs, sample_gradients
from echoatt_hf.modeling_echoatt import EchoRecords
from echoatt_hf.models.families import find_attention_modules, find_output_projection
from echoatt_hf.models.inference import inference
from echoatt_hf.planning.from_settings import choose_from_frontier, make_plan, parse_entries
from echoatt_hf.search.budget import PlanCounter
from echoatt_hf.search.effect import PlanSearch, find_frontier, with_pair
from echoatt_hf.settings import PlanSettings, Target, parse_target


pytestmark = pytest.mark.once

SKIP, DROP = "skip attention", "drop"
ALL = ("echo", "kv", SKIP, DROP)
UNTUNED = {"align": False, "refit": False}
PLANS = [[0, 1, 1, 3, 4, 5], [0, 1, "kv 1", SKIP, 4, 5], [0, 1, DROP, 1, "kv 1", DROP], [0, 1, 2, SKIP, SKIP, "kv 2"]]


@pytest.fixture(scope="module")
def rows():
    return [{"input_ids": row.tolist()} for row in make_batch(16, 16)["input_ids"]]


@pytest.fixture(scope="module")
def llama(rows):
    teacher = make_teacher("llama")
    return teacher, similarity_of(teacher, rows)


def pairs_of(plans):
    return sorted({(layer, entry) for plan in plans for layer, entry in enumerate(plan) if entry != layer}, key=str)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_costs_are_those_of_the_student(family, tied, rows):
    teacher = make_teacher(family, None, tie_word_embeddings=tied)
    types = getattr(teacher.config, "layer_types", None)
    plans = PLANS if len({*(types or [])}) < 2 else [[0, 1, 0, SKIP, 4, "kv 1"], [0, 1, DROP, 1, SKIP, DROP]]
    tuned = TunedPairs(teacher, similarity_of(teacher, rows), pairs_of(plans), [], [], **UNTUNED)
    counter = PlanCounter(teacher, tuned.count_parameters, 100)
    for plan in (list(range(6)), *plans):
        costs, student = counter(plan), EchoAttForCausalLM.from_teacher(teacher, plan)
        read = count_costs(student)
        assert costs.parameters == student.num_parameters()
        assert costs.kv_bytes_per_token == count_kv_bytes_per_token(student)
        assert costs.decode_bytes == read.weight_bytes + 100 * read.kv_bytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_plan_in_place_is_its_student(family, rows):
    teacher = make_teacher(family, None)
    plans = PLANS if family != "gemma2" else [[0, 1, 0, SKIP, 4, "kv 1"], [0, 1, DROP, 1, SKIP, DROP]]
    tuned = TunedPairs(teacher, similarity_of(teacher, rows), pairs_of(plans), [], [], **UNTUNED)
    batch = make_batch(2, 12)
    before = teacher(**batch, use_cache=False).logits
    for plan in plans:
        expected = EchoAttForCausalLM.from_teacher(teacher, plan)
        with inference(teacher), tuned.in_place(plan):
            found = teacher(**batch, use_cache=False, echo_records=EchoRecords()).logits
        torch.testing.assert_close(found, expected(**batch, use_cache=False).logits, **FP32_TOLERANCE)
    torch.testing.assert_close(teacher(**batch, use_cache=False).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("entry", ["kv 0", SKIP, DROP])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_expected_effects_as_by_hand(family, entry, monkeypatch):
    """Gradients by finite differences, with the tokens of the text in place of drawn ones, and the sum written out."""
    teacher, layer = make_teacher(family, None).double(), 2
    ids = make_batch(3, 8)["input_ids"]
    batch, pair = BatchEncoding({"input_ids": ids}), (layer, entry)
    tuned = TunedPairs(
        teacher, similarity_of(teacher, [{"input_ids": row.tolist()} for row in ids]), [pair], [], [], **UNTUNED
    )
    tuned.tune([pair])
    drawn = iter(ids[:, 1:])
    monkeypatch.setattr(torch, "multinomial", lambda probs, samples, **_: next(drawn)[:, None].expand(-1, samples))
    where = ([], [layer]) if entry == DROP else ([layer], [])
    found = tuned.effects([pair], [batch], sample_gradients(teacher, [batch], *where, samples=2))[pair]

    block = teacher.get_submodule("transformer.h" if family == "gpt2" else "model.layers")[layer]
    module = block if entry == DROP else find_output_projection(find_attention_modules(teacher)[layer])
    seen = {}
    hook = module.register_forward_hook(lambda m, args, out: seen.update(args=args, out=out))
    with torch.no_grad():
        teacher(ids, use_cache=False)
    hook.remove()
    out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    if entry == DROP:
        change = seen["args"][0] - out
    elif entry == SKIP:
        change = -out
    else:
        student = EchoAttForCausalLM.from_teacher(teacher, with_pair(list(range(6)), pair))
        projection = find_output_projection(find_attention_modules(student.language_model)[layer])
        hook = projection.register_forward_hook(lambda m, args, out: seen.update(changed=out))
        with torch.no_grad():
            student(ids, use_cache=False)
        change = seen["changed"] - out
    by_hand = effect_by_hand(teacher, module, ids, change.flatten(0, 1))
    assert found == pytest.approx(by_hand, rel=0.02)


def test_search_takes_the_cheapest_for_what_it_saves(llama, rows):
    teacher, similarity = llama
    target = Target("kv-bytes", 0.8)
    found = search_plan(teacher, rows, similarity, targets=[target], moves=ALL, width=1000, **UNTUNED)
    first, limit = found.rounds[0], 0.8 * found.teacher["kv_bytes_per_token"]
    prices = {}
    for layer in range(1, 5):
        for entry in [*range(layer), *(f"kv {source}" for source in range(layer)), SKIP, DROP]:
            plan = with_pair(list(range(6)), (layer, entry))
            saved = count_kv_bytes_per_token(teacher) - count_kv_bytes_per_token(
                EchoAttForCausalLM.from_teacher(teacher, plan)
            )
            useful = min(saved, count_kv_bytes_per_token(teacher) - limit)
            prices[layer, entry] = kl_of(teacher, plan, rows[12:]) / useful
    assert (first["layer"], first["entry"]) == min(prices, key=prices.get)
    assert found.rounds[-1]["kv_bytes_per_token"] <= limit < found.teacher["kv_bytes_per_token"]
    student = EchoAttForCausalLM.from_teacher(teacher, found.plan)
    assert count_kv_bytes_per_token(student) == found.rounds[-1]["kv_bytes_per_token"]
    assert kl_of(teacher, list(found.plan), rows[12:]) == pytest.approx(found.kl["effect"], rel=1e-4)


def test_dropped_layers_are_measured_with_what_takes_them_up(llama, rows):
    """As conversion makes the student: what a search promises is what it gives."""
    teacher, similarity = llama
    more = [{"input_ids": row.tolist()} for row in make_batch(96, 16)["input_ids"]]
    found = search_plan(teacher, more, similarity, targets=[Target("parameters", 0.95)], moves=(DROP,), search_rows=24)
    assert len(found.plan.dropped_layers) == 1
    student, report = convert(teacher, found.plan, more)
    assert report.taken_up and report.kl["tuned"] < report.kl["copied"]
    assert found.kl["effect"] == pytest.approx(report.kl["tuned"], rel=1e-3)


def test_the_plan_is_the_best_of_all_that_were_measured(llama, rows):
    teacher, similarity = llama
    target = Target("parameters", 0.9)
    found = search_plan(teacher, rows, similarity, targets=[target], moves=ALL, width=1000, **UNTUNED)
    assert list(found.plan) == choose_from_frontier(found.teacher, found.frontier, [target])


def test_a_layer_may_change_again_to_what_saves_more(llama, rows):
    """All inner layers have to go from the cache: echoes become something else."""
    teacher, similarity = llama
    targets = [Target("kv-bytes", 1 / 3), Target("parameters", 0.97)]
    found = search_plan(teacher, rows, similarity, targets=targets, moves=("echo", "kv"), width=4, **UNTUNED)
    assert len(found.rounds) > len({each["layer"] for each in found.rounds}) == 4
    assert found.plan.kv_layers == [1, 2, 3, 4] and found.plan.source_layers == [0]
    assert all(found.rounds[-1][target.field] <= target.share * found.teacher[target.field] for target in targets)


def test_targets_out_of_reach_are_refused(llama, rows):
    teacher, similarity = llama
    with pytest.raises(ValueError, match=r"out of reach .* kv_bytes_per_token -33.3%. Allow more moves"):
        search_plan(teacher, rows, similarity, targets=[Target("kv-bytes", 0.5)], width=2, **UNTUNED)


def test_frontier_and_what_is_chosen_from_it(llama, rows):
    teacher, similarity = llama
    target = Target("kv-bytes", 0.5)
    found = search_plan(teacher, rows, similarity, targets=[target], moves=ALL, width=4, **UNTUNED)
    names = ("parameters", "kv_bytes_per_token", "decode_bytes")
    assert [each["kl"] for each in found.frontier] == sorted(each["kl"] for each in found.frontier)
    for one in found.frontier:
        beaten = [
            other for other in found.frontier if other is not one and all(other[n] <= one[n] for n in ("kl", *names))
        ]
        assert not beaten
        assert kl_of(teacher, one["layer_plan"], rows[12:]) == pytest.approx(one["kl"], rel=1e-4)
    smaller = Target("kv-bytes", 0.75)
    plan = choose_from_frontier(found.teacher, found.frontier, [smaller])
    fitting = [
        each for each in found.frontier if each["kv_bytes_per_token"] <= 0.75 * found.teacher["kv_bytes_per_token"]
    ]
    assert plan == min(fitting, key=lambda each: each["kl"])["layer_plan"]
    with pytest.raises(
        ValueError, match="No plan that this search has measured reaches the target; it came to parameters"
    ):
        choose_from_frontier(found.teacher, found.frontier, [Target("parameters", 0.05)])


def test_frontier_leaves_out_what_another_plan_beats():
    point = {"parameters": 10, "kv_bytes_per_token": 10, "decode_bytes": 10, "kl": 0.1}
    worse, other = point | {"kl": 0.2}, point | {"kl": 0.3, "kv_bytes_per_token": 5}
    assert find_frontier([worse, other, point, {**point}]) == [point, other]


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("kv-bytes=-40%", Target("kv-bytes", 0.6)),
        ("parameters=-12.5%", Target("parameters", 0.875)),
        ("decode=1.25x", Target("decode", 0.8)),
    ],
)
def test_targets_are_read(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": ["kv-bytes=40%"]}, r"target is 'kv-bytes=40%'; it must be parameters=-N% or kv-bytes=-N%"),
        ({"target": ["kv-bytes=-100%"]}, "target is 'kv-bytes=-100%'; it must be"),
        ({"target": ["decode=0.9x"]}, "with N above 1"),
        ({"target": ["latency=-10%"]}, "it must be parameters"),
        ({"target": ["kv-bytes=-10%", "kv-bytes=-20%"]}, "target names kv-bytes more than once"),
        ({"target": ["kv-bytes=-10%"], "plan": "spread"}, "plan is 'spread'; target, moves and from_search are for"),
        ({"target": ["kv-bytes=-10%"], "moves": "echo,merge"}, "moves is 'echo,merge'; it must name some of echo, kv"),
        ({"moves": "kv"}, "moves is 'kv', but a ratio counts echo layers alone: give a target"),
        ({"from_search": "x.json"}, "from_search needs a target"),
        ({"target": ["kv-bytes=-10%"], "block_size": 2}, "block_size is for plans of echo layers alone"),
        ({"target": ["decode=2x"], "decode_context": 0}, "decode_context is 0; it must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PlanSettings(**settings)


def test_entries_are_read_from_the_command_line():
    assert parse_entries("0,1,1,kv 1,skip attention, drop") == [0, 1, 1, "kv 1", SKIP, DROP]
    with pytest.raises(ValueError, match="'0,kv' is not understood"):
        parse_entries("0,kv")


def test_another_target_from_a_search_costs_nothing(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments)])

    output, found = tmp_path / "plan.json", tmp_path / "plan.search.json"
    quick = ["--calibration-rows", "4", "--row-length", "32", "--search-rows", "1", "--search-width", "2"]
    result = run("plan", "builtin", "--target", "kv-bytes=-25%", "--moves", "kv,drop", *quick, "--output", output)
    assert result.exit_code == 0 and "KL (nats)" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.search.json", "plan.search.png"}
    plan, search = SharingPlan.from_json(output), json.loads(found.read_text())
    assert plan.kv_layers or plan.dropped_layers
    again = ["plan", "builtin", "--target", "kv-bytes=-8%", "--output", tmp_path / "small.json", "--from-search"]
    assert run(*again, found).exit_code == 0
    assert list(SharingPlan.from_json(tmp_path / "small.json")) == choose_from_frontier(
        search["teacher"], search["frontier"], [Target("kv-bytes", 0.92)]
    )
    result = run(*again, found, "--target", "parameters=-90%", "--overwrite")
    assert result.exit_code == 2 and "No plan that this search has measured reaches the target" in result.output
    (tmp_path / "broken.json").write_text("{}")
    result = run(*again, tmp_path / "broken.json", "--overwrite")
    assert result.exit_code == 2 and "does not hold what a search has found" in " ".join(result.output.split())


TEACHER_COSTS = {"parameters": 100, "kv_bytes_per_token": 100, "decode_bytes": 100}
FRONTIER = [  # the smallest KL first
    {"layer_plan": plan, "kl": index / 10, "parameters": 90, "kv_bytes_per_token": costs, "decode_bytes": costs}
    for index, (plan, costs) in enumerate(
        [
            ([0, 1, 2, 3, 4, "kv 0"], 90),
            ([0, 1, 2, DROP, 4, 5], 80),
            ([0, 1, 2, 3, "kv 0", 5], 70),
            ([0, 1, 1, "kv 1", 4, 5], 60),
        ]
    )
]


def from_search(folder, content, **settings):
    """The plan that settings take from the file of a search, for a model of six layers."""
    (folder / "search.json").write_text(json.dumps(content))
    settings = {"target": ["kv-bytes=-10%"], "from_search": str(folder / "search.json")} | settings
    return list(make_plan(PlanSettings(**settings), make_teacher().config))


@pytest.mark.parametrize(
    ("settings", "index"),
    [
        ({"protected_layers": 0}, 0),
        ({}, 1),
        ({"moves": "kv,echo"}, 2),
        ({"protected_layers": 2}, 1),
        ({"target": ["kv-bytes=-40%"], "moves": "echo,kv"}, 3),
    ],
)
def test_moves_and_protected_layers_hold_for_a_search_that_was_made(tmp_path, settings, index):
    content = {"teacher": TEACHER_COSTS, "frontier": FRONTIER}
    assert from_search(tmp_path, content, **settings) == FRONTIER[index]["layer_plan"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"moves": "skip"},
            "measured with moves of skip attention alone and 1 protected layers at either end is there",
        ),
        ({"protected_layers": 3}, "and 3 protected layers at either end is there: allow more of --moves, fewer of"),
        (
            {"moves": "kv", "target": ["kv-bytes=-40%"]},
            "with moves of kv alone and 1 protected .* reaches the target; it came to kv_bytes_per_token -30.0%",
        ),
        ({"protected_layers": -1}, "protected_layers is -1; it must be 0 or more"),
    ],
)
def test_what_a_search_has_not_measured_is_said(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        from_search(tmp_path, {"teacher": TEACHER_COSTS, "frontier": FRONTIER}, **settings)


def test_a_search_says_of_what_model_and_context_it_is(llama, rows, tmp_path):
    target = Target("decode", 1 / 1.01)
    search = search_plan(llama[0], rows, llama[1], targets=[target], decode_context=64, search_rows=1, width=1)
    found = search.to_dict()
    assert PlanSearch(search.plan, **found) == search
    settings = {"target": ["decode=1.01x"], "decode_context": 64}
    assert from_search(tmp_path, found, **settings) == list(search.plan)
    with pytest.raises(
        ValueError, match="decode_context is 2048, but the search .* with 64 tokens.*--decode-context 64"
    ):
        from_search(tmp_path, found, target=["decode=1.01x"])
    from_search(tmp_path, found, target=["parameters=-0.1%"])  # which no context changes
    with pytest.raises(ValueError, match="is of a model with hidden_size 99; this one has 32"):
        from_search(tmp_path, found | {"model": found["model"] | {"hidden_size": 99}}, **settings)
    earlier = {name: value for name, value in found.items() if name not in ("model", "decode_context")}
    assert from_search(tmp_path, earlier, target=["decode=1.01x"]) == list(search.plan)


def test_search_of_another_model_is_refused(tmp_path):
    content = {"teacher": TEACHER_COSTS, "frontier": [FRONTIER[0] | {"layer_plan": [0, 1, "kv 1"]}]}
    with pytest.raises(ValueError, match="is of a model with num_hidden_layers 3; this one has 6"):
        from_search(tmp_path, content)


@pytest.mark.parametrize(
    "content", [[], {"teacher": TEACHER_COSTS, "frontier": []}, {"teacher": {}, "frontier": FRONTIER}]
)
def test_what_is_no_search_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="does not hold what a search has found"):
        from_search(tmp_path, content)

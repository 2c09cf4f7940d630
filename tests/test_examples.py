"""The scripts in `examples/` run, on very little."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import make_teacher, process_environment, train_byte_level_bpe
from processes import run_python
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from echoatt_hf import EchoAttConfig, EchoAttForCausalLM, SharingPlan
from echoatt_hf.analysis.similarity import AttentionSimilarity
from echoatt_hf.models.loading import builtin_teacher_path
from echoatt_hf.planning.paper import plan_like_paper
from echoatt_hf.settings import DistillationSettings


pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
TINY = [
    "--layers", "2", "--hidden-size", "16", "--intermediate-size", "24", "--heads", "2", "--kv-heads", "1",
    "--vocab-size", "300", "--row-length", "16", "--batch-size", "4", "--tokens", str(20 * 4 * 16), "--save-steps", "5",
]  # fmt: skip


def train_teacher(*arguments, **how):
    return run_python(ROOT / "examples" / "train_teacher.py", *arguments, **how)


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


@pytest.mark.parametrize("steps", [8, 25], ids=["fewer steps than between two logs", "no multiple of them"])
def test_train_teacher_counts_all_its_steps(text, steps):
    tokens = steps * 4 * 16
    result = train_teacher("--output", "teacher", "--data", "text", *TINY, "--tokens", str(tokens), cwd=text)
    assert result.returncode == 0, result.stderr
    results = json.loads((text / "teacher" / "results.json").read_text())
    assert results["tokens"] == tokens
    assert [place for place, _ in results["loss_curve"]] == [step * 4 * 16 for step in (1, 10, 20) if step <= steps]


def test_train_teacher_resumes(text):
    arguments = ["--output", "teacher", "--data", "text", *TINY]
    assert train_teacher(*arguments, cwd=text, new_interpreter=True).returncode == 0
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


# The study of the paper.


STUDY = ["--scale", "tiny", "--teacher", "teacher", "--data", "text", "--ratios", "0.33", "--baseline-ratios", "0.33",
         "--ablation-ratio", "0.33", "--other-text", "zero=text/0.txt", "--task", "pairs=pairs.jsonl"]  # fmt: skip


@pytest.fixture(scope="module")
def example():
    """Imports a module of `examples/`."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def study(tmp_path_factory, example):
    """A folder with a tiny random teacher, text, a task, and a study of everything; and how to run another."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "text").mkdir()
    texts = [f"def function_{number}(x):\n    return x + {number}\n" * 20 for number in range(12)]
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    make_teacher(num_hidden_layers=6, vocab_size=300).save_pretrained(folder / "teacher")
    tokenizer = train_byte_level_bpe(texts, 290, ["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "teacher")
    pair = {"sentence_good": "return x + 1", "sentence_bad": "x return + 1"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["reproduce_paper.py", *STUDY, *arguments])
            example("reproduce_paper").main()
        return json.loads((folder / arguments[arguments.index("--output") + 1] / "results.json").read_text())

    run("--output", "whole", "--targets", "parameters=-12%")
    return folder, run


def entry_of(results, method):
    return next(run for run in results["runs"] if run["method"] == method)


def test_a_study_measures_every_method(study):
    folder, _ = study
    table, results = ((folder / "whole" / name).read_text() for name in ("results.md", "results.json"))
    results = json.loads(results)
    main = ["none", "cross-entropy", "paper", "ours untrained", "ours", "layer dropping untrained", "layer dropping"]
    main += ["KV sharing untrained", "KV sharing"]
    main += [f"random plan {seed}{state}" for seed in range(3) for state in (" untrained", "")]
    for name in ("KVSharer", "LaCo", "DirectShare"):
        main += [f"{name} untrained", name]
    moves = ["skip alone", "drop alone", "all moves", "LaCo", "DirectShare"]
    targets = [f"{name}{state}" for name in moves for state in (" untrained", "")]
    levers = ["copied", "aligned", "refitted", "both"]
    starts = [f"paper, {lever}" for lever in levers] + ["spread, copied", "similarity, copied"]
    starts += [f"effect, {lever}" for lever in levers]
    ablation = [start + state for start in starts for state in ("", ", 2 steps")]
    assert [run["method"] for run in results["runs"]] == main + targets + ablation
    cells = [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("|")]
    assert cells == ["method", "------------------------", "teacher", *main] + [
        "method", "---------------------", "teacher", *targets] + [
        "method", "---------------------------", "teacher", *ablation
    ]  # fmt: skip
    assert str(folder) not in json.dumps(results) + table
    assert (folder / "whole" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    paper, ours, on_text = (entry_of(results, method) for method in ("paper", "ours", "cross-entropy"))
    assert [tokens for tokens, _ in paper["curve"]] == [0, 64, 128, 192]  # steps of 2 rows of 16 tokens
    assert paper["curve"][0][1] == entry_of(results, "none")["evaluations"]["curve"]["perplexity"]
    assert on_text["distillation"]["stage2_steps"] == 6
    recipe = DistillationSettings(
        recipe="paper", steps=6, learning_rate=2e-3, batch_size=2, save_steps=1, eval_steps=2
    )
    assert paper["distillation"] == json.loads(json.dumps(asdict(recipe)))
    assert ours["distillation"]["recipe"] == "default"
    # Neither has blocks at whose ends hidden states could be compared.
    for method in ("KV sharing", "layer dropping"):
        assert entry_of(results, method)["distillation"] == paper["distillation"] | {"hidden_weight": 0.0}
    similarity = AttentionSimilarity.from_json(folder / "whole" / "analysis" / "similarity.json").flattened.tolist()
    assert paper["plan"] == list(plan_like_paper(similarity, 0.33))
    spread = entry_of(results, "spread, copied")["plan"]
    assert spread == list(SharingPlan.from_ratio(6, 0.33)) and spread != paper["plan"]
    rates = {
        line.split("|")[2].strip(): line.split("|")[4].strip() for line in table.splitlines() if line.startswith("|")
    }
    assert [rates[method] for method in ("none", "paper", "cross-entropy", "ours")] == ["", "0.002", "0.002", "0.002"]
    reasons = {each["method"]: each["reason"] for each in results["left_out"]}
    names = ("echo alone", "kv alone", "KVSharer")
    assert list(reasons) == [f"{name}{state}" for name in names for state in (" untrained", "")]
    assert "does not reach the target" in reasons["KVSharer"] and "is out of reach" in reasons["kv alone"]
    assert f"- Ratio parameters=-12%, `KVSharer untrained`, `KVSharer`: {reasons['KVSharer']}" in table
    assert paper["plan"] == on_text["plan"] == entry_of(results, "KV sharing")["plan"]
    assert ours["plan"] == entry_of(results, "effect, copied")["plan"]
    assert set(ours["evaluations"]) == {"held-out", "curve", "text zero", "task pairs"}
    echo, dropped, sharing = (
        entry_of(results, method)["evaluations"]["held-out"] for method in ("none", "layer dropping", "KV sharing")
    )
    assert dropped["parameters"] <= echo["parameters"]
    # Two of six layers: an echo has values alone, a layer that shares keys and values has nothing of its own.
    total = results["teacher_evaluations"]["held-out"]["kv_bytes_per_token"]
    assert echo["kv_bytes_per_token"] == total * 5 // 6 and sharing["kv_bytes_per_token"] == total * 4 // 6
    # The neighbours save at least as much: of the cache, or of the parameters; and at a target what it asks for.
    kvsharer, laco, heads = (
        entry_of(results, name)["evaluations"]["held-out"] for name in ("KVSharer", "LaCo", "DirectShare")
    )
    assert kvsharer["kv_bytes_per_token"] == total * 5 // 6
    assert max(laco["parameters"], heads["parameters"]) <= echo["parameters"]
    teacher_parameters = results["teacher_evaluations"]["held-out"]["parameters"]
    at_target = [entry for entry in results["runs"] if entry["table"] == "targets"]
    assert all(entry["evaluations"]["held-out"]["parameters"] <= 0.88 * teacher_parameters for entry in at_target)
    assert [entry["distillation"] is None for entry in at_target] == [True, False] * len(moves)
    student = AutoModelForCausalLM.from_pretrained(folder / "whole" / "0.33" / "layer-dropping" / "paper" / "student")
    assert student.num_parameters() == dropped["parameters"] and student.config.num_hidden_layers == 5


def test_a_study_counts_what_is_repeated(study):
    folder, run = study
    shutil.copytree(folder / "whole", folder / "going-on")
    arguments = ["--output", "going-on", "--methods", "none", "paper", "--continuations", "3", "--prompt-tokens", "6"]
    results = run(*arguments, "--new-tokens", "9")
    table = (folder / "going-on" / "results.md").read_text()
    evaluations = {"teacher": results["teacher_evaluations"]} | {
        each["method"]: each["evaluations"] for each in results["runs"]
    }
    assert [*evaluations] == ["teacher", "none", "paper"]
    header, _, *lines = ([cell.strip() for cell in line.split("|")] for line in table.splitlines() if "|" in line)
    column = header.index("repeated 4-grams")
    for line, found in zip(lines, (each["continuations"] for each in evaluations.values()), strict=True):
        assert found["prompts"] == 3 and 0 <= found["repeated_4grams"] <= 1
        assert line[column] == f"{found['repeated_4grams']:.1%} ± {found['repeated_4grams_stderr']:.1%}"
    assert "of 3 greedy continuations of 9 tokens; of the text itself" in table
    shown = (folder / "going-on" / "continuations.md").read_text()
    assert shown.count("|---|---|") == 3
    assert [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")][:5] == [
        "", "the text itself", "teacher", "0.33 none", "0.33 paper"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="a prompt of 6 tokens and 11 new ones need 17"):
        run(*arguments, "--new-tokens", "11")


def test_a_study_says_where_the_paper_has_no_plan(study, example, monkeypatch):
    folder, run = study
    make_teacher(num_hidden_layers=8, vocab_size=300).save_pretrained(folder / "deeper")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "deeper")
    # The last three layers are unlike the others and kept, and the first one has no source: four can echo, not five.
    unlike = [[1.0 if i == j else 0.1 if max(i, j) > 4 else 0.9 for j in range(8)] for i in range(8)]
    measured = AttentionSimilarity(None, 1, *2 * [torch.tensor(unlike, dtype=torch.float64)])
    monkeypatch.setattr(example("reproduce_paper"), "measure_on_rows", lambda *args, **kwargs: measured)
    methods = ["none", "paper", "layer dropping", "random plan"]
    arguments = ["--output", "deep", "--teacher", "deeper", "--methods", *methods, "--ratios", "0.5", "0.62"]
    results = run(*arguments, "--baseline-ratios", "0.62")
    assert [(each["ratio"], each["method"]) for each in results["left_out"]] == [
        (0.62, method) for method in ("none", "paper", "layer dropping untrained", "layer dropping")
    ]
    made = [(each["ratio"], each["method"]) for each in results["runs"]]
    assert (
        made[:2] == [(0.5, "none"), (0.5, "paper")] and len(made) == 8 and made[2] == (0.62, "random plan 0 untrained")
    )
    table = (folder / "deep" / "results.md").read_text()
    assert (
        "- Ratio 0.62, `none`, `paper`, `layer dropping untrained`, `layer dropping`: ratio 0.62 of 8 layers" in table
    )
    assert "the layers [5, 6, 7] are kept" in table


def test_a_study_in_bfloat16_trains_float32(study, example, monkeypatch):
    folder, run = study
    module, seen = example("reproduce_paper"), set()

    def distill(student, *args, distill=module.train_two_stages, **kwargs):
        trainer = distill(student, *args, **kwargs)
        seen.update(parameter.dtype for parameter in student.parameters())
        return trainer

    monkeypatch.setattr(module, "train_two_stages", distill)
    run("--output", "half", "--dtype", "bfloat16", "--methods", "paper")
    assert seen == {torch.float32}
    files = [*(folder / "half").rglob("student/model.safetensors")]
    assert len(files) == 2
    for file in files:
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


def test_a_study_that_is_done_is_left_alone(study):
    folder, run = study
    files = {file: file.stat().st_mtime_ns for file in (folder / "whole").rglob("*")}
    run("--output", "whole", "--targets", "parameters=-12%")
    assert {file: file.stat().st_mtime_ns for file in (folder / "whole").rglob("*")} == files


def test_an_interrupted_study_goes_on(study, example, monkeypatch, capsys):
    folder, run = study
    module, arguments = example("reproduce_paper"), ["--output", "stopped", "--methods", "paper", "KV sharing"]
    with monkeypatch.context() as patch:  # as by Ctrl-C at the end of stage 1
        patch.setattr(module, "train_two_stages", lambda *args, distill=module.train_two_stages, **kwargs: distill(
            *args, **kwargs, evaluate=lambda name, model: signal.raise_signal(signal.SIGINT)
        ))  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err
        with pytest.raises(SystemExit):  # the second stage of `paper` has no more to stop, but KV sharing has
            run(*arguments)
    checkpoints = folder / "stopped" / "0.33" / "KV-sharing" / "paper" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-5")] == ["checkpoint-5"]
    assert not (folder / "stopped" / "results.json").exists()
    results, whole = run(*arguments), json.loads((folder / "whole" / "results.json").read_text())
    for method in ("paper", "KV sharing"):
        for key in ("curve", "evaluations"):
            assert entry_of(results, method)[key] == entry_of(whole, method)[key]
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "whole", "--learning-rate", "1e-4"], "made with other settings"),
        (["--output", "whole", "--row-length", "8"], "made with other settings"),
        (["--output", "new", "--ratios", "0.99"], "ratio 0.99 of 6 layers"),
        (["--output", "new", "--targets", "cache=-5%"], "target is 'cache=-5%'; it must be"),
        (["--output", "new", "--teacher", "./nowhere"], "'./nowhere' cannot be loaded|no model folder './nowhere'"),
        (["--output", "new", "--task", "gone=gone.jsonl"], "gone.jsonl"),
        (["--output", "new", "--continuations", "-1"], "continuations is -1; it must be 0 or more"),
    ],
)
def test_a_study_refuses_in_one_line(study, arguments, message):
    folder, run = study
    with pytest.raises(SystemExit, match=message) as refused:
        run(*arguments)
    assert "\n" not in refused.value.code
    assert not (folder / "new" / "0.33").exists()


def test_a_named_file_needs_a_name(example, capsys):
    with pytest.raises(SystemExit):
        example("reproduce_paper").parse_arguments(["--output", "x", "--task", "piqa.jsonl"])
    assert "is not NAME=PATH" in capsys.readouterr().err


@pytest.mark.parametrize(("perplexity", "tokens"), [(30, 0.0), (20, 0.0), (15, 50), (10, 100), (9.5, 150), (8, None)])
def test_tokens_to_reach_a_perplexity(example, perplexity, tokens):
    assert example("study_report").tokens_to_reach([(0, 20), (100, 10), (200, 9), (300, 11)], perplexity) == tokens


def test_the_comparison_is_a_share_of_the_tokens_of_the_paper(example):
    report = example("study_report")
    runs = [{"method": "paper", "ratio": 0.4, "curve": [(0, 20), (400, 15)]}]
    assert report.compare(runs, 0.4) is None
    runs.append({"method": "ours", "ratio": 0.4, "curve": [(0, 20), (100, 10)]})
    assert report.compare(runs, 0.4)["share"] == 0.125
    assert "after 50 tokens, 12% of its 400" in report.describe(report.compare(runs, 0.4))
    runs[1]["curve"] = [(0, 15), (100, 10)]
    assert "before any training" in report.describe(report.compare(runs, 0.4))
    runs[1]["curve"] = [(0, 20), (100, 16)]
    assert "does not reach" in report.describe(report.compare(runs, 0.4))


# Stored teachers.


def test_stored_teachers_are_measured(study, example, monkeypatch, capsys):
    folder, _ = study
    monkeypatch.chdir(folder)
    few = ["--top-k", "3", "200", "--steps", "4", "--rounds", "1", "--row-length", "16", "--evaluation-rows", "4"]
    example("measure_stored_teacher").main(
        ["--teacher", "teacher", "--data", "text", "--ratio", "0.33", "--batch-size", "2", *few]
    )
    output = capsys.readouterr().out
    quality, speed = (table.splitlines() for table in output.split("\n\n")[-3:-1])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in quality[2:]]
    names = ["live", "top 3", "top 200", "top 3, renormalised", "top 200, renormalised"]
    assert [line[0] for line in cells] == names
    assert [line[1] for line in cells] == ["", "16", "804", "16", "804"]
    perplexity = {line[0]: float(line[3]) for line in cells}
    assert perplexity["top 200"] == pytest.approx(perplexity["live"], rel=0.01)
    assert perplexity["top 3, renormalised"] != perplexity["top 3"]
    assert [line.strip("|").split("|")[0].strip() for line in speed[2:]] == ["live", "top 3", "top 200"]
    assert "tokens/s" in speed[0] and all("uses" in line or "never" in line for line in speed[3:])


def test_tokenizing_is_measured_beside_the_tokenizer(text, example, monkeypatch, capsys):
    monkeypatch.chdir(text)
    made = example("measure_tokenizing")
    monkeypatch.setattr(made, "measure_apart", lambda call, *arguments: {
        "tokens": call(*arguments), "seconds": 2.0, "cpu_seconds": 4.0, "bytes": 2**20
    })  # fmt: skip
    teacher = str(builtin_teacher_path())
    sizes = ["--megabytes", "0.05", "--characters", "700", "--row-length", "32", "--output", "found.json"]
    made.main([teacher, "--data", "text", *sizes])
    found = json.loads((text / "found.json").read_text())
    alone, rows = (found["figures"][way]["tokens"] for way in ("the tokenizer alone", "rows, --num-proc 1"))
    # The rows hold an end of each document too, and leave out what does not fill the last one.
    assert 0 <= alone + found["documents"] - rows < 32
    assert found["documents"] >= 50_000 // 700
    assert "| rows, --num-proc 1  |       2 | 1.00 |" in capsys.readouterr().out


def test_memory_is_counted_from_the_sizes_of_models(example, capsys):
    counting = example("count_memory")
    counting.main(["--row-length", "512"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(counting.COMMANDS) and all(line.count("|") == lines[0].count("|") for line in lines)
    for shape in (*counting.COUNTED.values(), counting.SHAPES["SmolLM2-135M"]):
        with torch.device("meta"):
            teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"model_type": "llama"} | shape))
            plan = SharingPlan.from_ratio(shape["num_hidden_layers"], counting.RATIO)
            student = EchoAttForCausalLM(EchoAttConfig(text_config=teacher.config, echo_sources=list(plan)))
        counted = counting.sizes_of(shape, 512, 8, 2**26)
        norms = (2 * counted.layers + 1) * counted.hidden
        assert (counted.weights + norms, counted.student + norms) == (
            teacher.num_parameters(),
            student.num_parameters(),
        )


def test_memory_is_measured_beside_what_is_counted(example, capsys, monkeypatch):
    counting = example("count_memory")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
    heads = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    monkeypatch.setitem(counting.SHAPES, "SmolLM2-135M", sizes | heads)
    counting.main(["--measure", "SmolLM2-135M", "--row-length", "32", "--calibration-rows", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`analyze`", "`convert`", "`evaluate --teacher`"]


@pytest.mark.slow
def test_measure_loss_memory(tmp_path):
    script = [
        sys.executable,
        str(ROOT / "examples" / "measure_loss_memory.py"),
        "--output",
        str(tmp_path / "memory.json"),
    ]
    result = subprocess.run(
        [*script, "--vocab-sizes", "20000", "--tokens", "4096", "--repeats", "1"],
        env=process_environment(), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "tokens/s" in result.stdout
    (found,) = json.loads((tmp_path / "memory.json").read_text())["results"]
    peaks = found["peak_bytes"]
    whole, chunks = (peaks[how] - peaks["states"] for how in ("whole", "chunks"))
    assert whole > 4 * 4096 * 20_000  # at the least the logits in float32
    assert 0 < chunks < whole / 2

"""
The study of the EchoAtt paper as one command: students at several sharing ratios, made and trained in several ways.

On the built-in teacher and the sources of the Python standard library, offline, on a CPU:

    python examples/reproduce_paper.py --scale small --output runs/study

The paper's own size, on a GPU, with its steps, rows and learning rate; this has NOT been run by the authors of this
script:

    python examples/reproduce_paper.py --teacher TinyLlama/TinyLlama_v1.1 --data cerebras/SlimPajama-627B --streaming \
        --row-length 2048 --batch-size 1024 --accumulation-steps 256 --steps 2205 --learning-rate 1e-4 --eval-steps 200 \
        --other-text wikitext2=wikitext2.txt --task piqa=piqa.jsonl --task blimp=blimp --output runs/tinyllama

A small real model, with text and tasks in local files:

    python examples/reproduce_paper.py --teacher stories260k --data stories.txt --ratios 0.2 0.4 --baseline-ratios 0.4 \
        --ablation-ratio 0.4 --ablation-steps 100 --other-text fairytales=val.txt --task blimp=blimp --output runs/stories

Methods, at each ratio:

- `none`: the paper's plan with copied weights, without any training;
- `cross-entropy`: the same student, trained on the text alone;
- `paper`: the same student, distilled by the paper's recipe: its losses, then a quarter as many steps on the text at the
  same rate. The rate itself is `--learning-rate`: small models learn next to nothing in few steps at the paper's 1e-4;
- `ours untrained`, `ours`: plan searched by effect, heads aligned, output projections refitted; without training and with
  the default recipe.

The paper's plan is that of [`plan_like_paper`], of similarities measured on the calibration rows, or the printed one of
the models that have one. At a ratio that it has no plan for, as too many layers are kept, the methods that need one are
left out, and the results say why.

Baselines, at `--baseline-ratios`, untrained and distilled as `paper`:

- `layer dropping`: whole inner layers left out, until at least as many parameters are saved as by `none`; greedy, each
  time the layer without which KL to the teacher on calibration rows is smallest;
- `KV sharing`: the layers that echo in `none` use keys and values of their source, with queries of their own;
- `random plan`: as many echo layers as in `none`, they and their sources drawn at random, three times;
- `KVSharer`, `LaCo`, `DirectShare`: by the rules of others, see `make_by_method`, until at least as much is saved as by
  `none`: of the cache by the first, of the parameters by the other two. LaCo merges two layers at a time.

Only echo layers have blocks at whose ends hidden states could be compared: for the others that part of the loss is left out.

With `--targets`, such as `kv-bytes=-20%` or `parameters=-5%`, students that save at least as much, untrained and trained as
`ours`: by each move alone and by all of them, searched, and those of the others. What cannot reach a target is left out.

The ablation, at `--ablation-ratio`, changes the plan, alignment and refit one by one, untrained and after
`--ablation-steps` steps of the default recipe, at the rate of `ours`. All variants of the plan by effect have the one plan
of `ours`; `spread` is evenly spread pairs, for which nothing is measured.

Each run has a folder of its own, which keeps the student: plan for the disk space. The same command goes on where a study
was stopped, and does nothing where it is done, also with other `--methods` and `--ratios`, which choose what the tables
hold; a run that was made with other settings is refused. New texts and tasks
are measured on the students that are there.

With `--continuations 100` all models go on with the beginnings of 100 held-out rows. The table then has the share of 4-grams that
they repeat, and `continuations.md` what they wrote.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from study_report import compare, make_curve, make_report, make_side_by_side, plot_curves
from transformers import PreTrainedModel

from echoatt_hf import (
    SharingPlan,
    convert,
    count_kv_bytes_per_token,
    evaluate_continuations,
    evaluate_model,
    evaluate_zero_shot,
)
from echoatt_hf.analysis.similarity import AttentionSimilarity, measure_on_rows
from echoatt_hf.baselines.layer_dropping import choose_layers_to_drop
from echoatt_hf.baselines.random_plans import draw_plan
from echoatt_hf.conversion.dropping import check_same_model, drop_layers
from echoatt_hf.conversion.tuning import hold_out
from echoatt_hf.distillation.two_stages import train_two_stages
from echoatt_hf.models.devices import default_device
from echoatt_hf.models.dtypes import cast_weights
from echoatt_hf.models.loading import load_config, load_model, load_tokenizer
from echoatt_hf.outputs.files import whole_folder, write_whole
from echoatt_hf.outputs.provenance import describe_environment
from echoatt_hf.pipeline.neighbours import make_by_method
from echoatt_hf.pipeline.preparation import choose_plan, load_calibration_rows, load_rows
from echoatt_hf.pipeline.steps import SIDE_BY_SIDE
from echoatt_hf.planning.from_settings import make_plan, needs_similarity
from echoatt_hf.settings import (
    MOVES,
    CalibrationSettings,
    CompressionSettings,
    DataSettings,
    DistillationSettings,
    MethodSettings,
    PlanSettings,
    ScoringSettings,
    Target,
    describe_settings,
    differing_settings,
    parse_target,
)
from echoatt_hf.text.documents import STDLIB, load_documents
from echoatt_hf.text.rows import draw_rows


METHODS = ("none", "cross-entropy", "paper", "ours untrained", "ours")
NEIGHBOURS = {
    "KVSharer": MethodSettings("kvsharer"),
    "LaCo": MethodSettings("laco", merge_size=2),  # the fewest that a merge can have, for the finest steps
    "DirectShare": MethodSettings("directshare"),
}
BASELINES = ("layer dropping", "KV sharing", "random plan", *NEIGHBOURS)
MOVE_SETS = {**{f"{move} alone": move for move in MOVES}, "all moves": ",".join(MOVES)}
ABLATION = "ablation"
RANDOM_PLANS = 3
SCALES = {
    "small": {"steps": 240, "ablation_steps": 100, "ours_learning_rate": 1e-3},
    "tiny": {
        "steps": 6, "ablation_steps": 2, "target_steps": 2, "eval_steps": 2, "save_steps": 1, "curve_rows": 2, "evaluation_rows": 4,
        "calibration_rows": 4, "row_length": 16, "batch_size": 2,
    },
}  # fmt: skip


def named_path(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The study of the EchoAtt paper as one command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the study, new or to go on with")
    add("--scale", choices=sorted(SCALES), help="preset of defaults: small for two CPU cores, tiny for tests")
    add("--teacher", default="builtin", help="'builtin', a folder, or a repository of the Hub")
    add("--data", action="append", help="file, folder or data set; may be repeated; the standard library if not given")
    add("--held-out-data", action="append", help="text to evaluate on; some documents of the data if not given")
    add("--streaming", action="store_true", help="read the data as it goes")
    add("--text-column", default="text", help="column of the text in tables and data sets")
    add("--row-length", type=int, default=256, help="tokens in a row")
    add("--evaluation-rows", type=int, default=128, help="held-out rows of the final evaluation")
    add("--curve-rows", type=int, default=32, help="held-out rows of the curve")
    add("--calibration-rows", type=int, default=48, help="rows to search and tune on")
    add("--ratios", type=float, nargs="+", default=[0.23, 0.41, 0.77], help="sharing ratios")
    add("--methods", nargs="+", choices=[*METHODS, *BASELINES, ABLATION], default=[*METHODS, *BASELINES, ABLATION])
    add("--baseline-ratios", type=float, nargs="*", default=[0.41], help="ratios of the baselines")
    add("--ablation-ratio", type=float, default=0.41, help="ratio of the ablation")
    add("--ablation-steps", type=int, default=0, help="steps of the ablation; 0 for untrained students only")
    add("--targets", nargs="*", default=[], help="what else to save, as echoatt plan --target")
    add("--target-steps", type=int, default=0, help="steps of these students; 0 for untrained students only")
    add("--steps", type=int, default=300, help="steps of each training, over both stages")
    add("--learning-rate", type=float, default=2e-3, help="peak learning rate of stage 1; the paper's is 1e-4")
    add("--ours-learning-rate", type=float, help="the same for 'ours'; that of the others if not given")
    add("--batch-size", type=int, default=8, help="rows in a step, over all accumulation steps")
    add("--accumulation-steps", type=int, default=1, help="micro-batches in a step")
    add(
        "--warmup-steps", type=float, help="steps of warm-up in each stage, or their share; of the recipe if not given"
    )
    add("--eval-steps", type=int, default=25, help="steps between the points of the curve")
    add("--save-steps", type=int, default=100, help="steps between checkpoints")
    add("--dtype", default="float32", help="type of the weights; with bfloat16 training computes in it too")
    add("--seed", type=int, default=0, help="seed of the order of rows and of dropout")
    add("--other-text", type=named_path, action="append", default=[], help="NAME=FILE of text for perplexity")
    add("--task", type=named_path, action="append", default=[], help="NAME=FILE or FOLDER of a zero-shot task")
    add("--limit", type=int, help="questions of each task file; all if not given")
    add("--continuations", type=int, default=0, help="held-out rows to go on with, to count repeated 4-grams")
    add("--prompt-tokens", type=int, default=64, help="tokens of each that are the prompt")
    add("--new-tokens", type=int, default=128, help="tokens of a continuation; a row holds both")
    scale = parser.parse_known_args(arguments)[0].scale
    parser.set_defaults(**SCALES.get(scale, {}))
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Start:
    """
    How a student is made, before any training.

    Args:
        kind (`str`): `"echo"`, `"moves"` for a plan by target, `"layer dropping"`, `"KV sharing"` or a neighbour.
        plan (`str`): `"paper"`, `"spread"`, `"similarity"`, `"effect"` or `"random SEED"`; by target the moves; of layer
            dropping and neighbours the plan that is to save no more.
        align, refit (`bool`): tune it.
    """

    kind: str = "echo"
    plan: str = "paper"
    align: bool = False
    refit: bool = False

    def __str__(self) -> str:
        if self.kind not in ("echo", "moves"):
            return self.kind
        return " ".join([self.plan, *(["aligned"] if self.align else []), *(["refitted"] if self.refit else [])])


@dataclass(frozen=True)
class Run:
    """
    A student and its training.

    Args:
        method (`str`): its name in the table.
        ratio (`float` or `str`): sharing ratio, or target.
        start ([`Start`]): how the student is made.
        training (`str`): name of the training.
        distillation ([`DistillationSettings`], *optional*): the training; none if not given.
        table (`str`): the table it is in, `"main"`, `"targets"` or `"ablation"`.
    """

    method: str
    ratio: float | str
    start: Start
    training: str = "untrained"
    distillation: DistillationSettings | None = None
    table: str = "main"

    @property
    def folder(self) -> Path:
        """`Path`: below that of the study; runs that are the same share it."""
        return Path(str(self.ratio), str(self.start).replace(" ", "-"), self.training)

    @property
    def untrained(self) -> "Run":
        """The student before its training."""
        return Run(self.method, self.ratio, self.start, table=self.table)


def list_runs(arguments: argparse.Namespace) -> list[Run]:
    """All runs of a study, in the order of the tables."""
    ours = Start(plan="effect", align=True, refit=True)
    paper = training_settings(arguments, recipe="paper")
    without_blocks = replace(paper, hidden_weight=0.0)
    on_text = training_settings(arguments, stage2_steps=arguments.steps, stage2_learning_rate=arguments.learning_rate)
    with_ours = short_training(arguments, arguments.steps)
    recipes = {
        "none": (Start(),),
        "cross-entropy": (Start(), "cross-entropy", on_text),
        "paper": (Start(), "paper", paper),
        "ours untrained": (ours,),
        "ours": (ours, "ours", with_ours),
    }
    starts = {name: [(name, Start(name), without_blocks)] for name in BASELINES}
    starts["random plan"] = [
        (f"random plan {seed}", Start(plan=f"random {seed}"), paper) for seed in range(RANDOM_PLANS)
    ]
    runs = []
    for ratio in dict.fromkeys([*arguments.ratios, *arguments.baseline_ratios]):
        if ratio in arguments.ratios:
            runs += [Run(name, ratio, *recipe) for name, recipe in recipes.items() if name in arguments.methods]
        baselines = [each for method in BASELINES if method in arguments.methods for each in starts[method]]
        for name, start, training in baselines:
            if ratio in arguments.baseline_ratios:
                runs += [Run(f"{name} untrained", ratio, start), Run(name, ratio, start, "paper", training)]
    return runs + list_targets(arguments) + (list_ablation(arguments) if ABLATION in arguments.methods else [])


def list_targets(arguments: argparse.Namespace) -> list[Run]:
    """All that may reach each target, untrained and, if there are steps for it, trained."""
    starts = {name: Start("moves", moves, align=True, refit=True) for name, moves in MOVE_SETS.items()}
    starts |= {name: Start(name) for name in NEIGHBOURS}
    runs = []
    for target in arguments.targets:
        for name, start in starts.items():
            runs.append(Run(f"{name} untrained", target, start, table="targets"))
            if arguments.target_steps:
                training = short_training(arguments, arguments.target_steps)
                runs.append(Run(name, target, start, "ours", training, "targets"))
    return runs


def list_ablation(arguments: argparse.Namespace) -> list[Run]:
    """The levers one by one, untrained and, if there are steps for it, trained."""
    levers = {"copied": (False, False), "aligned": (True, False), "refitted": (False, True), "both": (True, True)}
    chosen = [("paper", name) for name in levers] + [("spread", "copied"), ("similarity", "copied")]
    chosen += [("effect", name) for name in levers]
    runs = []
    for plan, name in chosen:
        run = Run(f"{plan}, {name}", arguments.ablation_ratio, Start("echo", plan, *levers[name]), table="ablation")
        runs.append(run)
        if arguments.ablation_steps:
            settings = short_training(arguments, arguments.ablation_steps)
            trained = f"{run.method}, {arguments.ablation_steps} steps"
            runs.append(Run(trained, run.ratio, run.start, "ablation", settings, run.table))
    return runs


def short_training(arguments: argparse.Namespace, steps: int) -> DistillationSettings:
    """Training as of `ours`, of other length."""
    rate = arguments.ours_learning_rate or arguments.learning_rate
    return training_settings(arguments, steps=steps, learning_rate=rate)


def training_settings(arguments: argparse.Namespace, **changes) -> DistillationSettings:
    names = ("steps", "learning_rate", "batch_size", "accumulation_steps", "warmup_steps", "save_steps", "eval_steps")
    values = {name: getattr(arguments, name) for name in (*names, "seed")}
    values["bf16"] = arguments.dtype == "bfloat16"
    return DistillationSettings(**(values | changes))


class LeftOut(Exception):
    """A student that cannot be made; the message says why."""


@contextmanager
def left_out() -> Iterator[None]:
    """What is refused here is left out of the study."""
    try:
        yield
    except ValueError as error:
        raise LeftOut(str(error)) from error


class Study:
    """
    Makes, trains and evaluates the runs of a study, each in its folder. What is there already is not made again, and
    models and text are loaded only when something is left to do.

    Args:
        arguments (`argparse.Namespace`): of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self._arguments, self._output = arguments, arguments.output
        self._data = DataSettings(
            data=arguments.data or [STDLIB],
            held_out_data=arguments.held_out_data,
            text_column=arguments.text_column,
            streaming=arguments.streaming,
            row_length=arguments.row_length,
            evaluation_rows=arguments.evaluation_rows,
        )
        self._calibration = CalibrationSettings(calibration_rows=arguments.calibration_rows)
        lengths = {name: getattr(arguments, name) for name in ("continuations", "prompt_tokens", "new_tokens")}
        self._scoring = ScoringSettings(**lengths)
        self.row_length = self._data.row_length

    @cached_property
    def teacher(self) -> PreTrainedModel:
        return self._load(self._arguments.teacher)

    def _load(self, name: str | Path) -> PreTrainedModel:
        return load_model(name, self._arguments.dtype).to(default_device())

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self._arguments.teacher, self.teacher)

    @cached_property
    def rows(self):
        """Rows to train on, and held-out rows."""
        return load_rows(self._data, self.tokenizer, self.teacher)

    @cached_property
    def calibration_rows(self) -> list[dict]:
        settings = CompressionSettings(self._arguments.teacher, data=self._data, calibration=self._calibration)
        return load_calibration_rows(settings, self.tokenizer, self.teacher)

    @cached_property
    def similarity(self) -> AttentionSimilarity:
        file = self._check(Path("analysis")) / "similarity.json"
        if not file.exists():
            similarity = measure_on_rows(self.teacher, self.calibration_rows, progress=True)
            self._claim(Path("analysis"))
            similarity.save(file)
        return AttentionSimilarity.from_json(file)

    def check(self, runs: Iterable[Run]) -> None:
        """Refuse, before any work is done, ratios that are impossible and runs that are there with other settings."""
        config = load_config(self._arguments.teacher)
        for ratio in dict.fromkeys(run.ratio for run in runs):
            if isinstance(ratio, str):
                parse_target(ratio)
                continue
            make_plan(PlanSettings(plan="spread", ratio=ratio), config)
        for run in runs:
            for each in (run.untrained, run):
                self._check(each.folder, each)

    def _check(self, folder: Path, run: Run | None = None) -> Path:
        """The folder of a run; its settings are checked if they are there."""
        folder = self._output / folder
        file = folder / "settings.json"
        if file.exists() and differing_settings(json.loads(file.read_text()), self._settings(run)):
            raise ValueError(
                f"The run in {str(folder)!r} was made with other settings: give the same ones, another --output, or "
                "remove the folder."
            )
        return folder

    def _claim(self, folder: Path, run: Run | None = None) -> None:
        """Write the settings of a run, when there is something to keep: a run that failed before binds nobody."""
        (self._output / folder).mkdir(parents=True, exist_ok=True)
        write_whole(self._output / folder / "settings.json", json.dumps(self._settings(run), indent=2) + "\n")

    def _settings(self, run: Run | None) -> dict:
        settings = {"teacher": self._arguments.teacher, "data": self._data}
        settings["calibration_rows"] = self._calibration.calibration_rows
        settings["dtype"] = self._arguments.dtype
        if run is not None:
            settings |= {"ratio": run.ratio, "start": run.start, "distillation": run.distillation}
        return describe_settings(settings)

    # Making and training.

    def make(self, run: Run) -> None:
        """Make and train the student of a run, if it is not there yet."""
        folder = self._check(run.folder, run)
        if (folder / "student").exists():
            return
        if run.distillation is None:
            if (folder / "left_out.txt").exists():
                raise LeftOut((folder / "left_out.txt").read_text())
            try:
                with whole_folder(folder / "student") as unfinished:
                    self._make_untrained(run, unfinished)
                    self._claim(run.folder, run)
            except LeftOut as reason:  # kept: a search that reaches nothing takes long
                self._claim(run.folder, run)
                write_whole(folder / "left_out.txt", str(reason))
                raise
            return
        self.make(run.untrained)
        student = self.load(run.untrained)
        self._claim(run.folder, run)
        trainer = train_two_stages(
            student,
            self.teacher,
            self.rows[0],
            run.distillation,
            folder / "checkpoints",
            held_out_rows=self.rows[1][: self._arguments.curve_rows],
        )
        log = [[entry["step"], entry["eval_loss"]] for entry in trainer.state.log_history if "eval_loss" in entry]
        facts = self.read_facts(run.untrained) | {"eval_log": log, "environment": describe_environment()}
        cast_weights(student, self.teacher.dtype)
        with whole_folder(folder / "student") as unfinished:
            self._save(run, student, facts, unfinished)
        shutil.rmtree(folder / "checkpoints")

    def _make_untrained(self, run: Run, folder: Path) -> None:
        facts, start = {"environment": describe_environment()}, run.start
        if start.kind == "layer dropping":
            saved = self.teacher.num_parameters() - self._load_none(run.ratio).num_parameters()
            rows = hold_out(self.calibration_rows)[1][: PlanSettings().search_rows]
            facts["dropped_layers"] = choose_layers_to_drop(self.teacher, rows, saved)
            student = drop_layers(self.teacher, facts["dropped_layers"])
        elif start.kind in NEIGHBOURS:
            target = self._target(run)
            with left_out():
                made = make_by_method(self.teacher, self.calibration_rows, NEIGHBOURS[start.kind], [target])
            student, facts["made"] = made.student, made.about
        else:
            plan = self._plan(run)
            facts["plan"] = list(plan)
            if start.kind == "KV sharing":
                plan = plan.with_kv()
            rows = self.calibration_rows if start.align or start.refit else None
            similarity = self.similarity if start.align else None
            student, report = convert(
                self.teacher, plan, rows, similarity=similarity, align=start.align, refit=start.refit, progress=True
            )
            facts["calibration_kl"] = report.kl
        self._save(run, student, facts, folder)
        if start.kind == "layer dropping":
            check_same_model(student, self._load(folder))

    def _load_none(self, ratio: float) -> PreTrainedModel:
        """The student of the paper's plan, to save as much as it does."""
        run = Run("none", ratio, Start())
        self.make(run)
        return self.load(run)

    def _target(self, run: Run) -> Target:
        """What a neighbour is to save: the target, or what `none` saves."""
        if isinstance(run.ratio, str):
            return parse_target(run.ratio)
        none, saves_cache = self._load_none(run.ratio), run.start.kind == "KVSharer"
        count = count_kv_bytes_per_token if saves_cache else PreTrainedModel.num_parameters
        return Target(
            "kv-bytes" if saves_cache else "parameters", (count(none) + 0.5) / count(self.teacher)
        )  # a half, as shares are rounded down

    def _plan(self, run: Run) -> SharingPlan:
        if run.start.plan.startswith("random"):
            config = self.teacher.config.get_text_config()
            types = getattr(config, "layer_types", None)
            return draw_plan(config.num_hidden_layers, run.ratio, int(run.start.plan.split()[1]), types)
        folder = self._check(Path("analysis"))
        name = f"{run.start.plan.replace(',', '-')}-{run.ratio}"
        file, state = (folder / f"{prefix}-{name}.json" for prefix in ("plan", "measured"))
        if not file.exists():
            if run.start.kind == "moves":
                settings = PlanSettings(target=[run.ratio], moves=run.start.plan)
            else:
                settings = PlanSettings(plan=run.start.plan, ratio=run.ratio)
            rows = similarity = None
            if settings.plan == "effect" or needs_similarity(settings, self.teacher.config):
                rows, similarity = self.calibration_rows, self.similarity
            self._claim(Path("analysis"))
            with left_out():
                plan, _ = choose_plan(
                    settings, self._calibration, self.teacher, rows, similarity, state, progress=True
                )
            write_whole(file, plan.to_json())
        return SharingPlan.from_json(file)

    def _save(self, run: Run, student: PreTrainedModel, facts: dict, folder: Path) -> None:
        student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_whole(folder / "facts.json", json.dumps(facts, indent=2) + "\n")

    def read_facts(self, run: Run) -> dict:
        """What was noted when a student was made."""
        return json.loads((self._output / run.folder / "student" / "facts.json").read_text())

    def load(self, run: Run) -> PreTrainedModel:
        """Load the student of a run."""
        return self._load(self._output / run.folder / "student")

    # Evaluating.

    def evaluate(self, run: Run | None) -> dict[str, dict]:
        """Evaluations of a run's student, or of the teacher; those that are there are read."""
        folder = Path("teacher") if run is None else run.folder
        file = self._check(folder, run) / "evaluation.json"
        done = json.loads(file.read_text()) if file.exists() else {}
        model = None
        for name, (settings, measure) in self._evaluations().items():
            if done.get(name, {}).get("settings") == settings:
                continue
            if model is None:
                model = self.teacher if run is None else self.load(run)
            done[name] = {"settings": settings, "result": measure(model)}
            self._claim(folder, run)
            write_whole(file, json.dumps(done, indent=2) + "\n")
        return {name: entry["result"] for name, entry in done.items() if name in self._evaluations()}

    def _evaluations(self) -> dict[str, tuple[dict, Callable[[PreTrainedModel], dict]]]:
        """For each evaluation the settings it depends on, beside those of the run, and what to do."""
        count, limit = self._arguments.curve_rows, self._arguments.limit
        found = {
            "held-out": ({}, self._measure_held_out),
            "curve": ({"rows": count}, lambda model: evaluate_model(model, self.rows[1][:count])),
        }
        for name, path in self._arguments.other_text:
            found[f"text {name}"] = ({"text": path}, lambda model, path=path: self._measure_text(model, path))
        for name, path in self._arguments.task:
            found[f"task {name}"] = (
                {"task": path, "limit": limit},
                lambda model, path=path: evaluate_zero_shot(model, self.tokenizer, {"": path}, limit=limit)[""],
            )
        if number := self._scoring.continuations:
            lengths = {"prompt_tokens": self._scoring.prompt_tokens, "new_tokens": self._scoring.new_tokens}
            found["continuations"] = ({"rows": number, **lengths}, lambda model: self._go_on(model, number, lengths))
        return found

    def _go_on(self, model: PreTrainedModel, number: int, lengths: dict) -> dict:
        result = evaluate_continuations(model, self.rows[1][:number], self.tokenizer, description="go on", **lengths)
        return result | {"texts": result["texts"][:SIDE_BY_SIDE]}

    def _measure_held_out(self, model: PreTrainedModel) -> dict:
        result = evaluate_model(model, self.rows[1], teacher=self.teacher, tokenizer=self.tokenizer)
        return result | {
            "parameters": model.num_parameters(),
            "kv_bytes_per_token": count_kv_bytes_per_token(model),
        }

    def _measure_text(self, model: PreTrainedModel, path: str) -> dict:
        settings = self._data
        rows = draw_rows(load_documents(path), self.tokenizer, settings.row_length, settings.evaluation_rows)
        return evaluate_model(model, rows, tokenizer=self.tokenizer)


def run_study(arguments: argparse.Namespace) -> dict:
    """Do what is left to do, and return the results."""
    study, runs = Study(arguments), list_runs(arguments)
    study.check(runs)
    results = {
        "teacher": Path(arguments.teacher).name,
        "data": [Path(data).name for data in arguments.data or [STDLIB]],
        # First, so that texts and tasks that cannot be read are found before any training.
        "teacher_evaluations": study.evaluate(None),
    }
    entries, missing = [], []
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] ratio {run.ratio}: {run.method}", file=sys.stderr, flush=True)
        try:
            entries.append(finish_run(study, run))
        except LeftOut as reason:
            missing.append({"ratio": run.ratio, "method": run.method, "reason": str(reason)})
    compared = [compare(entries, ratio) for ratio in arguments.ratios]
    compared = [each for each in compared if each is not None]
    return results | {"runs": entries, "left_out": missing, "tokens_to_reach_paper": compared}


def finish_run(study: Study, run: Run) -> dict:
    """Do what is left to do of a run, and return its part of the results."""
    study.make(run)
    facts, evaluations = study.read_facts(run), study.evaluate(run)
    entry = {"ratio": run.ratio, "method": run.method, "table": run.table, "start": asdict(run.start)}
    entry["distillation"] = asdict(run.distillation) if run.distillation is not None else None
    if run.distillation is not None:
        ends = [each["curve"]["perplexity"] for each in (study.evaluate(run.untrained), evaluations)]
        steps, tokens_per_step = run.distillation.steps, run.distillation.batch_size * study.row_length
        entry["curve"] = make_curve(facts.pop("eval_log"), *ends, steps, tokens_per_step)
    return entry | facts | {"evaluations": evaluations}


def write_results(results: dict, output: Path) -> None:
    """Write what has changed: `results.json`, the tables, and the plot."""
    text, file = json.dumps(results, indent=2) + "\n", output / "results.json"
    if file.exists() and file.read_text() == text:
        return
    write_whole(output / "results.md", make_report(results))
    if "continuations" in results["teacher_evaluations"]:
        write_whole(output / "continuations.md", make_side_by_side(results))
    plot_curves(results, output / ".perplexity.png")
    (output / ".perplexity.png").replace(output / "perplexity.png")
    write_whole(file, text)  # last: what it says of the others holds


def main() -> None:
    arguments = parse_arguments()
    try:
        results = run_study(arguments)
    except KeyboardInterrupt:
        print("Stopped. All that was done is kept: the same command goes on.", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    write_results(results, arguments.output)
    print(make_report(results))


if __name__ == "__main__":
    main()

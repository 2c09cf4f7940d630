"""What the processes of `test_distributed.py` run, and what one process runs to compare with."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import make_batch, make_teacher, plan_of
from datasets import Dataset, IterableDataset
from transformers import Trainer
from transformers.integrations import unset_hf_deepspeed_config

from echoatt_hf import (
    EchoAttForCausalLM,
    EchoAttTrainer,
    EchoAttTrainingArguments,
    StoredTeacher,
    evaluate_continuations,
    evaluate_model,
    load_model,
    write_stored_teacher,
)
from echoatt_hf.cli import app as cli
from echoatt_hf.distillation import stored_teacher
from echoatt_hf.distillation.checkpoints import train_from_last_checkpoint, whole_state
from echoatt_hf.models import heads
from echoatt_hf.models.heads import OutputHead
from echoatt_hf.models.loading import load_tokenizer
from echoatt_hf.pipeline import training
from echoatt_hf.settings import DataSettings
from echoatt_hf.text.rows import collate_rows


ROWS, BATCH = 32, 8


def rows_of_ids():
    ids = make_batch(ROWS, 12)["input_ids"]
    ids[:, 0] = torch.arange(1, ROWS + 1)  # so that rows are told apart; 0 is padding
    return [{"input_ids": row} for row in ids.tolist()]


def masked_collator(rows):
    """Rows of very different numbers of targets: a mean over processes would weigh them wrongly."""
    batch = collate_rows(rows)
    for row, ids in enumerate(batch["input_ids"]):
        batch["labels"][row, 2 + 5 * int(ids[0]) % 10 :] = -100
    return batch


class RecordingTrainer(EchoAttTrainer):
    """Keeps which rows it was given."""

    def compute_loss(self, model, inputs, **kwargs):
        self.seen.extend(inputs["input_ids"][:, 0].tolist())
        return super().compute_loss(model, inputs, **kwargs)


def make_trainer(folder, processes, family="llama", rows=None, **changes):
    """A trainer of the tiny student, of global batches of the same rows for any number of processes."""
    heads.CHUNK_BYTES = 4 * 97 * 5  # five tokens
    unset_hf_deepspeed_config()  # of the trainer before
    teacher = make_teacher(family)
    values = {
        "stage1_steps": 3,
        "stage2_steps": 1,
        "learning_rate": 1e-2,
        "stage2_learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-2,  # small gradients are not blown up to steps of their sign
        "per_device_train_batch_size": BATCH // processes,
        "ce_weight": 0.3,
        "hidden_weight": 0.3,
        "attention_weight": 0.3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = RecordingTrainer(
        model=EchoAttForCausalLM.from_teacher(teacher, plan_of(family)),
        teacher=teacher,
        args=EchoAttTrainingArguments(str(folder), **{**values, **changes}),
        train_dataset=rows if rows is not None else Dataset.from_list(rows_of_ids()),
        data_collator=masked_collator,
    )
    trainer.seen = []
    return trainer


def stream(number):
    def generate():
        yield from rows_of_ids()[:number]

    return IterableDataset.from_generator(generate)


def shard_without_gpus() -> None:
    """Let accelerate use FSDP2 for processes on CPUs, which it leaves to accelerators: they pass for those of one."""

    def create(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        Trainer.create_accelerator_and_postprocess(self)

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        EchoAttTrainer.create_accelerator_and_postprocess = create


def train_and_save(folder: Path, family: str = "llama", checkpoint: Path | None = None) -> None:
    """Train, going on from a checkpoint if there is one, and save as `Trainer` does."""
    trainer = make_trainer(folder / "runs", 2, family)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model(str(folder))


def run_everywhere(folder: Path, alone: Path) -> dict:
    """What has to give the same however the student is divided. `alone` is the checkpoint of one process."""
    runs = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(folder / "runs", 2, **runs)
    train_from_last_checkpoint(trainer)
    trainer.save_model(str(folder / "trained"))
    local = [getattr(value, "_local_tensor", value).numel() for value in trainer.teacher.parameters()]
    facts = {"rows": trainer.seen, "teacher": [type(trainer.teacher).__name__, sum(local)]}
    train_and_save(folder / "phi", family="phi")
    finished = make_trainer(folder / "runs", 2, **runs)
    train_from_last_checkpoint(finished)
    state = whole_state(finished)
    if dist.get_rank() == 0:
        finished.model.save_pretrained(folder / "finished", state_dict=state)
    for name, checkpoint in (("resumed", folder / "runs" / "checkpoint-2"), ("from_one", alone)):
        try:
            train_and_save(folder / name, checkpoint=checkpoint)
        except (ValueError, RuntimeError) as error:
            facts[name] = str(error)
    return facts


def run_replicated(folder: Path) -> dict:
    """What does not depend on how the student is divided."""
    trainer = make_trainer(folder / "streamed", 2, rows=stream(19), stage1_steps=2, stage2_steps=0)
    trainer.train()
    gives_the_logits_of = OutputHead._gives_the_logits_of
    head = OutputHead.find(trainer.model) is not None
    if dist.get_rank() == 1:  # as where it is the main process alone that has loaded the weights
        OutputHead._gives_the_logits_of = lambda self, model: False
    refused_by_one = OutputHead.find(trainer.model) is None
    OutputHead._gives_the_logits_of = gives_the_logits_of
    return {"streamed": trainer.seen, "heads": [head, refused_by_one]} | run_together(folder)


class IdTokenizer:
    """Writes tokens as their numbers."""

    def decode(self, tokens, **options) -> str:
        return " ".join(map(str, tokens))


def run_together(folder: Path) -> dict:
    """An evaluation, the text of a run and a stored teacher, of which each process does its part."""
    teacher, evaluated = make_teacher("llama"), []
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))
    calls = []
    student.register_forward_hook(lambda *given: calls.append(None))
    tried = 2  # passes in which the head is tried out
    for count in (1, 5):
        calls.clear()
        rows = rows_of_ids()[:count]
        found = evaluate_model(student, rows, teacher=teacher, batch_size=2, among_processes=True)
        evaluated.append([found, len(calls) - tried])
    written = []
    for count in (1, 5):
        found = evaluate_continuations(
            student,
            rows_of_ids()[:count],
            IdTokenizer(),
            prompt_tokens=4,
            new_tokens=8,
            batch_size=2,
            among_processes=True,
        )
        written.append(found)
    reads = {"text": 0, "files": 0}

    def counted(module, name, kind):
        function = getattr(module, name)

        def count(*given, **options):
            reads[kind] += 1
            return function(*given, **options)

        setattr(module, name, count)

    counted(training, "load_rows", "text")
    model = load_model("builtin")
    models = training.RunModels(None, model, load_tokenizer("builtin", model), model.dtype)
    text = folder / "text.txt"
    if dist.get_rank() == 0:
        text.write_text("\n<|endoftext|>\n".join(f"Story {n} of some words, and some more." for n in range(99)))
        write_stored_teacher(folder / "store", teacher, models.tokenizer, rows_of_ids()[:4], top_k=3)
    dist.barrier()
    settings = DataSettings([str(text)], row_length=16, evaluation_rows=2, held_out_fraction=0.2)
    train, held_out = training.load_rows_once(folder / "rows", settings, models)
    counted(stored_teacher, "hash_file", "files")
    assert len(StoredTeacher(folder / "store")) == 4
    return {"evaluated": evaluated, "written": written, "reads": reads, "text": [list(train["input_ids"]), held_out]}


def main(folder: Path, alone: Path) -> None:
    facts = run_everywhere(folder, alone)
    if folder.name == "ddp_cpu2":
        facts |= run_replicated(folder)
    (folder / f"facts{dist.get_rank()}.json").write_text(json.dumps(facts, default=int))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    shard_without_gpus()
    if sys.argv[1] == "echoatt":
        sys.argv = sys.argv[1:]
        cli.main()
    else:
        main(*map(Path, sys.argv[1:]))

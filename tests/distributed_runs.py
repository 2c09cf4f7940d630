"""What the processes of `test_distributed.py` run, and what one process runs to compare with."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from conftest import make_batch, make_teacher, plan_of
from datasets import Dataset, IterableDataset
from torch import nn

from echoatt_hf import EchoAttForCausalLM, EchoAttTrainer, EchoAttTrainingArguments, losses
from echoatt_hf.data import collate_rows
from echoatt_hf.heads import OutputHead


ROWS, BATCH = 32, 8
# Whose head is tied to the embeddings, has a bias.
FAMILIES = ["llama", "phi"]


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
    losses.CHUNK_BYTES = 4 * 97 * 5  # five tokens
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


def train_in_shards(trainer: EchoAttTrainer, steps: int) -> nn.Module:
    """Some steps of plain gradient descent with the student in the shards that accelerate makes of it with FSDP2."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    # accelerate itself shards on GPUs only.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device="cpu", is_main_process=rank == 0
    )
    model = fsdp2_prepare_model(accelerator, trainer.model.train())
    part = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    for step in range(steps):
        descend(trainer, model, step, part)
    return model


def descend(trainer: EchoAttTrainer, model: nn.Module, step: int, part: slice = slice(None)) -> None:
    rows = rows_of_ids()[step * BATCH : (step + 1) * BATCH]
    tokens = (masked_collator(rows)["labels"][:, 1:] != -100).sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.compute_loss(model, masked_collator(rows[part]), num_items_in_batch=tokens).backward()
    optimizer.step()


def main(folder: Path) -> None:
    trainer = make_trainer(folder / "ddp", 2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(folder / "trained"))
    rank, gives_the_logits_of = dist.get_rank(), OutputHead._gives_the_logits_of
    streamed = make_trainer(folder / "streamed", 2, rows=stream(19), stage1_steps=2, stage2_steps=0)
    streamed.train()
    head = OutputHead.find(trainer.model) is not None
    if rank == 1:  # as where it is the main process alone that has loaded the weights
        OutputHead._gives_the_logits_of = lambda self, model: False
    refused_by_one = OutputHead.find(trainer.model) is None
    OutputHead._gives_the_logits_of = gives_the_logits_of
    seen = {"rows": trainer.seen, "streamed": streamed.seen, "heads": [head, refused_by_one]}
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))
    for family in FAMILIES:
        model = train_in_shards(make_trainer(folder / family, 2, family), 3)
        state = {name: value.full_tensor() for name, value in model.state_dict().items()}
        if rank == 0:
            torch.save(state, folder / f"{family}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Checkpoints of a `Trainer`: going on from the last whole one, and the weights of all processes."""

from pathlib import Path

import torch
from accelerate import load_checkpoint_in_model
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled

from ..models.devices import processes
from ..outputs.files import last_complete_checkpoint, seal_folder


__all__ = ["train_from_last_checkpoint", "whole_state"]


def train_from_last_checkpoint(trainer: Trainer) -> None:
    """
    Train from the last complete checkpoint in the trainer's `output_dir`, or from the start if there is none.

    Checkpoints are sealed as they become complete. From that of the last step nothing is trained; `Trainer` itself would
    make one step more.

    Raises:
        `ValueError`: the checkpoint has a file that is not as it was written.
    """
    trainer.add_callback(_SealCheckpoints())
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            if trainer.is_fsdp_enabled:  # whose states are for a model that it has divided
                load_checkpoint_in_model(trainer.model, checkpoint)
            else:
                trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()  # which `Trainer` leaves open when it fails, over what is said of it


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """
    Args:
        trainer (`Trainer`): a trainer that has trained, in each process that was launched.

    Returns:
        `dict` or `None`: the weights of its model, whole in the main process, where each process has a part of them;
        `None` where the model itself has all of them.
    """
    if trainer.is_fsdp_enabled:
        return trainer.accelerator.get_state_dict(trainer.model)
    if is_deepspeed_zero3_enabled() and trainer.model_wrapped is not trainer.model:  # there was something to train
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return None


class _SealCheckpoints(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        processes().wait_for_everyone()  # each may write a part
        if state.is_world_process_zero:
            seal_folder(Path(args.output_dir) / f"checkpoint-{state.global_step}")

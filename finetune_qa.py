"""Few-shot question answering: `train.py` with settings that suit 64 to 100 examples. Every flag overrides them."""

import argparse

from atlas.command_line import parse_config, quiet_until_started
from train import train


def often(options: argparse.Namespace) -> int:
    """10; 9 or 8 if that would evaluate one step before the end; of fewer steps the last is evaluated"""
    total = options.total_steps
    return min(total, next((steps for steps in (10, 9, 8, 7, 11) if (total - 1) % steps), 10))


def at_the_end(options: argparse.Namespace) -> int:
    """once, at the end"""
    return options.total_steps


def a_few(options: argparse.Namespace) -> int:
    """5, or all steps but the last"""
    return min(5, options.total_steps - 1)


PRESET = {
    "task": "qa",
    "write_results": True,
    "train_retriever": True,
    "query_side_retriever_training": True,
    "gold_score_mode": "ppmean",
    "temperature_gold": 0.01,
    "temperature_score": 0.01,
    "refresh_index": "-1",
    "text_maxlength": 384,
    "target_maxlength": 32,
    "generation_max_length": 32,
    "n_context": 40,
    "retriever_n_context": 40,
    "per_gpu_batch_size": 1,
    "precision": "bf16",
    "shard_optim": True,
    "shard_grads": True,
    "use_gradient_checkpoint_reader": True,
    "use_gradient_checkpoint_retriever": True,
    "dropout": 0.1,
    "lr": 4e-5,
    "lr_retriever": 4e-5,
    "weight_decay": 0.01,
    "scheduler": "linear",
    "warmup_steps": a_few,
    "eval_freq": often,
    "log_freq": 5,
    "save_freq": at_the_end,
}


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    train(parse_config(arguments, program="finetune_qa", **PRESET))


if __name__ == "__main__":
    quiet_until_started()
    main()

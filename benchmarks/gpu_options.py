"""What flags switch on, against a CPU: language models, adapters, other moments, 8 bits. Of `benchmarks.gpu_check`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atlas.config import Lora
from atlas.model.adapters import add_adapters
from atlas.model.int8 import round_to_int8
from atlas.model.signals import PROMPT_MODES
from benchmarks.gpu_bench import MODELS, Bench, Row, World, has_module
from benchmarks.gpu_right import LOSS_LIMITS, SAME_ANSWERS, compare_answers, compare_losses, compare_steps, joint_model

END = "<|end|>"


def save_language_model(directory: Path) -> Path:
    """A tiny Llama with random weights, whose tokens are bytes."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.1}
    ends = {"bos_token_id": None, "eos_token_id": tokens.index(END)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same model, whatever ran before
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **shape, **ends)).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(directory)
    return directory


def language_model(bench: Bench) -> Iterator[Row]:
    """A decoder-only reader: the losses of its gold-score modes, and its answers."""
    scratch = bench.world.scratch
    reader = save_language_model(scratch / "language-model")
    there = replace(bench, world=World(MODELS, scratch, bench.sizes, reader))
    yield from compare_losses(there, PROMPT_MODES, of="language model, ")
    # In bf16 a model with random weights often has two words that are as good.
    in_fp32 = {"fp32": SAME_ANSWERS["fp32"]}
    yield from compare_answers(there, there.world.reader(), "language model, greedy", shares=in_fp32)


def adapters(bench: Bench) -> Iterator[Row]:
    """A reader that learns by its adapters alone."""
    if not has_module("peft"):
        yield Row("losses of steps, --lora_rank 8", "as on the CPU", "not run: no peft")
        return
    model = joint_model(bench.world, "pdist")
    add_adapters(model.reader, model.reader.blocks, Lora(8, 16, 0.0, ()), "lora")
    yield from compare_steps(bench, model, "--lora_rank 8, ")


def moments(bench: Bench) -> Iterator[Row]:
    """What an optimizer keeps, in 8 bits and on the CPU."""
    model, in_fp32 = joint_model(bench.world, "pdist"), {"fp32": LOSS_LIMITS["fp32"]}
    yield from compare_steps(bench, model, "--optimizer adamw8bit, ", in_fp32, optimizer="adamw8bit")
    yield from compare_steps(bench, model, "--offload_optimizer, ", in_fp32, offload_optimizer=True)


def int8_reader(bench: Bench) -> Iterator[Row]:
    """Answers of a reader whose matrices are in 8 bits."""
    reader = bench.world.reader()
    round_to_int8(reader.blocks)
    yield from compare_answers(bench, reader, "--int8_reader, greedy")


CHECKS = (language_model, adapters, moments, int8_reader)

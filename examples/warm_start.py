"""
A warm start: teach a chat model to think before it answers.

The model gets a template that opens the thinking, markers of one token each, and made chains of thought by SFT.
"""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from trl_anytime.data.recipe import set_chat_template
from trl_anytime.inference.anytime_config import AnytimeConfig
from trl_anytime.method.budgets import prior_weights

THINK_START, THINK_END = "<think>", "</think>"
# The shortest that close a trace and open the answer. A long bridge would cost more than a short trace.
TRUNCATION_BRIDGE, ANSWER_BRIDGE = THINK_END, "\n\\boxed{"
MAX_SUMMARY_LENGTH = 16  # an answer here has at most five; `eval` counts the whole box
SFT_BATCH_SIZE = 16


def open_thinking(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Give a ChatML model a template that opens the thinking, and markers of one token each.

    A marker of several tokens may melt into its neighbours, and costs its length at every cut. A new token starts as
    the mean of those that spelled it.
    """
    spelled = {marker: tokenizer(marker, add_special_tokens=False)["input_ids"] for marker in (THINK_START, THINK_END)}
    # As in Qwen3's tokenizer, the markers are not special: they show when decoding
    tokenizer.add_tokens([AddedToken(marker, special=False) for marker in spelled])
    set_chat_template(tokenizer, "chatml_think")
    embeddings = model.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight.data
    for marker, ids in spelled.items():
        embeddings[tokenizer.convert_tokens_to_ids(marker)] = embeddings[ids].mean(dim=0)


def make_prompt(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def make_sft_dataset(
    questions: Iterable[str],
    make_thinking: Callable[[str, random.Random], tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    rng: random.Random,
) -> Dataset:
    """
    Make a row for each question: prompt, thinking of at most `longest` tokens, bridge, answer.

    The loss leaves out the prompt and the bridge. A quarter of the traces are cut at a random place, so that the model
    learns to answer early but is not taught to stop early.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end, eos = tokenizer.convert_tokens_to_ids(THINK_END), tokenizer.eos_token_id
    rows = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(make_prompt(question), add_generation_prompt=True, tokenize=False)
        text, answer = make_thinking(question, rng)
        thinking = [*encode(text), end]
        if rng.random() < 0.25:
            thinking = thinking[: rng.randrange(len(thinking))]
        thinking = thinking[:longest]
        bridge = encode(ANSWER_BRIDGE) if thinking[-1:] == [end] else [end, *encode(ANSWER_BRIDGE)]
        pieces = [(encode(prompt), False), (thinking, True), (bridge, False), ([*encode(answer + "}"), eos], True)]
        rows.append(
            {
                "input_ids": [token for ids, _ in pieces for token in ids],
                "labels": [token if trained else -100 for ids, trained in pieces for token in ids],
            }
        )
    return Dataset.from_list(rows)


def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies faster in bfloat16, as those with AVX512-BF16 or AMX do."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        x @ x
        start = time.perf_counter()
        for _ in range(5):
            x @ x
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


def common_settings(seed: int) -> dict[str, Any]:
    """Return the settings that the trainers of both stages share on a CPU."""
    return {
        "bf16": bfloat16_is_faster(),
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": "none",
        "seed": seed,
        "save_total_limit": 1,
    }


def make_sft_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, folder: Path, steps: int, seed: int
) -> SFTTrainer:
    """
    Make the trainer of a warm start.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model that [`open_thinking`] has prepared.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dataset (`Dataset`):
            Rows of [`make_sft_dataset`].
        folder (`Path`):
            Where checkpoints lie.
        steps (`int`):
            Optimiser steps of `SFT_BATCH_SIZE` rows.
        seed (`int`):
            Seed of the order.
    """
    args = SFTConfig(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=SFT_BATCH_SIZE // 2,
        gradient_accumulation_steps=2,
        learning_rate=4e-4,
        warmup_steps=steps // 10,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        dataset_kwargs={"skip_prepare_dataset": True},  # it is tokenized
        save_steps=15,
        **common_settings(seed),
    )
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)


def make_anytime_config(tokenizer: PreTrainedTokenizerBase, budgets: list[int]) -> AnytimeConfig:
    """Return what the warm-started model thinks and answers with: bridges, budgets, sampling at temperature 1."""
    config = AnytimeConfig.from_tokenizer(tokenizer, truncation_bridge=TRUNCATION_BRIDGE, answer_bridge=ANSWER_BRIDGE)
    return replace(
        config,
        budgets=budgets,
        prior=prior_weights("uniform", budgets).tolist(),
        max_summary_length=MAX_SUMMARY_LENGTH,
        sampling=replace(config.sampling, temperature=1.0),
    )

"""
From nothing to an anytime model in a few minutes, offline and on a CPU:

    make quickstart

or, with the package and its extra `plot` installed, `python examples/quickstart.py` (`--help` lists the options).

The task is pointer chasing. A question lists eight entries, `hf` (h points to f) or `e.` (e is an end), and a start
node; the answer is the node where the chain ends: `a. g. hf ca bd fb e. de h` -> `e`. One hop is one token of
thinking, so the shortest thinking here is `hf fb bd de e.`. Supervised fine-tuning first teaches a tiny Qwen3 model to
think wastefully and fallibly; BRPO then teaches it to be right as early as possible, at every thinking budget.
"""

import argparse
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# On tensors this small a second thread gains little, and beside another busy process it loses a lot
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from datasets import Dataset
from matplotlib.figure import Figure
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from trl_anytime import BRPOConfig, BRPOTrainer

BUDGETS = [10, 20, 30, 40]
EVAL_BUDGETS = [4, 6, 8, 10, 15, 20, 30, 40]
SFT_BATCH_SIZE = 32
PROMPTS_PER_UPDATE, GROUP_SIZE = 32, 8
# The paper has 4. Here, where thinking is short, the gradient of more early guesses would drown that of the thinking.
NUM_SUMMARIES = 2
FULL_UPDATES = 60

NODES = "abcdefgh"
FILLERS = ("so", "then", "hmm", "wait")
WORDS = (*FILLERS, *NODES, *(node + target for node in NODES for target in f"{NODES}." if target != node))
# Closes a thinking that was cut (BRPOConfig.truncation_bridge), then asks for the answer (answer_bridge).
TRUNCATION_BRIDGE, ANSWER_BRIDGE = "</think>", "answer"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant <think>{% endif %}"
)


# The task


@dataclass(frozen=True)
class Problem:
    """A pointer-chasing problem: `arrows` maps each node to the next one, or to `.` at an end of a chain."""

    question: str
    start: str
    arrows: dict[str, str]

    @property
    def answer(self) -> str:
        return follow(self.arrows, self.start)[-1]


def follow(arrows: dict[str, str], start: str) -> list[str]:
    """The nodes from `start` to the end of its chain."""
    path = [start]
    while arrows[path[-1]] != ".":
        path.append(arrows[path[-1]])
    return path


def make_problem(rng: random.Random) -> Problem:
    """A chain of 1 to 6 hops to follow, the remaining nodes in chains that distract, the entries shuffled."""
    nodes = rng.sample(NODES, len(NODES))
    hops = rng.randint(1, 6)
    arrows = {}
    for i, node in enumerate(nodes):
        is_end = i == hops or i == len(nodes) - 1 or (i > hops and rng.random() < 0.35)
        arrows[node] = "." if is_end else nodes[i + 1]
    entries = [node + target for node, target in arrows.items()]
    rng.shuffle(entries)
    return Problem(question=" ".join([*entries, nodes[0]]), start=nodes[0], arrows=arrows)


def make_problems(
    count: int,
    rng: random.Random,
    held_out: Container[str] = (),
    make_problem: Callable[[random.Random], Any] = make_problem,
) -> list[Any]:
    """`count` different problems, none of whose questions is in `held_out`."""
    problems: dict[str, Any] = {}
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.question not in held_out:
            problems[problem.question] = problem
    return list(problems.values())


def make_thinking(problem: Problem, rng: random.Random) -> tuple[list[str], str]:
    """
    A wasteful and fallible chain of thought, and the answer that it leads to: a preamble of fillers, the walk with
    repeated arrows and fillers between, up to three more walks of the same chain. One in five contains a slip, a wrong
    arrow that is then followed consistently: without slips, longer thinking would only ever help.
    """
    arrows = dict(problem.arrows)
    path = follow(arrows, problem.start)
    if rng.random() < 0.2:
        slip = rng.randrange(len(path) - 1)
        # Never back into the walk so far, which would loop
        arrows[path[slip]] = rng.choice([n for n in NODES if n not in path[: slip + 1] and n != arrows[path[slip]]])
        path = follow(arrows, problem.start)

    thinking = rng.choices(FILLERS, k=rng.randint(2, 10)) if rng.random() < 0.8 else []
    for walk in range(4):
        if walk > 0 and rng.random() > 0.7:
            break
        for node in path:
            arrow = node + arrows[node]
            thinking += [arrow, arrow] if rng.random() < 0.35 else [arrow]
            if rng.random() < 0.4:
                thinking += rng.choices(FILLERS, k=rng.randint(1, 2))
    return thinking, path[-1]


# Tokenizer, model, data


def make_tokenizer(task_words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token per word; the template opens the thinking, as DeepSeek-R1-Distill's does."""
    markers = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    words = [*markers, "user", "assistant", ANSWER_BRIDGE, *task_words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As in Qwen3's tokenizer, the thinking markers are single tokens but not special: they show when decoding.
    tokenizer.add_tokens([AddedToken(marker, special=False) for marker in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|im_start|>",  # never generated, and padding is masked wherever it is added
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=256,
        initializer_range=0.06,  # at the usual 0.02 so narrow a model learns late
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def make_prompt(problem: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def make_sft_dataset(
    problems: list[Any],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    make_thinking: Callable[..., tuple[list[str], str]] = make_thinking,
    longest: int = BUDGETS[-1],
) -> Dataset:
    """
    One row per problem: prompt, thinking, bridge, answer. The loss leaves out the prompt and the bridge. A quarter of
    the thinkings are cut at a random place, so the model learns to answer early but is not taught to stop early.
    """
    rows = []
    for problem in problems:
        prompt = tokenizer.apply_chat_template(make_prompt(problem), add_generation_prompt=True, tokenize=False)
        thinking, answer = make_thinking(problem, rng)
        thinking.append("</think>")
        if rng.random() < 0.25:
            thinking = thinking[: rng.randrange(len(thinking))]
        thinking = thinking[:longest]
        bridge = [ANSWER_BRIDGE] if thinking[-1:] == ["</think>"] else [TRUNCATION_BRIDGE, ANSWER_BRIDGE]
        pieces = [(prompt.split(), False), (thinking, True), (bridge, False), ([answer, tokenizer.eos_token], True)]
        input_ids, labels = [], []
        for words, is_trained in pieces:
            ids = tokenizer.convert_tokens_to_ids(words)
            input_ids += ids
            labels += ids if is_trained else [-100] * len(ids)
        rows.append({"input_ids": input_ids, "labels": labels})
    return Dataset.from_list(rows)


def make_rl_dataset(problems: list[Any]) -> Dataset:
    return Dataset.from_list([{"prompt": make_prompt(problem), "answer": problem.answer} for problem in problems])


# The run


class ProgressBar(ProgressCallback):
    """Transformers' progress bar, with loss and reward behind it instead of all metrics as text between."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            self.training_bar.set_postfix({key: logs[key] for key in ("loss", "reward") if key in logs})


def supervised_fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    steps: int,
    seed: int,
    output_dir: Path,
    learning_rate: float = 5e-3,
) -> None:
    args = SFTConfig(
        output_dir=str(output_dir),
        save_strategy="no",
        max_steps=steps,
        per_device_train_batch_size=SFT_BATCH_SIZE,
        learning_rate=learning_rate,
        adam_beta2=0.98,
        warmup_steps=50,
        lr_scheduler_type="linear",
        dataset_kwargs={"skip_prepare_dataset": True},  # it is tokenized
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        seed=seed,
    )
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)
    trainer.train()


def end_of_chain_reward(
    completions: list[list[dict]], answer: list[str], well_formed: list[bool], **kwargs
) -> list[float]:
    """1 for each summary that is the right node, 0 for a wrong one and after a thinking that broke off."""
    return [
        float(formed and completion[0]["content"].strip() == truth)
        for completion, truth, formed in zip(completions, answer, well_formed, strict=True)
    ]


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    updates: int,
    **settings,
) -> BRPOTrainer:
    """The trainer of the quickstart; `settings` override those of its BRPOConfig."""
    settings = {
        "budgets": BUDGETS,
        "eval_budgets": EVAL_BUDGETS,
        "num_summaries": NUM_SUMMARIES,
        "max_summary_length": 4,
        "truncation_bridge": TRUNCATION_BRIDGE,
        "answer_bridge": ANSWER_BRIDGE,
        "num_generations": GROUP_SIZE,
        "num_generations_eval": 1,
        "per_device_train_batch_size": PROMPTS_PER_UPDATE * GROUP_SIZE,
        "per_device_eval_batch_size": 250,
        "max_steps": updates,
        "learning_rate": 8e-4,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        **settings,
    }
    trainer = BRPOTrainer(
        model,
        BRPOConfig(**settings),
        train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        reward_funcs=end_of_chain_reward,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)
    return trainer


def evaluate(trainer: BRPOTrainer) -> list[float]:
    """Accuracy on the held-out problems at each of EVAL_BUDGETS."""
    metrics = trainer.evaluate()
    return [metrics[f"eval_anytime/reward@{budget}"] for budget in EVAL_BUDGETS]


def plot_curves(before: list[float], after: list[float], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(EVAL_BUDGETS, before, "o--", color="tab:gray", label="before (SFT)")
    axes.plot(EVAL_BUDGETS, after, "o-", color="tab:blue", label="after BRPO")
    axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy on held-out problems", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def requirements(before: list[float], after: list[float]) -> dict[str, bool]:
    """What a full run must reach, and whether it did."""
    at = EVAL_BUDGETS.index
    return {
        f"budget 10: from about 0.55 ({before[at(10)]:.3f}) to at least 0.92 ({after[at(10)]:.3f})": (
            0.45 <= before[at(10)] <= 0.65 and after[at(10)] >= 0.92
        ),
        f"budget 40: at least 0.95 ({after[at(40)]:.3f})": after[at(40)] >= 0.95,
        "no budget lower than before": all(new >= old for old, new in zip(before, after, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Warm-start a tiny model, train it with BRPO, show what changed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft_steps", type=int, default=700, help="steps of supervised fine-tuning")
    parser.add_argument("--updates", type=int, default=FULL_UPDATES, help="updates by BRPO")
    parser.add_argument("--prior", default="uniform", choices=["uniform", "linear", "base"])
    parser.add_argument("--baseline", default="brpo", choices=["brpo", "v1", "v2", "none"])
    parser.add_argument("--eval_problems", type=int, default=1000, help="held-out problems")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own
    model_dir = options.output_dir / "model"
    model_dir.mkdir(parents=True, exist_ok=True)

    set_seed(options.seed)
    rng = random.Random(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    held_out = make_problems(options.eval_problems, rng)
    questions = {problem.question for problem in held_out}
    sft_problems = make_problems(options.sft_steps * SFT_BATCH_SIZE, rng, questions)
    rl_problems = make_problems(options.updates * PROMPTS_PER_UPDATE, rng, questions)

    print(f"\n1. Supervised fine-tuning of {model.num_parameters():,} parameters, {options.sft_steps} steps")
    sft_dataset = make_sft_dataset(sft_problems, tokenizer, rng)
    supervised_fine_tune(model, tokenizer, sft_dataset, options.sft_steps, options.seed, model_dir)

    trainer = make_trainer(
        model,
        tokenizer,
        make_rl_dataset(rl_problems),
        make_rl_dataset(held_out),
        options.updates,
        output_dir=str(model_dir),
        prior=options.prior,
        baseline=options.baseline,
        seed=options.seed,
        card_dataset="pointer chasing",
        card_eval_dataset="pointer chasing, held out",
        card_metric="accuracy",
        card_question=held_out[0].question,
    )
    print(f"\n2. Accuracy before, on {options.eval_problems} held-out problems")
    before = evaluate(trainer)
    print(f"\n3. BRPO at budgets {BUDGETS}, prior {options.prior}, {options.updates} updates")
    trainer.train()
    print("\n4. Accuracy after")
    after = evaluate(trainer)
    trainer.save_model()
    trainer.create_model_card(model_name="Pointer chasing at any thinking budget")

    plot_curves(before, after, options.output_dir / "curves.png")
    seconds = round(time.time() - psutil.Process().create_time(), 1)
    results = {"budgets": EVAL_BUDGETS, "before": before, "after": after, "seconds": seconds}
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    print()
    for name, row in {"budget": EVAL_BUDGETS, "before": before, "after": after}.items():
        cells = (f"{value:7d}" if isinstance(value, int) else f"{value:7.3f}" for value in row)
        print(f"{name:8}" + "".join(cells))
    print(f"\n{seconds:.0f} seconds. In {options.output_dir}:")
    print("  model/      the checkpoint, with its card in README.md\n  curves.png  both curves\n  results.json")

    print("\nRequired of a full run (uniform prior):")
    outcome = requirements(before, after)
    for requirement, is_met in outcome.items():
        print(f"  {'met' if is_met else 'NOT MET':8}{requirement}")
    is_full = options.updates >= FULL_UPDATES and options.prior == "uniform" and options.baseline == "brpo"
    if is_full and not all(outcome.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

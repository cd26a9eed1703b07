"""
The toy task of the quickstart: problems, a tokenizer with one token per word, and a tiny model that has learned to
think wastefully and fallibly. The learning study shares it.

The task is pointer chasing. A question lists eight entries, `hf` (h points to f) or `e.` (e is an end), and a start
node. The answer is the node where the chain ends: `a. g. hf ca bd fb e. de h` -> `e`. One hop is one token of
thinking, so the shortest thinking here is `hf fb bd de e.`.
"""

import random
import sys
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from trl_anytime.outside.progress import progress

SFT_BATCH_SIZE = 32
# Closes a trace that was cut (BRPOConfig.truncation_bridge), then asks for the answer (answer_bridge).
TRUNCATION_BRIDGE, ANSWER_BRIDGE = "</think>", "answer"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant <think>{% endif %}"
)
# Settings of BRPOConfig for any run on this task: a tiny float32 model, answers of one word
BRPO_SETTINGS: dict[str, Any] = {
    "max_summary_length": 4,
    "truncation_bridge": TRUNCATION_BRIDGE,
    "answer_bridge": ANSWER_BRIDGE,
    "num_generations_eval": 1,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
}


class Problem(Protocol):
    """A question and its answer, as text."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Task:
    """
    A task of generated problems.

    Args:
        words (`tuple[str, ...]`):
            Vocabulary of questions, thinking traces and answers.
        make_problem (`Callable`):
            Draws a problem.
        make_thinking (`Callable`):
            Draws a wasteful and fallible thinking trace for a problem. Returns its words, and the answer that it leads
            to.
    """

    words: tuple[str, ...]
    make_problem: Callable[[random.Random], Any]
    make_thinking: Callable[[Any, random.Random], tuple[list[str], str]]


# Pointer chasing

NODES = "abcdefgh"
FILLERS = ("so", "then", "hmm", "wait")


@dataclass(frozen=True)
class PointerProblem:
    """A pointer-chasing problem: `arrows` maps each node to the next one, or to `.` at an end of a chain."""

    question: str
    start: str
    arrows: dict[str, str]

    @property
    def answer(self) -> str:
        return follow(self.arrows, self.start)[-1]


def follow(arrows: dict[str, str], start: str) -> list[str]:
    """Return the nodes from `start` to the end of its chain."""
    path = [start]
    while arrows[path[-1]] != ".":
        path.append(arrows[path[-1]])
    return path


def make_pointer_problem(rng: random.Random) -> PointerProblem:
    """Draw a chain of 1 to 6 hops to follow, the remaining nodes in chains that distract, the entries shuffled."""
    nodes = rng.sample(NODES, len(NODES))
    hops = rng.randint(1, 6)
    arrows = {}
    for i, node in enumerate(nodes):
        is_end = i == hops or i == len(nodes) - 1 or (i > hops and rng.random() < 0.35)
        arrows[node] = "." if is_end else nodes[i + 1]
    entries = [node + target for node, target in arrows.items()]
    rng.shuffle(entries)
    return PointerProblem(question=" ".join([*entries, nodes[0]]), start=nodes[0], arrows=arrows)


def make_pointer_thinking(problem: PointerProblem, rng: random.Random) -> tuple[list[str], str]:
    """
    Draw a thinking trace: a preamble of fillers, the walk with repeated arrows and fillers between, up to three more
    walks of the same chain. One in five contains a slip, a wrong arrow that is then followed consistently. Without
    slips, longer thinking would only ever help.
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


POINTERS = Task(
    words=(*FILLERS, *NODES, *(node + target for node in NODES for target in f"{NODES}." if target != node)),
    make_problem=make_pointer_problem,
    make_thinking=make_pointer_thinking,
)


# Tokenizer, model, data


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word. Its template opens the thinking, as DeepSeek-R1-Distill's does."""
    markers = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    words = [*markers, "user", "assistant", ANSWER_BRIDGE, *task.words]
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


def make_model(tokenizer: PreTrainedTokenizerFast, model_type: str = "qwen3") -> PreTrainedModel:
    """Make a random model of some 340,000 parameters, of an architecture of transformers."""
    config = AutoConfig.for_model(
        model_type,
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
    return AutoModelForCausalLM.from_config(config)


def make_problems(task: Task, count: int, rng: random.Random, held_out: Container[str] = ()) -> list[Any]:
    """Draw `count` different problems, none of whose questions is in `held_out`."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = task.make_problem(rng)
        if problem.question not in held_out:
            problems[problem.question] = problem
    return list(problems.values())


def make_prompt(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def make_sft_dataset(
    task: Task, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast, rng: random.Random, longest: int
) -> Dataset:
    """
    Make one row per problem: prompt, thinking of at most `longest` tokens, bridge, answer. The loss leaves out the
    prompt and the bridge. A quarter of the thinking traces are cut at a random place, so the model learns to answer
    early but is not taught to stop early.
    """
    rows = []
    for problem in problems:
        prompt = tokenizer.apply_chat_template(make_prompt(problem), add_generation_prompt=True, tokenize=False)
        thinking, answer = task.make_thinking(problem, rng)
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


def make_rl_dataset(problems: Sequence[Problem]) -> Dataset:
    return Dataset.from_list([{"prompt": make_prompt(problem), "answer": problem.answer} for problem in problems])


def end_of_chain_reward(
    completions: list[list[dict]], answer: list[str], well_formed: list[bool], **kwargs
) -> list[float]:
    """Return 1 for each summary that is the right answer, 0 for a wrong one and after a trace that broke off."""
    return [
        float(formed and completion[0]["content"].strip() == truth)
        for completion, truth, formed in zip(completions, answer, well_formed, strict=True)
    ]


# The warm start


class ProgressBar(ProgressCallback):
    """Transformers' progress bar, with loss and reward behind it instead of all metrics as text between."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            self.training_bar.set_postfix({key: logs[key] for key in ("loss", "reward") if key in logs})


class ProgressLines(TrainerCallback):
    """A line a minute, with the time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._lines = ExitStack()
        self._count = self._lines.enter_context(progress("training", "step", state.max_steps, state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self._count()

    def on_train_end(self, args, state, control, **kwargs):
        self._lines.close()


def show_progress(trainer: Trainer) -> None:
    """Show a short bar in a terminal, and lines in a pipe, in place of what the trainer shows."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar if sys.stderr.isatty() else ProgressLines)


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
    show_progress(trainer)
    trainer.train()


def load(
    seed: int, sft_steps: int, train_problems: int, eval_problems: int, longest: int, output_dir: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Dataset, Dataset]:
    """
    Teach a fresh model to think wastefully and fallibly about pointer chasing.

    Args:
        seed (`int`):
            Seeds problems, weights and the order of training.
        sft_steps (`int`):
            Steps of supervised fine-tuning.
        train_problems, eval_problems (`int`):
            How many problems to draw for reinforcement learning, and how many held-out ones.
        longest (`int`):
            Tokens of the longest trace.
        output_dir (`Path`):
            Folder of the fine-tuning.

    Returns:
        `tuple`: the model, its tokenizer, the problems to train on, the held-out problems.
    """
    set_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer(POINTERS)
    model = make_model(tokenizer)
    held_out = make_problems(POINTERS, eval_problems, rng)
    questions = {problem.question for problem in held_out}
    sft_problems = make_problems(POINTERS, sft_steps * SFT_BATCH_SIZE, rng, questions)
    rl_problems = make_problems(POINTERS, train_problems, rng, questions)
    sft_dataset = make_sft_dataset(POINTERS, sft_problems, tokenizer, rng, longest)
    supervised_fine_tune(model, tokenizer, sft_dataset, sft_steps, seed, output_dir)
    return model, tokenizer, make_rl_dataset(rl_problems), make_rl_dataset(held_out)

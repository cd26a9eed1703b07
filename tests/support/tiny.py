"""A tokenizer, models and data small enough to train in a test, made on the spot."""

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig

from trl_anytime import BRPOConfig, BRPOTrainer, ReliableGRPOTrainer
from trl_anytime.rewards import ExactMatch

WORDS = ["user", "assistant", "answer", "so", *"0123456789"]
OPENED = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant <think>{% endif %}"
)


def byte_tokenizer(
    texts=(), vocab_size=300, chat_template=None, special_tokens=("<|end|>", "<think>", "</think>"), end="<|end|>"
) -> PreTrainedTokenizerFast:
    """Byte-level, as those of most language models, trained on some texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=list(special_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=end, chat_template=chat_template
    )


def make_tokenizer(chat_template: str = OPENED, extra_words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Word-level: one token per word, so that a test can write ids as text."""
    vocabulary = ["<pad>", "<unk>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", *WORDS, *extra_words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = chat_template
    return fast


def make_model(model_type: str = "qwen3", vocab_size: int = 20, seed: int = 0, **settings) -> PreTrainedModel:
    """A random decoder with weights large enough for its tokens to influence each other."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 2,
            **settings,
        },
    )
    return AutoModelForCausalLM.from_config(config)


def make_dataset(num_rows: int = 8) -> Dataset:
    """Conversational prompts of unequal length, with an answer column."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": " ".join(str(i + k) for k in range(i % 3 + 1))}], "answer": str(i)}
            for i in range(num_rows)
        ]
    )


# A tiny run: 2 prompts × 4 rollouts per batch
TINY_RUN = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,  # exact comparisons
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_grpo_config(output_dir, **settings) -> GRPOConfig:
    """Settings of a tiny run without budgets."""
    return GRPOConfig(str(output_dir), **{"max_completion_length": 9, **TINY_RUN, **settings})


def make_config(output_dir, **settings) -> BRPOConfig:
    """Settings of a tiny run: 3 budgets × 2 summaries."""
    return BRPOConfig(
        str(output_dir),
        **{
            "budgets": [3, 6, 9],
            "num_summaries": 2,
            "max_summary_length": 4,
            "truncation_bridge": "so </think>",
            "answer_bridge": "answer",
            **TINY_RUN,
            **settings,
        },
    )


def parity_reward(completions, completion_ids, **kwargs) -> list[float]:
    """Varies from summary to summary, and depends on nothing but its tokens."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def tiny_trainer(output_dir, trainer_class=BRPOTrainer, model=None, **settings) -> ReliableGRPOTrainer:
    """
    A trainer of the tiny model on the tiny problems, without budgets unless `trainer_class` is a `BRPOTrainer`.

    `settings` are fields of the configuration or arguments of the trainer.
    """
    make, config_class = (
        (make_config, BRPOConfig) if issubclass(trainer_class, BRPOTrainer) else (make_grpo_config, GRPOConfig)
    )
    fields = config_class.__dataclass_fields__
    return trainer_class(
        make_model() if model is None else model,
        args=make(output_dir, **{name: value for name, value in settings.items() if name in fields}),
        **{
            "train_dataset": make_dataset(),
            "reward_funcs": parity_reward,
            "processing_class": make_tokenizer(),
            **{name: value for name, value in settings.items() if name not in fields},
        },
    )


def graded_trainer(output_dir, model=None, **settings) -> BRPOTrainer:
    """A trainer with rewards of 0 and 1 by a verifier, so that its evaluations are accuracies."""
    boxed = tuple(f"\\boxed{{{digit}}}" for digit in range(10))
    graded = {
        "eval_budgets": [2, 4],
        "eval_dataset": make_dataset(3),
        "reward_funcs": ExactMatch(),
        "processing_class": make_tokenizer(extra_words=boxed),
    }
    return tiny_trainer(output_dir, model=model or make_model(vocab_size=30), **{**graded, **settings})


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Recorder(BRPOTrainer):
    """Keeps what was rolled out, and scored batches."""

    def __init__(self, *args, **kwargs):
        self.rolled, self.scored = [], []
        super().__init__(*args, **kwargs)

    def _roll_out(self, prompts, trainer):
        output = super()._roll_out(prompts, trainer)
        self.rolled.append((output, self._batch, torch.get_rng_state()))
        return output

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.scored.append(output)
        return output

"""The messages in docs/troubleshooting.md: each error that needs no GPU and no server is provoked."""

from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import pages
from tests.support.anytime import make_anytime_config
from tests.support.tiny import make_config, make_dataset, make_grpo_config, make_model, make_tokenizer, parity_reward
from trl_anytime import AnytimeConfig, BRPOTrainer
from trl_anytime.rewards import MathReward
from trl_anytime.training.faults import memory_advice

CLOSED = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant <think> </think>{% endif %}"
)


def make_trainer(folder, dataset=None, tokenizer=None, reward=parity_reward, args=None, **settings):
    return BRPOTrainer(
        make_model(),
        args or make_config(folder, **settings),
        dataset or make_dataset(),
        reward_funcs=reward,
        processing_class=tokenizer or make_tokenizer(),
    )


def without_markers():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}answer")
    tokenizer.get_vocab = lambda: {"answer": 0}
    return tokenizer


def without_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def change_budgets(folder):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(folder, **settings).train()
    make_trainer(folder, budgets=[3, 6], **settings).train(resume_from_checkpoint=True)


def run_out_of_memory(folder):
    try:
        with memory_advice("update"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    except torch.OutOfMemoryError as error:
        raise RuntimeError(error.__notes__[0]) from None


def swap_tokenizer(folder):
    """Load the configuration with a tokenizer in which two words have changed places."""
    make_anytime_config().save_pretrained(folder)
    vocabulary = make_tokenizer().get_vocab()
    vocabulary["answer"], vocabulary["so"] = vocabulary["so"], vocabulary["answer"]
    swapped = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    swapped.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    AnytimeConfig.from_pretrained(folder, PreTrainedTokenizerFast(tokenizer_object=swapped, unk_token="<unk>"))


ROWS = make_dataset()
PROVOKED = {
    "a model that does not think": lambda folder: make_trainer(folder, tokenizer=without_markers()),
    "thinking closed by the template": lambda folder: make_trainer(folder, tokenizer=make_tokenizer(CLOSED)),
    "no template": lambda folder: make_trainer(folder, tokenizer=without_template()),
    "no prompts": lambda folder: make_trainer(folder, ROWS.remove_columns("prompt")),
    "no answers": lambda folder: make_trainer(folder, ROWS.remove_columns("answer"), reward=MathReward()),
    "an answer that is none": lambda folder: make_trainer(
        folder, ROWS.map(lambda row: {"answer": ""}), reward=MathReward()
    ),
    "GRPOConfig": lambda folder: make_trainer(folder, args=make_grpo_config(folder)),
    "TRL's order of arguments": lambda folder: BRPOTrainer(make_model(), parity_reward, make_config(folder)),
    "a setting of GRPO": lambda folder: make_config(folder, scale_rewards="group"),
    "a batch without whole groups": lambda folder: make_config(folder, per_device_train_batch_size=3),
    "weights for other budgets": lambda folder: make_config(folder, prior=[0.5, 0.5]),
    "one reward for all": lambda folder: make_trainer(folder, reward=lambda completions, **kwargs: [1.0]).train(),
    "a full GPU": run_out_of_memory,
    "nothing to resume": lambda folder: make_trainer(folder).train(resume_from_checkpoint=True),
    "other budgets on resume": change_budgets,
    "another tokenizer": swap_tokenizer,
    "a budget beyond the context": lambda folder: make_anytime_config().check_context(10, 1000, 256, "the model's"),
}


ERRORS = [row for table in pages.tables("docs/troubleshooting.md", "the message has", "cause") for row in table]


@pytest.fixture(scope="module")
def message_of(tmp_path_factory):
    @cache
    def message(name):
        with pytest.raises((ValueError, RuntimeError)) as error:
            PROVOKED[name](tmp_path_factory.mktemp("provoked") / "run")
        return str(error.value)

    return message


@pytest.mark.parametrize("name", PROVOKED)
def test_a_message_is_on_the_page(name, message_of):
    assert sum(row[0][1:-1] in message_of(name) for row in ERRORS) == 1, message_of(name)


def test_every_error_of_the_page_is_provoked(message_of):
    for row in ERRORS:
        assert any(row[0][1:-1] in message_of(name) for name in PROVOKED), row[0]

"""The config beside a model: written by the trainer, read by everything that uses the model."""

import json
import re
from dataclasses import replace

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import trl_anytime
from tests.support.tiny import make_config, make_model, make_tokenizer, parity_reward, tiny_trainer
from trl_anytime import AnytimeConfig, BRPOTrainer, Sampling
from trl_anytime.inference.anytime_config import ANYTIME_CONFIG_NAME
from trl_anytime.inference.generate import find_config


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear")], ids=["full", "lora"])
def test_every_saved_model_carries_it(tmp_path, peft_config):
    settings = {"temperature": 0.8, "top_p": 0.9, "prior": "linear", "max_steps": 1, "save_steps": 1}
    trainer = tiny_trainer(tmp_path, peft_config=peft_config, save_strategy="steps", **settings)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        config = AnytimeConfig.from_pretrained(folder)
        assert config.markers == trainer.markers
        assert (config.budgets, config.max_summary_length, config.eos_token_ids) == ([3, 6, 9], 4, [2])
        assert config.prior == pytest.approx([3 / 18, 6 / 18, 9 / 18])
        assert config.sampling == Sampling(temperature=0.8, top_p=0.9)
        assert config.versions.keys() >= {"trl", "transformers", "torch"}
        config.check_tokenizer(AutoTokenizer.from_pretrained(folder))
    values = json.loads((tmp_path / ANYTIME_CONFIG_NAME).read_text())
    assert values["markers"]["truncation_bridge"] == {"text": "so </think>", "ids": [9, 5]}


@pytest.mark.parametrize(
    ("systems", "recorded"),
    [(["so", "so"], "so"), (["so", "answer"], None), (["so", None], None), ([None, "so"], None), ([None, None], None)],
)
def test_the_system_prompt_of_all_prompts_is_recorded(tmp_path, systems, recorded):
    prompts = [
        [*([] if text is None else [{"role": "system", "content": text}]), {"role": "user", "content": "1 2"}]
        for text in systems
    ]
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts * 4])
    args = make_config(tmp_path)
    trainer = BRPOTrainer(make_model(), args, rows, reward_funcs=parity_reward, processing_class=make_tokenizer())
    trainer.save_model()
    assert AnytimeConfig.from_pretrained(tmp_path).system_prompt == recorded
    assert ("so" in (tmp_path / "README.md").read_text().partition("question = ")[2][:60]) == (recorded == "so")

    file = tmp_path / ANYTIME_CONFIG_NAME  # one from before there was such a field
    values = json.loads(file.read_text())
    assert values.pop("system_prompt") == recorded
    file.write_text(json.dumps(values))
    assert AnytimeConfig.from_pretrained(tmp_path).system_prompt is None


def test_it_is_read_from_beside_the_model(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert find_config(model, tokenizer).markers == trainer.markers
    assert not caplog.records
    with pytest.raises(ValueError, match="anytime_config.json.*answer_bridge"):
        AnytimeConfig.from_pretrained(str(tmp_path), tokenizer, answer_bridge="so")


def test_a_model_without_a_file_gets_detected_defaults_with_a_notice(tmp_path, caplog):
    make_model().save_pretrained(tmp_path)
    bridges = "Considering the limited time by user, I have to give solution based on thinking directly now."
    tokenizer = make_tokenizer(extra_words=(*bridges.split(), "**Final", "Answer**"))
    tokenizer.save_pretrained(tmp_path)
    config = AnytimeConfig.from_pretrained(str(tmp_path), AutoTokenizer.from_pretrained(tmp_path))
    assert "anytime_config.json" in caplog.text and repr(config.markers.truncation_bridge) in caplog.text
    assert "Considering the limited time" in config.markers.truncation_bridge
    assert config.markers.answer_bridge == "\n\n**Final Answer**\n"
    assert (config.budgets, config.max_summary_length) == ([2000, 4000, 6000, 8000], 118)


def test_a_model_without_thinking_markers_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    words = make_tokenizer().backend_tokenizer
    plain = PreTrainedTokenizerFast(
        tokenizer_object=words.from_str(words.to_str().replace("think>", "other>")), eos_token="<|im_end|>"
    )
    with pytest.raises(ValueError, match="`?think_end"):
        AnytimeConfig.from_pretrained(str(tmp_path), plain)


def test_another_tokenizer_is_refused(tmp_path):
    tiny_trainer(tmp_path)._anytime_config().save_pretrained(tmp_path)
    words = make_tokenizer().backend_tokenizer
    changed_over = json.loads(words.to_str())
    vocabulary = changed_over["model"]["vocab"]
    vocabulary["answer"], vocabulary["so"] = vocabulary["so"], vocabulary["answer"]
    other = PreTrainedTokenizerFast(tokenizer_object=words.from_str(json.dumps(changed_over)), eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=r"answer_bridge 'answer'.*\[8\].*\[9\]"):
        AnytimeConfig.from_pretrained(tmp_path, other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda values: values.pop("markers"), "`markers`"),
        (lambda values: values.update(format=99), "format 99.*trl-anytime"),
        (lambda values: values.update(budgets=[4, 4]), r"`budgets`.*\[4, 4\]"),
        (lambda values: values["sampling"].update(temperature=-1), "`sampling.temperature`.*-1"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path, damage, message):
    path = tiny_trainer(tmp_path)._anytime_config().save_pretrained(tmp_path)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        AnytimeConfig.from_pretrained(tmp_path)


def test_a_folder_without_it_and_a_name_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"anytime_config.json in {tmp_path}")):
        AnytimeConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "missing"))):
        AnytimeConfig.from_pretrained(tmp_path / "missing")


def test_the_former_name_can_be_imported():
    assert trl_anytime.AnytimeContract is AnytimeConfig


def test_budgets_beyond_the_context(tmp_path):
    config = tiny_trainer(tmp_path)._anytime_config()
    # A prompt of 10, bridges of 2 + 1, a summary of 4: 17 besides the thinking
    config.check_context(10, 83, 100, "the model's")
    with pytest.raises(ValueError, match=r"\b84\b.*\b100\b.*\b83\b"):
        config.check_context(10, 84, 100, "the model's")
    replace(config, max_summary_length=3).check_context(10, 84, 100, "the model's")

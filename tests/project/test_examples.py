"""The examples: their configurations say what the paper says, and they run."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_task
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config

import trl_anytime
from tests.support import DATA, ROOT
from tests.support.cards import curve_tables, metrics_of_headings
from tests.support.speeds import slow_but_for
from tests.support.tiny import byte_tokenizer, make_tokenizer
from trl_anytime.commands.common import BAD_INPUT
from trl_anytime.data.recipe import DataArguments, load_prompts, parse_recipe
from trl_anytime.method.advantages import summary_weights, thinking_advantages
from trl_anytime.method.budgets import exponential_budgets, trapezoid_prior
from trl_anytime.rewards import MathReward
from trl_anytime.rollout.encoding import encode
from trl_anytime.train import main, make_trainer, train

EXAMPLES = ROOT / "examples"
RECIPES = Path(trl_anytime.__file__).parent / "recipes"
PROBLEMS = DATA / "problems.jsonl"


# Configurations

# The paper's table: A, summary method, m, prior, baseline
ARMS = {
    "8k_grpo": (1, "grpo", 1, "base", "v2"),
    "8k_anytime_linear": (4, "brpo", 4, "linear", "brpo"),
    "8k_anytime_uniform": (4, "brpo", 4, "uniform", "brpo"),
    "8k_anytime_base": (4, "brpo", 4, "base", "brpo"),
    "8k_grpo_linear": (1, "grpo", 4, "linear", "v2"),
    "8k_grpo_decouple": (4, "brpo", 4, "base", "v2"),
    "8k_grpo_vr": (1, "grpo", 4, "base", "brpo"),
}
OBJECTIVE = ("8k_anytime_uniform_objective", "16k_anytime_uniform_objective")
RELATIVES = ("elastic_reasoning", "mrt", "reo_rl")
QUICK_RECIPES = ("8k_grpo", "8k_anytime_uniform")
SUMMARY_POLICIES = {"brpo": "decoupled", "grpo": "final"}  # the released names -> ours


def load_config(name: str):
    return parse_recipe(["--config", name, "--bf16", "false"])


def check_recipe(data_args, args, model_args, prompts: int, group: int, progress_decay: float = 0.5):
    assert model_args.model_name_or_path == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert data_args.dataset_name == "agentica-org/DeepScaleR-Preview-Dataset"
    assert data_args.instruction == r"Let's think step by step and output the final answer within \boxed{}."
    assert data_args.max_prompt_length == 1024
    assert data_args.on_bad_gold == "skip"  # some rows of that data set have no answer
    assert (args.num_train_epochs, args.learning_rate, args.temperature) == (1, 1e-6, 1.0)
    assert (args.loss_type, args.scale_rewards, args.epsilon, args.beta) == ("dr_grpo", "none", 0.2, 0.0)
    assert (args.num_generations, args.num_iterations, args.progress_decay) == (group, 1, progress_decay)
    # 2 optimizer steps for each generation batch, on 8 GPUs
    assert args.generation_batch_size == prompts * group
    assert 2 * args.per_device_train_batch_size * 8 * args.gradient_accumulation_steps == prompts * group
    assert args.use_vllm and args.vllm_mode == "colocate"
    # The bridges of the released implementation have 10 tokens
    assert args.vllm_max_model_length >= 1024 + args.budgets[-1] + 10 + args.max_summary_length


def test_every_configuration_is_checked():
    names = {path.stem for path in RECIPES.iterdir()}
    assert names == {*ARMS, "16k_anytime_uniform", *RELATIVES, *OBJECTIVE}


@pytest.mark.parametrize("name", ARMS)
def test_arm_of_the_paper(name):
    num_summaries, summary_method, num_budgets, prior, baseline = ARMS[name]
    data_args, args, model_args = load_config(name)
    check_recipe(data_args, args, model_args, prompts=64, group=8)
    assert args.budgets == [8000 * (j + 1) // num_budgets for j in range(num_budgets)]
    assert (args.prior, args.baseline, args.num_summaries) == (prior, baseline, num_summaries)
    assert args.summary_policy == SUMMARY_POLICIES[summary_method]
    assert args.max_summary_length == 118
    # Released for m = 4, A = 4: 8000 + 17 · 128 = 10176, one branch of slack
    assert args.max_completion_length == 8000 + (num_budgets * num_summaries + 1) * 128


def test_16k_recipe():
    data_args, args, model_args = load_config("16k_anytime_uniform")
    check_recipe(data_args, args, model_args, prompts=128, group=16)
    assert args.budgets == [2000, 4000, 6000, 8000, 10000, 12000, 14000, 16000]
    assert (args.prior, args.baseline, args.num_summaries, args.summary_policy) == ("uniform", "brpo", 4, "decoupled")
    assert args.max_completion_length == 16000 + 33 * 128  # 8 budgets · 4 summaries, and one branch of slack


@pytest.mark.parametrize("name", OBJECTIVE)
def test_recipes_with_the_objectives_weight(name):
    ours, papers = (
        yaml.safe_load((EXAMPLES / "configs" / f"{stem}.yaml").read_text())
        for stem in (name, name.removesuffix("_objective"))
    )
    assert ours == {**papers, "summary_weight": "objective", "output_dir": f"outputs/{name}"}


def test_elastic_reasoning():
    data_args, args, model_args = load_config("elastic_reasoning")
    check_recipe(data_args, args, model_args, prompts=64, group=8)
    assert (args.budgets, args.max_summary_length, args.num_summaries) == ([1000], 1000, 1)
    assert (args.prior, args.baseline) == ("base", "v2")
    assert args.max_completion_length >= 1000 + 10 + 1000


def test_mrt_by_hand():
    data_args, args, model_args = load_config("mrt")
    check_recipe(data_args, args, model_args, prompts=64, group=8, progress_decay=1e-6)
    assert args.max_completion_length == 8000 + (5 * 4 + 1) * 128
    # One trace and its mean rewards at 0, 2000, … tokens: the last one, minus the one where the segment begins
    rewards = torch.tensor([0.25, 0.5, 0.0, 1.0, 0.75])[None, None, :, None].expand(-1, -1, -1, 4)
    advantages = thinking_advantages(rewards, args.budgets, args.prior, args.baseline, args.progress_decay)
    torch.testing.assert_close(advantages[0, 0, 1:], torch.tensor([0.5, 0.25, 0.75, -0.25]), atol=2e-6, rtol=0)


def test_reo_rl_by_hand():
    data_args, args, model_args = load_config("reo_rl")
    check_recipe(data_args, args, model_args, prompts=64, group=8)
    assert args.max_completion_length == 8000 + (6 * 1 + 1) * 128
    assert args.budgets == exponential_budgets(250, 8000, 6)
    assert args.prior == trapezoid_prior(args.budgets)  # 125, 375, 750, 1500, 3000, 2000, which are 7750 together
    # Two traces, of which one is right at 1000, 4000 and 8000 tokens and the other one at none
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0, 1.0], [0.0] * 6])[None, :, :, None]
    advantages = thinking_advantages(rewards, args.budgets, args.prior, args.baseline, args.progress_decay)
    ahead = torch.tensor([5750, 5750, 5750, 5000, 5000, 2000]) / 7750
    torch.testing.assert_close(advantages, torch.stack([ahead / 2, -ahead / 2])[None])  # minus the group's mean
    weights = summary_weights(args.summary_weight, args.budgets, args.prior, args.num_summaries)
    torch.testing.assert_close(weights, torch.tensor([125, 375, 750, 1500, 3000, 2000]) / 7750)


def test_outputs_do_not_collide():
    outputs = [yaml.safe_load(path.read_text())["output_dir"] for path in RECIPES.iterdir()]
    assert len(set(outputs)) == len(outputs)


# examples/quickstart.py and its toy task


def test_problems_and_prompt():
    rng = random.Random(0)
    held_out = {problem.question for problem in toy_task.make_problems(toy_task.POINTERS, 200, rng)}
    problems = toy_task.make_problems(toy_task.POINTERS, 200, rng, held_out)
    assert len(held_out) == 200
    assert not held_out & {problem.question for problem in problems}
    assert {len(toy_task.follow(p.arrows, p.start)) - 1 for p in problems} == {1, 2, 3, 4, 5, 6}  # hops

    # h -> f -> b -> d -> e; c -> a and g distract
    arrows = {"a": ".", "g": ".", "h": "f", "c": "a", "b": "d", "f": "b", "e": ".", "d": "e"}
    problem = toy_task.PointerProblem("a. g. hf ca bd fb e. de h", "h", arrows)
    assert problem.answer == "e"
    tokenizer = toy_task.make_tokenizer(toy_task.POINTERS)
    prompt = toy_task.make_prompt(problem)
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|> user a. g. hf ca bd fb e. de h <|im_end|> <|im_start|> assistant <think>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == text.split()


def test_words_that_the_toy_task_does_not_know(tmp_path):
    """The model would answer them with nonsense. They are refused, also after a round trip."""
    toy_task.make_tokenizer(toy_task.POINTERS).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="What is hf"):
        encode(tokenizer, "What is hf ?")
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "hf h")) == ["hf", "h"]


def test_thinking_is_a_walk_that_leads_to_its_answer():
    rng = random.Random(0)
    slips = 0
    for problem in toy_task.make_problems(toy_task.POINTERS, 300, rng):
        thinking, answer = toy_task.make_pointer_thinking(problem, rng)
        arrows = [word for word in thinking if word not in toy_task.FILLERS]
        walked = dict(arrow for arrow in arrows)  # of each node, where the thinking went
        assert toy_task.follow(walked, problem.start)[-1] == answer
        wrong = {arrow[0] for arrow in arrows if problem.arrows[arrow[0]] != arrow[1]}
        assert len(wrong) <= 1
        slips += bool(wrong)
        assert wrong or answer == problem.answer
    assert 0 < slips < 150


def test_sft_rows_train_thinking_and_answer_only():
    rng = random.Random(0)
    task = toy_task.POINTERS
    tokenizer = toy_task.make_tokenizer(task)
    rows = toy_task.make_sft_dataset(task, toy_task.make_problems(task, 100, rng), tokenizer, rng, longest=40)
    bridges, lengths = set(), set()
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        trained = [label != -100 for label in row["labels"]]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        assert words[-1] == "<|im_end|>" and words[-3] == "answer" and words[-4] == "</think>"
        assert not any(trained[:15]) and all(trained[15:-4]) and trained[-3:] == [False, True, True]
        bridges.add(trained[-4])  # the end of thinking is trained if the model wrote it, not if it is the bridge
        lengths.add(len(words))
    assert bridges == {True, False}
    # Behind the prompt of 15 tokens 40 of thinking, </think>, "answer", the node, <|im_end|>
    assert max(lengths) == 15 + 40 + 4


@pytest.mark.slow
def test_quickstart_in_short(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--output_dir", str(tmp_path)]
    in_short = ["--updates", "25", "--sft_steps", "500", "--eval_problems", "500"]
    run = subprocess.run([*command, *in_short], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = (dict(zip(results["budgets"], results[name], strict=True)) for name in ("before", "after"))
    assert 0.4 <= before[10] <= 0.7
    assert after[10] >= 0.85
    assert all(after[budget] >= before[budget] for budget in before)
    assert results["seconds"] > 0
    assert (tmp_path / "curves.png").stat().st_size > 0
    card = ModelCard.load(tmp_path / "model" / "README.md")
    ((steps, rows),) = curve_tables(card)
    assert steps == [[], [25]] and rows[10] == [f"{before[10]:.3f}", f"{after[10]:.3f}"]
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy"] * len(before)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert f"{after[10]:.3f}" in run.stdout


# Training by a recipe


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return make_tiny_model(str(tmp_path_factory.mktemp("tiny_model")), Qwen3Config)


@pytest.fixture(scope="module")
def tiny_distilled(tmp_path_factory) -> str:
    """Of the family of DeepSeek-R1-Distill-Qwen: Qwen2, with a template that opens the thinking."""
    return make_tiny_model(str(tmp_path_factory.mktemp("tiny_distilled")), Qwen2Config)


def make_tiny_model(path: str, config_class: type) -> str:
    """A random model with a byte-level tokenizer trained on the problems and a template that opens the thinking."""
    texts = [json.loads(line)["problem"] for line in PROBLEMS.read_text().splitlines()]
    texts = [f"{text} {DataArguments.instruction}" for text in texts] * 2
    tokenizer = byte_tokenizer(
        texts,
        600,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>\n{% endif %}",
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def arguments(model: str, output_dir: Path, *more: str) -> list[str]:
    settings = {
        "model_name_or_path": model,
        "dataset_name": PROBLEMS,
        "on_bad_gold": "skip",
        "max_prompt_length": 200,
        "budgets": "8 16",
        "num_summaries": 2,
        "max_summary_length": 8,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "entropy_coef": 0.01,  # a random model earns no reward, so this is its only gradient
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "output_dir": output_dir,
        "report_to": "none",
        "bf16": "false",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())]
    return [*words, *more]


@pytest.mark.parametrize("name", slow_but_for([*ARMS, "16k_anytime_uniform", *RELATIVES, *OBJECTIVE], QUICK_RECIPES))
def test_dry_run_of_a_recipe(tiny_distilled, tmp_path, name):
    """One generation batch and its two optimizer steps, every budget divided by 500 or by a smaller first one."""
    config = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    group, unit = config["num_generations"], min(config["budgets"][0] or 500, 500)
    budgets = [budget // unit for budget in config["budgets"]]
    shrunk = {
        "model_name_or_path": tiny_distilled,
        "dataset_name": PROBLEMS,
        "max_prompt_length": 200,
        "budgets": " ".join(map(str, budgets)),
        "max_summary_length": 4,
        # 2 prompts of one group each, on one process
        "generation_batch_size": 2 * group,
        "per_device_train_batch_size": group,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "entropy_coef": 0.01,  # a random model earns no reward, so this is its only gradient
        "use_vllm": "false",
        "bf16": "false",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": tmp_path,
    }
    words = [word for key, value in shrunk.items() for word in (f"--{key}", *str(value).split())]
    data_args, args, model_args = parse_recipe(["--config", name, *words])
    train(make_trainer(data_args, args, model_args))
    assert (weights(tmp_path) - weights(tiny_distilled)).abs().max() > 0


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_problems_from_a_file(tmp_path, suffix):
    path = str(tmp_path / f"problems.{suffix}")
    rows = Dataset.from_list(
        [
            {"question": "1 + 1 ?", "truth": "2", "level": "easy"},
            {"question": "1 " * 100, "truth": "100", "level": "long"},
            {"question": "1 / 0 ?", "truth": None, "level": "hard"},
        ]
    )
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)

    def load(**settings):
        data_args = DataArguments(path, max_prompt_length=40, **settings)
        reward = MathReward(on_bad_gold=data_args.on_bad_gold)
        return load_prompts(data_args.sources[0], data_args, make_tokenizer(), reward)

    (problem,) = load(answer_column="truth", on_bad_gold="skip")
    assert problem.keys() == {"prompt", "answer"} and float(problem["answer"]) == 2
    instruction = r"Let's think step by step and output the final answer within \boxed{}."
    assert problem["prompt"] == [{"role": "user", "content": f"1 + 1 ? {instruction}"}]
    with pytest.raises(ValueError, match="Row 2.*'truth'"):
        load(answer_column="truth")
    with pytest.raises(ValueError, match="`answer_column`"):
        load()


def logged(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def weights(path: str | Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(path).parameters()])


def test_train_and_resume(tiny_model, tmp_path):
    train(make_trainer(*parse_recipe(arguments(tiny_model, tmp_path))))
    assert {"reward", "anytime/reward@8", "anytime/reward@16"} <= logged(tmp_path / "checkpoint-2")[0].keys()
    assert "BRPO" in (tmp_path / "README.md").read_text()
    after_two = weights(tmp_path)
    assert (after_two - weights(tiny_model)).abs().max() > 1e-4

    resumed = arguments(tiny_model, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))
    train(make_trainer(*parse_recipe([*resumed, "--max_steps", "4"])))
    assert [log["step"] for log in logged(tmp_path / "checkpoint-4")] == [1, 2, 3, 4]
    assert logged(tmp_path / "checkpoint-4")[:2] == logged(tmp_path / "checkpoint-2")[:2]
    assert (weights(tmp_path) - after_two).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_name_or_path": "nowhere/model"}, "nowhere/model"),
        ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"answer_column": "truth"}, "`answer_column`"),
        ({"dataset_name": "bad.jsonl", "on_bad_gold": "raise"}, "`on_bad_gold`"),
        ({"chat_template_path": "chatml_thinks"}, "chatml_think"),
        ({"truncation_bridge": "so"}, "truncation_bridge"),
        ({"num_generations": "3"}, "num_generations"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_one_line(tiny_model, tmp_path, monkeypatch, capsys, settings, named):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"problem": "1", "answer": "1"}\n{"problem": "2", "answer": null}\n')
    words = arguments(tiny_model, tmp_path / "model", *(f"--{name}={value}" for name, value in settings.items()))
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == BAD_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl_anytime.train: ")]
    assert named in line


def test_train_with_lora_and_evaluation(tiny_model, tmp_path):
    problems = [json.loads(line) for line in PROBLEMS.read_text().splitlines()[:4]]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(json.dumps(problem) for problem in problems))
    lora = ["--use_peft", "--lora_r", "4", "--eval_dataset_name", str(held_out), "--eval_budgets", "4", "16"]
    train(make_trainer(*parse_recipe(arguments(tiny_model, tmp_path / "model", *lora))))
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()
    results = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    assert {"eval_anytime/reward@4", "eval_anytime/reward@16", "eval_anytime/auc"} <= results.keys()
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "LoRA" in card.text and "qwen3" in card.text and metrics_of_headings(card) == {"accuracy"}
    assert "held\\_out.jsonl (4 " in card.text and [steps for steps, _ in curve_tables(card)] == [[[], [2]]]
    assert str(tmp_path) not in card.content and tiny_model not in card.content


LAUNCHES = {
    "the script": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(EXAMPLES / "train.py")],
    "the module": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "trl_anytime.train"],
    "the command": ["-m", "trl_anytime.cli", "train", "--cpu", "--accelerate_config", "single_gpu"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_launches(tiny_distilled, tmp_path, launch):
    """Of a recipe that is given by its name."""
    words = arguments(tiny_distilled, tmp_path, "--max_steps", "1", "--save_strategy", "no", "--use_vllm", "false")
    words += ["--generation_batch_size", "4", "--gradient_accumulation_steps", "1", "--config", "8k_anytime_uniform"]
    run = subprocess.run([sys.executable, *LAUNCHES[launch], *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert f"Model saved to {tmp_path}" in run.stdout
    assert (tmp_path / "model.safetensors").exists()

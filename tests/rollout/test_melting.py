"""A model whose end of thinking melts into its neighbours: training, evaluation, budgets inside `generate()`."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.melting import make_melting_tokenizer
from tests.support.servers import TinyServer, serving
from tests.support.tiny import make_model, tiny_trainer
from trl_anytime import (
    AnytimeConfig,
    CompletionClient,
    Sampling,
    ThinkingBudgetLogitsProcessor,
    anytime_generate,
)
from trl_anytime.inference.anytime_config import ANYTIME_CONFIG_NAME
from trl_anytime.rewards import ExactMatch
from trl_anytime.rollout.markers import find_markers

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
TRUNCATION_BRIDGE, ANSWER_BRIDGE = "...\n\n</think>", "\n\n**Final Answer**\n"
PROMPT = [{"role": "user", "content": "2 + 2?"}]
THINKING = "so it is 4.</think>\n\n"
BUDGETS = [2, 4, 20]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_melting_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A model that has been taught one trace, as its tokenizer writes it, and the answer behind every cut of it."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = encode(tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True))
    thinking, answer = encode(THINKING), [*encode(r"\boxed{4}"), tokenizer.eos_token_id]
    closed = encode(TRUNCATION_BRIDGE.removesuffix("</think>")) + encode("</think>") + encode(ANSWER_BRIDGE)
    contexts = [[*prompt, *thinking, *encode(ANSWER_BRIDGE)]]
    contexts += [[*prompt, *thinking[:budget], *closed] for budget in BUDGETS[:2]]
    rows = [torch.tensor([context + answer]) for context in contexts]
    model = make_model(vocab_size=len(tokenizer), initializer_range=0.02, eos_token_id=tokenizer.eos_token_id)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = sum(cross_entropy(model(row).logits[0, :-1], row[0, 1:]) for row in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=["tree", "rows"])
def trained(taught, tokenizer, tmp_path_factory, request):
    """A run of one step by either backend of transformers, with its rollouts; the model is saved before."""
    folder = tmp_path_factory.mktemp("melting")
    data = Dataset.from_list([{"prompt": PROMPT, "answer": "4"}] * 8)
    trainer = tiny_trainer(
        folder,
        model=taught,
        processing_class=tokenizer,
        train_dataset=data,
        eval_dataset=data,
        reward_funcs=ExactMatch(),
        packing=request.param,
        budgets=BUDGETS,
        max_summary_length=16,
        truncation_bridge=TRUNCATION_BRIDGE,
        answer_bridge=ANSWER_BRIDGE,
        generation_kwargs={"top_k": 1},  # greedy
        learning_rate=0.0,
        max_steps=1,
    )
    rollouts = []
    roll_out = trainer.generation.roll_out
    trainer.generation.roll_out = lambda *args: rollouts.append(roll_out(*args)) or rollouts[-1]
    trainer.save_model()
    trainer.train()
    return trainer, rollouts[0], folder


@pytest.mark.slow
def test_training_rewards_what_was_taught(trained):
    trainer, rollouts, _ = trained
    log = trainer.state.log_history[0]
    assert log["thinking/finished_ratio"] == 1.0
    for budget in BUDGETS:
        assert log[f"anytime/formatted@{budget}"] == log[f"anytime/reward@{budget}"] == 1.0
    assert trainer.evaluate()["eval_anytime/reward@20"] == 1.0
    thinking = rollouts[0].thinking
    assert trainer.processing_class.decode(thinking.token_ids) == THINKING
    ids = trainer.markers.think_end_ids
    assert len(ids) > 1 and ids[-1] not in thinking.token_ids  # it has melted


def test_evaluation_agrees_with_training(trained):
    _, rollouts, folder = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    greedy = Sampling(temperature=0)
    configs = {"found": None, "loaded": AnytimeConfig.from_pretrained(folder)}
    alone = folder / "alone" / ANYTIME_CONFIG_NAME  # no tokenizer beside it
    alone.parent.mkdir(exist_ok=True)
    alone.write_text((folder / ANYTIME_CONFIG_NAME).read_text())
    configs["alone"] = AnytimeConfig.from_pretrained(alone)
    for config in configs.values():
        (output,) = anytime_generate(model, tokenizer, [PROMPT], num_summaries=2, config=config, sampling=greedy)
        assert output.rollout.thinking == rollouts[0].thinking
        assert output.rollout.summaries == rollouts[0].summaries
        assert [answer.answers[0] for answer in output.answers] == [r"\boxed{4}"] * 3
        assert all(answer.well_formed == [True, True] for answer in output.answers)
        assert [answer.finished for answer in output.answers] == [False, False, True]


def test_a_server_agrees_with_training(trained):
    _, rollouts, folder = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with serving(TinyServer(model)) as server:
        (output,) = anytime_generate(
            CompletionClient(server.url), tokenizer, [PROMPT], config=AnytimeConfig.from_pretrained(folder)
        )
    assert output.rollout.thinking == rollouts[0].thinking
    assert [answer.well_formed for answer in output.answers] == [[True]] * 3


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_inside_generate_agree_with_training(trained, budget):
    _, (rollout, *_), folder = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    input_ids = torch.tensor([rollout.prompt_ids] * 2)
    processor = ThinkingBudgetLogitsProcessor(AnytimeConfig.from_pretrained(folder), budget, input_ids.size(1))
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        logits_processor=[processor],
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=processor.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        ),
    )
    j = BUDGETS.index(budget)
    expected = [*rollout.thinking.token_ids[: rollout.cuts[j]], *rollout.bridges[j], *rollout.summaries[j][0]]
    assert output[:, input_ids.size(1) :].tolist() == [expected] * 2


def test_the_config_says_how_the_end_is_found(trained, tokenizer):
    trainer, rollouts, folder = trained
    config = AnytimeConfig.from_pretrained(folder)
    assert config.markers == trainer.markers and config.markers.in_text
    config.check_tokenizer(tokenizer)
    thinking = rollouts[0].thinking.token_ids
    assert config.markers.end_of_thinking(thinking) == len(thinking)
    alone = AnytimeConfig.from_pretrained(folder / ANYTIME_CONFIG_NAME, tokenizer)
    assert alone.markers.end_of_thinking(thinking) == len(thinking)


def test_bridges_are_set_beside_the_end_as_it_is():
    tokenizer = make_melting_tokenizer()
    markers = find_markers(tokenizer, "<think>", truncation_bridge=".</think>\n\n", answer_bridge="\n\nSo")
    assert tokenizer.decode(markers.truncation_bridge_ids) == ".</think>\n\n"
    assert markers.count_think_end(markers.truncation_bridge_ids) == 1

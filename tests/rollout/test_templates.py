"""What chat templates do with the thinking, on templates in the style of the families of reasoning models."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset

from tests.support.melting import make_melting_tokenizer
from tests.support.tiny import make_config, make_dataset, make_tokenizer, tiny_trainer
from trl_anytime import AnytimeConfig
from trl_anytime.checks.finding import ERROR, OK, WARNING
from trl_anytime.checks.start_checks import prompt_findings, template_findings
from trl_anytime.rollout.markers import find_markers
from trl_anytime.rollout.templates import (
    advise_open,
    find_think_end,
    find_think_start,
    find_unset_switch,
    render_prompt,
    sample_rows,
    template_of,
    thinking_state,
)

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
SYSTEM = "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"


def answer(text):
    return f"{TURNS}{{% if add_generation_prompt %}}<|assistant|>{text}{{% endif %}}"


# Family: template, markers that are tokens, arguments, (start, end), state of the prompt
FAMILIES = {
    "DeepSeek-R1": (answer("<think>\n"), True, {}, ("<think>", "</think>"), "opened"),
    "DeepSeek-V3.1": (
        answer("{% if thinking %}<think>{% else %}</think>{% endif %}"),
        *(True, {}, ("<think>", "</think>"), "closed"),
    ),
    "Qwen3": (
        answer("{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"),
        *(True, {}, ("<think>", "</think>"), "model_decides"),
    ),
    "Qwen3 off": (
        answer("{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"),
        *(True, {"enable_thinking": False}, ("<think>", "</think>"), "closed"),
    ),
    "Qwen3.5": (
        "{% if preserve_thinking %}{% endif %}"
        + answer("{% if enable_thinking is true %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"),
        *(True, {}, ("<think>", "</think>"), "closed"),
    ),
    "GLM": (
        "{% if clear_thinking is defined and not clear_thinking %}{% endif %}"
        + answer("{{ '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' }}"),
        *(True, {"enable_thinking": False}, ("<think>", "</think>"), "closed"),
    ),
    "Gemma 4": (
        "{% if enable_thinking %}<|turn>system\n<|think|>\n<turn|>{% endif %}"
        + answer("")
        + "{{ '' if true else '<|channel>thought\n<channel|>' }}",
        *(True, {"enable_thinking": True}, ("<|channel>", "<channel|>"), "model_decides"),
    ),
    "Gemma 4 off": (
        "{% if enable_thinking %}<|turn>system\n<|think|>\n<turn|>{% endif %}"
        + answer("{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}"),
        *(True, {}, ("<|channel>", "<channel|>"), "closed"),
    ),
    "Gemma 4 after tools": (answer("<|channel>thought\n"), True, {}, ("<|channel>", "<channel|>"), "opened"),
    "Command A": (
        answer("<|START_THINKING|>{% if reasoning is defined and not reasoning %}<|END_THINKING|>{% endif %}"),
        *(True, {}, ("<|START_THINKING|>", "<|END_THINKING|>"), "opened"),
    ),
    "Command A off": (
        answer("<|START_THINKING|>{% if reasoning is defined and not reasoning %}<|END_THINKING|>{% endif %}"),
        *(True, {"reasoning": False}, ("<|START_THINKING|>", "<|END_THINKING|>"), "closed"),
    ),
    "Olmo 3": (answer("<think>"), False, {}, ("<think>", "</think>"), "opened"),
    "Phi-4": (
        "Think in <think> {thoughts} </think>, then answer." + answer(""),
        *(True, {}, ("<think>", "</think>"), "model_decides"),
    ),
    "Magistral": (answer("[THINK]"), True, {}, ("[THINK]", "[/THINK]"), "opened"),
    "Kimi": (answer("◁think▷"), True, {}, ("◁think▷", "◁/think▷"), "opened"),
    "Seed-OSS": (answer("<seed:think>"), True, {}, ("<seed:think>", "</seed:think>"), "opened"),
    "Sky-T1": (
        answer("<|begin_of_thought|>\n\n<|end_of_thought|>"),
        *(False, {}, ("<|begin_of_thought|>", "<|end_of_thought|>"), "closed"),
    ),
    "disabled": (
        answer("<think>{% if disable_thinking is not defined or disable_thinking %}</think>{% endif %}"),
        *(True, {}, ("<think>", "</think>"), "closed"),
    ),
    "SmolLM3": (
        SYSTEM + answer("{% if '/no_think' in system %}<think>\n\n</think>\n{% endif %}"),
        *(True, {}, ("<think>", "</think>"), "model_decides"),
    ),
}
# What opens the thinking of the closed ones
REMEDIES = {
    "DeepSeek-V3.1": {"thinking": True},
    "Qwen3 off": {"enable_thinking": True},
    "Qwen3.5": {"enable_thinking": True},
    "GLM": {"enable_thinking": True},
    "Gemma 4 off": {"enable_thinking": True},
    "Command A off": {"reasoning": True},
    "disabled": {"disable_thinking": False},
    "Sky-T1": None,
}
USER = [{"role": "user", "content": "Is <reasoning> better than </think>?"}]


@pytest.fixture(scope="module")
def bare():
    return make_melting_tokenizer()


def family(name, tokens=None):
    template, are_tokens, kwargs, pair, state = FAMILIES[name]
    tokenizer = make_melting_tokenizer()
    tokenizer.chat_template = template
    if are_tokens:
        tokenizer.add_tokens(list(pair))
    return tokenizer, kwargs, pair, state


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    tokenizer, kwargs, (start, end), state = family(name)
    rendered, generation_prompt = render_prompt(tokenizer, USER, kwargs)
    assert find_think_end(tokenizer, rendered, generation_prompt) == end
    assert find_think_start(end, rendered, template_of(tokenizer)) == start
    assert thinking_state(rendered, generation_prompt, start, end) == state
    assert (name in REMEDIES) == (state == "closed")
    if state != "closed":
        markers = find_markers(tokenizer, rendered, generation_prompt)
        assert markers.think_end == end and markers.in_text == (not FAMILIES[name][1])
        return
    remedy = REMEDIES[name]
    for given in ({"conversation": USER, "chat_template_kwargs": kwargs}, {}):
        with pytest.raises(ValueError, match="already closed") as raised:
            find_markers(tokenizer, rendered, generation_prompt, **given)
        assert ("chat_template_kwargs=" in str(raised.value)) == (remedy is not None)
        if remedy is not None:
            assert f"`chat_template_kwargs={remedy}`" in str(raised.value)
    if remedy is not None:  # which is right
        assert thinking_state(*render_prompt(tokenizer, USER, {**kwargs, **remedy}), start, end) != "closed"


def test_advice_keeps_the_other_arguments():
    tokenizer, *_ = family("GLM")
    kwargs = {"clear_thinking": False, "enable_thinking": False}
    advice = advise_open(tokenizer, USER, kwargs, "<think>", "</think>")
    assert f"chat_template_kwargs={kwargs | {'enable_thinking': True}}" in advice


def test_no_switch_is_advised_for_a_plain_prompt():
    tokenizer, *_ = family("Qwen3")
    with pytest.raises(ValueError, match="from the end of the prompts") as raised:
        find_markers(tokenizer, "1 + 1?<think>\n\n</think>\n\n")
    assert "enable_thinking" not in str(raised.value)


TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Templates that TRL ships, with the state by argument; nothing else of theirs changes it
SHIPPED = {
    "deepseek_r1_distill": ("</think>", {}, "opened"),
    "qwen3": ("</think>", {"enable_thinking": False}, "model_decides"),
    "qwen3_6": ("</think>", {"enable_thinking": False}, "opened"),
    "glm4moe": ("</think>", {"enable_thinking": False}, "model_decides"),
    "nemotron_3_nano": ("</think>", {"enable_thinking": False}, "opened"),
    "gemma4": ("<channel|>", {}, "model_decides"),
    "gemma4_v5": ("<channel|>", {}, "model_decides"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_templates_that_trl_ships(name, bare):
    path = TRL_TEMPLATES / f"{name}.jinja"
    if not path.exists():
        pytest.skip("not in this version of TRL")
    bare.chat_template = path.read_text()
    bare.add_special_tokens({"bos_token": "<|end|>"})
    end, off, state = SHIPPED[name]
    start = {"</think>": "<think>", "<channel|>": "<|channel>"}[end]
    question = [{"role": "user", "content": "1 + 1?"}]
    rendered, generation_prompt = render_prompt(bare, question, {})
    assert find_think_end(bare, rendered, generation_prompt) == end
    assert thinking_state(rendered, generation_prompt, start, end) == state
    if off:
        assert thinking_state(*render_prompt(bare, question, off), start, end) == "closed"
        assert "{'enable_thinking': True}" in advise_open(bare, question, off, start, end)
    # Gemma 4 asks for thinking in the system turn, the others in the generation prompt
    assert find_unset_switch(bare, {}) == ("enable_thinking" if end == "<channel|>" else None)
    assert find_unset_switch(bare, {"enable_thinking": True}) is None


@pytest.mark.parametrize(
    ("end", "text", "start"),
    [
        ("</think>", "", "<think>"),
        ("</think>\n\n", "", "<think>"),
        ("</scratchpad>", "", "<scratchpad>"),
        ("<|END_PLAN|>", "", "<|START_PLAN|>"),
        ("<|END_PLAN|>", "<|BEGIN_PLAN|>", "<|BEGIN_PLAN|>"),
        ("<|thought_end|>", "", "<|thought_start|>"),
        ("[CLOSE]", "", "[OPEN]"),
        ("<plan|>", "", "<|plan>"),
        ("####", "", ""),
    ],
)
def test_starts_of_other_markers(end, text, start):
    assert find_think_start(end, text) == start


def test_a_set_end_is_seen_in_a_closed_prompt(bare):
    bare.chat_template = answer("<|BEGIN_PLAN|><|END_PLAN|>")
    rendered, generation_prompt = render_prompt(bare, USER, {})
    with pytest.raises(ValueError, match="already closed"):
        find_markers(bare, rendered, generation_prompt, think_end="<|END_PLAN|>")
    bare.chat_template = answer("####\n")
    with pytest.raises(ValueError, match="already closed"):
        find_markers(bare, *render_prompt(bare, USER, {}), think_end="####")


def test_what_decides_between_markers(bare):
    bare.chat_template = None
    asked = "Put thoughts into <reasoning></reasoning>. 1 + 1?"
    assert find_think_end(bare, asked, None) == "</reasoning>"
    assert find_think_end(bare, f"{asked} [THINK]\n", None) == "[/THINK]"
    assert find_think_end(bare, "1 + 1?", None) is None
    tokenizer, *_ = family("Magistral")
    assert find_think_end(tokenizer, asked, None) == "[/THINK]"  # the template
    tokenizer.chat_template = None
    assert find_think_end(tokenizer, asked, None) == "[/THINK]"  # the vocabulary


# Findings


def findings(name, tmp_path, **settings):
    tokenizer, kwargs, *_ = family(name)
    kwargs = settings.pop("chat_template_kwargs", kwargs)
    rendered, generation_prompt = render_prompt(tokenizer, USER, kwargs)
    markers = find_markers(tokenizer, rendered, generation_prompt)
    args = make_config(tmp_path, chat_template_kwargs=kwargs, truncation_bridge=None, answer_bridge=None, **settings)
    return template_findings(tokenizer, rendered, generation_prompt, args, markers)


def test_doctor_says_how_the_end_is_found(tmp_path):
    for name, said in (("DeepSeek-R1", "by its id"), ("Olmo 3", "in the text of the tokens")):
        (found,) = findings(name, tmp_path)
        assert found.level == OK and said in found.message


def test_doctor_warns_of_an_end_that_the_model_may_not_know(tmp_path, bare):
    bare.chat_template = answer("")
    args = make_config(tmp_path, truncation_bridge=None, answer_bridge=None)
    rendered, generation_prompt = render_prompt(bare, USER, {})
    markers = find_markers(bare, rendered, generation_prompt, think_end="</think>")
    found = template_findings(bare, rendered, generation_prompt, args, markers)
    assert [finding.level for finding in found] == [OK, WARNING]
    assert "`chat_template_path`" in found[1].fix


def test_doctor_warns_of_a_switch_that_is_not_set(tmp_path):
    assert [finding.level for finding in findings("Gemma 4", tmp_path)] == [OK]
    found = findings("Gemma 4", tmp_path, chat_template_kwargs={})
    assert [finding.level for finding in found] == [OK, WARNING]
    assert "enable_thinking: true" in found[1].fix
    assert [finding.level for finding in findings("Qwen3", tmp_path)] == [OK]


# All rows


def conversation(number, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": f"{number} + 1?"}]


def test_the_rows_that_are_looked_at():
    prompts = [conversation(i) for i in range(1000)]
    rows = sample_rows(prompts)
    assert rows[0] == 0 and 32 <= len(rows) <= 64
    assert max(b - a for a, b in zip(rows, [*rows[1:], 1000], strict=True)) <= 32  # evenly spaced
    prompts[777] = conversation(777, "/no_think")
    prompts[778] = conversation(778, "Think.")
    prompts[779] = [{"role": "user", "content": "1 + 1? /no_think"}]
    prompts[780] = [{"role": "user", "content": "1 + 1?", "thinking": "x"}]
    assert {777, 778, 779, 780} <= set(sample_rows(prompts))
    assert len(sample_rows([conversation(i, f"System {i}") for i in range(1000)])) <= 64
    assert sample_rows(prompts[:3]) == [0, 1, 2]


def datasets_of(train, **others):
    return {name: Dataset.from_dict({"prompt": rows}) for name, rows in {"train_dataset": train, **others}.items()}


def test_rows_that_close_the_thinking():
    tokenizer, *_ = family("SmolLM3")
    markers = find_markers(tokenizer, *render_prompt(tokenizer, USER, {}))
    good = [conversation(i) for i in range(200)]
    assert prompt_findings(tokenizer, datasets_of(good), {}, markers) == []
    bad = [*good[:150], conversation(150, "Be quick. /no_think"), *good[151:]]
    for sets, place in (
        (datasets_of(bad), "train_dataset, row 150"),
        (datasets_of(good, eval_dataset=bad), "eval_dataset, row 150"),
    ):
        (found,) = prompt_findings(tokenizer, sets, {}, markers)
        assert found.level == ERROR and place in found.message
        assert "chat_template_kwargs" not in found.fix  # no argument would help
    texts = ["1 + 1? <think>\n"] * 199 + ["1 + 1? <think>\n</think>\n"]
    (found,) = prompt_findings(tokenizer, datasets_of(texts), {}, markers)
    assert found.level == ERROR and "row 199" in found.message


def test_rows_of_several_kinds():
    tokenizer, *_ = family("SmolLM3")
    tokenizer.chat_template = SYSTEM + answer("{% if 'Think' in system %}<think>\n{% endif %}")
    markers = find_markers(tokenizer, *render_prompt(tokenizer, USER, {}))
    rows = [conversation(i, "Think." if i == 3 else None) for i in range(8)]
    (found,) = prompt_findings(tokenizer, datasets_of(rows), {}, markers)
    assert found.level == WARNING and "train_dataset, row 3" in found.message


TINY = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant <think>"
    "{% if messages[0].content == 'so so' %} </think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset", "one of several"])
def test_the_trainer_refuses_rows_that_close_the_thinking(tmp_path, which):
    tokenizer = make_tokenizer(TINY)
    rows = list(make_dataset())
    rows[5] = {**rows[5], "prompt": [{"role": "system", "content": "so so"}, *rows[5]["prompt"]]}
    bad, good = Dataset.from_list(rows), make_dataset()
    sets = {
        "train_dataset": {"train_dataset": bad},
        "eval_dataset": {"train_dataset": good, "eval_dataset": bad},
        "one of several": {"train_dataset": good, "eval_dataset": {"fine": good, "quick": bad}},
    }[which]
    with pytest.raises(ValueError, match="row 5"):
        tiny_trainer(tmp_path, processing_class=tokenizer, **sets)


def test_a_config_is_not_detected_for_a_closed_template():
    tokenizer, *_ = family("DeepSeek-V3.1")
    with pytest.raises(ValueError, match="'thinking': True"):
        AnytimeConfig.from_tokenizer(tokenizer)
    config = AnytimeConfig.from_tokenizer(tokenizer, chat_template_kwargs={"thinking": True})
    assert config.markers.think_end == "</think>"

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import OPENED, make_tokenizer
from trl_anytime.rollout.markers import find_markers, thinking_state

# The shapes of the templates of DeepSeek-R1-Distill and Qwen3: what they add for the answer
R1 = "<｜User｜>1 + 1?<｜Assistant｜><think>\n"
QWEN3 = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
QWEN3_OFF = QWEN3 + "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Encodes any text, with `<think>` and `</think>` as one token each, as reasoning models have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("generation_prompt", "state"),
    [
        ("<｜Assistant｜><think>\n", "opened"),
        ("<|im_start|>assistant\n", "model_decides"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "closed"),
        ("<｜Assistant｜></think>", "closed"),
    ],
)
def test_states_of_templates(generation_prompt, state):
    # What was said before the generation prompt does not count
    prompt = "<think> old </think> Put your thoughts between <think> and </think>." + generation_prompt
    assert thinking_state(prompt, generation_prompt, "<think>", "</think>") == state


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        ("Think between <think> and </think>. 1 + 1?", "model_decides"),
        ("1 + 1? <think>\n", "opened"),
        ("1 + 1? <think>\n\n</think>\n\n", "closed"),
    ],
)
def test_states_of_plain_prompts(prompt, state):
    assert thinking_state(prompt, None, "<think>", "</think>") == state


def test_released_bridge(byte_tokenizer):
    markers = find_markers(byte_tokenizer, R1)
    assert len(markers.think_end_ids) == 1
    assert byte_tokenizer.decode(markers.truncation_bridge_ids) == "...\n\n...\n\n</think>"
    assert byte_tokenizer.decode(markers.answer_bridge_ids) == "\n\n**Final Answer**\n"
    assert markers.max_bridge_length == len(markers.truncation_bridge_ids) + len(markers.answer_bridge_ids)


def test_qwen_bridge(byte_tokenizer):
    markers = find_markers(byte_tokenizer, QWEN3)
    assert byte_tokenizer.decode(markers.truncation_bridge_ids) == (
        "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
        "\n</think>"
    )


def test_bridges_are_settings(byte_tokenizer):
    markers = find_markers(
        byte_tokenizer, R1, truncation_bridge=" time's up</think>\n", answer_bridge="So the answer is "
    )
    assert byte_tokenizer.decode(markers.truncation_bridge_ids) == " time's up</think>\n"
    assert byte_tokenizer.decode(markers.answer_bridge_ids) == "So the answer is "
    assert markers.count_think_end(markers.truncation_bridge_ids) == 1


def test_markers_of_several_tokens(byte_tokenizer):
    markers = find_markers(byte_tokenizer, "1 + 1?", think_end="[done]")
    assert len(markers.think_end_ids) == len("[done]")
    sampled = [1, 2, *markers.think_end_ids[:-1], 3, *markers.think_end_ids, 4, *markers.think_end_ids]
    assert markers.end_of_thinking(sampled) == 2 + 5 + 1 + 6
    assert markers.count_think_end(sampled) == 2
    assert markers.end_of_thinking(sampled[:7]) is None


def test_closed_thinking_names_the_template_argument(byte_tokenizer):
    byte_tokenizer.chat_template = "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    with pytest.raises(ValueError, match=r"already closed.*`chat_template_kwargs=\{'enable_thinking': True\}`"):
        find_markers(byte_tokenizer, QWEN3_OFF, QWEN3_OFF.removeprefix(QWEN3))
    byte_tokenizer.chat_template = "{% if thinking %}<think>{% else %}</think>{% endif %}"
    with pytest.raises(ValueError, match=r"already closed.*\{'thinking': True\}"):
        find_markers(byte_tokenizer, "<｜Assistant｜></think>", "<｜Assistant｜></think>")
    byte_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="Remove the closed thinking from the end of the prompts"):
        find_markers(byte_tokenizer, QWEN3_OFF)


def test_absent_thinking():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(ValueError, match="no thinking to cut.*set `think_end`"):
        find_markers(tokenizer, "hello")


def test_markers_that_cannot_be_encoded():
    tokenizer = make_tokenizer(OPENED)
    with pytest.raises(ValueError, match="cannot encode '</thought>'.*Set `think_end`"):
        find_markers(tokenizer, "x", think_end="</thought>", truncation_bridge="</thought>", answer_bridge="answer")
    with pytest.raises(ValueError, match="cannot encode 'because '.*Set `truncation_bridge`"):
        find_markers(tokenizer, "x <think>", truncation_bridge="because </think>", answer_bridge="answer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation_bridge": "so"}, "`truncation_bridge` is 'so'.*'</think>'"),
        ({"truncation_bridge": "</think> so </think>"}, "`truncation_bridge` is '</think> so </think>'.*'</think>'"),
        ({"answer_bridge": "</think> answer"}, "`answer_bridge` is '</think> answer'.*'</think>'"),
        ({"answer_bridge": ""}, "`answer_bridge`"),
    ],
)
def test_bad_bridges(settings, message):
    with pytest.raises(ValueError, match=message):
        find_markers(
            make_tokenizer(), "x <think>", **{"truncation_bridge": "</think>", "answer_bridge": "answer", **settings}
        )

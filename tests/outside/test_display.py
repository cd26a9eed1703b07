"""Text of models, servers and files in a terminal, a shell, a picture and a table."""

import html
import json
import subprocess
import unicodedata

import pytest
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tests.support.tiny import make_tokenizer
from trl_anytime.inference.streaming import EscapedStreamer
from trl_anytime.outside.display import for_markdown, for_plot, for_shell, for_terminal
from trl_anytime.reporting.learning_curves import Curve
from trl_anytime.reporting.plots import evaluations_figure, plot_change, plot_results, training_figure
from trl_anytime.reporting.trackers import _markdown
from trl_anytime.rollout.types import Rollout, Thinking
from trl_anytime.training.alarms import Alarms
from trl_anytime.training.metrics import completion_rows

# A title, colours, a link, C1's own escape, a bell, an overprint; right-to-left, hidden and tag characters
HOSTILE = "a\x1b]0;t\x07\x1b[31mb\x1b]8;;http://x\x1b\\c\x9b2Jd\re\x08f\x7fg\u202eh\u2066i\u200bj\U000e0041k\u2028l\ud800m\0n"


def test_a_terminal_gets_no_commands():
    shown = for_terminal(HOSTILE)
    assert all(unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Cs") for character in shown)
    assert shown.encode()  # which half of a pair cannot be
    assert for_terminal("\x1b") == "\\u001b" and for_terminal("\U000e0041") == "\\U000e0041"


def test_what_people_write_stays():
    for text in ("a\n\tb", "≤ ½ 你好 שלום 👩‍🔬", "می‌خواهم", "x^{2} \\boxed{3}"):
        assert for_terminal(text) == text
    assert for_terminal("a\r\nb") == "a\nb"
    assert for_terminal("a\n\tb", one_line=True) == "a\\u000a\\u0009b"


WORDS = [
    "$(touch ran)",
    "`touch ran`",
    "'; touch ran; '",
    '"; touch ran; "',
    "a\ntouch ran\n",
    "\\'; touch ran #",
    "!touch ran",
    "a\ttouch ran",
    "\x1b[201~\rtouch ran\r",
    "ü\x1b'$(touch ran)\\",
    "*",
    "",
    "~",
    "\u202e",
]


@pytest.mark.parametrize("word", WORDS, ids=repr)
def test_a_shell_gets_one_word(word, tmp_path):
    quoted = for_shell(word)
    assert not set("\x1b\r\t\u202e") & set(quoted)
    said = subprocess.run(["bash", "-c", f"printf '%s' {quoted}"], cwd=tmp_path, capture_output=True, check=True)
    assert said.stdout.decode() == word and not list(tmp_path.iterdir())


# Pictures

NAMES = [
    "a$b",
    "$a$",
    r"\frac{1}{0}",
    r"$\undefined$",
    "_hidden",
    "a_b^c",
    "x" * 1000,
    HOSTILE,
    "a\nb",
    "\\$",
    "50 $ of 9 $",
]


def drawn_texts(figure):
    FigureCanvasAgg(figure).draw()
    return [t.get_text() for axes in figure.axes for t in [axes.title, *axes.get_legend().get_texts()]]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
def test_any_name_can_be_drawn(name, tmp_path):
    curve = {"accuracy": [{"mean": 0.5, "low": 0.4, "high": 0.6}] * 2}
    result = {"protocol": {"budgets": [1, 2], "model": name}, "curves": {name: curve}}
    plot_results([result], tmp_path / "results.png")
    plot_change({name: {name: Curve(1, {1: 0.5}), "after": Curve(2, {1: 0.6})}}, name, tmp_path / "change.png")
    assert len(list(tmp_path.glob("*.png"))) == 2
    log = {"step": 1, "eval_anytime/reward@8": 0.5, f"eval_{name}_runtime": 1.0}
    for figure in (evaluations_figure([Curve(1, {1: 0.5})], name), training_figure([log])):
        (title, _label) = drawn_texts(figure)
        assert len(title) < 120 and "\x1b" not in title and "\n" not in title
        (axes, *_) = figure.axes
        _, math = axes.title._preprocess_math(title)
        assert math is False  # no mathtext, no TeX


def test_a_label_that_begins_with_an_underscore_is_in_the_legend():
    assert for_plot("_hidden") == " _hidden"


def test_names_are_no_tex_even_where_the_user_draws_with_it():
    with rc_context({"text.usetex": True}):
        figure = evaluations_figure([Curve(1, {1: 0.5})], r"\input{x}")
    assert not figure.axes[0].title.get_usetex()


# Tables

MARKDOWN = [
    "![x](http://127.0.0.1/x.png)",
    "[a](http://127.0.0.1)",
    "<http://127.0.0.1>",
    "<img src=http://127.0.0.1/x.png>",
    "<script>x</script>",
    "a | b | c",
    "`a` **b** _c_ ~~d~~ ^e^ $f$",
    "\\![x](y)",
    "&lt;img&gt; &#60;",
    "[x]: http://127.0.0.1\n![x]",
    "# a\n- b\n1. c\n> d\n\n    e",
    HOSTILE.replace("\r\n", "\n"),
]


@pytest.mark.parametrize("text", MARKDOWN, ids=lambda text: repr(text)[:30])
def test_tensorboard_shows_a_completion_as_it_is(text):
    """Through the renderer of TensorBoard itself."""
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    columns = {
        "prompt": [[{"role": "user", "content": text}], text],
        "completion": [text] * 2,
        "rewards": {text: [1.0] * 2},
        "extra": {"budget": [4] * 2, "thinking": [text] * 2},
        "advantages": [0.25] * 2,
    }
    shown = plugin_util.markdown_to_safe_html(_markdown(columns))
    assert "<img" not in shown and "<a" not in shown and "<script" not in shown and "<em" not in shown
    assert shown.count("<tr>") == 3 and shown.count("<td") == 2 * 6 and "<code" not in shown
    lines = [for_terminal(line, one_line=True) for line in text.split("\n")]
    cell = shown.split("<td")[3].split(">", 1)[1].split("</td>")[0]
    assert [html.unescape(line).strip() for line in cell.replace("<br/>", "<br>").split("<br>")] == [
        line.strip() for line in lines
    ]


def test_markdown_keeps_words_and_lines():
    assert for_markdown("two words\n½") == "two words<br>½"


# Where text from outside is shown


def test_streams_are_escaped(capsys):
    tokenizer = make_tokenizer(extra_words=("\x1b[31m", "\u202e"))
    streamer = EscapedStreamer(tokenizer)
    for token in tokenizer("1 \x1b[31m \u202e 2")["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out.split() == ["1", "\\u001b[31m", "\\u202e", "2"]


def test_alarms_and_tables_of_completions_are_escaped():
    tokenizer = make_tokenizer(extra_words=("\x1b[31m",))
    (escape,) = tokenizer("\x1b[31m")["input_ids"]
    thinking = Thinking([escape] * 4, finished=False, ended_with_eos=False)
    rollout = Rollout([escape], thinking, [4], [[]], [[[escape]]])
    alarms = Alarms(tokenizer)
    alarms.rollouts = [rollout]
    warnings = [w for step in range(20) for w in alarms.update(step + 1, {"anytime/reward@4": 0.0})]
    assert warnings and "x1b" in warnings[0] and "\x1b" not in warnings[0]
    prompt = [{"role": "user", "content": "\x1b[31m"}]
    (row,) = completion_rows([prompt], [rollout], [4], tokenizer)
    assert "\x1b" not in json.dumps(row, ensure_ascii=False) and row["prompt"][0]["content"] == "\\u001b[31m"

"""Texts that a tokenizer has no tokens for: one line at each entry point, with real tokenizers of that kind."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.anytime import make_anytime_config
from tests.support.servers import TinyServer, serving
from tests.support.tiny import make_model, make_tokenizer
from trl_anytime import CompletionClient, anytime_generate
from trl_anytime.cli import main
from trl_anytime.commands.common import BAD_INPUT
from trl_anytime.inference.probe import probe
from trl_anytime.rollout.encoding import encode


def without_unknown_token():
    """As the quickstart's: words, and none for what is unknown."""
    usual = make_tokenizer()
    words = Tokenizer(models.WordLevel({word: i for word, i in usual.get_vocab().items() if word != "<unk>"}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = usual.chat_template
    return tokenizer


def characters():
    """A BPE that leaves out what it does not know, without a word."""
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    bpe.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="b")


@pytest.mark.parametrize("text", ["What is 2 + 2?", "\udcff", "x" * 10_000], ids=["words", "no text", "long"])
def test_a_text_of_unknown_words(text):
    with pytest.raises(ValueError) as raised:
        encode(without_unknown_token(), text)
    assert len(str(raised.value)) < 500 and len(str(raised.value).splitlines()) == 1
    assert encode(without_unknown_token(), "1 2") == make_tokenizer()("1 2")["input_ids"]


def test_a_text_of_which_nothing_is_left():
    assert encode(characters(), "ab") == [0, 1]
    with pytest.raises(ValueError, match="xyz"):
        encode(characters(), "xyz")


def test_commands_end_with_a_line(tmp_path, capsys):
    without_unknown_token().save_pretrained(tmp_path)
    model = make_model()
    model.save_pretrained(tmp_path)
    make_anytime_config().save_pretrained(tmp_path)
    (tmp_path / "problems.jsonl").write_text('{"problem": "ordinary words", "answer": "2"}\n')
    problems = ["--dataset", str(tmp_path / "problems.jsonl"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    with serving(TinyServer(model, chat=lambda body: [11, 5, 13, 2], tokenizer=make_tokenizer())) as server:
        url = ["--base-url", server.url]
        for command in (
            ["generate", str(tmp_path), "ordinary words", "--device", "cpu"],
            ["generate", str(tmp_path), "ordinary words", *url],
            ["eval", str(tmp_path), *problems],
            ["probe", str(tmp_path), "--question", "ordinary words", *url],
        ):
            assert main(command) == BAD_INPUT
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert line.startswith("trl-anytime: ") and "ordinary words" in line


def test_from_python():
    with pytest.raises(ValueError, match="ordinary words"):
        anytime_generate(make_model(), without_unknown_token(), ["ordinary words"], config=make_anytime_config())


def test_an_answer_of_unknown_words():
    with serving(TinyServer()) as server:
        handler = server.RequestHandlerClass

        class WithoutIds(handler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send({"choices": [{"message": {"content": "ordinary words </think> 3"}}]})

        server.RequestHandlerClass = WithoutIds
        with pytest.raises(ValueError, match="ordinary words"):
            probe(
                CompletionClient(server.url, patience=1.0),
                make_anytime_config(),
                without_unknown_token(),
                [4],
                question="1 2",
            )


TEMPLATES = ["{{ raise_exception('no') }}", "{{ messages[7].content.x }}", "{% for", "{{ 1 / 0 }}"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails(template):
    tokenizer = make_tokenizer(template)
    with pytest.raises(ValueError, match="template"):
        make_anytime_config().prompt_ids(tokenizer, [[{"role": "user", "content": "1"}]])

"""Tokenizers that write an end of thinking in more than one way, trained on the spot."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# How GPT-2's and GPT-4's tokenizers (cl100k; Qwen, Llama 3, Olmo and Phi have the like) part a text before merges.
# `.</` and ` </` are parts of one kind in both, `>` takes line breaks or a word with it in GPT-4's.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# What stands before an end of thinking and behind it
NEIGHBOURS = [
    ("so it is 4", ""),
    ("so it is 4.", ""),
    ("so it is 4 ", ""),
    ("so it is 4", "\n\n"),
    ("so it is 4\n", "\n\n"),
    ("(so it is 4)", "\n"),
    ("so it is {4}", "\n\n"),
    ("so it is $4$", "\n"),
    ('so it is "4"', ""),
    ("is it 4?", "So it is"),
    ("so it is 4.\n\n", "\n\n**Final"),
]


def corpus(think_end: str) -> list[str]:
    return [f"{before}{think_end}{after}" for before, after in NEIGHBOURS] * 50


def make_melting_tokenizer(regex: str = GPT4, think_end: str = "</think>", vocab_size: int = 700):
    """Byte-level BPE that has merged the end of thinking with its neighbours."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(think_end), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def make_sentencepiece_tokenizer(think_end: str = "</think>"):
    """Like Llama 2's: `▁` for spaces, bytes for unknown characters, and no space before the first word."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [*sorted(set("".join(corpus("</think>"))) - {"\n", " "}), "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=60,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(think_end), trainer)
    with_bytes = json.loads(bpe.to_str())
    vocabulary = with_bytes["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    bpe = Tokenizer.from_str(json.dumps(with_bytes))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>", bos_token="<s>")

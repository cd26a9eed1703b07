"""Sessions on real vLLM, its engine and its server: pauses, answers and resuming change no token."""

import pytest
from vllm import LLM

from tests.support.tiny import make_model, make_tokenizer
from tests.vllm_engine.servers import serving
from trl_anytime import AnytimeConfig, AnytimeSession, CompletionClient, Sampling
from trl_anytime.inference import session_requests
from trl_anytime.rollout.markers import ThinkingMarkers

PROMPTS = [
    f"<|im_start|> user {question} <|im_end|> <|im_start|> assistant <think>" for question in ("1 2 3", "4", "7 8 9 0")
]
SAMPLINGS = {"greedy": Sampling(temperature=0), "sampled": Sampling(), "top-p": Sampling(0.8, top_p=0.9, top_k=9)}
MOST = 100
PAUSES = (1, 9, 22, 50, 18)  # together MOST tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with its config. It has so many words that it seldom ends a trace."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    model = make_model(vocab_size=2000, head_dim=32, num_attention_heads=2, max_position_embeddings=1024)
    model.save_pretrained(folder)
    markers = ThinkingMarkers("</think>", (5,), "so </think>", (9, 5), "answer", (8,))
    AnytimeConfig(markers, [64], [1.0], 5, Sampling(temperature=0), [2]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(folder, request):
    return LLM(str(folder), dtype=request.param, block_size=32, enforce_eager=True, max_model_len=1024)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    arguments = ["--model", str(folder), "--max-model-len", "1024", "--block-size", "32"]
    arguments += ["--enable-prompt-tokens-details"]
    with serving(arguments, tmp_path_factory.mktemp("server") / "log") as (url, _):
        yield url


def traces(model, tokenizer, config, sampling, between):
    """Of each prompt, the uninterrupted trace and the one with pauses."""
    for seed, prompt in enumerate(PROMPTS):
        sessions = [
            AnytimeSession(model, tokenizer, prompt, config=config, sampling=sampling, seed=seed) for _ in range(2)
        ]
        sessions[0].think(MOST)
        paused = sessions[1]
        for tokens in PAUSES:
            if not paused.ended:
                paused.answer(2)
                paused = between(paused)
                paused.think(tokens)
        yield sessions[0].token_ids, paused.token_ids


def count_same(pairs):
    pairs = list(pairs)
    assert sum(len(trace) == MOST for trace, _ in pairs) >= len(PROMPTS) - 1
    return sum(trace == paused for trace, paused in pairs), len(pairs)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("forgotten", [False, True], ids=["kept", "forgotten"])
def test_the_engine(llm, tokenizer, config, sampling, forgotten, tmp_path):
    """By a file each time, with the prefix in the engine's cache, or recomputed as by an engine that was restarted."""

    def between(session):
        path = session.save(tmp_path / "session")
        if forgotten:
            assert llm.reset_prefix_cache()
        return AnytimeSession.resume(path, llm, tokenizer)

    same, number = count_same(traces(llm, tokenizer, config, sampling, between))
    assert same == number == len(PROMPTS)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_the_server(server, tokenizer, config, sampling, streamed, tmp_path):
    def between(session):
        if streamed and not session.ended:  # which breaks off within a chunk
            heard = []
            session.think(2, lambda new: heard.extend(new))
            assert heard == session.token_ids[-2:]
        path = session.save(tmp_path / "session")
        return AnytimeSession.resume(path, CompletionClient(server), tokenizer)

    client = CompletionClient(server)
    for seed, prompt in enumerate(PROMPTS):
        whole = AnytimeSession(client, tokenizer, prompt, config=config, sampling=sampling, seed=seed)
        whole.think(MOST)
        paused = AnytimeSession(client, tokenizer, prompt, config=config, sampling=sampling, seed=seed)
        for tokens in PAUSES:
            paused.answer(2)
            paused = between(paused)
            left = MOST - len(paused.token_ids)
            if left:
                paused.think(min(tokens, left))
        assert paused.token_ids == whole.token_ids


def test_the_engine_remembers(llm, tokenizer, config, caplog):
    """And is named once if it does not."""
    session = AnytimeSession(llm, tokenizer, PROMPTS[0], config=config, sampling=SAMPLINGS["sampled"], seed=0)
    session.think(320)
    assert len(session.token_ids) == 320 and not caplog.records
    assert session._backend._watch._before > session_requests._NOTICEABLE
    for _ in range(2):
        llm.reset_prefix_cache()
        session.think(session_requests.CHUNK)
    assert len(caplog.records) == 1


def test_the_server_says_what_it_remembers(server, tokenizer, config, caplog):
    session = AnytimeSession(
        CompletionClient(server), tokenizer, PROMPTS[0], config=config, sampling=SAMPLINGS["sampled"], seed=0
    )
    for on_tokens in (None, lambda new: None):
        session.think(160, on_tokens)
    assert session._backend._watch._before >= 256 and not caplog.records


def test_an_answer_of_the_engine_computes_bridge_and_answer(llm, tokenizer, config):
    session = AnytimeSession(llm, tokenizer, PROMPTS[0], config=config, sampling=SAMPLINGS["sampled"], seed=0)
    session.think(40)
    first, second = session.answer(3).answer_ids, session.answer(3).answer_ids
    assert len({tuple(ids) for ids in first + second}) == 6
    again = AnytimeSession.resume(session.state(), llm, tokenizer)
    assert again.token_ids == session.token_ids
    with pytest.raises(ValueError, match=r"\b1024\b"):
        again.think(1000)

"""Sessions: wherever thinking pauses, the trace is that of the uninterrupted run, and answers change nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import MambaForCausalLM

from tests.support.anytime import GREEDY, PROMPTS, make_anytime_config, usual_token
from tests.support.servers import TinyServer, serving
from tests.support.tiny import make_model, make_tokenizer
from trl_anytime import AnytimeSession, CompletionClient, Sampling, anytime_generate
from trl_anytime.inference import session_requests
from trl_anytime.inference.session_backends import derived_seed
from trl_anytime.inference.session_requests import CHUNK
from trl_anytime.inference.session_state import SessionState
from trl_anytime.inference.session_transformers import TransformersSession

SAMPLED = Sampling(temperature=1.0)
PENALTY = Sampling(temperature=0.8, top_k=7, repetition_penalty=1.3)
MOST = 80
PAUSES = (1, 6, 2, 30, 41)  # together MOST tokens
MAMBA = pytest.param(
    "mamba",
    marks=pytest.mark.skipif(
        "cache_params" in signature(MambaForCausalLM.forward).parameters,
        reason="this transformers cannot go on from a recurrent state",
    ),
)


@pytest.fixture(scope="module")
def endless():
    """A config whose marker and EOS no trace has."""
    return replace(make_anytime_config((19, 19, 19)), eos_token_ids=[25])


def uninterrupted(model, tokenizer, config, prompt, sampling, seed=0):
    session = AnytimeSession(model, tokenizer, prompt, config=config, sampling=sampling, seed=seed)
    session.think(MOST)
    return session.token_ids


def paused(model, tokenizer, config, prompt, sampling, seed=0, between=lambda session: session):
    session = AnytimeSession(model, tokenizer, prompt, config=config, sampling=sampling, seed=seed)
    for tokens in PAUSES:
        session.answer(2)
        session = between(session)
        session.think(tokens)
    return session.token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALTY], ids=["greedy", "sampled", "penalty"])
def test_pauses_and_answers_change_no_token(tokenizer, endless, dtype, sampling):
    model = make_model().eval().to(dtype)
    for prompt in PROMPTS[:3]:
        expected = uninterrupted(model, tokenizer, endless, prompt, sampling)
        assert len(expected) == MOST and len(set(expected)) > 3
        assert paused(model, tokenizer, endless, prompt, sampling) == expected


def test_seeds_draw_other_traces(model, tokenizer, endless):
    traces = [uninterrupted(model, tokenizer, endless, PROMPTS[0], SAMPLED, seed) for seed in (0, 1)]
    assert traces[0] != traces[1]


def test_a_draw_has_the_distribution_of_the_scores(model, tokenizer, endless):
    """First tokens of 400 seeds against the model's probabilities."""
    (ids,) = endless.prompt_ids(tokenizer, PROMPTS[:1])
    with torch.no_grad():
        probs = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    backend = TransformersSession(model, replace(endless, sampling=SAMPLED), 0, 256)
    drawn = torch.zeros(20)
    for seed in range(400):
        generator = torch.Generator().manual_seed(derived_seed(seed))
        drawn[backend._choose(generator, None, probs.log()[None])] += 1
    # Five standard deviations of each frequency
    assert (drawn / 400 - probs).abs().le(5 * (probs * (1 - probs) / 400).sqrt() + 1e-3).all()
    assert (drawn > 0).sum() > 3


@pytest.mark.parametrize("cache", [True, False], ids=["with the cache", "without it"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_save_and_resume_change_no_token(model, tokenizer, endless, tmp_path, cache, sampling):
    def by_file(session):
        path = session.save(tmp_path / "session", cache=cache)
        return AnytimeSession.resume(path, model, tokenizer)

    for prompt in PROMPTS[:2]:
        expected = uninterrupted(model, tokenizer, endless, prompt, sampling)
        assert paused(model, tokenizer, endless, prompt, sampling, between=by_file) == expected


NEW_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_anytime import AnytimeSession
folder, most = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
traces = []
for path in sys.argv[4:]:
    session = AnytimeSession.resume(path, model, tokenizer)
    session.answer()
    session.think(most - len(session.token_ids))
    traces.append([session.token_ids, session.answer().answer_ids])
print(json.dumps(traces))
"""


@pytest.mark.slow
def test_a_new_process_goes_on(model, tokenizer, endless, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    endless = replace(endless, markers=replace(endless.markers, think_end_ids=(19,), in_text=False))
    expected, paths = [], []
    for sampling in (GREEDY, SAMPLED):
        for cache in (True, False):
            session = AnytimeSession(model, tokenizer, PROMPTS[1], config=endless, sampling=sampling, seed=3)
            session.think(29)
            paths.append(str(session.save(tmp_path / f"{len(paths)}.session", cache=cache)))
            if not session.ended:
                session.think(MOST - 29)
            expected.append([session.token_ids, session.answer().answer_ids])
    found = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(tmp_path), str(MOST), str(torch.get_num_threads()), *paths],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == expected


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma2", MAMBA])
def test_other_caches(tokenizer, endless, model_type):
    model = make_model(model_type, **({"sliding_window": 8} if model_type == "gemma2" else {})).eval()
    for sampling in (GREEDY, SAMPLED):
        expected = uninterrupted(model, tokenizer, endless, PROMPTS[0], sampling)

        def by_state(session):
            return AnytimeSession.resume(session.state(), model, tokenizer)

        assert paused(model, tokenizer, endless, PROMPTS[0], sampling) == expected
        assert paused(model, tokenizer, endless, PROMPTS[0], sampling, between=by_state) == expected


@pytest.mark.parametrize("model_type", ["qwen3", MAMBA])
def test_answers_are_those_of_anytime_generate(tokenizer, model_type):
    """With greedy decoding, at every place of a trace that may end by itself."""
    model = make_model(model_type).eval()
    config = make_anytime_config((usual_token(model, tokenizer),))
    ends = set()
    for prompt in PROMPTS:
        session = AnytimeSession(model, tokenizer, prompt, config=config)
        for budget in (3, 7, 12):
            # One budget at a time: a trace that ends with EOS later is ill-formed at all budgets
            (expected,) = anytime_generate(model, tokenizer, [prompt], [budget], config=config)
            if not session.ended:
                session.think(budget - len(session.token_ids))
            found = session.answer()
            assert [replace(found, budget=budget)] == expected.answers
            assert found.budget == len(session.token_ids)
            assert session.token_ids == expected.rollout.thinking.token_ids
            assert session.thinking == expected.thinking
        ends.add(session.ended)
    assert True in ends and (model_type == "mamba" or False in ends)


def test_an_answer_before_the_first_token(model, tokenizer, endless):
    session = AnytimeSession(model, tokenizer, PROMPTS[0], config=endless)
    answer = session.answer()
    (ids,) = endless.prompt_ids(tokenizer, PROMPTS[:1])
    context = torch.tensor([[*ids, *endless.markers.truncation_bridge_ids, *endless.markers.answer_bridge_ids]])
    expected = model.generate(context, max_new_tokens=4, do_sample=False, eos_token_id=25)[
        0, context.size(1) :
    ].tolist()
    assert (answer.thinking_tokens, answer.finished, answer.answer_ids) == (0, False, [expected])


def test_answers_have_generators_of_their_own(model, tokenizer, endless):
    def answers(*nums, before=0):
        session = AnytimeSession(model, tokenizer, PROMPTS[0], config=endless, sampling=SAMPLED, seed=5)
        if before:
            session.think(before)
            session.answer(3)
        session.think(9 - before)
        torch.manual_seed(len(nums))  # of no consequence
        return [session.answer(num).answer_ids for num in nums]

    (many,) = answers(6)
    assert len({tuple(ids) for ids in many}) > 1
    assert answers(6) == answers(6, before=4) == [many]  # answers elsewhere change nothing
    assert answers(6, 6)[1] != many  # those of a second call are further draws


def test_the_model_is_left_as_it_was(tokenizer, endless):
    model = get_peft_model(make_model(attention_dropout=0.9), LoraConfig(target_modules="all-linear"))
    model.train()
    attention = model.config._attn_implementation
    sessions = [AnytimeSession(model, tokenizer, PROMPTS[0], config=endless) for _ in range(2)]
    for session in sessions:
        session.think(8)
        session.answer()
        assert model.training and model.config._attn_implementation == attention
    assert sessions[0].token_ids == sessions[1].token_ids


# Interruptions


def test_a_listener_pauses(model, tokenizer, endless):
    expected = uninterrupted(model, tokenizer, endless, PROMPTS[0], SAMPLED)
    session = AnytimeSession(model, tokenizer, PROMPTS[0], config=endless, sampling=SAMPLED, seed=0)
    heard = []
    assert session.think(MOST, lambda new: heard.extend(new) or len(heard) == 17) is False
    assert heard == session.token_ids == expected[:17]
    session.think(MOST - 17, heard.extend)
    assert heard == session.token_ids == expected


@pytest.mark.parametrize("model_type", ["qwen3", MAMBA])
@pytest.mark.parametrize("layer", [0, 1, 2], ids=["before a layer", "between layers", "after a step"])
def test_an_interruption_loses_nothing(tokenizer, endless, monkeypatch, model_type, layer):
    """Ctrl-C in a step that has brought none, some or all layers of the cache forward."""
    model = make_model(model_type).eval()
    expected = uninterrupted(model, tokenizer, endless, PROMPTS[0], SAMPLED)
    session = AnytimeSession(model, tokenizer, PROMPTS[0], config=endless, sampling=SAMPLED, seed=0)
    layers = (model.model if model_type == "qwen3" else model.backbone).layers
    module = layers[layer] if layer < 2 else model.lm_head
    for steps in (1, 5, 3):  # the first in the prefill
        left = steps

        def interrupt(*args):
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        hook = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.think(MOST - len(session.token_ids))
        hook.remove()
        assert session.token_ids == expected[: len(session.token_ids)]
        session.answer()
    assert 0 < len(session.token_ids) < MOST
    session.think(MOST - len(session.token_ids))
    assert session.token_ids == expected


# Servers


def client_of(server):
    return CompletionClient(server.url, timeout=5.0, patience=5.0, first_wait=0.01)


class SeededServer(TinyServer):
    """Draws by the seed of a request, one generator for all its tokens, as vLLM does."""

    def complete(self, body):
        choices = []
        for index in range(len(body["prompt"]) * body["n"]):
            ids = list(body["prompt"][index // body["n"]])
            generator = torch.Generator().manual_seed(body["seed"] + index % body["n"])
            sampled = []
            with self.lock, torch.no_grad():
                while len(sampled) < body["max_tokens"] and not (sampled and sampled[-1] in body["stop_token_ids"]):
                    logits = self.model(torch.tensor([ids + sampled])).logits[0, -1]
                    probs = logits.softmax(-1) if body["temperature"] else (logits == logits.max()).float()
                    sampled.append(int(torch.multinomial(probs, 1, generator=generator)))
            reason = "stop" if sampled[-1] in body["stop_token_ids"] else "length"
            choices.append({"index": index, "token_ids": sampled, "finish_reason": reason})
        return choices


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_pauses_change_no_token_of_a_server(model, tokenizer, endless, tmp_path, sampling, streamed):
    heard = []

    def by_file(session):
        return AnytimeSession.resume(session.save(tmp_path / "session"), client_of(server), tokenizer)

    for prompt in PROMPTS[:2]:
        with serving(SeededServer(model)) as server:
            client = client_of(server)
            expected = uninterrupted(client, tokenizer, endless, prompt, sampling)
            assert len(server.bodies) == -(-MOST // CHUNK)
            session = AnytimeSession(client, tokenizer, prompt, config=endless, sampling=sampling, seed=0)
            heard.clear()
            for tokens in PAUSES:
                session.think(tokens, heard.extend if streamed else None)
                session.answer()
                session = by_file(session)
            assert session.token_ids == expected and len(expected) == MOST
            assert heard == (expected if streamed else [])
            thinking = [body for body in server.bodies if body["max_tokens"] != 4]
            assert len(thinking) == 2 * -(-MOST // CHUNK)  # no chunk twice


def test_the_greedy_trace_of_a_server_is_that_of_the_model(model, tokenizer, endless):
    with serving(TinyServer(model)) as server:
        session = AnytimeSession(client_of(server), tokenizer, PROMPTS[0], config=endless)
        session.think(MOST)
        local = AnytimeSession(model, tokenizer, PROMPTS[0], config=endless)
        local.think(MOST)
        assert session.token_ids == local.token_ids
        assert session.answer(2) == local.answer(2)


@pytest.mark.parametrize("at", [3, CHUNK + 5])
def test_a_stream_that_was_interrupted_goes_on(model, tokenizer, endless, at):
    """The chunk is asked for again, and its tokens are those that were shown."""
    with serving(SeededServer(model)) as server:
        expected = uninterrupted(client_of(server), tokenizer, endless, PROMPTS[0], SAMPLED)
        session = AnytimeSession(client_of(server), tokenizer, PROMPTS[0], config=endless, sampling=SAMPLED, seed=0)

        def interrupt(new):
            if len(session.token_ids) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            session.think(MOST, interrupt)
        assert session.token_ids == expected[:at]
        session = AnytimeSession.resume(session.state(), client_of(server), tokenizer)
        session.think(MOST - at)
        assert session.token_ids == expected
        server.faults.append("drops")
        session = AnytimeSession(client_of(server), tokenizer, PROMPTS[0], config=endless, sampling=SAMPLED, seed=0)
        with pytest.raises(ConnectionError, match=server.url):
            session.think(MOST, lambda new: None)
        session.think(MOST, lambda new: None)
        assert session.token_ids == expected


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_server_that_forgets_is_named_once(tokenizer, endless, caplog, monkeypatch, forgets, streamed):
    monkeypatch.setattr(session_requests, "_NOTICEABLE", 64)
    model = make_model(max_position_embeddings=1024).eval()
    server = SeededServer(model, max_model_len=1024)
    server.cached_tokens = lambda ids: 0 if forgets else len(ids) // 16 * 16
    with serving(server):
        session = AnytimeSession(client_of(server), tokenizer, PROMPTS[0], config=endless, sampling=SAMPLED, seed=1)
        session.think(6 * CHUNK, (lambda new: None) if streamed else None)
        assert len(session.token_ids) > 4 * CHUNK
    said = [record.message for record in caplog.records if server.url in record.message]
    assert len(said) == forgets


# What is refused


def test_thinking_beyond_the_context(model, tokenizer, endless):
    session = AnytimeSession(model, tokenizer, PROMPTS[0], config=endless, sampling=SAMPLED, seed=0)
    session.think(5)
    (ids,) = endless.prompt_ids(tokenizer, PROMPTS[:1])
    room = 256 - len(ids) - 5 - endless.markers.max_bridge_length - 4
    assert session.room == room
    before = session.token_ids
    with pytest.raises(ValueError, match=rf"\b{room + 1}\b.*\b256\b.*think\({room}\)"):
        session.think(room + 1)
    assert session.token_ids == before
    session.think(room)
    assert session.room == 0 and len(session.token_ids) == 5 + room
    with pytest.raises(ValueError, match=r"\b1\b.*\b256\b"):
        session.think(1)
    assert session.answer().thinking_tokens == 5 + room


def test_a_trace_that_has_ended_stays(model, tokenizer, config):
    prompt = next(
        prompt
        for prompt in PROMPTS
        if anytime_generate(model, tokenizer, [prompt], [12], config=config)[0].answers[0].finished
    )
    session = AnytimeSession(model, tokenizer, prompt, config=config)
    assert session.think(12) and session.ended
    before = session.token_ids
    assert session.think(10**6) and session.token_ids == before
    assert AnytimeSession.resume(session.state(), model, tokenizer).ended


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda session: session.think(0), "tokens"),
        (lambda session: session.think(True), "tokens"),
        (lambda session: session.answer(0), "num"),
    ],
)
def test_numbers_that_are_none(model, tokenizer, endless, call, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        call(AnytimeSession(model, tokenizer, PROMPTS[0], config=endless))


def test_a_seed_that_is_none(model, tokenizer, endless):
    with pytest.raises(ValueError, match="`seed`.*-1"):
        AnytimeSession(model, tokenizer, PROMPTS[0], config=endless, seed=-1)


@pytest.fixture
def saved(model, tokenizer, endless, tmp_path):
    session = AnytimeSession(model, tokenizer, PROMPTS[0], config=endless, sampling=SAMPLED, seed=0)
    session.think(20)
    return session.save(tmp_path / "session")


def changed(model, name="model.layers.1.mlp.up_proj.weight"):
    """A copy in which one weight is another."""
    copy = make_model().eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.get_parameter(name).view(-1)[0] += 1e-3
    return copy


def test_another_model(model, tokenizer, endless, saved, tmp_path):
    before = saved.read_bytes()
    for other, named in ((changed(model), "weights"), (make_model(num_hidden_layers=1), "parameters")):
        with pytest.raises(ValueError, match=rf"{saved}.*`{named}`"):
            AnytimeSession.resume(saved, other, tokenizer)
    with serving(TinyServer(model)) as server, pytest.raises(ValueError, match="'transformers'.*'server'"):
        AnytimeSession.resume(saved, client_of(server), tokenizer)
    assert saved.read_bytes() == before


def test_another_model_on_the_server(model, tokenizer, endless):
    cards = [{"id": "one", "max_model_len": 256}, {"id": "two", "max_model_len": 256}]
    with serving(TinyServer(model, cards=cards)) as server:
        state = AnytimeSession(CompletionClient(server.url, "one"), tokenizer, PROMPTS[0], config=endless).state()
        with pytest.raises(ValueError, match="'one'.*'two'"):
            AnytimeSession.resume(state, CompletionClient(server.url, "two"), tokenizer)
        AnytimeSession.resume(state, CompletionClient(server.url, "one"), tokenizer)


def test_another_tokenizer(model, saved):
    with pytest.raises(ValueError, match=rf"{saved}.*tokenizer"):
        AnytimeSession.resume(saved, model, make_tokenizer(extra_words=("more",)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampling": GREEDY}, "sampling"),
        ({"max_summary_length": 5}, "max_summary_length"),
        ({"eos_token_ids": [2, 3]}, "eos_token_ids"),
        ({"markers": make_anytime_config((7,)).markers}, "markers"),
    ],
)
def test_other_settings(model, tokenizer, endless, saved, changes, named):
    same = replace(endless, sampling=SAMPLED, budgets=[5], prior=[1.0])  # a session has no budgets
    AnytimeSession.resume(saved, model, tokenizer, config=same)
    with pytest.raises(ValueError, match=rf"{saved}.*`{named}`"):
        AnytimeSession.resume(saved, model, tokenizer, config=replace(same, **changes))


def test_another_machine(model, tokenizer, saved, monkeypatch):
    expected = AnytimeSession.resume(saved, model, tokenizer)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "abacus")
    with pytest.raises(ValueError, match=r"`device`.*abacus.*exact=False"):
        AnytimeSession.resume(saved, model, tokenizer)
    found = AnytimeSession.resume(saved, model, tokenizer, exact=False)
    assert found.token_ids == expected.token_ids
    assert found.think(10) == expected.think(10)
    assert len(found.token_ids) == 30


# Files


def test_a_file_is_the_state(model, tokenizer, endless, saved):
    session = AnytimeSession.resume(saved, model, tokenizer)
    loaded, state = SessionState.load(saved), session.state()
    assert replace(loaded, tensors={}) == replace(state, tensors={})
    assert loaded.tensors.keys() == state.tensors.keys() and len(state.tensors) == 4
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in state.tensors.items())
    small = session.save(saved.with_name("small"), cache=False)
    assert small.stat().st_size < saved.stat().st_size and not SessionState.load(small).tensors


def flip(content, at):
    content = bytearray(content)
    content[at] ^= 1
    return bytes(content)


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a bit of the cache": lambda content: flip(content, len(content) - 5),
    "a token": lambda content: content.replace(b'\\"seed\\": 0', b'\\"seed\\": 1'),
    "another format": lambda content: content.replace(b'\\"format\\": 1, \\"digest', b'\\"format\\": 9, \\"digest'),
    "a text": lambda content: b"nothing",
    "a pickle": lambda content: b"\x80\x05K\x01.",
    "a list of ids that is none": lambda content: content.replace(b'\\"ahead\\": []', b'\\"ahead\\": {}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file(model, tokenizer, saved, damage):
    content = saved.read_bytes()
    assert damage(content) != content
    saved.write_bytes(damage(content))
    with pytest.raises(ValueError, match=str(saved)) as error:
        AnytimeSession.resume(saved, model, tokenizer)
    assert "\n" not in str(error.value)


def test_a_save_that_fails_leaves_the_old_file(model, tokenizer, endless, saved, monkeypatch):
    before = saved.read_bytes()
    session = AnytimeSession.resume(saved, model, tokenizer)
    session.think(3)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("trl_anytime.inference.session_state.save_file", full)
    with pytest.raises(OSError, match="No space"):
        session.save(saved)
    assert saved.read_bytes() == before and [*saved.parent.iterdir()] == [saved]
    with pytest.raises(OSError):
        AnytimeSession.resume(saved.with_name("missing"), model, tokenizer)
    with pytest.raises(ValueError, match=str(Path(saved.parent))):
        AnytimeSession.resume(saved.parent, model, tokenizer)


def test_a_state_that_transformers_does_not_go_on_from(tokenizer, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model, "forward", lambda input_ids, cache_params=None: None)
    with pytest.raises(ValueError, match=f"Qwen3ForCausalLM.*{transformers.__version__}"):
        AnytimeSession(model, tokenizer, PROMPTS[0], config=make_anytime_config((5,)))

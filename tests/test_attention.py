"""Packed rollouts against their definition: one separate row per branch, and one for the thinking."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model
from trl.trainer.utils import add_fused_lm_head

from trl_anytime.attention import TreeLayout, check_tree_attention, enable_tree_attention, forward_packed
from trl_anytime.tree import PackedRollouts

FAMILIES = ["qwen2", "qwen3", "llama"]


def make_batch():
    """Three rollouts: cut at every budget; finished before the second; finished before the first, with empty parts."""
    generator = torch.Generator().manual_seed(0)

    def sample(length):
        return torch.randint(3, 20, (length,), generator=generator).tolist()

    prompts = [sample(6), sample(2), sample(4)]
    packed = PackedRollouts.pack(
        thinkings=[sample(9), sample(5), sample(1)],
        cuts=[[3, 6, 9], [3, 5, 5], [1, 1, 1]],
        bridges=[[sample(3), sample(3), sample(3)], [sample(3), sample(1), sample(1)], [sample(1)] * 3],
        summaries=[
            [[sample(2), sample(4)], [sample(1), sample(3)], [sample(4), sample(1)]],
            [[sample(1), sample(1)], [sample(2), sample(2)], [sample(3), sample(4)]],
            [[[], sample(1)], [sample(2), []], [sample(1), sample(1)]],
        ],
    )
    return prompts, packed


def as_rows(prompts, packed):
    """[left padding][prompt][packed rollout][right padding], as TRL builds them."""
    width = max(map(len, prompts))
    prompt_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    mask = (packed.indices() < packed.lengths[:, None]).long()
    return torch.cat([prompt_ids, packed.token_ids], dim=1), torch.cat([prompt_mask, mask], dim=1)


def packed_logprobs(model, prompts, packed):
    """Log-probability of each sampled token, (R, T), from one packed forward pass; 0 elsewhere."""
    input_ids, attention_mask = as_rows(prompts, packed)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    outputs = forward_packed(
        model, packed, input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True
    )
    return outputs.log_probs[:, -packed.token_ids.size(1) :]


def separate_logprobs(model, prompts, packed):
    """The same from one plain forward pass per branch and thinking."""

    def score(context, sampled):
        if not sampled:
            return torch.zeros(0)
        logits = model(torch.tensor([[*context, *sampled]]), use_cache=False).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(sampled)[:, None])[:, 0]

    rows = []
    for i, prompt in enumerate(prompts):
        tokens = packed.token_ids[i].tolist()
        thinking = tokens[: packed.thinking_lengths[i]]
        parts = [score(prompt, thinking)]
        for j, cut in enumerate(packed.cuts[i].tolist()):
            for start, summary_start, end in packed.spans[i, j].tolist():
                context = [*prompt, *thinking[:cut], *tokens[start:summary_start]]
                parts += [torch.zeros(summary_start - start), score(context, tokens[summary_start:end])]
        parts.append(torch.zeros(len(tokens) - int(packed.lengths[i])))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def make_tree_model(family, **settings):
    model = make_model(family, **settings)
    add_fused_lm_head(model)
    enable_tree_attention(model)
    return model


def gradients(model, logprobs):
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}],
                         ids=["plain", "checkpointing", "reentrant"])  # fmt: skip
def test_packed_equals_separate_rows(family, lora, checkpointing):
    model = make_tree_model(family)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
        model.enable_input_require_grads()
    prompts, packed = make_batch()
    separate = separate_logprobs(model, prompts, packed)
    expected = gradients(model, separate)

    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    together = packed_logprobs(model, prompts, packed)
    actual = gradients(model, together)

    # The bounds for float32: sums in another order
    torch.testing.assert_close(together, separate, atol=2e-5, rtol=0)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_mask_agrees(family):
    """The mask that `PackedRollouts.visible` draws, given to eager attention, is what tree attention computes."""
    prompts, packed = make_batch()
    model = make_tree_model(family, attn_implementation="eager")
    together = packed_logprobs(model, prompts, packed)
    for i, prompt in enumerate(prompts):
        length, p = int(packed.lengths[i]), len(prompt)
        visible = torch.ones(p + length, p + length, dtype=torch.bool).tril()
        visible[p:, p:] = packed.visible()[i, :length, :length]
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        row = torch.tensor([[*prompt, *packed.token_ids[i, :length].tolist()]])
        positions = torch.cat([torch.arange(p), p + packed.positions()[i, :length]])
        logits = model(row, attention_mask=mask[None, None], position_ids=positions[None], use_cache=False).logits[0]
        dense = logits[p - 1 : -1].log_softmax(-1).gather(1, row[0, p:, None])[:, 0]
        dense = dense * packed.trained()[i, :length]
        torch.testing.assert_close(together[i, :length], dense, atol=2e-5, rtol=0)


def test_branches_do_not_see_each_other():
    """Changing one branch changes nothing else; a mask that leaked would."""
    model = make_tree_model("qwen3")
    prompts, packed = make_batch()
    before = packed_logprobs(model, prompts, packed)
    start, _, end = packed.spans[0, 1, 0].tolist()
    packed.token_ids[0, start:end] = (packed.token_ids[0, start:end] + 1) % 20
    after = packed_logprobs(model, prompts, packed)
    changed = before != after
    assert changed[0, start:end].any()
    changed[0, start:end] = False
    assert not changed.any()


def test_padding_changes_nothing():
    model = make_tree_model("qwen3")
    prompts, packed = make_batch()
    together = packed_logprobs(model, prompts, packed)
    for i in range(3):
        length = int(packed.lengths[i])
        alone = packed[i : i + 1]
        alone = PackedRollouts(alone.token_ids[:, :length], alone.cuts, alone.spans)
        torch.testing.assert_close(packed_logprobs(model, prompts[i : i + 1], alone)[0], together[i, :length])


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_plain_forward_and_generate_are_untouched(base):
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (prompts != 0).long()
    plain, tree = (make_model("qwen3", attn_implementation=base) for _ in range(2))
    enable_tree_attention(tree)
    assert torch.equal(plain(prompts, attention_mask=mask).logits, tree(prompts, attention_mask=mask).logits)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(plain.generate(prompts, **settings), tree.generate(prompts, **settings))
    positions = torch.tensor([[0, 1, 0, 1]])  # two documents in one row
    assert torch.equal(plain(prompts, position_ids=positions).logits, tree(prompts, position_ids=positions).logits)


def test_saved_models_do_not_know_of_the_tree(tmp_path):
    make_tree_model("qwen3").save_pretrained(tmp_path)
    assert "tree" not in (tmp_path / "config.json").read_text()


def test_no_object_of_row_by_row_size():
    """What the layout holds grows with branches × keys, never with the square of the row."""
    thinking, cuts = list(range(400)), [100, 400]
    packed = PackedRollouts.pack([thinking], [cuts], [[[1], [1]]], [[[[2, 3]], [[4, 5]]]])
    layout = TreeLayout.of(packed, torch.tensor([50]), 460)
    assert max(branches.mask.numel() for branches in layout.budgets) == 3 * (450 + 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_self_check_passes(family):
    model = make_tree_model(family).train()
    check_tree_attention(model)
    assert model.training


def test_self_check_fails_on_a_wrong_layout(monkeypatch):
    model = make_tree_model("qwen3")
    monkeypatch.setattr(PackedRollouts, "positions", PackedRollouts.indices)  # branches do not restart at their cut
    with pytest.raises(ValueError, match="differ by .* from those of separate rows"):
        check_tree_attention(model)


def test_recurrent_models_are_refused():
    model = make_model("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, conv_L_cache=3)
    enable_tree_attention(model)
    with pytest.raises(ValueError, match="recurrent and hybrid models"):
        check_tree_attention(model)


def test_models_without_attention_functions_are_refused():
    model = make_model("bloom", n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="does not support a registered attention function"):
        enable_tree_attention(model)


def test_sliding_windows_are_refused_where_they_matter():
    prompts, packed = make_batch()
    settings = {"use_sliding_window": True, "max_window_layers": 0}
    packed_logprobs(make_tree_model("qwen3", sliding_window=64, **settings), prompts, packed)
    with pytest.raises(ValueError, match="sliding_window=8, which tree attention does not support"):
        packed_logprobs(make_tree_model("qwen3", sliding_window=8, **settings), prompts, packed)


def test_a_lost_layout_is_an_error():
    model = make_tree_model("qwen3")
    prompts, packed = make_batch()
    input_ids, attention_mask = as_rows(prompts, packed)

    def drops_it(tree, **kwargs):
        return model(**kwargs)

    with pytest.raises(RuntimeError, match="did not receive the keyword argument `tree`"):
        forward_packed(drops_it, packed, input_ids, attention_mask)

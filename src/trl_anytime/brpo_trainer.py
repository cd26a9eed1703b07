"""The [`BRPOTrainer`], which adds Budget Relative Policy Optimization to TRL's [`~trl.GRPOTrainer`]."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id

from .brpo_config import BRPOConfig
from .checks.arguments import (
    check_answers,
    check_arguments,
    check_prompt_tokens,
    check_references,
    check_reward_funcs,
    check_tokens,
    check_trainable,
)
from .checks.batch_sizes import most_tokens
from .checks.prompts import checked_markers, first_prompt, shared_system_prompt, shortest_and_longest
from .checks.run_start import StartReport
from .checks.start_checks import context_overflow
from .inference.anytime_config import AnytimeConfig
from .method.adaptive_baseline import AdaptiveBaseline
from .method.advantages import segment_returns, summary_advantages, summary_weights, thinking_advantages
from .method.budgets import nonempty_segments, prior_weights
from .method.likelihood import likelihood_advantages
from .method.packing import PackedRollouts
from .modeling.support import check_sharded, choose_forward
from .modeling.tree_attention import forward_packed
from .reporting.card_facts import card_facts
from .reporting.model_card import CARD, copy_card, write_card
from .reporting.trackers import Trackers
from .rewards import AnswerReward, FormatReward, MathReward
from .rollout.backend import RolloutSettings
from .rollout.escapes import EscapeSearch
from .rollout.trl_backend import choose_backend
from .rollout.types import Rollout
from .rollout.vllm_server import check_server, server_url
from .training import micro_batches
from .training.alarms import Alarms
from .training.metrics import (
    METRICS_OF_PLAIN_ROWS,
    TABLE_COLUMNS,
    baseline_metrics,
    completion_rows,
    completion_table,
    reward_metrics,
    rollout_metrics,
)
from .training.progress import StepLines
from .training.references import ReferenceAnswers
from .training.reliable_trainer import ReliableGRPOTrainer

logger = get_logger(__name__)

# These shape rollouts and advantages, so a resumed run must not change them
_FIXED = (
    "budgets",
    "prior",
    "num_summaries",
    "max_summary_length",
    "baseline",
    "progress_decay",
    "summary_policy",
    "summary_weight",
    "summary_reward",
    "reference_template",
)
_BASELINE = "adaptive_baseline.pth"  # in a checkpoint


@dataclass
class _GenerationBatch:
    """
    Generation batch on its way through TRL's `_generate_and_score_completions`: settings, and collected results.

    Dimensions: N rollouts on this rank, W ranks, M budgets, A summaries, F reward functions.
    """

    budgets: list[int]
    prior: str | list[float]
    num_summaries: int
    num_generations: int
    rollouts: list[Rollout] = field(default_factory=list)  # N
    packed: PackedRollouts | None = None  # N rows, as packed
    padded: PackedRollouts | None = None  # the same rows after TRL padded and moved them
    rewards_per_func: torch.Tensor | None = None  # (W·N, M, A, F)
    references: ReferenceAnswers | None = None  # of its N rollouts, in place of sampled summaries
    escapes: list = field(default_factory=list)  # N, see EscapeSearch.kinds
    rewards: torch.Tensor | None = None  # (W·N, M, A), NaN where no function scored the summary
    extra_logs: dict[str, list] = field(default_factory=dict)  # from reward functions, a value per rollout and budget

    def on_device(self, completion_ids: torch.Tensor) -> PackedRollouts:
        """Return the packed rows, given their tokens after TRL padded and moved them."""
        if self.padded is None:
            assert self.packed is not None
            cuts, spans = (x.to(completion_ids.device) for x in (self.packed.cuts, self.packed.spans))
            self.padded = PackedRollouts(completion_ids, cuts, spans)
        return self.padded


class BRPOTrainer(ReliableGRPOTrainer):
    """
    Trainer for Budget Relative Policy Optimization (BRPO), https://huggingface.co/papers/2505.13438.

    Each sampled trace is cut at several token budgets. At each cut the model summarises its best answer, and every
    summary is verified. A thinking token is trained for the rewards of all budgets that its trace can still reach.
    Each summary is trained for its own reward. A rollout trains as one packed row with tree attention (see
    `trl_anytime.method.packing`).

    Checkpoints, restarts and faults are those of [`~trl_anytime.training.reliable_trainer.ReliableGRPOTrainer`].

    These methods of [`~trl.GRPOTrainer`] change for the method. The rest is inherited.

    - `__init__`: checks the input, finds the markers, enables tree attention and chooses the generation backend.
    - `_generate_and_score_completions`: thinks, cuts and summarises (through TRL's `rollout_func` hook), and computes
      the advantages.
    - `_calculate_rewards`: calls reward functions once per summary.
    - `_log_completion_extra`: refuses names of our own columns in the table of completions.
    - `_prepare_inputs`: puts rollouts of similar length into a micro-batch, where that does not change a gradient.
    - `_get_per_token_logps_and_entropies`, `_compute_loss`: forward packed rows instead of plain ones.
    - `save_model`: writes `anytime_config.json` beside every saved model.
    - `create_model_card`: writes a card of its own (docs/model_cards.md).

    `_at_train_begin`, `_resume_settings` and `_add_to_checkpoint` add the state of the method to checkpoints.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_anytime import BRPOConfig, BRPOTrainer

    >>> dataset = load_dataset("agentica-org/DeepScaleR-Preview-Dataset", split="train")
    >>> dataset = dataset.map(lambda x: {"prompt": [{"role": "user", "content": x["problem"]}]})
    >>> trainer = BRPOTrainer("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", BRPOConfig("anytime"), dataset)
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Reasoning model to train, see [`~trl.GRPOTrainer`].
        args ([`BRPOConfig`], *optional*):
            Settings. Defaults to those of the paper.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Must have a column `"prompt"` (conversational or text), and the columns that the reward functions need. The
            default reward needs `"answer"` or `"solution"`.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            See [`~trl.GRPOTrainer`]. Defaults to [`~trl_anytime.rewards.MathReward`]. Each is called once per summary,
            with the summary as the completion. Further arguments say for each summary where its thinking was cut, see
            [`~trl_anytime.rollout.types.Rollout.summary_facts`].
        **kwargs:
            The other arguments of [`~trl.GRPOTrainer`], by keyword: `eval_dataset`, `processing_class`,
            `reward_processing_classes`, `callbacks`, `optimizers`, `quantization_config`, `peft_config`. `tools`,
            `rollout_func` and `environment_factory` are refused.

    Raises:
        `ValueError`: If settings, prompts, answers or model do not fit the method. The message says what to set.
    """

    # Narrower than declared by the base class
    args: BRPOConfig
    model: PreTrainedModel
    train_dataset: Dataset | IterableDataset
    chat_template_kwargs: dict[str, Any]
    num_generations: int
    num_generations_eval: int

    _tag_names = ["trl", "brpo", "anytime-reasoning"]
    _name = "BRPO"
    _paper = {
        "title": "Optimizing Anytime Reasoning via Budget Relative Policy Optimization",
        "id": "2505.13438",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{qi2025optimizing,
                title        = {{Optimizing Anytime Reasoning via Budget Relative Policy Optimization}},
                author       = {Penghui Qi and Zichen Liu and Tianyu Pang and Chao Du and Wee Sun Lee and Min Lin},
                year         = 2025,
                booktitle    = {Advances in Neural Information Processing Systems},
                eprint       = {arXiv:2505.13438},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: BRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *others: Any,  # to name the remedy for TRL's order
        reward_funcs: Any = None,
        **kwargs: Any,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = BRPOConfig(f"{model_name.split('/')[-1]}-BRPO")
        check_arguments(args, train_dataset, others, kwargs)
        check_reward_funcs(args, reward_funcs, kwargs.get("eval_dataset"))
        reward_funcs = MathReward() if reward_funcs is None else reward_funcs
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        for reward_func in reward_funcs:
            if isinstance(reward_func, AnswerReward):
                if args.summary_reward is None:
                    train_dataset = check_answers(reward_func, train_dataset)
                kwargs["eval_dataset"] = check_answers(reward_func, kwargs.get("eval_dataset"))

        # Set while TRL's methods run around ours: the generation batch, and the rows of the loss
        self._batch: _GenerationBatch | None = None
        self._micro_batch: tuple[PackedRollouts, torch.Tensor] | None = None
        self._adaptive_baseline = AdaptiveBaseline(len(args.budgets)) if args.baseline == "adaptive" else None

        self._engine_context: int | None = None  # most tokens of a prompt and its continuation in vLLM
        if args.use_vllm and args.vllm_mode == "server":
            name = model if isinstance(model, str) else model.name_or_path or ""
            self._engine_context = check_server(server_url(args), args.vllm_server_timeout, name)

        super().__init__(model, reward_funcs, args, train_dataset, on_nonfinite=args.on_nonfinite, **kwargs)
        check_trainable(self.model)

        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                "`processing_class` is a multimodal processor, but BRPO trains on text. Pass a tokenizer."
            )
        self.rollout_func = self._roll_out
        self._first_prompt = first_prompt(self.train_dataset)  # read once, because a stream has to be opened for it
        self._system_prompt = shared_system_prompt(self._first_prompt, self.train_dataset)
        eval_data = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        datasets = {"train_dataset": self.train_dataset, **eval_data}
        self.markers = checked_markers(self._tokenizer, self._first_prompt, datasets, args, self.chat_template_kwargs)
        self._escapes = EscapeSearch(self.markers, self._tokenizer)
        self.reward_funcs = [
            replace(func, answer_bridge=self.markers.answer_bridge)
            if isinstance(func, AnswerReward | FormatReward)
            else func
            for func in self.reward_funcs
        ]
        if self.use_vllm and self.vllm_mode == "colocate":
            self._engine_context = self.vllm_generation.llm.llm_engine.model_config.max_model_len
        shortest_prompts, longest_prompts = (
            self._tokenize_prompts(prompts)[0] for prompts in shortest_and_longest(self.train_dataset)
        )
        check_tokens(self._tokenizer, self.model, self.eos_token_ids, self.markers, shortest_prompts + longest_prompts)
        self._check_context(longest_prompts)
        if args.summary_reward is not None:
            check_references(self.train_dataset, args, self._tokenizer, self.markers)
        packed, separate = most_tokens(args, self.markers.max_bridge_length)
        self.max_completion_length = args.max_completion_length or packed
        unwrap = self.accelerator.unwrap_model
        self._forward = choose_forward(
            unwrap(self.model),
            None if self.ref_model is None else unwrap(self.ref_model),
            args.packing,
            self._is_sharded,
            separate / packed,
        )
        self.generation = choose_backend(self, self._forward is forward_packed)

        self._lines = StepLines.replace(self)
        self._times.on_start = self.generation.times.on_start = self._lines.show_phase
        self.add_callback(StartReport(self, max(map(len, longest_prompts))))
        if args.alarms:
            self.add_callback(Alarms())
        completions = self._logs if self.log_completions else None
        self.add_callback(Trackers(cast(list[str], args.report_to), self.callback_handler, completions))

    # Set-up

    def _check_context(self, prompt_ids: Sequence[Sequence[int]]) -> None:
        in_model = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(ids) for ids in prompt_ids)
        reason = context_overflow(longest, self.args, self.markers, in_model, self._engine_context)
        if reason is not None:
            raise ValueError(" ".join(reason))

    # Rollout: think, cut, bridge, summarise

    def _roll_out(self, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        """Generate one packed rollout for each prompt of this rank. TRL calls this as its `rollout_func`."""
        batch = self._batch
        assert batch is not None
        prompt_ids = self._tokenize_prompts(prompts)[0]
        check_prompt_tokens(self.model, prompt_ids)  # on the host, because an assertion on a GPU gives no cause
        self._check_context(prompt_ids)

        settings = RolloutSettings(
            batch.budgets,
            batch.num_summaries,
            self.args.max_summary_length,
            self.markers,
            self.eos_token_ids,
            batch.num_generations,
        )
        if batch.references is None:
            batch.rollouts = self.generation.roll_out(prompt_ids, settings)
        else:
            batch.rollouts = batch.references.roll_out(self.generation, prompt_ids, settings)
        self._times.seconds |= self.generation.times.seconds
        batch.packed = packed = PackedRollouts.pack(
            [rollout.thinking.token_ids for rollout in batch.rollouts],
            [rollout.cuts for rollout in batch.rollouts],
            [rollout.bridges for rollout in batch.rollouts],
            [rollout.summaries for rollout in batch.rollouts],
        )
        if batch.references is not None:
            scores = self._packed_logprobs(packed, prompt_ids)
            batch.rollouts = batch.references.score(batch.rollouts, packed, scores)
        logprobs = [rollout.packed_logprobs() for rollout in batch.rollouts]
        lengths = packed.lengths.tolist()
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [ids[:n].tolist() for ids, n in zip(packed.token_ids, lengths, strict=True)],
            "env_mask": [mask[:n].int().tolist() for mask, n in zip(packed.trained(), lengths, strict=True)],
            "logprobs": None if logprobs[0] is None else logprobs,
        }

    def _packed_logprobs(self, packed: PackedRollouts, prompt_ids: list[list[int]]) -> torch.Tensor:
        """Compute the policy's log-probabilities of packed rows, (N, T), without gradient, on the host."""
        width, num_tokens = max(map(len, prompt_ids)), packed.token_ids.size(1)
        padding = [width - len(ids) for ids in prompt_ids]
        pad_token_id = self._tokenizer.pad_token_id
        prompts = [[pad_token_id] * pad + ids for pad, ids in zip(padding, prompt_ids, strict=True)]
        prompt_mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        mask = packed.indices() < packed.lengths[:, None]
        with torch.no_grad():
            logprobs = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([torch.tensor(prompts), packed.token_ids], dim=1).to(self.accelerator.device),
                torch.cat([torch.tensor(prompt_mask), mask.long()], dim=1).to(self.accelerator.device),
                num_tokens,
                self.args.per_device_train_batch_size,
            )[0]
        cast(_GenerationBatch, self._batch).padded = None  # TRL may pad the same rows to another width
        return logprobs.float().cpu()

    # Rewards and advantages

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        batch = self._batch
        assert batch is not None
        num_budgets, num_summaries = len(batch.budgets), batch.num_summaries
        per_rollout = num_budgets * num_summaries
        summary_ids = [ids for rollout in batch.rollouts for at_budget in rollout.summaries for ids in at_budget]
        summary_facts = [
            facts
            for rollout in batch.rollouts
            for facts in rollout.summary_facts(batch.budgets, self.markers, self._tokenizer)
        ]
        texts = self._tokenizer.batch_decode(summary_ids, skip_special_tokens=True)
        batch.escapes = self._escapes_of(batch, texts)
        if is_conversational({"prompt": prompts[0]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        rows = [{**inputs[i // per_rollout], **facts} for i, facts in enumerate(summary_facts)]
        prompts = [prompts[i // per_rollout] for i in range(len(rows))]
        rewards_per_func = super()._calculate_rewards(rows, prompts, texts, summary_ids)

        # TRL's completions table gets one row per budget, with the first summary
        batch.extra_logs = {name: values[::num_summaries] for name, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()
        batch.rewards_per_func = rewards_per_func.view(-1, num_budgets, num_summaries, len(self.reward_funcs))
        unscored = batch.rewards_per_func.isnan().all(dim=-1)
        weighted = batch.rewards_per_func * self.reward_weights.to(rewards_per_func)
        batch.rewards = weighted.nansum(dim=-1).masked_fill(unscored, torch.nan)
        # TRL takes this as the reward of a rollout, and logs it: the anytime objective Σ_j P_j r̄_j, (W·N, F)
        weights_M = prior_weights(batch.prior, batch.budgets).to(rewards_per_func)
        mean_NMF = batch.rewards_per_func.nanmean(dim=2)
        return torch.where(weights_M[:, None] > 0, weights_M[:, None] * mean_NMF, 0.0).sum(dim=1)

    def _escapes_of(self, batch: _GenerationBatch, texts: Sequence[str]) -> list:
        """Return the signs of resumed reasoning of each rollout, given the texts of all summaries."""
        rest = iter(texts)
        return [
            self._escapes.kinds(
                rollout,
                [[next(rest) for _ in at_budget] for at_budget in rollout.summaries],
                rollout.clipped(self.args.max_summary_length, self.eos_token_ids),
            )
            for rollout in batch.rollouts
        ]

    def _log_completion_extra(self, column: str, values: list) -> None:
        taken = (*TABLE_COLUMNS, *self.reward_func_names)
        if column in taken:
            raise ValueError(
                f"`log_extra({column!r}, ...)` uses the name of another column in the table of completions. Choose a "
                f"name other than {', '.join(taken)}."
            )
        super()._log_completion_extra(column, values)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        self._lines.is_evaluating = mode == "eval"
        batch = self._new_batch(mode, inputs)
        if batch.references is None:
            return self._train_on(batch, mode, inputs)
        with batch.references.rewarding(self):
            return self._train_on(batch, mode, inputs)

    def _train_on(self, batch: _GenerationBatch, mode: str, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Fill a generation batch by TRL's method, and compute the advantages of its tokens."""
        self._batch = batch
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._batch = None
        packed = batch.on_device(output["completion_ids"])

        # A group may be split across ranks, so advantages are computed for all rollouts and sliced for this rank
        assert batch.rewards is not None
        num_budgets = len(batch.budgets)
        grouped = (-1, batch.num_generations, num_budgets)
        rewards_PGMA = batch.rewards.view(*grouped, batch.num_summaries)
        cuts_PGM = self.accelerator.gather(packed.cuts).view(grouped)
        baseline = self.args.baseline if self._adaptive_baseline is None else self._adaptive_baseline.predict
        if mode == "eval":  # it may have budgets that the learned baseline does not know, and does not use advantages
            baseline = "brpo"
        thinking_PGM = thinking_advantages(
            rewards_PGMA, batch.budgets, batch.prior, baseline, self.args.progress_decay
        )
        weights_M = summary_weights(self.args.summary_weight, batch.budgets, batch.prior, batch.num_summaries)
        if batch.references is None:
            summary_PGMA = summary_advantages(rewards_PGMA, cuts_PGM, self.args.summary_policy, weights_M)
        else:
            lengths_PGM = self.accelerator.gather(packed.summary_lengths()).view(grouped)
            summary_PGMA = likelihood_advantages(
                batch.references.kind, rewards_PGMA[..., 0], lengths_PGM, weights_M.to(rewards_PGMA)
            ).unsqueeze(-1)
        # Advantages are unknown where summaries could not be scored. They become 0: `anytime/unscored_ratio` counts
        # such summaries.
        thinking = thinking_PGM.reshape(-1, num_budgets).nan_to_num()
        summary = summary_PGMA.reshape(-1, num_budgets, batch.num_summaries).nan_to_num()
        first = self.accelerator.process_index * len(inputs)
        local = slice(first, first + len(inputs))
        output["advantages"] = packed.token_advantages(thinking[local], summary[local], batch.budgets)
        output["cuts"], output["spans"] = packed.cuts, packed.spans

        self._log_batch(mode, batch, output["advantages"], rewards_PGMA, cuts_PGM)
        if mode == "train" and self._adaptive_baseline is not None:  # for the next batches
            returns = segment_returns(rewards_PGMA, batch.budgets, batch.prior, self.args.progress_decay)
            self._adaptive_baseline.update(rewards_PGMA, returns, nonempty_segments(cuts_PGM, batch.budgets))
        if self.log_completions:
            self._log_table(batch, [x["prompt"] for x in inputs], thinking, summary)
        if mode == "train" and self.args.prune and micro_batches.can_prune(self.args, self.aux_loss_enabled):
            output, lengths = micro_batches.prune_batch(output, packed)
            before, now = self.accelerator.reduce(lengths, reduction="sum").tolist()
            self._metrics[mode]["anytime/pruned_ratio"].append(1 - now / before)
        return output

    def _new_batch(self, mode: str, inputs: list[dict[str, Any]]) -> _GenerationBatch:
        args = self.args
        if mode == "train":
            batch = _GenerationBatch(args.budgets, args.prior, args.num_summaries, self.num_generations)
            if args.summary_reward is not None:
                batch.references = ReferenceAnswers.from_rows(inputs, args, self._tokenizer, self.markers)
            return batch
        # Evaluation estimates the plain curve, with equal weights and one summary per budget
        return _GenerationBatch(args.eval_budgets or args.budgets, "uniform", 1, self.num_generations_eval)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:  # evaluation, or no new rollouts
            return inputs
        self._buffered_inputs = micro_batches.sort_by_length(self._buffered_inputs, self.args, self.aux_loss_enabled)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # Packed rows in TRL's forward passes

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple:
        if self._batch is None:
            packed, trained = cast(tuple[PackedRollouts, torch.Tensor], self._micro_batch)
        else:
            packed = self._batch.on_device(input_ids[:, -logits_to_keep:])
            trained = torch.ones(len(input_ids), dtype=torch.bool)
        is_update, num_rows = self._batch is None, len(input_ids)
        parts: list[list[int]]
        if is_update:
            parts = self._parts_of_update(packed, trained, attention_mask[:, :-logits_to_keep])
        else:
            parts = [part.tolist() for part in torch.arange(num_rows).split(batch_size or num_rows)]
        score = super()._get_per_token_logps_and_entropies
        with self._times("updating" if is_update else "scoring"):
            chunks = [  # TRL would chunk the rows, but not their layout
                score(
                    partial(micro_batches.forward_some, self._forward, model, packed[rows], trained[rows]),
                    input_ids[rows],
                    attention_mask[rows],
                    logits_to_keep,
                    **kwargs,
                )
                for rows in ([slice(None)] if len(parts) == 1 else map(torch.tensor, parts))
            ]
        if len(chunks) == 1:
            return chunks[0]
        order = torch.tensor([row for part in parts for row in part]).argsort()
        return tuple(_joined(values, order) for values in zip(*chunks, strict=True))

    def _parts_of_update(
        self, packed: PackedRollouts, trained: torch.Tensor, prompt_mask: torch.Tensor
    ) -> list[list[int]]:
        """Return the rows of each forward pass of a micro-batch."""
        # All ranks make equally many forward passes, and a router's loss is a mean over the micro-batch
        if self.accelerator.num_processes > 1 or self.aux_loss_enabled:
            return [list(range(len(trained)))]
        lengths = ((packed.lengths + prompt_mask.sum(dim=1)) * trained).tolist()
        *parts, shortest = micro_batches.split_by_length(lengths)
        # A forward pass needs a row that is trained
        return [*parts, shortest] if any(lengths[row] for row in shortest) else [*parts[:-1], parts[-1] + shortest]

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        packed = PackedRollouts(inputs["completion_ids"], inputs["cuts"], inputs["spans"])
        with self._forwarding(packed, micro_batches.rows_to_forward(inputs)):
            return super()._compute_loss(model, micro_batches.as_before_pruning(inputs, self.args.loss_type))

    @contextmanager
    def _forwarding(self, packed: PackedRollouts, trained: torch.Tensor) -> Iterator[None]:
        """Forward these rows in forward passes inside, and compute only those that are trained."""
        self._micro_batch = packed, trained
        try:
            yield
        finally:
            self._micro_batch = None

    # Logging

    def _log_batch(
        self,
        mode: str,
        batch: _GenerationBatch,
        advantages: torch.Tensor,
        rewards_PGMA: torch.Tensor,
        cuts_PGM: torch.Tensor,
    ) -> None:
        """Add the metrics of a generation batch to those of TRL."""
        args, budgets = self.args, batch.budgets
        real, groups = slice(self._num_real), slice(self._num_real // batch.num_generations)
        # To the host at once, because each metric would wait for the device
        rewards_PGMA, cuts_PGM = rewards_PGMA[groups].cpu(), cuts_PGM[groups].cpu()
        segments = segment_returns(rewards_PGMA, budgets, batch.prior, args.progress_decay)
        extra_baselines = {}
        if mode == "train" and self._adaptive_baseline is not None:
            extra_baselines["adaptive"] = self._adaptive_baseline.predict(rewards_PGMA, segments)
        metrics = {
            **reward_metrics(rewards_PGMA.flatten(0, 1), budgets),
            **rollout_metrics(
                batch.rollouts,
                advantages,
                budgets,
                self.markers,
                self.eos_token_ids,
                args.max_summary_length,
                lambda rows: self.accelerator.gather(rows)[real].cpu(),
                batch.escapes,
            ),
            **baseline_metrics(segments, cuts_PGM, budgets, extra_baselines),
            **{
                f"time/{phase}": [self._times.take(phase)]
                for phase in ("thinking", "summarising", "grading", "scoring")
            },
        }
        for name in METRICS_OF_PLAIN_ROWS:
            self._metrics[mode].pop(name)
        if batch.references is not None:  # a reference answer has neither a form nor a limit that the model chose
            metrics = {k: v for k, v in metrics.items() if not k.startswith(("summary/", "anytime/formatted@"))}
        for name, values in metrics.items():
            self._metrics[mode][name].extend(values)
        if mode == "train":
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Alarms):
                    callback.rollouts = batch.rollouts

    def _log_table(
        self, batch: _GenerationBatch, prompts: list, thinking: torch.Tensor, summary: torch.Tensor
    ) -> None:
        """Replace TRL's rows of packed ids by one row per rollout and budget, with its first summary."""
        rows = gather_object(completion_rows(prompts, batch.rollouts, batch.budgets, self._tokenizer))
        extra = {}
        for name in sorted(set(gather_object(list(batch.extra_logs)))):  # the same order on all ranks
            none = [None] * (len(rows) // self.accelerator.num_processes)
            extra[name] = gather_object(batch.extra_logs.get(name, none))
        assert batch.rewards_per_func is not None
        rewards_of_first = batch.rewards_per_func[:, :, 0].flatten(0, 1).T.tolist()
        rewards = dict(zip(self.reward_func_names, rewards_of_first, strict=True))
        self._logs.update(completion_table(rows, rewards, thinking, summary, extra))

    # Checkpoints

    def _at_train_begin(self) -> None:
        if self._is_sharded and self._forward is forward_packed:
            check_sharded(cast(torch.nn.Module, self.model_wrapped), self.accelerator.unwrap_model(self.model))
        super()._at_train_begin()
        if self._adaptive_baseline is not None and self._checkpoint is not None:
            self._adaptive_baseline.load_state_dict(torch.load(self._checkpoint / _BASELINE, weights_only=True))

    def _resume_settings(self) -> dict[str, dict[str, Any]]:
        markers = {name: getattr(self.markers, name) for name in ("think_end", "truncation_bridge", "answer_bridge")}
        return {
            "fixed": {**{name: getattr(self.args, name) for name in _FIXED}, **markers},
            "reported": {"packing": self.args.packing},
        }

    def _add_to_checkpoint(self, folder: Path) -> None:
        if self.is_world_process_zero():
            copy_card(Path(str(self.args.output_dir)), folder)
            if self._adaptive_baseline is not None and not self.args.save_only_model:
                torch.save(self._adaptive_baseline.state_dict(), folder / _BASELINE)

    # Saving

    def _anytime_config(self) -> AnytimeConfig:
        """Return the config that is saved beside the model."""
        return AnytimeConfig.from_brpo_config(
            self.args, self.markers, self.eos_token_ids, self.chat_template_kwargs, self._system_prompt
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            # Before saving, which may push the folder to the Hub. Also into `output_dir`, which is pushed during
            # training.
            for folder in {output_dir or self.args.output_dir, self.args.output_dir}:
                self._anytime_config().save_pretrained(str(folder))
        super().save_model(output_dir, _internal_call)
        # Checkpoints and pushes write their own cards. This card replaces that of PEFT, which names local folders.
        if not _internal_call:
            self.create_model_card()
            if self.is_world_process_zero():
                copy_card(Path(str(self.args.output_dir)), Path(output_dir or str(self.args.output_dir)))

    # TRL's arguments differ from those of transformers
    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        # TRL's card would not escape names, so it gets none. Only its tags and its links to trackers are used.
        super().create_model_card(tags=tags)
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            card_of_trl = ModelCard.load(folder / CARD)
            facts = card_facts(
                self, self._anytime_config(), self._paper, self._first_prompt, card_of_trl, model_name, dataset_name
            )
            write_card(facts, folder)


def _joined(chunks: Sequence[torch.Tensor | None], order: torch.Tensor) -> torch.Tensor | None:
    """Join what TRL's scoring returns for several chunks, with the rows in `order`, or return `None`."""
    return None if chunks[0] is None else torch.cat(cast(list[torch.Tensor], list(chunks)))[order]

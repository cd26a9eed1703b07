"""The [`BRPOTrainer`]: Budget Relative Policy Optimization as thin overrides of TRL's [`~trl.GRPOTrainer`]."""

import math
import textwrap
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import trl
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from packaging.version import Version
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from . import checkpoint
from .adaptive_baseline import AdaptiveBaseline
from .admission import decoding_objection, measured_objection, sharded_objection, structural_objection
from .advantages import Returns, segment_returns, summary_advantages
from .alarms import Alarms
from .attention import enable_tree_attention, forward_packed, plain_attention
from .brpo_config import BRPOConfig
from .brpo_logging import baseline_metrics, completion_rows, reward_metrics, rollout_metrics
from .budgets import live_segments, prior_weights
from .cards.card import CARD, copy_card, write_card
from .cards.facts import card_facts
from .checks.arguments import check_answers, check_arguments
from .checks.batch_arithmetic import most_tokens
from .checks.finding import ERROR
from .checks.run_start import report_start
from .checks.start_checks import context_objection, prompt_findings
from .contract import AnytimeContract, Sampling
from .faults import FaultWatch, memory_advice
from .generation import Generation, PrefixGeneration, RolloutSettings
from .markers import ThinkingMarkers, find_markers, render_prompt
from .preemption import Preemption
from .reward_guard import RewardGuard
from .rewards import AnswerReward, FormatReward, MathReward
from .rollout import Rollout
from .separate_rows import forward_rows
from .trackers import Trackers
from .transformers_generation import TransformersGeneration, sampling_objection
from .tree import PackedRollouts
from .vllm_generation import ColocateGeneration, ServerSampler, check_server

logger = get_logger(__name__)

# TRL's metrics that look at the end of a packed row, where they only meet its last summary
_METRICS_OF_PLAIN_ROWS = (
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
)


@dataclass
class _Batch:
    """
    One generation batch on its way through TRL's `_generate_and_score_completions`: settings, then what is collected.

    N rollouts on this rank, W ranks, M budgets, A summaries, F reward functions.
    """

    budgets: list[int]
    prior: str | list[float]
    num_summaries: int
    num_generations: int
    num_rollouts: int
    num_counted: int  # W·N, less where the last batch of an evaluation is filled up with prompts it has seen
    rollouts: list[Rollout] = field(default_factory=list)  # N
    rewards_per_func: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (W·N, M, A, F)
    rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (W·N, M, A), NaN where none scored it
    extra_logs: dict[str, list] = field(
        default_factory=dict
    )  # from reward functions, one value per rollout and budget
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class _AtTrainBegin(TrainerCallback):
    """Calls the trainer back when model, optimizer and state are ready, before the first step."""

    def __init__(self, action: Callable[[], None]):
        self._action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self._action()


class BRPOTrainer(GRPOTrainer):
    """
    Trainer for Budget Relative Policy Optimization (BRPO), https://huggingface.co/papers/2505.13438.

    Each sampled thinking is cut at several token budgets; at each cut the model summarises its best answer; every
    summary is verified. The thinking is trained for the rewards of all budgets that it can still reach, the summaries
    for their own. A rollout trains as one packed row with tree attention (see `trl_anytime.tree`).

    What changes in [`~trl.GRPOTrainer`]; the rest is inherited:

    - `__init__`: checks, markers, tree attention.
    - `_generate_and_score_completions`: think, cut, summarise (through TRL's `rollout_func` hook), and the advantages.
    - `_calculate_rewards`: reward functions are called once per summary.
    - `prediction_step`: every rollout counts once in an evaluation, however many ranks there are.
    - `_prepare_inputs`: rollouts of like length share a micro-batch.
    - `_get_per_token_logps_and_entropies`, `_compute_loss`: packed rows instead of plain ones.
    - `training_step`: measures the time of the update.
    - `_get_grad_norm`: refuses to step along a gradient that is not finite.
    - `train`, `_save_checkpoint`, `_load_from_checkpoint`, `_get_train_sampler`: a fault on one rank ends all, SIGTERM
      saves, checkpoints are whole and resumed exactly (docs/reliability.md).
    - `log`: sounds the alarms, and gives trackers figures and tables (docs/monitoring.md).
    - `save_model`: writes `anytime_config.json` beside every saved model.
    - `create_model_card`: a card of its own (docs/model_cards.md).

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
            Reasoning model to be trained, see [`~trl.GRPOTrainer`].
        args ([`BRPOConfig`], *optional*):
            Settings. Defaults to those of the paper.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Must have a column `"prompt"` (conversational or text), and what the reward functions need: `"answer"` or
            `"solution"` for the default.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            See [`~trl.GRPOTrainer`]. Defaults to [`~trl_anytime.rewards.MathReward`]. Each is called once per summary:
            the completion is the summary, and the argument `well_formed` says, per summary, whether the thinking was
            ended exactly once.
        **kwargs:
            The other arguments of [`~trl.GRPOTrainer`], by keyword: `eval_dataset`, `processing_class`,
            `reward_processing_classes`, `callbacks`, `optimizers`, `quantization_config`, `peft_config`. `tools`,
            `rollout_func` and `environment_factory` are refused.

    Raises:
        `ValueError`: If settings, prompts, answers or model do not fit the method; the message says what to set.
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
        *,
        reward_funcs: Any = None,
        **kwargs: Any,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = BRPOConfig(f"{model_name.split('/')[-1]}-BRPO")
        check_arguments(args, train_dataset, kwargs)
        reward_funcs = MathReward() if reward_funcs is None else reward_funcs
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        for reward_func in reward_funcs:
            if isinstance(reward_func, AnswerReward):
                train_dataset, kwargs["eval_dataset"] = (
                    check_answers(reward_func, dataset) for dataset in (train_dataset, kwargs.get("eval_dataset"))
                )

        # What is in flight while TRL's methods run around ours: the generation batch, and the rows of a forward pass
        self._batch: _Batch | None = None
        self._packed: PackedRollouts | None = None
        self._rollout_seconds = 0.0
        self._update_seconds = 0.0
        self._adaptive_baseline = AdaptiveBaseline(len(args.budgets)) if args.baseline == "adaptive" else None
        # What `train()` goes on from, if anything
        self._checkpoint: Path | None = None
        self._alarms: Alarms | None = None  # of the main process, once training begins
        # Logs of evaluations before `train()`
        self._evaluated: list[dict[str, Any]] = []

        self._engine_context: int | None = None  # tokens that a prompt and its continuation may come to in vLLM
        if args.use_vllm and args.vllm_mode == "server":
            self._engine_context = check_server(args, model if isinstance(model, str) else model.name_or_path or "")

        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)

        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                "BRPO trains on text: pass a tokenizer as `processing_class`, not a multimodal processor."
            )
        self.rollout_func = self._roll_out
        self.markers = self._find_markers()
        self.reward_funcs = [
            replace(func, answer_bridge=self.markers.answer_bridge)
            if isinstance(func, AnswerReward | FormatReward)
            else func
            for func in self.reward_funcs
        ]
        if self.use_vllm and self.vllm_mode == "colocate":
            self._engine_context = self.vllm_generation.llm.llm_engine.model_config.max_model_len
        longest_prompts = self._longest_prompts()
        self._check_context(longest_prompts)
        packed, _ = most_tokens(args, self.markers.max_bridge_length)
        self.max_completion_length = args.max_completion_length or packed
        self._longest_prompt = max(map(len, longest_prompts))  # tokens

        self._forward = self._choose_forward()
        self._generation = self._choose_generation()

        self._preemption = Preemption(self.accelerator, enabled=args.save_strategy != "no")
        self.add_callback(self._preemption)
        self.add_callback(_AtTrainBegin(self._at_train_begin))
        self._trackers = Trackers(cast(list[str], args.report_to), self.callback_handler)

    # Set-up

    @cached_property
    def _first_prompt(self) -> Any:
        """Read once: a stream may have to be opened for it."""
        example = next(iter(self.train_dataset), None)
        if example is None:
            raise ValueError("`train_dataset` is empty.")
        return example["prompt"]

    def _find_markers(self) -> ThinkingMarkers:
        """Markers and bridges, from the first prompt as the model will see it; other rows have to agree with it."""
        prompt, generation_prompt = render_prompt(self._tokenizer, self._first_prompt, self.chat_template_kwargs)
        markers = find_markers(
            self._tokenizer,
            prompt,
            generation_prompt,
            think_end=self.args.think_end,
            truncation_bridge=self.args.truncation_bridge,
            answer_bridge=self.args.answer_bridge,
            conversation=self._first_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        eval_data = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        datasets = {"train_dataset": self.train_dataset, **eval_data}
        for finding in prompt_findings(self._tokenizer, datasets, self.chat_template_kwargs, markers):
            if finding.level == ERROR:
                raise ValueError(f"{finding.found} {finding.change}")
            logger.warning(str(finding))
        return markers

    def _longest_prompts(self, count: int = 16) -> list[list[int]]:
        """The longest prompts of the training data as token ids; of a stream, the first."""
        if isinstance(self.train_dataset, IterableDataset):
            prompts = [example["prompt"] for example in self.train_dataset.take(1)]
        else:
            prompts = sorted(self.train_dataset["prompt"], key=lambda prompt: len(str(prompt)))[-count:]
        return self._tokenize_prompts(prompts)[0]

    def _check_context(self, prompt_ids: Sequence[Sequence[int]]) -> None:
        in_model = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(ids) for ids in prompt_ids)
        objection = context_objection(longest, self.args, self.markers, in_model, self._engine_context)
        if objection is not None:
            raise ValueError(" ".join(objection))

    def _choose_forward(self) -> Callable[..., Any]:
        """The forward pass of packed rollouts: tree attention where the model allows it, else separate rows."""
        mode = self.args.tree_attention
        if mode == "rows":
            return forward_rows
        model = self.accelerator.unwrap_model(self.model)
        base_model = model.get_base_model() if is_peft_model(model) else model
        objection = structural_objection(base_model)
        if objection is None:
            plain_attention = base_model.config._attn_implementation
            enable_tree_attention(base_model)
            # Sharded parameters are not at hand before training starts: `_admit_sharded` measures then
            objection = None if self._is_sharded else measured_objection(model)
            if objection is None:
                if self.ref_model is not None:
                    enable_tree_attention(self.accelerator.unwrap_model(self.ref_model))
                return forward_packed
            base_model.set_attn_implementation(plain_attention)

        message = f"{type(base_model).__name__} cannot train on packed rollouts: {objection}."
        if mode == "tree":
            raise ValueError(f"{message} Set `tree_attention='auto'` to train on separate rows instead.")
        packed, separate = most_tokens(self.args, self.markers.max_bridge_length)
        logger.warning(
            f"{message} It trains on separate rows, one for each summary, which forward up to {separate / packed:.1f} "
            "times as many tokens."
        )
        return forward_rows

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or getattr(self.args.deepspeed_plugin, "zero_stage", 0) == 3

    def _admit_sharded(self) -> None:
        """Collective: compare tree attention with separate rows on a sharded model, once it is ready to train."""
        if self._is_sharded and self._forward is forward_packed:
            model = self.accelerator.unwrap_model(self.model)
            half_precision = self.args.bf16 or self.args.fp16
            objection = sharded_objection(cast(torch.nn.Module, self.model_wrapped), model, half_precision)
            if objection is not None:
                raise ValueError(
                    f"{type(model).__name__} cannot train on packed rollouts: {objection}. Set "
                    "`tree_attention='rows'` to train on separate rows instead."
                )

    def _choose_generation(self) -> Generation:
        """The backend of the two generation phases."""
        if self.use_vllm and self.vllm_mode == "colocate":
            return ColocateGeneration(self.vllm_generation, overlap=self.args.vllm_overlap)
        if self.use_vllm:
            return PrefixGeneration(ServerSampler(self._sample, self.vllm_generation))
        if self.use_transformers_continuous_batching:
            return PrefixGeneration(self._sample)
        objection: str | None
        if self.is_fsdp_enabled or (self._is_sharded and not self.args.ds3_gather_for_generation):
            # Every rank must forward equally often; `generate()` sees to that by itself
            objection = "the model is sharded"
        elif self._forward is forward_rows:
            objection = "the model has no tree attention"
        else:
            model = self.accelerator.unwrap_model(self.model)
            objection = sampling_objection(model, self.generation_config) or decoding_objection(model)
        if objection is None:
            return TransformersGeneration(
                self._hold_model, self.generation_config, self._tokenizer.pad_token_id, self.args.max_cached_tokens
            )
        logger.warning(
            f"Summaries are generated each from a prompt of its own, which computes the thinking once more for each: "
            f"decoding them on top of the thinking's cache is not possible, because {objection}."
        )
        return PrefixGeneration(self._sample)

    # Rollout: think, cut, bridge, summarise

    def _roll_out(self, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func` hook: one packed rollout for each prompt of this rank."""
        batch = self._batch
        assert batch is not None
        prompt_ids = self._tokenize_prompts(prompts)[0]
        self._check_context(prompt_ids)

        settings = RolloutSettings(
            batch.budgets,
            batch.num_summaries,
            self.args.max_summary_length,
            self.markers,
            self.eos_token_ids,
            batch.num_generations,
        )
        batch.rollouts = self._generation.roll_out(prompt_ids, settings)
        batch.seconds |= self._generation.seconds
        self._packed = PackedRollouts.pack(
            [rollout.thinking.token_ids for rollout in batch.rollouts],
            [rollout.cuts for rollout in batch.rollouts],
            [rollout.bridges for rollout in batch.rollouts],
            [rollout.summaries for rollout in batch.rollouts],
        )
        logprobs = [rollout.packed_logprobs() for rollout in batch.rollouts]
        lengths = self._packed.lengths.tolist()
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [ids[:n].tolist() for ids, n in zip(self._packed.token_ids, lengths, strict=True)],
            "env_mask": [mask[:n].int().tolist() for mask, n in zip(self._packed.trained(), lengths, strict=True)],
            "logprobs": None if logprobs[0] is None else logprobs,
        }

    def _sample(
        self, prompt_ids: list[list[int]], max_new_tokens: int, stop_token_ids: list[int], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continuations by whichever of TRL's backends is set, see [`~trl_anytime.generation.Sampler`]."""
        with self._sampling(max_new_tokens, stop_token_ids):
            if self.use_vllm:
                return self._generate_single_turn(prompt_ids, None, {}, num_generations)
            if self.use_transformers_continuous_batching:
                with plain_attention(self.accelerator.unwrap_model(self.model)):
                    return self._generate_single_turn(prompt_ids, None, {}, num_generations)
            # `generate()` holds the whole batch in memory: no more rows at a time than there are rollouts
            assert self._batch is not None
            num_rows = self._batch.num_rollouts
            sampled = []
            for start in range(0, len(prompt_ids), num_rows):
                rows = prompt_ids[start : start + num_rows]
                sampled += self._generate_single_turn(rows, None, {}, num_generations)[0]
            return sampled, None

    @contextmanager
    def _hold_model(self) -> Iterator[PreTrainedModel]:
        """The model as TRL unwraps it to generate, without dropout."""
        checkpointing = {}
        if Version(trl.__version__) >= Version("1.16"):  # 1.15 forgets how checkpointing was switched on
            checkpointing = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, self.args.ds3_gather_for_generation, **cast(Any, checkpointing)
        ) as model:
            training = model.training
            model.eval()
            try:
                yield model
            finally:
                model.train(training)

    @contextmanager
    def _sampling(self, max_new_tokens: int, stop_token_ids: list[int]) -> Iterator[None]:
        """Sampling settings of one generation phase, for all of TRL's backends."""
        eos_token_ids, self.eos_token_ids = self.eos_token_ids, stop_token_ids
        if self.use_vllm:
            engine = self.vllm_generation
            saved = engine.max_completion_length, engine.generation_kwargs
            engine.max_completion_length = max_new_tokens
            engine.generation_kwargs = {**engine.generation_kwargs, "stop_token_ids": stop_token_ids}
        else:
            saved = self.generation_config.max_new_tokens, self.generation_config.eos_token_id
            self.generation_config.max_new_tokens = max_new_tokens
            self.generation_config.eos_token_id = stop_token_ids
        try:
            yield
        finally:
            self.eos_token_ids = eos_token_ids
            if self.use_vllm:
                engine.max_completion_length, engine.generation_kwargs = saved
            else:
                self.generation_config.max_new_tokens, self.generation_config.eos_token_id = saved

    # Rewards and advantages

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        batch = self._batch
        assert batch is not None
        num_budgets, num_summaries = len(batch.budgets), batch.num_summaries
        per_rollout = num_budgets * num_summaries
        summary_ids = [ids for rollout in batch.rollouts for of_budget in rollout.summaries for ids in of_budget]
        well_formed = [
            formed for rollout in batch.rollouts for row in rollout.well_formed(self.markers) for formed in row
        ]
        texts = self._tokenizer.batch_decode(summary_ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        rows = [{**inputs[i // per_rollout], "well_formed": formed} for i, formed in enumerate(well_formed)]
        prompts = [prompts[i // per_rollout] for i in range(len(rows))]
        guard, reward_funcs = RewardGuard(self.state.global_step), self.reward_funcs
        self.reward_funcs = [
            guard.guard(func, name) for func, name in zip(reward_funcs, self.reward_func_names, strict=True)
        ]
        try:
            with self._timed("grading"):
                rewards_per_func = super()._calculate_rewards(rows, prompts, texts, summary_ids)
        finally:
            self.reward_funcs = reward_funcs
        guard.raise_on_all_ranks()
        guard.check_models(reward_funcs, self.reward_func_names, rewards_per_func, prompts)

        # TRL's completions table gets one row per budget, for which the first summary stands
        batch.extra_logs = {name: values[::num_summaries] for name, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()
        batch.rewards_per_func = rewards_per_func.view(-1, num_budgets, num_summaries, len(reward_funcs))
        unscored = batch.rewards_per_func.isnan().all(dim=-1)
        weighted = batch.rewards_per_func * self.reward_weights.to(rewards_per_func)
        batch.rewards = weighted.nansum(dim=-1).masked_fill(unscored, torch.nan)
        # What TRL takes for the reward of a rollout, and logs: the anytime objective Σ_j P_j r̄_j, per function
        weights_M = prior_weights(batch.prior, batch.budgets).to(rewards_per_func)
        mean_NMF = batch.rewards_per_func.nanmean(dim=2)
        objective_NF = torch.where(weights_M[:, None] > 0, weights_M[:, None] * mean_NMF, 0.0).sum(dim=1)
        objective_NF[batch.num_counted :] = torch.nan
        return objective_NF

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        start = time.perf_counter()
        self._batch = batch = self._new_batch(mode, len(inputs))
        try:
            with memory_advice("rollouts"):
                output = super()._generate_and_score_completions(inputs)
            packed = self._packed_rows(output["completion_ids"])
        finally:
            self._batch = self._packed = None

        # A group may be split across ranks: advantages are computed for all rollouts, and those of this rank kept
        num_budgets = len(batch.budgets)
        grouped = (-1, batch.num_generations, num_budgets)
        rewards_PGMA = batch.rewards.view(*grouped, batch.num_summaries)
        cuts_PGM = self.accelerator.gather(packed.cuts).view(grouped)
        segments = segment_returns(rewards_PGMA, batch.budgets, batch.prior, self.args.progress_decay)
        learned = self._learned_baselines(mode, rewards_PGMA, segments, live_segments(cuts_PGM, batch.budgets))
        baseline_PGM = learned["adaptive"] if learned else segments.baseline(self.args.baseline)
        thinking_PGM = segments.returns - baseline_PGM
        summary_PGMA = summary_advantages(rewards_PGMA, cuts_PGM, self.args.summary_policy)
        # Unknown where summaries could not be scored: no signal, counted in `anytime/unscored_ratio`
        thinking = thinking_PGM.reshape(-1, num_budgets).nan_to_num()
        summary = summary_PGMA.reshape(-1, num_budgets, batch.num_summaries).nan_to_num()
        first = self.accelerator.process_index * len(inputs)
        local = slice(first, first + len(inputs))
        output["advantages"] = packed.token_advantages(thinking[local], summary[local], batch.budgets)
        output["cuts"], output["spans"] = packed.cuts, packed.spans

        for name in _METRICS_OF_PLAIN_ROWS:
            self._metrics[mode].pop(name)
        counted = slice(batch.num_counted)
        groups = slice(batch.num_counted // batch.num_generations)
        if batch.num_counted < len(batch.rewards):
            self._leave_out(output, first, counted)
            segments = segment_returns(rewards_PGMA[groups], batch.budgets, batch.prior, self.args.progress_decay)
            learned = {name: values[groups] for name, values in learned.items()}
        metrics = {
            **reward_metrics(batch.rewards[counted], batch.budgets),
            **rollout_metrics(
                batch.rollouts,
                output["advantages"],
                batch.budgets,
                self.markers,
                self.eos_token_ids,
                self.args.max_summary_length,
                lambda rows: self.accelerator.gather(rows)[counted],
            ),
            **baseline_metrics(segments, cuts_PGM[groups], batch.budgets, learned),
            **{f"time/{phase}": [batch.seconds[phase]] for phase in ("thinking", "summarising", "grading", "scoring")},
        }
        for name, values in metrics.items():
            self._metrics[mode][name].extend(values)
        if self.log_completions:
            self._log_table(batch, [x["prompt"] for x in inputs], thinking, summary)
        if mode == "train" and self._alarms is not None:
            self._alarms.rollouts = batch.rollouts
        self._rollout_seconds = time.perf_counter() - start
        return output

    def _leave_out(self, output: dict[str, Any], first: int, counted: slice) -> None:
        """Take rollouts that fill up an evaluation's last batch out of its loss and of what TRL has logged."""
        lengths = self.accelerator.gather((output["tool_mask"] * output["completion_mask"]).sum(dim=1))
        metrics, kept = self._metrics["eval"], lengths[counted].float()
        for name, value in (("mean", kept.mean()), ("min", kept.min()), ("max", kept.max())):
            metrics[f"completions/{name}_length"][-1] = value.item()
        metrics["frac_reward_zero_std"][-1] *= len(lengths) / len(kept)  # theirs was NaN, which is not zero
        output["tool_mask"][max(0, len(kept) - first) :] = 0

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.accelerator.gradient_state.end_of_dataloader:
            # transformers keeps the first few ranks' losses of the last batch: give each the loss of all
            num_rollouts = len(inputs)
            share = num_rollouts / self._num_counted("eval", num_rollouts)
            loss = self.accelerator.reduce(loss, reduction="sum") * share
        return (loss, *rest)

    def _num_counted(self, mode: str, num_rollouts: int) -> int:
        """Rollouts of all ranks, without those that fill up the last batch of an evaluation; these come last."""
        of_all = num_rollouts * self.accelerator.num_processes
        state = self.accelerator.gradient_state
        if mode == "train" or not state.end_of_dataloader:
            return of_all
        loader = state.active_dataloader
        if not hasattr(loader.dataset, "__len__"):  # a stream does not know where it began anew
            return of_all
        return min(of_all, len(loader.dataset) * self.num_generations_eval % loader.total_batch_size or of_all)

    def _learned_baselines(
        self, mode: str, rewards: torch.Tensor, segments: Returns, live: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The adaptive baseline of a batch, from which it then learns; none if not asked for."""
        if self._adaptive_baseline is None:
            return {}
        if mode == "eval":  # other budgets, and no use for advantages
            return {"adaptive": segments.brpo}
        predicted = self._adaptive_baseline.predict(rewards, segments)
        self._adaptive_baseline.update(rewards, segments, live)
        return {"adaptive": predicted}

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:  # evaluation, or no new rollouts
            return inputs
        # Rollouts of like length share a micro-batch, so that little padding is computed. They move only within what
        # one optimiser step accumulates: its gradient stays the same for every loss that weighs rollouts alike.
        steps, accumulated = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if steps % accumulated == 0 or accumulated % steps == 0:
            window = min(steps, accumulated)
            for first in range(0, steps, window):
                part = slice(first, first + window)
                self._buffered_inputs[part] = _sorted_by_length(self._buffered_inputs[part])
        return self._buffered_inputs[self._step % steps]

    def _new_batch(self, mode: str, num_rollouts: int) -> _Batch:
        args, num_counted = self.args, self._num_counted(mode, num_rollouts)
        if mode == "train":
            return _Batch(
                args.budgets, args.prior, args.num_summaries, self.num_generations, num_rollouts, num_counted
            )
        # Evaluation estimates the plain curve: every budget counts alike, one summary each
        budgets = args.eval_budgets or args.budgets
        return _Batch(budgets, "uniform", 1, self.num_generations_eval, num_rollouts, num_counted)

    # Packed rows in TRL's forward passes

    def _packed_rows(self, completion_ids: torch.Tensor) -> PackedRollouts:
        """The rollouts in flight, as TRL has padded them and on the device where it has put them."""
        assert self._packed is not None
        device = completion_ids.device
        return PackedRollouts(completion_ids, self._packed.cuts.to(device), self._packed.spans.to(device))

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        packed = self._packed_rows(input_ids[:, -logits_to_keep:])
        first = 0

        def packed_model(input_ids, **model_inputs):  # TRL calls it for one chunk of rows after the other
            nonlocal first
            rows = packed[first : first + len(input_ids)]
            first += len(input_ids)
            return self._forward(model, rows, input_ids, **model_inputs)

        with self._timed("scoring"):
            output = super()._get_per_token_logps_and_entropies(
                packed_model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )
            self._check_finite("log-probabilities", output[0], input_ids[:, :-logits_to_keep])
        return output

    def _compute_loss(self, model, inputs):
        self._packed = PackedRollouts(inputs["completion_ids"], inputs["cuts"], inputs["spans"])
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._packed = None
        self._check_finite("loss", loss.expand(len(inputs["prompt_ids"]), 1), inputs["prompt_ids"])
        return loss

    def _check_finite(self, name: str, values: torch.Tensor, prompt_ids: torch.Tensor) -> None:
        """`values` has one row per prompt; both ranks of `prompt_ids` may be padded."""
        if self.args.on_nonfinite == "skip" or torch.isfinite(values).all():
            return
        rows = (~torch.isfinite(values)).any(dim=1)
        texts = [self._prompt_text(ids) for ids in prompt_ids[rows]]
        raise FloatingPointError(
            f"Step {self.state.global_step}: {name} not finite for {len(texts)} of {len(rows)} rollouts of a "
            f"micro-batch, with the prompts {list(dict.fromkeys(texts))}. `on_nonfinite='skip'` leaves such steps out."
        )

    def _prompt_text(self, ids: torch.Tensor) -> str:
        text = self._tokenizer.decode(ids[ids != self._tokenizer.pad_token_id])
        return text if len(text) <= 200 else f"{text[:100]} [...] {text[-100:]}"

    def training_step(self, model, inputs, num_items_in_batch=None):
        start = time.perf_counter()
        self._rollout_seconds = 0.0
        with memory_advice("update"):
            output = super().training_step(model, inputs, num_items_in_batch)
        self._update_seconds += time.perf_counter() - start - self._rollout_seconds
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["time/updating"].append(self._update_seconds)
            self._update_seconds = 0.0
        return output

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 an overflow is part of scaling the loss, which leaves the step out by itself
        if grad_norm is None or self.args.fp16:
            return grad_norm
        finite = math.isfinite(grad_norm)
        if self.args.on_nonfinite == "skip":
            self._metrics["train"]["nonfinite/skipped_ratio"].append(float(not finite))
            if not finite:  # the norm is the same on all ranks: all of them leave the step out
                model.zero_grad()
        elif not finite:
            raise FloatingPointError(
                f"Step {self.state.global_step}: the norm of the gradient is {float(grad_norm)}, while loss and "
                "log-probabilities were finite. `on_nonfinite='skip'` leaves such steps out."
            )
        return grad_norm

    # Faults, checkpoints and restarts

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        # transformers starts a log of its own: what was evaluated before the first step is the card's curve before
        self._evaluated = [] if self.state.global_step > 0 else self.state.log_history
        with FaultWatch(), self._preemption:
            self._checkpoint = self._find_checkpoint(resume_from_checkpoint)
            output = super().train(
                resume_from_checkpoint=None if self._checkpoint is None else str(self._checkpoint),
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
        if self._preemption.stopped:
            # What a script does after training is meant for a trained model, and may take longer than there is time
            raise SystemExit(0)
        return output

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The checkpoint to resume from, whole and with settings that fit. The main process looks for all."""
        if not resume_from_checkpoint:
            return None
        folder, objection = Path(), None
        warnings: list[str] = []
        if self.accelerator.is_main_process:
            try:
                if resume_from_checkpoint is True:
                    folder, warnings = checkpoint.last_whole(Path(str(self.args.output_dir)))
                else:
                    folder = Path(resume_from_checkpoint)
                saved = checkpoint.manifest(folder)["settings"]
                changed = checkpoint.compare_settings(saved, self._settings(), folder)
                if changed:
                    warnings.append(f"Not as in the run that saved {folder}: {'; '.join(changed)}.")
            except ValueError as error:
                objection = str(error)
        folder, warnings, objection = broadcast_object_list([folder, warnings, objection])
        if objection is not None:
            raise ValueError(objection)
        for warning in warnings:
            logger.warning(warning)
        return folder

    def _settings(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        frozen = model if is_peft_model(model) else self.ref_model
        if self._is_sharded:
            frozen = None  # its weights are not at hand
        return checkpoint.settings_of(
            self.args,
            self.markers,
            model,
            None if frozen is None else self.accelerator.unwrap_model(frozen),
            None if isinstance(self.train_dataset, IterableDataset) else len(self.train_dataset),
            self._rollouts_in_use,
        )

    @property
    def _rollouts_in_use(self) -> bool:
        return self._step % checkpoint.generate_every(self.args) != 0

    def _save_checkpoint(self, model, trial):
        args, run_dir = self.args, Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if args.should_save:
            checkpoint.begin(folder)
        self.accelerator.wait_for_everyone()
        # No older one is deleted, and nothing is pushed, before this one is whole
        save_total_limit, args.save_total_limit = args.save_total_limit, None
        push_to_hub, args.push_to_hub = args.push_to_hub, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, args.push_to_hub = save_total_limit, push_to_hub
        if self.is_world_process_zero():
            copy_card(Path(str(args.output_dir)), folder)
        if not args.save_only_model:
            checkpoint.save_rank_state(folder, args.process_index, self._rank_state())
        self.accelerator.wait_for_everyone()
        if args.should_save:
            torch.save(args, folder / TRAINING_ARGS_NAME)  # has been saved without its limit
            checkpoint.finish(folder, self._settings())
        if push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            if save_total_limit is not None:
                checkpoint.remove_unfinished(run_dir)
            rotate_checkpoints(str(run_dir), save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _rank_state(self) -> dict[str, Any]:
        """What TRL and transformers do not save: rollouts in use, and sums that are not logged yet."""
        return {
            # Between generation batches the count may start anew, and must if the next ones are dealt out otherwise
            "step": self._step if self._rollouts_in_use else 0,
            "buffered_inputs": self._buffered_inputs if self._rollouts_in_use else None,
            "metrics": checkpoint.to_plain(self._metrics["train"]),
            "logs": checkpoint.to_plain(self._logs) if self.log_completions else None,
            "loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            "adaptive_baseline": None if self._adaptive_baseline is None else self._adaptive_baseline.state_dict(),
            "alarms": None if self._alarms is None else self._alarms.state_dict(),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT loads adapters in float32, also where TRL trains them in bfloat16 (QLoRA)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if self._checkpoint is not None:
            # Each epoch draws its order from the sampler's one generator: go past those of the epochs already done
            state = TrainerState.load_from_json(str(self._checkpoint / TRAINER_STATE_NAME))
            for _ in range(int(state.epoch)):
                next(iter(sampler))
        return sampler

    def _at_train_begin(self) -> None:
        if self.accelerator.is_main_process:
            report_start(self, self._longest_prompt)
        self._admit_sharded()
        if self.args.alarms and self.accelerator.is_main_process:
            self._alarms = Alarms(self._tokenizer)
        if self._checkpoint is None:
            self.state.log_history[:0] = self._evaluated
            return
        if self._adaptive_baseline is not None:  # the same on all ranks, and with other ranks than at the time
            state = checkpoint.load_rank_state(self._checkpoint, 0, torch.device("cpu"))
            self._adaptive_baseline.load_state_dict(state["adaptive_baseline"])
        if not checkpoint.has_rank_state(self._checkpoint, self.args.world_size):
            return  # other ranks than at the time, and no rollouts in use
        state = checkpoint.load_rank_state(self._checkpoint, self.args.process_index, self.args.device)
        self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        self._metrics["train"].update(state["metrics"])
        if self.log_completions and state["logs"] is not None:
            self._logs.update(checkpoint.to_logs(state["logs"]))
        if self._alarms is not None and state["alarms"] is not None:
            self._alarms.load_state_dict(state["alarms"])
        self._tr_loss += state["loss"]
        self._globalstep_last_logged = state["last_logged"]

    # Logging

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if self._alarms is not None:
            for warning in self._alarms.update(self.state.global_step, logs):
                logger.warning(warning)
        if self.accelerator.is_main_process:
            self._trackers.update(logs, self.state, self._logs if self.log_completions else None)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to the generation batch in flight, if there is one."""
        start = time.perf_counter()
        yield
        if self._batch is not None:
            self._batch.seconds[phase] += time.perf_counter() - start

    def _log_table(self, batch: _Batch, prompts: list, thinking: torch.Tensor, summary: torch.Tensor) -> None:
        """Replace TRL's rows, which hold packed ids, by one row per rollout and budget with its first summary."""
        rows = gather_object(completion_rows(prompts, batch.rollouts, batch.budgets, self._tokenizer))
        extra = {name: deque(row[name] for row in rows) for name in ("budget", "thinking")}
        extra["thinking_advantage"] = deque(thinking.flatten().tolist())
        for name in sorted(set(gather_object(list(batch.extra_logs)))):  # the same order on all ranks
            local = batch.extra_logs.get(name, [None] * (len(rows) // self.accelerator.num_processes))
            extra[name] = deque(gather_object(local))
        rewards = batch.rewards_per_func[:, :, 0].flatten(0, 1).T.tolist()
        self._logs["prompt"] = deque(row["prompt"] for row in rows)
        self._logs["completion"] = deque(row["completion"] for row in rows)
        self._logs["rewards"] = defaultdict(deque, zip(self.reward_func_names, map(deque, rewards), strict=True))
        self._logs["advantages"] = deque(summary[:, :, 0].flatten().tolist())
        self._logs["extra"] = defaultdict(deque, extra)

    # Saving

    def _contract(self) -> AnytimeContract:
        """What is needed to use the model as it was trained."""
        args = self.args
        return AnytimeContract(
            markers=self.markers,
            budgets=args.budgets,
            prior=prior_weights(args.prior, args.budgets).tolist(),
            max_summary_length=args.max_summary_length,
            sampling=Sampling(
                args.temperature, args.top_p, args.top_k or 0, args.min_p or 0.0, args.repetition_penalty
            ),
            eos_token_ids=self.eos_token_ids,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            # First, because saving may push the folder to the Hub; and beside the last model too, because what is
            # pushed during training is that folder
            for folder in {output_dir or self.args.output_dir, self.args.output_dir}:
                self._contract().save(str(folder))
        super().save_model(output_dir, _internal_call)
        # A checkpoint and a push have cards of their own; this one goes over that of PEFT, which names local folders
        if not _internal_call:
            self.create_model_card()
            if self.is_world_process_zero():
                copy_card(Path(str(self.args.output_dir)), Path(output_dir or str(self.args.output_dir)))

    # With TRL's arguments, which are not those of transformers
    def create_model_card(self, model_name=None, dataset_name=None, tags=None):  # type: ignore[override]
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            card_of_trl = ModelCard.load(folder / CARD)
            facts = card_facts(
                self, self._contract(), self._paper, self._first_prompt, card_of_trl, model_name, dataset_name
            )
            write_card(facts, folder)


def _sorted_by_length(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of several batches dealt out anew, the longest first: a lack of memory shows at once."""
    rows = {
        name: torch.cat([batch[name] for batch in batches])
        for name, values in batches[0].items()
        if isinstance(values, torch.Tensor) and values.dim() > 0
    }
    order = (rows["prompt_mask"].sum(dim=1) + rows["completion_mask"].sum(dim=1)).argsort(descending=True, stable=True)
    dealt = {name: values[order].chunk(len(batches)) for name, values in rows.items()}
    return [{**batch, **{name: dealt[name][i] for name in rows}} for i, batch in enumerate(batches)]

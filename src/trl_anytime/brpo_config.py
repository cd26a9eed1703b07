"""Settings of [`BRPOTrainer`]: additions to TRL's [`~trl.GRPOConfig`], and settings with another default."""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from trl import GRPOConfig

from .method.advantages import BASELINES as COMPUTED_BASELINES
from .method.advantages import OBJECTIVE, SUMMARY_POLICIES, summary_weights
from .method.budgets import PAPER_BUDGETS, PAPER_SUMMARY_LENGTH, check_budgets, prior_weights
from .method.likelihood import SUMMARY_REWARDS
from .outside.host_warnings import without_host_warnings

if TYPE_CHECKING:
    Prior = str | list[float]
    Weight = float | str
else:
    Prior = str  # HfArgumentParser reads `str | list[float]` as a list of floats, and `--prior linear` would fail
    Weight = str

# Inherited settings that do not apply to packed rollouts: (name, the only value allowed, reason, what to do instead)
_FIXED_SETTINGS = (
    (
        "torch_compile",
        False,
        "its rows have another shape in every micro-batch, and each shape would be compiled anew",
        "leave it off",
    ),
    (
        "enable_jit_checkpoint",
        False,
        "BRPOTrainer itself saves on SIGTERM, on all ranks at the same step",
        "remove it",
    ),
    (
        "scale_rewards",
        "none",
        "BRPO's advantages are not divided by a standard deviation",
        "remove it, or train with TRL's GRPOTrainer",
    ),
    (
        "multi_objective_aggregation",
        "sum_then_normalize",
        "rewards are summed for each summary before the advantages are computed",
        "use `reward_weights` to balance the reward functions",
    ),
    (
        "importance_sampling_level",
        "token",
        "a packed rollout is a tree, and a sequence-level ratio is not defined over a tree",
        "use 'token'",
    ),
    (
        "mask_truncated_completions",
        False,
        "BRPO learns from truncated traces, and clipped summaries have their own reward",
        "raise `max_summary_length` if too many summaries are clipped (`summary/clipped_ratio`)",
    ),
    (
        "off_policy_mask_threshold",
        None,
        "it drops whole sequences by a sequence-level statistic, but a packed rollout is a tree",
        "use the token-level `vllm_importance_sampling_mode`",
    ),
    (
        "vllm_structured_outputs_regex",
        None,
        "it would constrain the thinking as well as the summaries",
        "set the form of the answer in `answer_bridge` and in the reward",
    ),
)
BASELINES = (*COMPUTED_BASELINES, "adaptive")
PACKING = ("auto", "tree", "rows")
ON_NONFINITE = ("raise", "skip")
CARD_METRICS = ("accuracy", "mean_reward")
_SEQUENCE_LOSSES = ("luspo", "vespo")
# Keys of `generation_kwargs` that the two generation phases set themselves
_OWN_GENERATION_KEYS = (
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "max_tokens",
    "n",
    "output_kind",
    "stop_token_ids",
    "structured_outputs",  # refused for the same reason as `vllm_structured_outputs_regex`
)


def check_on_nonfinite(value: str, deepspeed_plugin: Any) -> None:
    """
    Refuse a value of `on_nonfinite` that is unknown or cannot be honoured.

    Args:
        value (`str`):
            The setting.
        deepspeed_plugin (`Any`, *optional*):
            DeepSpeed's settings in accelerate, if DeepSpeed is in use.

    Raises:
        `ValueError`: If the value is refused. The message says what to set instead.
    """
    if value not in ON_NONFINITE:
        raise ValueError(f"`on_nonfinite` must be one of {ON_NONFINITE}, got {value!r}.")
    if value == "skip" and deepspeed_plugin is not None:
        raise ValueError(
            "`on_nonfinite='skip'` does not work with DeepSpeed, which takes optimiser steps itself. Set "
            "`on_nonfinite='raise'`."
        )


@dataclass
class BRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`BRPOTrainer`].

    This class holds only the settings that Budget Relative Policy Optimization adds to [`~trl.GRPOConfig`], or for
    which it has another default. The defaults are those of the paper (https://huggingface.co/papers/2505.13438). All
    other settings are inherited. Among them, `num_generations` (8), `learning_rate` (1e-6), `temperature` (1.0),
    `beta` (0) and `epsilon` (0.2) have the paper's values as defaults in TRL.

    Parameters:
        > Parameters that control budgets and summaries

        budgets (`list[int]`, *optional*, defaults to `[2000, 4000, 6000, 8000]`):
            Thinking budgets b_1 < … < b_m in tokens. Thinking is sampled up to the last one. The first may be 0: the
            answer without thinking.
        prior (`str`, *optional*, defaults to `"uniform"`):
            Weight of each budget in the objective: `"uniform"`, `"linear"` (proportional to the budget) or `"base"`
            (only the last budget counts). In Python and YAML also a list of one non-negative weight per budget.
        num_summaries (`int`, *optional*, defaults to `4`):
            Number of summaries A per trace and budget during training. Evaluation samples one.
        max_summary_length (`int`, *optional*, defaults to `118`):
            Most tokens sampled for one summary.
        summary_reward (`str`, *optional*):
            Reward at each budget without sampled summaries: the policy's own `"likelihood"` of the reference answer
            behind the bridge, its `"log_likelihood"`, or `"mean_log_likelihood"` per token. Needs one answer per row
            in `answer` or `solution`. No reward function runs in training. `num_summaries` becomes 1, for the one
            branch per budget that holds the answer. `summary_weight` weighs the gradient by the answer's tokens: set
            `"objective"` for the objective's own, 0 to train the thinking alone. Not in the paper.
        reference_template (`str`, *optional*, defaults to `"\boxed{{answer}}"`):
            Text of a reference answer behind `answer_bridge`, in which `{answer}` stands for the column's value. Used
            by `summary_reward`.
        eval_budgets (`list[int]`, *optional*):
            Budgets of `trainer.evaluate()` in tokens. Defaults to `budgets`.

        > Parameters that control the advantages

        baseline (`str`, *optional*, defaults to `"brpo"`):
            Baseline of the thinking's advantage: `"brpo"` (V), `"v1"` (progress so far), `"v2"` (the group's mean, as
            in GRPO), `"none"` or `"adaptive"`. The last is not in the paper. It is a least-squares prediction, fitted
            on earlier generation batches, from the rewards at earlier budgets and the mean of the rest of the group.
        progress_decay (`float`, *optional*, defaults to `0.5`):
            λ in (0, 1]. The smaller it is, the faster the rewards of earlier budgets lose weight in V1.
        summary_policy (`str`, *optional*, defaults to `"decoupled"`):
            `"decoupled"` trains every summary with its own advantage. `"final"` trains only the last one of each
            trace.
        summary_weight (`float` or `str`, *optional*, defaults to `1.0`):
            Factor of the summaries' advantages. 1 is the value of the released implementation. `"objective"` gives
            each summary its weight in the objective, P_j / A. Then thinking and summaries follow the gradient of the
            same J.

        > Parameters that control how a rollout is computed

        packing (`str`, *optional*, defaults to `"auto"`):
            `"tree"` computes a rollout as one packed row with tree attention. `"rows"` computes it as one row per
            summary, which costs several times as much and gives the same result. `"auto"` takes tree attention if the
            model passes a check of its structure and a comparison on a small example. Otherwise it takes separate
            rows, and a warning says why.
        prune (`bool`, *optional*, defaults to `True`):
            Whether the update leaves out summaries and rollouts without advantage. The gradient stays the same.
            Nothing is left out where such tokens count: with a KL term (`beta`), an entropy bonus,
            `top_entropy_quantile` below 1, or a loss that balances experts. Metrics of the update (entropy, clip
            ratios) cover the tokens that are left. Their share of all packed tokens is 1 - `anytime/pruned_ratio`.
        max_cached_tokens (`int`, *optional*):
            Most tokens whose keys and values a rank holds at a time while it generates with transformers. Larger
            batches are split into parts that run one after the other. There is no limit if not set.
        vllm_overlap (`bool`, *optional*, defaults to `True`):
            Whether vLLM in colocate mode samples the summaries at a budget as soon as a trace has passed it, while
            other traces still think. `False` waits for the last trace, which takes more steps of the engine.

        > Parameters that control what happens when something is wrong

        on_nonfinite (`str`, *optional*, defaults to `"raise"`):
            What to do when log-probabilities, loss or gradient are NaN or infinite. `"raise"` stops and shows the step
            and the prompts. `"skip"` leaves out the optimiser step on all ranks and counts it in the metric
            `nonfinite/skipped_ratio`. Rewards that are not finite always stop the run.
        alarms (`bool`, *optional*, defaults to `True`):
            Whether to warn, once each, when logged metrics show that training goes wrong: no rewards, nothing to learn
            from, clipped summaries and the like (docs/monitoring.md).

        > Parameters that control what is spliced into a trace

        think_end (`str`, *optional*):
            Text that ends the thinking. If not set, it is found from the chat template and the vocabulary.
        truncation_bridge (`str`, *optional*):
            Text that closes a trace that is cut. It contains `think_end` exactly once. Defaults to Qwen's own text for
            ChatML templates, and to the one released with the paper (`"...\n\n...\n\n</think>"`) for all others.
        answer_bridge (`str`, *optional*):
            Text that opens each summary. Defaults to `"\n\n**Final Answer**\n"`.

        > Parameters that control the model card

        card_base_model (`str`, *optional*):
            Id on the Hub of the model that training starts from. Needed if the model is loaded from a folder.
        card_dataset (`str`, *optional*):
            Training data: an id on the Hub (`owner/name`) or any text. Not needed if `load_dataset` fetched the data
            from the Hub.
        card_eval_dataset (`str`, *optional*):
            Evaluation data in the same form, for a single set. With several sets, their names are used.
            `owner/name:task` names the task of a benchmark.
        card_metric (`str`, *optional*):
            Name of the mean reward of an evaluation: `"accuracy"` or `"mean_reward"`. Defaults to `"accuracy"` if the
            only reward function is one of this package's verifiers.
        card_license (`str`, *optional*):
            Licence of the trained weights, as the Hub names it, such as `"apache-2.0"`. Not stated if not set.
        card_question (`str`, *optional*, defaults to `"What is 2 + 2?"`):
            Example question in the model card's code. Use one like those in the training data.

        > Parameters that are set differently from GRPO

        max_completion_length (`int`, *optional*):
            Constant that the `dr_grpo` loss divides by, in tokens. It does not limit generation here: `budgets` and
            `max_summary_length` do. Defaults to the longest possible packed rollout, b_m + m · A · (bridge +
            `max_summary_length`).
        loss_type (`str`, *optional*, defaults to `"dr_grpo"`):
            See [`~trl.GRPOConfig`]. The sequence-level losses `"luspo"` and `"vespo"` are refused.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Fixed to `"none"`: advantages are not divided by a standard deviation.
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_truncate"`):
            See [`~trl.GRPOConfig`]. The sequence-level modes are refused.
        logging_steps (`float`, *optional*, defaults to `1`):
            Optimiser steps between logs, or their share of the run if below 1. TRL logs every tenth, which would leave
            a short run without any.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS

    # Parameters that control budgets and summaries
    budgets: list[int] = field(
        default_factory=lambda: list(PAPER_BUDGETS),
        metadata={"help": "Thinking budgets in tokens, strictly increasing. Thinking is sampled up to the last one."},
    )
    prior: Prior = field(
        default="uniform",
        metadata={
            "help": "Weight of each budget in the objective: 'uniform', 'linear', 'base', or (in Python and YAML) a "
            "list of one non-negative weight per budget."
        },
    )
    num_summaries: int = field(
        default=4, metadata={"help": "Number of summaries per trace and budget in training. Evaluation samples one."}
    )
    max_summary_length: int = field(
        default=PAPER_SUMMARY_LENGTH, metadata={"help": "Most tokens sampled for one summary."}
    )
    summary_reward: str | None = field(
        default=None,
        metadata={
            "help": "Reward at each budget without sampled summaries: the policy's own likelihood of the reference "
            "answer, its logarithm, or the logarithm per token.",
            "choices": [*SUMMARY_REWARDS],
        },
    )
    reference_template: str = field(
        default=r"\boxed{{answer}}",
        metadata={"help": "Text of a reference answer behind `answer_bridge`; `{answer}` stands for the answer."},
    )
    eval_budgets: list[int] | None = field(
        default=None, metadata={"help": "Budgets of `trainer.evaluate()` in tokens. Defaults to `budgets`."}
    )

    # Parameters that control the advantages
    baseline: str = field(
        default="brpo",
        metadata={"help": "Baseline of the thinking's advantage.", "choices": list(BASELINES)},
    )
    progress_decay: float = field(
        default=0.5,
        metadata={
            "help": "Weight in (0, 1] of earlier rewards in the baseline V1. Smaller values make them fade faster."
        },
    )
    summary_policy: str = field(
        default="decoupled",
        metadata={
            "help": "'decoupled' trains every summary with its own advantage, 'final' only the last of each trace.",
            "choices": list(SUMMARY_POLICIES),
        },
    )
    summary_weight: Weight = field(
        default=1.0,
        metadata={
            "help": "Factor of the summaries' advantages: a number, or 'objective' for the weight of a summary in the "
            "objective, its budget's prior divided by `num_summaries`."
        },
    )

    # Parameters that control how a rollout is computed
    packing: str = field(
        default="auto",
        metadata={
            "help": "'tree' computes a rollout as one packed row with tree attention, 'rows' as one row per summary. "
            "'auto' takes 'tree' if the model supports it. Otherwise it takes 'rows' and warns.",
            "choices": list(PACKING),
        },
    )
    prune: bool = field(
        default=True,
        metadata={
            "help": "Whether the update leaves out summaries and rollouts without advantage. The gradient stays the "
            "same. Not done where it would change (KL term, entropy bonus, loss that balances experts)."
        },
    )
    max_cached_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens whose keys and values a rank holds at a time while it generates with transformers. "
            "Larger batches are split into parts. There is no limit if not set."
        },
    )
    vllm_overlap: bool = field(
        default=True,
        metadata={
            "help": "Whether vLLM in colocate mode samples the summaries at a budget as soon as a trace has passed "
            "it, while other traces still think."
        },
    )

    # Parameters that control what happens when something is wrong
    on_nonfinite: str = field(
        default="raise",
        metadata={
            "help": "What to do when log-probabilities, loss or gradient are NaN or infinite. 'raise' stops and shows "
            "the step and the prompts. 'skip' leaves out the optimiser step and counts it in the metric "
            "`nonfinite/skipped_ratio`.",
            "choices": list(ON_NONFINITE),
        },
    )
    alarms: bool = field(
        default=True,
        metadata={"help": "Whether to warn, once each, when logged metrics show that training goes wrong."},
    )

    # Parameters that control what is spliced into a trace
    think_end: str | None = field(
        default=None,
        metadata={"help": "Text that ends the thinking. Found from chat template and vocabulary if not set."},
    )
    truncation_bridge: str | None = field(
        default=None,
        metadata={
            "help": "Text that closes a trace that is cut, with `think_end` exactly once. If not set, it depends on "
            "the family of the chat template."
        },
    )
    answer_bridge: str | None = field(
        default=None,
        metadata={"help": r"Text that opens each summary. Defaults to '\n\n**Final Answer**\n'."},
    )

    # Parameters that control the model card
    card_base_model: str | None = field(
        default=None,
        metadata={
            "help": "Id on the Hub of the model that training starts from. Needed if it is loaded from a folder."
        },
    )
    card_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Training data for the card: an id on the Hub (owner/name) or any text. Not needed if "
            "`load_dataset` fetched the data from the Hub."
        },
    )
    card_eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation data for the card, as `card_dataset`. 'owner/name:task' names the task of a benchmark."
        },
    )
    card_metric: str | None = field(
        default=None,
        metadata={
            "help": "Name of the mean reward of an evaluation. Defaults to 'accuracy' if the only reward function is "
            "one of this package's verifiers.",
            "choices": list(CARD_METRICS),
        },
    )
    card_license: str | None = field(
        default=None,
        metadata={"help": "Licence of the trained weights, as the Hub names it, such as apache-2.0."},
    )
    card_question: str | None = field(
        default=None,
        metadata={"help": "Example question in the model card's code. Defaults to 'What is 2 + 2?'."},
    )

    # Parameters that are set differently from GRPO
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Constant that the dr_grpo loss divides by, in tokens. It does not limit generation. Defaults to "
            "the longest possible packed rollout."
        },
    )
    loss_type: str = field(
        default="dr_grpo",
        metadata={"help": "Loss formulation, see GRPOConfig. The sequence-level 'luspo' and 'vespo' are refused."},
    )
    scale_rewards: str = field(
        default="none", metadata={"help": "Fixed to 'none': advantages are not divided by a standard deviation."}
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={"help": "'token_truncate' or 'token_mask'. The sequence-level modes are refused."},
    )
    logging_steps: float = field(
        default=1,
        metadata={"help": "Optimiser steps between logs, or their share of the run if below 1."},
    )

    def __post_init__(self) -> None:
        with without_host_warnings():
            super().__post_init__()

        self.budgets = check_budgets(self.budgets)
        self.eval_budgets = check_budgets(
            self.budgets if self.eval_budgets is None else self.eval_budgets, "eval_budgets"
        )
        prior_weights(self.prior, self.budgets)  # raises if they do not fit each other
        if self.summary_reward is not None:
            self._check_summary_reward()
        for name in ("num_summaries", "max_summary_length", "max_cached_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.baseline not in BASELINES:
            raise ValueError(f"`baseline` must be one of {BASELINES}, got {self.baseline!r}.")
        if self.summary_policy not in SUMMARY_POLICIES:
            raise ValueError(f"`summary_policy` must be one of {SUMMARY_POLICIES}, got {self.summary_policy!r}.")
        if self.summary_weight != OBJECTIVE:
            with suppress(ValueError):  # the command line gives a number as text; any other text is refused below
                self.summary_weight = float(self.summary_weight)
        summary_weights(self.summary_weight, self.budgets, self.prior, self.num_summaries)
        if self.packing not in PACKING:
            raise ValueError(f"`packing` must be one of {PACKING}, got {self.packing!r}.")
        check_on_nonfinite(self.on_nonfinite, self.deepspeed_plugin)
        if not 0 < self.progress_decay <= 1:
            raise ValueError(f"`progress_decay` must lie in (0, 1], got {self.progress_decay}.")
        # Settings of sampling, wherever they are set
        generation_kwargs = cast(dict[str, Any], self.generation_kwargs or {})
        sampling = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
        }
        sampling |= {name: value for name, value in generation_kwargs.items() if name in sampling}
        for name, value in sampling.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(
                    f"`{name}` must be a number greater than 0, got {value}. BRPO learns from differences between "
                    "sampled rollouts. For nearly greedy sampling set a small `temperature`."
                )
        if generation_kwargs.get("do_sample") is False:
            raise ValueError(
                "`generation_kwargs` sets `do_sample=False`, so all rollouts would be the same. Remove `do_sample`."
            )
        if self.card_metric not in (None, *CARD_METRICS):
            raise ValueError(f"`card_metric` must be one of {CARD_METRICS}, got {self.card_metric!r}.")
        if self.card_base_model is not None:
            try:
                validate_repo_id(self.card_base_model)
            except HFValidationError:
                raise ValueError(
                    f"`card_base_model` must be the id of a model on the Hub, such as 'Qwen/Qwen3-0.6B', got "
                    f"{self.card_base_model!r}. Leave it out if the model is not on the Hub."
                ) from None
        self._refuse_other_objectives()

    def _refuse_other_objectives(self) -> None:
        """Refuse settings of GRPO that have no meaning for a packed rollout."""
        for name, allowed, reason, instead in _FIXED_SETTINGS:
            if getattr(self, name) != allowed:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` does not apply to BRPO: {reason}. Instead, {instead}."
                )
        if self.loss_type in _SEQUENCE_LOSSES:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` weighs whole sequences, but a packed rollout is a tree. Use "
                "'dr_grpo' (the paper's) or another token-level loss."
            )
        if self.vllm_importance_sampling_mode not in ("token_truncate", "token_mask"):
            raise ValueError(
                f"`vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r}` takes one ratio per "
                "sequence, but a packed rollout is a tree. Use 'token_truncate' or 'token_mask'."
            )
        own = sorted(set(self.generation_kwargs or ()) & set(_OWN_GENERATION_KEYS))
        if own:
            raise ValueError(
                f"`generation_kwargs` must not set {own}. Use `budgets` to limit the thinking and "
                "`max_summary_length` to limit the summaries. Other constraints are not supported."
            )

    def _check_summary_reward(self) -> None:
        """Refuse settings that do not fit reference answers, and fill in the one branch per budget."""
        if self.summary_reward not in SUMMARY_REWARDS:
            raise ValueError(f"`summary_reward` must be one of {SUMMARY_REWARDS}, got {self.summary_reward!r}.")
        if self.num_summaries not in (1, type(self).num_summaries):
            raise ValueError(
                f"`num_summaries={self.num_summaries}` has no meaning with `summary_reward`: each budget has one "
                "branch, which holds the reference answer. Remove it."
            )
        self.num_summaries = 1
        if "{answer}" not in self.reference_template:
            raise ValueError(f"`reference_template` must contain '{{answer}}', got {self.reference_template!r}.")
        for name, allowed, reason in (
            ("beta", 0.0, "The KL term is estimated on sampled tokens, and a reference answer was not sampled."),
            ("top_entropy_quantile", 1.0, "It would leave out tokens of the reference answer."),
            ("summary_policy", "decoupled", "Every budget has a reward of its own."),
            ("reward_weights", None, "The likelihood is the only reward of training."),
        ):
            if getattr(self, name) != allowed:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` does not fit `summary_reward`. {reason} Remove one of them."
                )

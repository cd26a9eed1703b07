"""The file beside a model's weights that describes how to use it at any budget."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..method.budgets import PAPER_BUDGETS, PAPER_SUMMARY_LENGTH, check_budgets, prior_weights
from ..outside.validation import (
    MEBIBYTE,
    TOKEN_ID,
    Unfit,
    boolean,
    fields,
    free_form,
    integer,
    list_of,
    mapping_of,
    number,
    or_null,
    read_json,
    string,
)
from ..outside.versions import installed_versions
from ..rollout.backend import RolloutSettings
from ..rollout.encoding import encode_prompt
from ..rollout.markers import ThinkingMarkers, find_markers, render_prompt
from ..rollout.sampling import SAMPLING, Sampling

if TYPE_CHECKING:
    from ..brpo_config import BRPOConfig  # it loads TRL

ANYTIME_CONFIG_NAME = "anytime_config.json"
_GENERATION_CONFIG = "generation_config.json"
_FORMAT = 1
_MARKERS = ("think_end", "truncation_bridge", "answer_bridge")
_LIBRARIES = ("trl-anytime", "trl", "transformers", "torch")

BUDGETS = list_of(integer(1), least=1, most=10_000)
_MARKER = fields({"in_text": boolean}, text=string(10_000, least=1), ids=list_of(TOKEN_ID, least=1, most=10_000))
_FIELDS = fields(
    {"system_prompt": or_null(string(MEBIBYTE))},  # files of version 0.1.0 may lack it
    markers=fields(**dict.fromkeys(_MARKERS, _MARKER)),
    budgets=BUDGETS,
    prior=list_of(number(0, 1e9), least=1, most=10_000),
    max_summary_length=integer(1),
    sampling=fields(**SAMPLING),
    eos_token_ids=list_of(TOKEN_ID, least=1, most=1000),
    chat_template_kwargs=mapping_of(free_form, most=100),
    versions=mapping_of(string(1000), most=100),
)
# Arguments of `apply_chat_template` that are not for the template. They would change what it returns.
_NOT_FOR_TEMPLATES = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "chat_template",
    "tools",
    "documents",
}

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AnytimeConfig:
    """
    Settings that are needed to use a model at any budget as it was trained. Saved as `anytime_config.json`.

    Args:
        markers ([`ThinkingMarkers`]):
            End marker of a thinking trace and the bridges after it, as text and as token ids.
        budgets (`list[int]`):
            Budgets b_1 < … < b_m in thinking tokens.
        prior (`list[float]`):
            Weight of each budget in the objective. The weights sum to 1.
        max_summary_length (`int`):
            Most tokens sampled for one summary.
        sampling ([`Sampling`]):
            Sampling settings of the training.
        eos_token_ids (`list[int]`):
            Tokens that end a summary, or a trace without its end marker.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template.
        versions (`dict[str, str]`, *optional*):
            Versions of the libraries that wrote the file. Defaults to those installed.
        system_prompt (`str`, *optional*):
            System message before each question.
    """

    markers: ThinkingMarkers
    budgets: list[int]
    prior: list[float]
    max_summary_length: int
    sampling: Sampling
    eos_token_ids: list[int]
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions(_LIBRARIES))
    system_prompt: str | None = None

    @classmethod
    def from_pretrained(
        cls, model: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, **markers: Any
    ) -> "AnytimeConfig":
        """
        Read the config beside a model.

        Args:
            model (`str` or `Path`):
                Folder or Hub id of the model, or the file itself.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Tokenizer of the model. The config is checked against it. With a tokenizer, a model without a file gets
                the config of [`from_tokenizer`], and a warning. Without one, the tokenizer beside the file is loaded
                if the end of thinking has to be found in text.
            **markers (`str`, *optional*):
                `think_end`, `truncation_bridge` and `answer_bridge` for a model without a file.

        Raises:
            `FileNotFoundError`: If there is no file, and no tokenizer is given.
            `OSError`: If the Hub does not answer, or knows no such model.
            `ValueError`: If the file is damaged, newer than this package, or does not fit the tokenizer. Also if
                markers are given although there is a file, or if there is no file and no markers are found.
        """
        given = {name: text for name, text in markers.items() if text is not None}
        try:
            file = find_file(model, ANYTIME_CONFIG_NAME)
        except FileNotFoundError:
            if tokenizer is None:
                raise
            config = cls.from_tokenizer(tokenizer, generation_eos_token_ids(model), **given)
            logger.warning(
                f"{model} has no {ANYTIME_CONFIG_NAME}. It was not trained by trl_anytime, or was copied without it. "
                f"{config.markers.truncation_bridge!r} will close a cut trace, and {config.markers.answer_bridge!r} "
                "will ask for the answer. If the model was trained with others, set `truncation_bridge` and "
                "`answer_bridge`."
            )
            return config
        if given:
            raise ValueError(
                f"The {ANYTIME_CONFIG_NAME} of {model} already sets its markers and bridges. Remove "
                f"{', '.join(sorted(given))}."
            )
        config = cls._from_file(file)
        if tokenizer is None:
            if not config.markers.in_text:
                return config
            try:
                tokenizer = AutoTokenizer.from_pretrained(file.parent if Path(model).exists() else str(model))
            except (OSError, ValueError):  # a config without a tokenizer is useful, too
                return config
        config.check_tokenizer(tokenizer)
        return config.with_tokenizer(tokenizer)

    @classmethod
    def _from_file(cls, file: Path) -> "AnytimeConfig":
        return cls.from_values(read_json(file, fields(format=integer(1)), MEBIBYTE), file)

    @classmethod
    def from_values(cls, values: dict[str, Any], source: Any) -> "AnytimeConfig":
        """
        Make a config of the values of a file, and check them.

        Args:
            values (`dict[str, Any]`):
                What [`to_values`] returned. `format` is known to be an int.
            source (`Any`):
                Source to name in an error.

        Raises:
            `ValueError`: If the values do not fit, or are newer than this package.
        """
        if values["format"] > _FORMAT:
            raise Unfit(
                f"{source} has format {values['format']}, but this version reads up to {_FORMAT}. Upgrade trl-anytime."
            )
        try:
            _FIELDS(values, "")
            _check_fields(values)
            markers: dict[str, Any] = {name: values["markers"][name]["text"] for name in _MARKERS}
            markers |= {f"{name}_ids": tuple(values["markers"][name]["ids"]) for name in _MARKERS}
            markers["in_text"] = values["markers"]["think_end"].get("in_text", False)
            budgets = check_budgets(values["budgets"])
            return cls(
                markers=ThinkingMarkers(**markers),
                budgets=budgets,
                prior=prior_weights(values["prior"], budgets).tolist(),
                max_summary_length=values["max_summary_length"],
                sampling=Sampling(**values["sampling"]),
                eos_token_ids=values["eos_token_ids"],
                chat_template_kwargs=values["chat_template_kwargs"],
                versions=values["versions"],
                system_prompt=values.get("system_prompt"),
            )
        except ValueError as error:
            raise Unfit(f"{source}: {error}") from error

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        think_end: str | None = None,
        truncation_bridge: str | None = None,
        answer_bridge: str | None = None,
    ) -> "AnytimeConfig":
        """
        Make the config of a model without a file.

        Markers and bridges are found as in training. The other settings are the paper's.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            eos_token_ids (`Sequence[int]`, *optional*):
                Tokens that end a text besides the tokenizer's own.
            chat_template_kwargs (`Mapping[str, Any]`, *optional*):
                Arguments of the chat template.
            think_end, truncation_bridge, answer_bridge (`str`, *optional*):
                See [`find_markers`].

        Raises:
            `ValueError`: If the model has no thinking markers, or the template has closed the thinking.
        """
        kwargs = dict(chat_template_kwargs or {})
        prompt: Any = [{"role": "user", "content": "?"}] if tokenizer.chat_template else "?"
        text, generation_prompt = render_prompt(tokenizer, prompt, kwargs)
        budgets = list(PAPER_BUDGETS)
        return cls(
            markers=find_markers(
                tokenizer,
                text,
                generation_prompt,
                think_end,
                truncation_bridge,
                answer_bridge,
                conversation=prompt,
                chat_template_kwargs=kwargs,
            ),
            budgets=budgets,
            prior=prior_weights("uniform", budgets).tolist(),
            max_summary_length=PAPER_SUMMARY_LENGTH,
            sampling=Sampling(temperature=0.6),
            eos_token_ids=list(dict.fromkeys([_eos(tokenizer), *eos_token_ids])),
            chat_template_kwargs=kwargs,
        )

    @classmethod
    def from_brpo_config(
        cls,
        args: "BRPOConfig",
        markers: ThinkingMarkers,
        eos_token_ids: list[int],
        chat_template_kwargs: dict[str, Any],
        system_prompt: str | None = None,
    ) -> "AnytimeConfig":
        """Make the config of a model that is trained with `args`. See the class for the other arguments."""
        return cls(
            markers=markers,
            budgets=args.budgets,
            prior=prior_weights(args.prior, args.budgets).tolist(),
            max_summary_length=args.max_summary_length,
            sampling=Sampling.from_config(args),
            eos_token_ids=eos_token_ids,
            chat_template_kwargs=chat_template_kwargs,
            system_prompt=system_prompt,
        )

    def to_values(self) -> dict[str, Any]:
        """Return the config as values of JSON."""
        markers: dict[str, Any] = {
            name: {"text": getattr(self.markers, name), "ids": list(getattr(self.markers, f"{name}_ids"))}
            for name in _MARKERS
        }
        markers["think_end"]["in_text"] = self.markers.in_text
        return {"format": _FORMAT, **vars(self), "markers": markers, "sampling": asdict(self.sampling)}

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `anytime_config.json` into a folder and return its path. The folder is created if needed."""
        path = Path(save_directory) / ANYTIME_CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_values(), indent=2) + "\n")
        return path

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "AnytimeConfig":
        """Return a copy that can find an end of thinking in the text of this tokenizer's tokens."""
        return replace(self, markers=self.markers.with_tokenizer(tokenizer))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Check that a tokenizer encodes the markers as the file does.

        Raises:
            `ValueError`: If not. The message says which differ.
        """
        markers = self.markers
        found = find_markers(
            tokenizer,
            "",
            think_end=markers.think_end,
            truncation_bridge=markers.truncation_bridge,
            answer_bridge=markers.answer_bridge,
        )
        differing = [
            f"{name} {getattr(markers, name)!r} is {list(getattr(markers, f'{name}_ids'))} in the file and "
            f"{list(getattr(found, f'{name}_ids'))} by the tokenizer"
            for name in _MARKERS
            if getattr(found, f"{name}_ids") != getattr(markers, f"{name}_ids")
        ]
        if differing:
            raise ValueError(
                f"The {ANYTIME_CONFIG_NAME} was saved with another tokenizer: {'; '.join(differing)}. Use the "
                "tokenizer that was saved with the model."
            )

    def check_context(self, longest_prompt: int, budget: int, context: int | None, whose: str) -> None:
        """
        Refuse a budget that a context cannot hold.

        Args:
            longest_prompt (`int`):
                Tokens of the longest prompt.
            budget (`int`):
                The largest budget in tokens.
            context (`int`, *optional*):
                Tokens that the model can hold. `None` if not known.
            whose (`str`):
                Owner of the context, for the error.

        Raises:
            `ValueError`: If the budget does not fit. The message says which would.
        """
        around = longest_prompt + self.markers.max_bridge_length + self.max_summary_length
        if context is not None and around + budget > context:
            raise ValueError(
                f"A budget of {budget} thinking tokens does not fit into {whose} context of {context} tokens. The "
                f"longest prompt has {longest_prompt}, the bridges {self.markers.max_bridge_length}, and a summary "
                f"up to {self.max_summary_length}. Lower the budget to at most {max(context - around, 0)}."
            )

    def rollout_settings(self, num_summaries: int) -> RolloutSettings:
        """Return rollout settings with which budgets that share a cut share its summaries."""
        return RolloutSettings(
            self.budgets,
            num_summaries,
            self.max_summary_length,
            self.markers,
            self.eos_token_ids,
            share_summaries=True,
        )

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
        """
        Return prompts as token ids, as training renders them.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                Texts, which are used unchanged, or conversations.

        Raises:
            `ValueError`: See [`~trl_anytime.rollout.encoding.encode_prompt`].
        """
        return [encode_prompt(tokenizer, prompt, self.chat_template_kwargs) for prompt in prompts]

    def question(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
        """
        Return a question as a prompt.

        It is a conversation, or the text itself for a model without a chat template.

        Raises:
            `ValueError`: If there is a system prompt, and the model has no chat template.
        """
        if tokenizer.chat_template:
            return self.conversation(text)
        if self.system_prompt is not None:
            raise ValueError("The tokenizer has no chat template for a system prompt. Remove the system prompt.")
        return text

    def conversation(self, text: str) -> list[dict[str, str]]:
        """Return a question as a conversation, behind the system prompt if there is one."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": text}]


def _check_fields(values: dict[str, Any]) -> None:
    """Refuse a config with fields that do not fit each other."""
    further = values["sampling"].keys() - SAMPLING.keys()
    if further:
        raise Unfit(f"`sampling` has unknown fields: {', '.join(map(repr, sorted(further)))}. Remove them.")
    taken = values["chat_template_kwargs"].keys() & _NOT_FOR_TEMPLATES
    if taken:
        raise Unfit(
            f"`chat_template_kwargs` has fields that are not for a template: {', '.join(sorted(taken))}. Remove them."
        )
    end, bridge = (values["markers"][name]["text"] for name in ("think_end", "truncation_bridge"))
    if bridge.count(end) != 1:
        raise Unfit("`markers.truncation_bridge.text` must contain `markers.think_end.text` exactly once.")


def find_file(path: str | Path, name: str) -> Path:
    """
    Return a file of a model's folder, or of its repository on the Hub.

    Raises:
        `FileNotFoundError`: If the model has no such file.
        `OSError`: If there is no such model, or the Hub does not answer.
    """
    found = Path(path)
    if found.exists():
        file = found / name if found.is_dir() else found
        if not file.exists():
            raise FileNotFoundError(f"There is no {name} in {path}. Give a folder or a model that has it.")
        return file
    try:
        return Path(hf_hub_download(str(path), name))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise OSError(f"{path} is neither a folder nor a model that you can read on the Hub. Check it.") from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not HF_HUB_OFFLINE:
            raise OSError(
                f"The Hub did not answer when asked for {path}/{name}: {error} Try again, or give a local folder."
            ) from error
        raise FileNotFoundError(f"There is no {name} in {path}. Give a folder or a model that has it.") from error


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("The tokenizer has no EOS token, so an answer could not end. Set `tokenizer.eos_token`.")
    return tokenizer.eos_token_id


def generation_eos_token_ids(model: str | Path) -> list[int]:
    """
    Return the tokens that end a text in the model's generation config, if it has one.

    Raises:
        `ValueError`: If the generation config is damaged.
    """

    def token_ids(value: Any, name: str) -> Any:
        return (list_of(TOKEN_ID, most=1000) if isinstance(value, list) else TOKEN_ID)(value, name)

    try:
        file = find_file(model, _GENERATION_CONFIG)
    except OSError:
        return []
    found = read_json(file, fields({"eos_token_id": or_null(token_ids)}), MEBIBYTE).get("eos_token_id")
    return [] if found is None else found if isinstance(found, list) else [found]

"""
Say which members of TRL that the package imports, overrides, calls or sets are not as it expects them.

    make test-main

Ends with 1 if there are some. It imports nothing of the package, which a moved import would keep from loading.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent / "src" / "trl_anytime"

# Methods of `GRPOTrainer` that are overridden, and the parameters that they are called with
OVERRIDDEN = {
    "_generate": ["self", "prompts"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_train_sampler": ["self", "dataset"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_rng_state": ["self", "checkpoint"],
    "_log_completion_extra": ["self", "column", "values"],
    "_save_checkpoint": ["self", "model", "trial"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "save_model": ["self", "output_dir", "_internal_call"],
}
# Those that are called
CALLED = {
    "_get_output_dir": ["self", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_tokenize_prompts": ["self", "prompts"],
}
# Other functions by their first parameters: further ones do no harm
LEADING = {
    ("trl", "GRPOTrainer._get_per_token_logps_and_entropies"): [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
    ],
    ("trl.trainer.utils", "add_fused_lm_head"): ["model"],
    ("trl.generation.vllm_client", "VLLMClient.update_named_params"): ["self", "metadata", "named_params"],
    ("trl.generation.vllm_client", "VLLMClient.generate"): ["self", "prompts", "features", "n"],
}
# Private attributes that TRL sets, and that are read or set here
ATTRIBUTES = {"_buffered_inputs", "_logs", "_metrics", "_pending_extra_logs", "_step", "_tokenizer"}
PUBLIC_ATTRIBUTES = {
    "eos_token_ids",
    "generation_config",
    "max_completion_length",
    "reward_func_names",
    "rollout_func",
}
CLASS_ATTRIBUTES = {"_name", "_paper", "_tag_names"}
VLLM_ATTRIBUTES = {"generation_kwargs", "max_completion_length"}


def moved() -> list[str]:
    """Return a line for each member that is gone or takes other parameters."""
    lines = {*_imports(), *_methods(), *_attributes()}
    return sorted(line for line in lines if not any(other != line and other.startswith(line) for other in lines))


def _imports() -> Iterator[str]:
    for file, text in _sources(PACKAGE):
        for node in ast.walk(ast.parse(text)) if "from trl" in text else ():
            if isinstance(node, ast.ImportFrom) and not node.level and re.match(r"trl(\.|$)", node.module or ""):
                for alias in node.names:
                    fault = _find(node.module or "", alias.name)[1]
                    if fault:
                        yield f"{fault} Imported by {file.relative_to(PACKAGE.parent)}."


def _methods() -> Iterator[str]:
    whole = {("trl", f"GRPOTrainer.{name}"): expected for name, expected in (OVERRIDDEN | CALLED).items()}
    for place, expected in (whole | LEADING).items():
        function, fault = _find(*place)
        if fault:
            yield fault
            continue
        found = [*inspect.signature(function).parameters]
        if (found if place in whole else found[: len(expected)]) != expected:
            yield f"{'.'.join(place)} takes other parameters: {', '.join(found)}. Expected: {', '.join(expected)}."


def _attributes() -> Iterator[str]:
    trainer, fault = _find("trl", "GRPOTrainer")
    if fault:
        return  # which `_imports` has said
    source = "".join(inspect.getsource(parent) for parent in trainer.__mro__ if parent.__module__.startswith("trl."))
    for name in ATTRIBUTES | PUBLIC_ATTRIBUTES:
        if not re.search(rf"\bself\.{name}\b(: [^=\n]+)? \+?= ", source):
            yield f"trl.GRPOTrainer sets no attribute {name}."
    for name in CLASS_ATTRIBUTES:
        if not hasattr(trainer, name):
            yield f"trl.GRPOTrainer has no attribute {name}."
    generation, fault = _find("trl.generation.vllm_generation", "VLLMGeneration")
    if fault:
        return
    source = inspect.getsource(generation)
    for name in VLLM_ATTRIBUTES | used_of_vllm() - vars(generation).keys():
        if not re.search(rf"\bself\.{name}(, _)? = ", source):
            yield f"trl.generation.vllm_generation.VLLMGeneration has no {name}."


def used_of_vllm() -> set[str]:
    """Return the names of members of TRL's `VLLMGeneration` that the vLLM backends use."""
    return {
        node.attr
        for name in ("vllm_backend", "vllm_server")
        for node in ast.walk(ast.parse((PACKAGE / "rollout" / f"{name}.py").read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self._vllm", "vllm", "vllm_generation")
    }


def _find(module: str, path: str) -> tuple[Any, str]:
    """Return the member at a dotted path, and a sentence if there is none."""
    try:
        found = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (AttributeError, ImportError, RuntimeError):  # the last is what TRL's lazy modules raise
        return None, f"{module}.{path} is gone.{_elsewhere(path.split('.')[-1])}"
    return found, ""


def _elsewhere(name: str) -> str:
    """Say which files of TRL define a name."""
    root = Path(import_module("trl").__file__ or "").parent
    definition = re.compile(rf"^\s*(async )?(def|class) {name}\b|^{name} = ", re.MULTILINE)
    files = [str(file.relative_to(root.parent)) for file, text in _sources(root) if definition.search(text)]
    return f" The name is defined in {', '.join(files)}." if files else ""


def _sources(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.rglob("*.py")):
        yield file, file.read_text()


def main() -> None:
    lines = moved()
    print(f"TRL {import_module('trl').__version__}: {len(lines)} of the members that the package uses have moved.")
    for line in lines:
        print(line)
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()

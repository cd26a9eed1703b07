"""Load a model's files with transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .validation import check_folder


def load_files(what: str, model: str, load: Callable[..., Any], **kwargs: Any) -> Any:
    """
    Load a part of a model. An error has one line, which names the model.

    Args:
        what (`str`):
            The part, for the error: `"tokenizer"`, `"weights"`.
        model (`str`):
            Folder or Hub id of the model.
        load (`Callable`):
            Function of transformers that loads it, with `kwargs`.

    Raises:
        `ValueError`: If it cannot be loaded.
        `ConnectionError`: If the Hub does not answer.
    """
    if Path(model).is_dir():
        check_folder(Path(model))
    try:
        return load(model, **kwargs)
    except ConnectionError:
        raise
    except Exception as error:  # a damaged file may raise anything in its reader
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"The {what} of {model} cannot be loaded: {said[:500]}") from error

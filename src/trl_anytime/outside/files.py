"""Files of models, and files that others see whole."""

from pathlib import Path

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def weight_files(folder: Path) -> list[Path]:
    """Return the files with weights in a model's folder, sorted by name."""
    return sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file()})

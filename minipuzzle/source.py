"""Where a model comes from: a folder, the bundled teacher, or a hub id. No torch in here."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from minipuzzle import families
from minipuzzle.architecture import Architecture
from minipuzzle.errors import UserError
from minipuzzle.families import Family

DEMO = "demo"
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def demo_teacher() -> Path:
    """Folder of the bundled teacher."""
    return Path(str(resources.files("minipuzzle.demo"))) / "teacher"


def resolve(model: str | Path, revision: str | None = None, *, only_config: bool = False) -> Path:
    """Folder of a model: a path as it is, `demo`, or a hub id downloaded (safetensors only)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder that holds config.json and the weights")
    text = str(model)
    if text == DEMO:
        return demo_teacher()
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise UserError(f"{text} does not exist; give a model folder, a hub id or `{DEMO}`")
    return _download(text, revision, ["config.json"] if only_config else PATTERNS)


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        folder: str = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns
        )
    except (OSError, HFValidationError) as error:  # network, missing repository or revision
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repository} is no folder, and no hub gave it: {reason}") from None
    return Path(folder)


def resolve_config(model: str | Path, revision: str | None = None) -> tuple[Family, Architecture]:
    """Family and architecture of a model; needs only its config.json (a folder or the file)."""
    path = Path(model).expanduser()
    file = path if path.is_file() and path.suffix == ".json" else None
    file = file or resolve(model, revision, only_config=True) / "config.json"
    from minipuzzle.jsonfile import read_json

    return families.read(read_json(file))

"""Finding a recipe or an accelerate config: by its path, or by the name under which the package ships it."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("training_configs", "accelerate_configs")


def packaged_names(folder: str) -> list[str]:
    """The names of the YAML files that the package ships in `folder`, without the ending: `llama3/wpo`, ..."""
    assert folder in FOLDERS, folder
    root = PACKAGE / folder
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def locate(name: str, folder: str) -> Path:
    """The file that `name` means: a path that exists, or a packaged file named with or without its folder and ending.

    Args:
        name: what the user typed, for instance `my.yaml`, `training_configs/llama3/wpo.yaml` or `llama3/wpo`.
        folder: "training_configs" or "accelerate_configs", where packaged files are looked up.

    Returns:
        The path of an existing file.

    Raises:
        ValueError: neither a file nor a packaged name; the message gives the nearest packaged name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{name} is a folder; a YAML file is needed.")
    if path.is_absolute():
        raise ValueError(f"{name} does not exist.")
    inside = name.removeprefix("./").removeprefix(f"{folder}/").removesuffix(".yaml").removesuffix(".yml")
    known = packaged_names(folder)
    if inside in known:
        return PACKAGE / folder / f"{inside}.yaml"
    near = get_close_matches(inside, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"packaged ones: {', '.join(known)}."
    raise ValueError(f"{name} is neither a file nor one of the packaged {folder}; {hint}")

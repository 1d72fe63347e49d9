"""Where cascades are found: embedded in the library, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from synthaug.errors import CheckpointError

PRETRAINED = Path(__file__).parent / "pretrained"
"""Where the embedded cascades live."""

ALIASES = {"nuclei-2d": "nuclei-2d-u2os"}


def embedded_cascades() -> list[str]:
    """Names of the cascades that come with the library, aliases included."""
    names = sorted(p.parent.name for p in PRETRAINED.glob("*/model_index.json"))
    return names + [a for a, target in ALIASES.items() if target in names]


def find_cascade(name: str | Path) -> Path:
    """Folder of a cascade given by embedded name, path or hub id."""
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        return folder
    embedded = PRETRAINED / ALIASES.get(str(name), str(name))
    if (embedded / "model_index.json").is_file():
        return embedded
    if isinstance(name, str) and name.count("/") == 1 and not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name))
        except Exception as error:
            raise CheckpointError(
                name,
                expected=f"a folder, one of {embedded_cascades()} or a hub id that can be reached",
                got=f"{type(error).__name__}: {error}",
            ) from error
    raise CheckpointError(
        str(name),
        expected=f"a cascade folder (with model_index.json), a hub id, or one of {embedded_cascades()}",
        got="a folder without model_index.json" if folder.exists() else "no such folder or name",
        remedy="Was the fit interrupted? `synthaug fit ... --resume` finishes it." if folder.exists() else "",
    )

"""Cascade: joins the stages, and nothing else does.

    keys -> MaskDDPM -> TextureDiffusion -> Cells        the costly half, `cells`
    Cells, keys -> PopulationSynthesis -> Background     the cheap half, `populate`

On disk a cascade is a diffusers-style folder: `model_index.json`, a subfolder a stage, a model card `README.md`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthaug.errors import CheckpointError, InputError, SynthAugError
from synthaug.generators.background import Background, BackgroundMode
from synthaug.generators.masks import MaskDDPM
from synthaug.generators.population import PopulationSynthesis
from synthaug.generators.stage import write_atomic
from synthaug.generators.texture import TextureDiffusion
from synthaug.randomness import SampleKey
from synthaug.types import CellMasks, Cells, FrameStyles, Population

PRETRAINED = Path(__file__).parent / "pretrained"
"""Where the embedded cascades live."""

ALIASES = {"nuclei-2d": "nuclei-2d-u2os"}

MAX_ATTEMPTS = 12
"""How often a rejected mask is redrawn. At 5 % rejects, the chance to run out is 1 in 10^15."""

REACHED = 0.8
"""Share of the cells asked for below which a population warns; a crowded frame may always miss one."""

NumCells = int | tuple[int, int] | None


@dataclass(frozen=True)
class CascadeConfig:
    """What belongs to the cascade as a whole.

    Attributes:
        name: Shown by `synthaug info`.
        block_size: Cells generated together, a multiple of 8; always padded to this number, so that a key's bits never
            depend on its company.
        min_area: Smallest instance, pixels.
        pixel_size_um: Of the real data, or None if unknown.
        intensity: Data type of the real images, for writing synthetic ones ("uint8", "uint16" or "float32").
    """

    name: str = "unnamed"
    block_size: int = 8
    min_area: int = 20
    pixel_size_um: float | None = None
    intensity: str = "uint16"

    def __post_init__(self) -> None:
        if self.block_size < 8 or self.block_size % 8:
            # Vectorised CPU loops treat the elements beyond a multiple of their width differently, in the last bit.
            raise InputError("block_size", expected="a multiple of 8", got=self.block_size)


class Cascade(nn.Module):
    """Fresh cells and populations from keys.

    Args:
        config: See `CascadeConfig`.
        masks, texture, background, population: The trained stages.

    >>> cascade = Cascade.from_pretrained("nuclei-2d")
    >>> population = cascade.generate([SampleKey(0, ("frame", 0))], size=(256, 256))
    >>> population.image.shape, population.labels.dtype
    (torch.Size([1, 1, 256, 256]), torch.int32)
    """

    def __init__(
        self,
        config: CascadeConfig,
        masks: MaskDDPM,
        texture: TextureDiffusion,
        background: Background,
        population: PopulationSynthesis,
    ) -> None:
        super().__init__()
        if masks.config.crop_size != texture.config.crop_size:
            raise InputError(
                "Cascade",
                expected="masks and texture of one crop size",
                got=f"{masks.config.crop_size} and {texture.config.crop_size}",
            )
        self.config = config
        self.masks, self.texture, self.background, self.population = masks, texture, background, population
        self.rejects: Counter[str] = Counter()
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the costly half runs."""
        return self.masks.device

    @property
    def block_size(self) -> int:
        """Cells generated together."""
        return self.config.block_size

    @property
    def crop_size(self) -> int:
        """Side of a cell's crop, pixels."""
        return self.masks.config.crop_size

    # The costly half ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cells(self, keys: Sequence[SampleKey]) -> Cells:
        """One cell a key; row i depends on `keys[i]` alone.

        Masks that are empty, in several parts, holed, too small or at the crop's edge are redrawn from child keys and
        counted in `rejects` (`drawn` counts all masks drawn, without the padding).
        """
        if not keys:
            raise InputError("keys", expected="at least one SampleKey", got="none")
        found: list[CellMasks | None] = [None] * len(keys)
        waiting = list(range(len(keys)))
        for attempt in range(MAX_ATTEMPTS):
            still = []
            for block in _blocks(waiting, self.block_size):
                drawn = [keys[i].child("mask", attempt) for i in block]
                masks, rejects = self.masks(self.masks.draw(_pad(drawn, self.block_size)))
                area = masks.mask.flatten(1).sum(1) * masks.scale**2
                self.rejects["drawn"] += len(block)
                for row, i in enumerate(block):
                    why = rejects[row] or ("too small" if area[row] < self.config.min_area else None)
                    if why is None:
                        found[i] = masks.select(slice(row, row + 1))
                    else:
                        self.rejects[why] += 1
                        still.append(i)
            waiting = still
            if not waiting:
                break
        if waiting:
            raise SynthAugError(
                f"{len(waiting)} of {len(keys)} masks were rejected {MAX_ATTEMPTS} times in a row ({dict(self.rejects)}): "
                "this cascade's mask stage is not trained enough; fit it with a larger --budget."
            )
        out = []
        for block in _blocks(list(range(len(keys))), self.block_size):
            rows = _pad(block, self.block_size)
            masks = CellMasks.cat([m for i in rows if (m := found[i]) is not None])
            noise = self.texture.draw([keys[i].child("texture") for i in rows])
            out.append(self.texture(masks, noise).select(slice(0, len(block))))
        return Cells.cat(out)

    # The cheap half -----------------------------------------------------------------------------------------------

    def styles(self, keys: Sequence[SampleKey], density: float | None = None) -> FrameStyles:
        """How each frame looks: level, brightness, density and noise, drawn jointly from the real frames.

        Args:
            keys: One a frame.
            density: Cells per pixel; default: as drawn.
        """
        styles = self.background.draw_styles(keys)
        if density is None:
            return styles
        if density < 0:
            raise InputError("density", expected="cells per pixel, >= 0", got=density)
        values = styles.values.clone()
        values[:, styles.names.index("density")] = density
        return replace(styles, values=values)

    def num_cells(
        self,
        keys: Sequence[SampleKey],
        size: Sequence[int],
        *,
        num_cells: NumCells = None,
        density: float | None = None,
    ) -> list[int]:
        """How many cells each frame asks for; needs no cells, so that a stream can plan ahead.

        Args:
            keys: One a frame.
            size: (Y, X) in pixels.
            num_cells: Fixed number, or (least, most); default: from the density.
            density: Cells per pixel; default: from the real frames' own distribution.
        """
        styles = self.styles(keys, density)
        counts = [k.child("count") for k in keys]
        return self.population.num_cells(counts, _size(size), styles["density"], num_cells=num_cells)

    @torch.no_grad()
    def populate(
        self,
        cells: Cells,
        keys: Sequence[SampleKey],
        size: Sequence[int],
        *,
        picks: Sequence[Tensor] | None = None,
        num_cells: NumCells = None,
        density: float | None = None,
        clustering: float | None = None,
        background: BackgroundMode = "model",
    ) -> Population:
        """Frames made of given cells.

        Args:
            cells: The cells to place.
            keys: One a frame; they decide everything but the cells.
            size: (Y, X) in pixels.
            picks: For each frame the indices into `cells` to place, int64; default: as many as `num_cells` says, drawn
                without replacement as far as there are enough.
            num_cells, density: See `num_cells`.
            clustering: Probability that a cell is placed next to another one; default: fitted.
            background: "model", or "real" for the free regions of real frames.

        Returns:
            float32 image in camera counts and int32 labels.
        """
        shape = _size(size)
        styles = self.styles(keys, density)
        if picks is None:
            asked = self.num_cells(keys, shape, num_cells=num_cells, density=density)
            picks = [_pick(k.child("pick"), n, len(cells)) for k, n in zip(keys, asked)]
        noise = self.population.draw([k.child("place") for k in keys], shape, [len(p) for p in picks])
        scenes = self.population(cells, picks, noise, shape, clustering=clustering)
        asked_for, placed = int(scenes.num_requested.sum()), int(scenes.num_placed.sum())
        if placed < REACHED * asked_for:
            pixels = len(keys) * shape[0] * shape[1] / 1e4
            warnings.warn(
                f"only {placed} of {asked_for} cells found a free place: {placed / pixels:.1f} cells per 100 x 100 px "
                f"instead of {asked_for / pixels:.1f}. Ask for fewer cells or a larger size.",
                stacklevel=2,
            )
        camera = self.background.draw(keys, shape)
        image = self.background(scenes.light, scenes.labels, styles, camera, background)
        pixel = self.config.pixel_size_um
        return Population(
            image=image,
            labels=scenes.labels,
            num_requested=scenes.num_requested,
            num_placed=scenes.num_placed,
            voxel_size_um=None if pixel is None else (1.0, pixel, pixel),
        )

    @torch.no_grad()
    def paste(
        self,
        cells: Cells,
        image: Tensor,
        labels: Tensor,
        key: SampleKey,
        *,
        num_cells: NumCells = None,
        clustering: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A real image with synthetic cells in its free space.

        Args:
            cells: The cells to place.
            image: float32 [1, Y, X], any intensity scale.
            labels: int32 [1, Y, X], contiguous from 1.
            key: Decides everything but the cells.
            num_cells: Fixed number, or (least, most); default: as many as the image already has, at least 1.
            clustering: See `populate`.

        Returns:
            The image with their light added, and the labels with theirs appended.
        """
        shape = _size(image.shape[1:])
        existing = int(labels.max())
        asked = max(existing, 1) if num_cells is None else num_cells
        density = torch.zeros(1)
        count = self.population.num_cells([key.child("count")], shape, density, num_cells=asked)[0]
        noise = self.population.draw([key.child("place")], shape, [count])
        picks = [_pick(key.child("pick"), count, len(cells))]
        scenes = self.population(cells, picks, noise, shape, clustering=clustering, occupied=labels[None])
        styles = self.background.styles_of(image, labels)
        out = self.background.add_cells(image[None], scenes.light, styles, self.background.draw([key], shape))
        added = scenes.labels[0]
        return out[0], torch.where(added > 0, added + existing, labels)

    def generate(
        self,
        keys: Sequence[SampleKey],
        size: Sequence[int],
        *,
        num_cells: NumCells = None,
        density: float | None = None,
        clustering: float | None = None,
        background: BackgroundMode = "model",
    ) -> Population:
        """Frames of fresh cells, none of which appears twice; arguments as in `populate`."""
        asked = self.num_cells(keys, size, num_cells=num_cells, density=density)
        names = [k.child("cell", i) for k, n in zip(keys, asked) for i in range(n)]
        starts = [sum(asked[:i]) for i in range(len(asked))]
        picks = [torch.arange(s, s + n) for s, n in zip(starts, asked)]
        cells = self.cells(names or [keys[0].child("cell", 0)])
        return self.populate(
            cells, keys, size, picks=picks, density=density, clustering=clustering, background=background
        )

    # On disk ------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """SHA-256 over all weights, tables and configs: two cascades with the same one stream the same bits."""
        digest = hashlib.sha256()
        for name, stage in self.stages().items():
            digest.update(f"{name}{sorted(asdict(stage.config).items())}".encode())
            for key, tensor in sorted(stage.state_dict().items()):
                digest.update(key.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        config = asdict(self.config)
        digest.update(str([config["block_size"], config["min_area"]]).encode())
        return digest.hexdigest()

    def stages(self) -> dict[str, Any]:
        """The stages by name, in the order of the flow."""
        return {
            "masks": self.masks,
            "texture": self.texture,
            "population": self.population,
            "background": self.background,
        }

    def save_pretrained(self, folder: str | Path, *, half: bool = False, card: str | None = None) -> None:
        """Write the cascade; the folder appears complete or not at all.

        Args:
            folder: Replaced if it is a cascade already.
            half: Store network weights as float16: half the size, read back as float32.
            card: Text of the model card.

        Raises:
            CheckpointError: If the folder exists and holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
            raise CheckpointError(
                str(folder), expected="a new folder or a cascade", got="other files", remedy="Choose another folder."
            )
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        index: dict[str, Any] = {"_class_name": "Cascade", "config": asdict(self.config)}
        for name, stage in self.stages().items():
            stage.save_pretrained(temporary / name, half=half)
            index[name] = ["synthaug", type(stage).__name__]
        (temporary / "README.md").write_text(
            card or f"# {self.config.name}\n\nA synthaug cascade without a model card.\n"
        )
        write_atomic(temporary / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Cascade:
        """Load an embedded cascade by name, a folder, or a repository of the Hugging Face hub.

        Raises:
            CheckpointError: If there is no such cascade, or a part of it is missing.
        """
        folder = find_cascade(name)
        index = json.loads((folder / "model_index.json").read_text())
        if index.get("_class_name") != "Cascade":
            raise CheckpointError(str(folder), expected="a synthaug cascade", got=index.get("_class_name"))
        return cls(
            CascadeConfig(**index["config"]),
            masks=MaskDDPM.from_pretrained(folder / "masks"),
            texture=TextureDiffusion.from_pretrained(folder / "texture"),
            background=Background.from_pretrained(folder / "background"),
            population=PopulationSynthesis.from_pretrained(folder / "population"),
        )


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


def _size(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or min(size) < 8:
        raise InputError("size", expected="(Y, X), at least 8 pixels each", got=tuple(size))
    return int(size[0]), int(size[1])


def _blocks(items: list[int], length: int) -> list[list[int]]:
    return [items[i : i + length] for i in range(0, len(items), length)]


def _pad(items: list[Any], length: int) -> list[Any]:
    return items + items[-1:] * (length - len(items))


def _pick(key: SampleKey, count: int, available: int) -> Tensor:
    """`count` indices below `available`, each used once more only when all have been used."""
    generator = key.generator()
    rounds = [torch.randperm(available, generator=generator) for _ in range(-(-count // available))]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *rounds])[:count]

"""What an experiment compares: arms, budgets, seeds, and how long is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from synthaug.errors import InputError

ARMS = ("none", "real", "real+copy-paste", "synthetic", "both", "real-2d", "real-dense")
NEED_CASCADE = ("real+copy-paste", "synthetic", "both")
VOLUME_ARMS = ("real-2d", "real-dense")
PRIORS = ("ellipsoid", "bezier", "spherical-harmonics")
WITHOUT = ("multiview", "pretraining")
SEGMENTERS = ("monai", "cellpose")

REAL_CELLS = 0.3
"""Share of the annotated cells in the synthetic frames of `both`. None at all taught less about cells that are alike, a half
less about others (`benchmarks/evidence.md`)."""

BESIDE_ALL = 0.125
"""Share of synthetic samples beside all frames of a data set. Half, in place of real ones that are not used up, cost BBBC039
.003, a quarter .002 (`benchmarks/evidence.md`)."""


@dataclass(frozen=True)
class ExperimentConfig:
    """What is compared, and how long is trained.

    Attributes:
        arms: Of `ARMS`.
        num_patches: Budgets: annotated patches (of volumes: annotated planes, one a volume); None for all.
        seeds: How many; a seed decides annotations, cascade, weights, augmentation and stream.
        segmenter: "monai" (the UNet of `segmenter.py` or `train_monai_3d.py`) or "cellpose" (CPnet, 2D).
        also: Folder of another data set, annotated throughout, on which every arm trains that trains on real images; the
            few annotations are repeated until they are as many. What is asked then is whether the arms carry over.
        start: Cascade to adapt (name, folder, hub id), or "scratch". It must not have seen the real images' data set.
        fit_minutes: Of each cascade.
        prior: Of `PRIORS`, in place of the cascade's shapes; None for its own.
        without: Of `WITHOUT`: "multiview" takes spherical harmonics in its place, "pretraining" fits from scratch.
        steps: Optimizer steps of every training.
        batch_size: Samples a step.
        size: ((Z,) Y, X) of patches and synthetic samples.
        crop: (Y, X) of what is cut out of them at random to train on, multiples of 8; by Cellpose, squares of the longer side.
        ratio: Share of synthetic samples in `both` and `real+copy-paste`; None goes by how many annotated patches there are,
            see `ratio_of`.
        real_cells: Share of the annotated cells themselves among those of synthetic samples in `both`; None is `REAL_CELLS` of
            frames and 0 of volumes, of whose cells single planes are known.
        max_reuse: Uses of a synthetic cell.
        learning_rate: Peak rate.
        min_area: Smallest instance that counts, in truth and prediction, pixels (voxels).
        photons: Of a dim camera, see `annotations.dimmed`; None leaves the images as they are.
        voxel_size_um: (Z, Y, X) of volumes in micrometres.
        pretrained: File of segmenter weights that every arm starts from; needed for `none`.
        nbase: Features of Cellpose's network, see `cellpose_segmenter.build_cpnet`.
    """

    arms: tuple[str, ...] = ("real", "real+copy-paste", "synthetic", "both")
    num_patches: tuple[int | None, ...] = (4,)
    seeds: int = 3
    segmenter: str = "monai"
    also: str | None = None
    start: str = "nuclei-2d-u2os"
    fit_minutes: float = 3.0
    prior: str | None = None
    without: tuple[str, ...] = ()
    steps: int = 1500
    batch_size: int = 8
    size: tuple[int, ...] = (192, 192)
    crop: tuple[int, int] = (128, 128)
    ratio: float | None = None
    real_cells: float | None = None
    max_reuse: int = 64
    learning_rate: float = 3e-3
    min_area: int = 20
    photons: float | None = None
    voxel_size_um: tuple[float, float, float] | None = None
    pretrained: str | None = None
    nbase: tuple[int, ...] = (2, 32, 64, 128, 256)

    def __post_init__(self) -> None:
        for name, values, known in (("arms", self.arms, ARMS), ("without", self.without, WITHOUT)):
            if set(values) - set(known):
                raise InputError(name, expected=f"some of {', '.join(known)}", got=", ".join(values))
        if self.segmenter not in SEGMENTERS:
            raise InputError("segmenter", expected=f"one of {SEGMENTERS}", got=repr(self.segmenter))
        if self.prior is not None and self.prior not in PRIORS:
            raise InputError("prior", expected=f"one of {PRIORS}", got=repr(self.prior))
        if not self.arms or self.seeds < 1 or self.steps < 1 or not self.num_patches:
            raise InputError("experiment", expected="an arm, a seed, a step and a budget", got=asdict(self))
        if any(n % 8 or n > m for n, m in zip(self.crop, self.size[-2:])):
            raise InputError("crop", expected=f"multiples of 8, at most {self.size[-2:]}", got=self.crop)
        if set(self.arms) & set(VOLUME_ARMS) and self.ndim == 2:
            raise InputError("arms", expected="arms of frames", got=f"{VOLUME_ARMS} beside size {self.size}")
        if self.ndim == 3 and ("real+copy-paste" in self.arms or self.segmenter == "cellpose"):
            got = "volumes, of whose cells single planes are known"
            raise InputError("real+copy-paste, cellpose", expected="frames", got=got, remedy="Leave them out in 3D.")
        if not 0 <= self.share_of_real_cells <= 1 or (self.ndim == 3 and self.real_cells):
            raise InputError("real_cells", expected="a share in [0, 1], 0 in 3D", got=self.real_cells)
        if self.ndim == 3 and self.also:
            raise InputError("also", expected="frames", got="volumes, of which the arms see different parts")
        if "multiview" in self.without and self.ndim == 2:
            raise InputError("without", expected="multiview in 3D only", got="frames")
        if "none" in self.arms and not self.pretrained:
            raise InputError("arms", expected="pretrained weights beside the arm none", got="no --pretrained")

    @property
    def ndim(self) -> int:
        """2 for frames, 3 for volumes."""
        return len(self.size)

    @property
    def share_of_real_cells(self) -> float:
        """`real_cells`, or what None stands for."""
        if self.real_cells is not None:
            return self.real_cells
        return REAL_CELLS if self.ndim == 2 else 0.0

    def ratio_of(self, num: int | None) -> float:
        """Share of synthetic samples beside so many annotated patches, None for all.

        Half of volumes. Of frames it goes by what real ones still have to tell: a patch that comes again in every batch teaches
        nothing new, and its own dimness and density all the more. Up to four annotated patches make up a sixteenth of the
        samples, every further one a 64th, up to a half; all frames of a data set, hundreds of patches, make up seven eighths.

        >>> [ExperimentConfig().ratio_of(num) for num in (1, 4, 16, 64, None)]
        [0.9375, 0.9375, 0.75, 0.5, 0.125]
        """
        if self.ratio is not None:
            return self.ratio
        if self.ndim == 3:
            return 0.5
        return BESIDE_ALL if num is None else 1 - min(max(num, 4) / 64, 0.5)

    def runs(self) -> list[Run]:
        """All trainings, those without a cascade first."""
        arms = sorted(self.arms, key=lambda arm: (arm in NEED_CASCADE, self.arms.index(arm)))
        return [Run(arm, num, seed) for arm in arms for num in self.num_patches for seed in range(self.seeds)]


@dataclass(frozen=True)
class Run:
    """One training: arm, budget, seed."""

    arm: str
    num: int | None
    seed: int

    @property
    def budget(self) -> str:
        """The budget as text."""
        return "all" if self.num is None else str(self.num)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}-{self.budget}-{self.seed}"

    @property
    def cascade(self) -> str:
        """Name of the cascade it needs."""
        return f"{self.budget}-{self.seed}"

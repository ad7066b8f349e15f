"""Who holds what: labelled images split over silos, evenly or in the ways that hospitals differ.

    iid         every silo a random share
    dirichlet   silo i has the share p_ci of class c, p_c ~ Dirichlet(α, …, α) (arXiv 1909.06335)
    classes     k classes each, the images of a class divided evenly among its silos
    quantity    silo i keeps q_i / max q of its part, q ~ Dirichlet(β, …, β) (arXiv 2102.02079)
    rotation    silo i turns its images by r_i·`rotation` degrees,
    contrast    multiplies their distance from mid-grey by 1 + r_i·`contrast`,
    noise       and adds Gaussian noise of (1 + r_i)/2·`noise` grey levels, r_i from −1 to 1 in even
                steps: as the scanners of N sites differ

The first three say how labels are spread; the others come on top, alone or together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field, model_validator

from diffusion.spec import Spec

Indices = NDArray[np.int64]
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

_AT_LEAST = 20  # images: a silo with fewer cannot train, and the audit needs neighbours


@dataclass(frozen=True)
class Scanner:
    """What one silo's images look like beside the publisher's."""

    degrees: float
    contrast: float
    noise: float

    def __str__(self) -> str:
        return f"{self.degrees:+.1f}°, contrast ×{self.contrast:.2f}, noise {self.noise:.1f}"


class Partition(Spec):
    """[simulation.partition]: how images are spread over silos."""

    labels: Literal["iid", "dirichlet", "classes"] = "iid"
    """How labels are spread."""

    alpha: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Dirichlet's α, for labels = "dirichlet": small = few classes per silo."""

    classes: Annotated[int, Field(ge=1, le=1000)] | None = None
    """k classes per silo, for labels = "classes"."""

    quantity: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """β of the quantity skew: small = very different numbers of images."""

    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """Degrees by which the first and the last silo turn their images, in opposite directions."""

    contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share by which the first silo lowers and the last one raises contrast."""

    noise: Annotated[float, Field(ge=0.0, le=128.0)] = 0.0
    """Standard deviation, in grey levels, of the noise in the last silo's images."""

    @model_validator(mode="after")
    def _numbers_belong_to_labels(self) -> Self:
        for kind, key in (("dirichlet", "alpha"), ("classes", "classes")):
            given = getattr(self, key) is not None
            if given != (self.labels == kind):
                fix = f"leave {key} out" if given else f"add {key} = …"
                raise ValueError(f'labels = "{self.labels}": {fix}')
        return self

    def split(self, labels: Labels, silos: int, seed: int) -> list[Indices]:
        """For each silo the ascending indices of its images.

        Raises ValueError where a silo would hold fewer than twenty.
        """
        rng = np.random.default_rng(seed)
        if self.labels == "dirichlet" and self.alpha is not None:
            parts = dirichlet(labels, silos, self.alpha, seed, _AT_LEAST)
        elif self.labels == "classes" and self.classes is not None:
            parts = by_class(labels, silos, self.classes, rng)
        else:
            shuffled = rng.permutation(len(labels))
            parts = [np.sort(part) for part in np.array_split(shuffled, silos)]
        if self.quantity is not None:
            parts = _thinned(parts, self.quantity, rng)
        if min(len(part) for part in parts) < _AT_LEAST:
            raise ValueError(
                f"{len(labels)} images over {silos} silos leave a silo with fewer than "
                f"{_AT_LEAST}: use fewer silos, or less skew"
            )
        return parts

    @property
    def alters(self) -> bool:
        """Whether silos have scanners that differ."""
        return bool(self.rotation or self.contrast or self.noise)

    def scanner(self, silo: int, silos: int) -> Scanner:
        """That of silo 0 … silos − 1."""
        r = 2.0 * silo / max(1, silos - 1) - 1.0
        return Scanner(r * self.rotation, 1.0 + r * self.contrast, (1.0 + r) / 2.0 * self.noise)

    def altered(self, images: Images, silo: int, silos: int, seed: int) -> Images:
        """The images (uint8 (n, c, h, w)) as the scanner of silo 0 … silos − 1 shows them."""
        if not self.alters:
            return images
        scanner = self.scanner(silo, silos)
        out = _rotated(images, scanner.degrees) if self.rotation else images
        if not (self.contrast or self.noise):
            return out
        values = 127.5 + (out.astype(np.float32) - 127.5) * scanner.contrast
        if self.noise:
            rng = np.random.default_rng([seed, silo])
            drawn = rng.standard_normal(values.shape, dtype=np.float32)
            values += scanner.noise * drawn
        return values.round().clip(0, 255).astype(np.uint8)


def dirichlet(
    labels: Labels, silos: int, alpha: float, seed: int, at_least: int = _AT_LEAST
) -> list[Indices]:
    """Split by class with proportions p_c ~ Dirichlet(α, …, α) per class c (arXiv 1909.06335).

    Small α gives each silo few classes. Proportions are drawn again until every silo holds
    `at_least` images, since a silo with none cannot train; raises ValueError where a hundred draws
    do not give that. Returns for each silo the ascending indices of its images.
    """
    rng = np.random.default_rng(seed)
    for _ in range(100):
        parts = _draw(labels, silos, alpha, rng)
        if min(len(part) for part in parts) >= at_least:
            return parts
    raise ValueError(
        f"{len(labels)} images over {silos} silos with alpha = {alpha} leave a silo with fewer "
        f"than {at_least}: use fewer silos or a larger alpha"
    )


def by_class(labels: Labels, silos: int, classes: int, rng: np.random.Generator) -> list[Indices]:
    """k = `classes` classes per silo; silo i has the k from number i·k on of a shuffled circle.

    Raises ValueError where a class would be nobody's, or where there are fewer than k.
    """
    known = rng.permutation(np.unique(labels))
    if classes > len(known) or silos * classes < len(known):
        raise ValueError(
            f"{silos} silos of {classes} classes each do not fit {len(known)} classes: every "
            "class needs a silo, and no silo can have more than all"
        )
    holders: dict[int, list[int]] = {}
    for silo in range(silos):
        for j in range(classes):
            holders.setdefault(int(known[(silo * classes + j) % len(known)]), []).append(silo)
    shares: list[list[Indices]] = [[] for _ in range(silos)]
    for label, its_silos in sorted(holders.items()):
        members = rng.permutation(np.flatnonzero(labels == label))
        for silo, part in zip(its_silos, np.array_split(members, len(its_silos)), strict=True):
            shares[silo].append(part)
    return [np.sort(np.concatenate(share)) for share in shares]


def histogram(labels: Labels, parts: list[Indices]) -> NDArray[np.int64]:
    """Images per silo and class: [silos, classes]."""
    classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def histogram_text(
    counts: NDArray[np.int64], labelled: bool = True, scanners: Sequence[Scanner] = ()
) -> str:
    """A table of `histogram`: one line per silo, its classes if they are known, its total, and its
    scanner where these differ."""
    width = max(5, len(str(counts.max())) + 1)
    shown = counts if labelled else counts[:, :0]
    head = "silo " + "".join(f"{c:>{width}}" for c in range(shown.shape[1])) + f"{'all':>8}"
    lines = [
        f"{silo:>4} " + "".join(f"{n or '·':>{width}}" for n in row) + f"{total:>8}"
        for silo, (row, total) in enumerate(zip(shown, counts.sum(axis=1), strict=True), start=1)
    ]
    if scanners:
        lines = [f"{line}  {scanner}" for line, scanner in zip(lines, scanners, strict=True)]
    return "\n".join([head, *lines])


def histogram_png(counts: NDArray[np.int64], path: Path, cell: int = 36) -> None:
    """`histogram` as a picture: one row per silo, one column per class, the more the darker."""
    silos, classes = counts.shape
    sheet = Image.new("L", (classes * cell + 1, silos * cell + 1), 255)
    draw = ImageDraw.Draw(sheet)
    for (silo, label), n in np.ndenumerate(counts):
        shade = 255 - round(200 * int(n) / max(1, int(counts.max())))
        x, y = label * cell, silo * cell
        draw.rectangle((x, y, x + cell, y + cell), fill=shade, outline=200)
        if n:
            ink = 255 if shade < 128 else 0
            draw.text((x + cell / 2, y + cell / 2), str(n), fill=ink, anchor="mm", font_size=11)
    sheet.save(path, format="PNG")


def _draw(labels: Labels, silos: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    shares: list[list[Indices]] = [[] for _ in range(silos)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet([alpha] * silos))[:-1] * len(members)
        for share, part in zip(shares, np.split(members, cuts.astype(np.int64)), strict=True):
            share.append(part)
    return [np.sort(np.concatenate(share)) for share in shares]


def _thinned(parts: list[Indices], beta: float, rng: np.random.Generator) -> list[Indices]:
    """Keep shares of the parts; drawn again, a hundred times at most, while one is too small."""
    sizes = np.array([len(part) for part in parts])
    for _ in range(100):
        shares = rng.dirichlet([beta] * len(parts))
        kept = np.maximum(1, (sizes * shares / shares.max()).round().astype(np.int64))
        if kept.min() >= _AT_LEAST:
            break
    return [
        np.sort(rng.choice(part, size=n, replace=False))
        for part, n in zip(parts, kept, strict=True)
    ]


def _rotated(images: Images, degrees: float) -> Images:
    """Each channel turned about the centre, bilinear; corners take the image's own edge value."""
    out = np.empty_like(images)
    for image, turned in zip(images, out, strict=True):
        for channel, target in zip(image, turned, strict=True):
            edge = np.concatenate([channel[0], channel[-1], channel[:, 0], channel[:, -1]])
            fill = int(np.median(edge))
            picture = Image.fromarray(channel)
            target[:] = picture.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)
    return out

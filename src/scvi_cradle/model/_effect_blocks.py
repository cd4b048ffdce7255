"""Means and standard deviations of effects on expression, over blocks of labels and particles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from scvi_cradle._constants import COUNTS_PER_CELL
from scvi_cradle.model._devices import block_generator, copies_on, spread
from scvi_cradle.module.base import (
    EffectNoise,
    FastLinear,
    LogNormalizedExpectation,
    Pairs,
    total_count_bias,
)

BLOCK_VALUES = 1_200_000  # particles times labels times genes that are held at once, about what the cache takes
MIN_ROWS, MAX_ROWS = 64, 1024  # particles times labels
BLOCK_LABELS = 4  # labels that share the basal part of the decoder


class Particles(NamedTuple):
    """What the particles of all labels share.

    Parameters
    ----------
    draw_noise
        Draws basal states (the module's ``noise``), shape ``(1, n_particles, n_latent)``.
    covariates
        Covariate design, shape ``(n_particles, 1, n_covariates)``.
    libraries
        Representative library sizes, shape ``(n_libraries,)``.
    library
        The one of every particle, shape ``(n_particles, 1, 1)``.
    generator
        Source of randomness.
    """

    draw_noise: Callable[[], Tensor]
    covariates: Tensor
    libraries: np.ndarray
    library: Tensor
    generator: Generator


class Block(NamedTuple):
    """Draws of some labels.

    Parameters
    ----------
    members
        Their treatments, padded with -1, shape ``(n_labels, width)``.
    basal
        Basal states, shape ``(n_particles, n_labels or 1, n_latent)``.
    noise
        Of their effects, if the module has effects: for every particle, or for every two neighbours.
    dispersion
        Factors of sampled counts that labels share, shape ``(n_particles, 1, n_genes)``.
    number
        Of the block.
    """

    members: Tensor
    basal: Tensor
    noise: EffectNoise | None
    dispersion: Tensor | None
    number: int = 0

    def to(self, device: torch.device) -> Block:
        """Return the block on a device."""
        noise = None if self.noise is None else EffectNoise(*(x.to(device) for x in self.noise))
        dispersion = None if self.dispersion is None else self.dispersion.to(device)
        return Block(self.members.to(device), self.basal.to(device), noise, dispersion, self.number)


class EffectBlocks:
    """Differences of expression between labels and the control.

    The random numbers of a label are drawn at once, so that the sizes of blocks change nothing but rounding; where counts
    are sampled, theirs are drawn block by block, by a generator of the block's own.

    Parameters
    ----------
    module
        A module in evaluation mode.
    particles
        What the particles of all labels share.
    method
        Argument of ``get_average_treatment_effects``.
    sampled
        Whether counts are drawn.
    table
        The table of expectations, if it is read.
    """

    def __init__(
        self,
        module: Any,
        particles: Particles,
        method: str,
        *,
        sampled: bool = False,
        table: LogNormalizedExpectation | None = None,
    ) -> None:
        self.module, self.particles = module, particles
        self.method, self.sampled, self.table = method, sampled, table
        libraries = torch.as_tensor(particles.libraries, dtype=torch.float32, device=particles.library.device)
        self.size = libraries[particles.library]
        self._n_rows = min(MAX_ROWS, max(MIN_ROWS, BLOCK_VALUES // module.decoder.output.out_features))
        self._fast = FastLinear()
        # where a network makes embeddings of masks, it is evaluated once for two particles
        self._per_noise = 2 if module.effects is not None and module.effects.is_amortized else 1

    def on(self, device: torch.device) -> EffectBlocks:
        """Return a copy on a device, which computes what it is given and draws nothing of its own."""
        moved = copy(self)
        (moved.module,), moved._fast = copies_on(self.module, [device]), FastLinear()
        shared = {name: getattr(self.particles, name).to(device) for name in ("covariates", "library")}
        moved.particles, moved.size = self.particles._replace(**shared), self.size.to(device)
        moved.table = None if self.table is None else self.table.to(device)
        return moved

    def differences(
        self, members: Tensor, *, share_basal: bool, devices: Sequence[torch.device] = ()
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield mean and standard deviation over particles of every label minus the first, each ``(n_genes,)``."""
        likelihood, n = self.module.decoder.likelihood, len(self.size)
        basal, dispersion = self.particles.draw_noise().transpose(0, 1), None
        if self.sampled and share_basal and hasattr(likelihood, "draw_dispersion"):
            shape = torch.Size((n, 1, len(likelihood.theta)))
            dispersion = likelihood.draw_dispersion(shape, self.particles.generator)
        base = self._values(self._draw(members[:1], basal, dispersion))  # (n, 1, n_genes)
        workers = [(worker, base.to(worker.size.device)) for worker in ([self.on(d) for d in devices] or [self])]
        blocks = (
            self._draw(codes, basal if share_basal else None, dispersion)._replace(number=1 + i)
            for i, codes in enumerate(members[1:].split(max(BLOCK_LABELS, self._n_rows // n)))
        )
        for means, stds in spread(lambda worker, block: worker[0]._moments(block, worker[1]), workers, blocks):
            yield from zip(means, stds, strict=True)

    def _values(self, block: Block) -> Tensor:
        """Return expression of all particles of a block of one label, shape ``(n_particles, 1, n_genes)``."""
        generator, n = self._generator(block), len(self.size)
        return torch.cat([self.expression(block, rows, generator) for rows in _slices(n, self._n_rows)])

    def _moments(self, block: Block, base: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of the labels of a block minus the control, each ``(n_labels, n_genes)``."""
        block, generator, n = block.to(self.size.device), self._generator(block), len(self.size)
        mean = squares = torch.zeros((), dtype=torch.float64)
        for rows in _slices(n, self._n_rows // len(block.members)):
            difference = self.expression(block, rows, generator).sub_(base[rows])
            center = difference.mean(0)
            apart = difference.sub_(center).square_().sum(0)
            shift, share = center.cpu().double() - mean, len(difference) / (rows.start + len(difference))
            squares = squares + apart.cpu().double() + shift.square() * (rows.start * share)
            mean = mean + shift * share
        return mean.float().numpy(), (squares / n).sqrt().float().numpy()

    def _generator(self, block: Block) -> Generator | None:
        """Return the source of a block's sampled counts."""
        if not self.sampled:
            return None
        return block_generator(self.particles.generator.initial_seed(), block.number, self.size.device)

    def _draw(self, members: Tensor, basal: Tensor | None, dispersion: Tensor | None = None) -> Block:
        """Draw the random numbers of labels, label by label."""
        module, generator, n = self.module, self.particles.generator, len(self.size)
        states, noises = [], []
        for row in members:
            if basal is None:
                states.append(self.particles.draw_noise().transpose(0, 1))
            if module.effects is not None:
                shape = (-(-n // self._per_noise), int((row >= 0).sum()), module.n_latent)
                noises.append(module.effects.draw_noise(shape, generator))
        noise = EffectNoise(*(torch.cat(x, 1) for x in zip(*noises, strict=True))) if noises else None
        return Block(members, torch.cat(states, 1) if basal is None else basal, noise, dispersion)

    def decode(self, block: Block, rows: slice) -> Tensor:
        """Return outputs of the decoder of some particles of a block, shape ``(n_rows, n_labels, n_genes)``."""
        noise = {}
        if block.noise is not None:
            drawn = slice(rows.start // self._per_noise, -(-rows.stop // self._per_noise))
            noise["effect_noise"] = EffectNoise(*(x[drawn] for x in block.noise))
        with self._fast:
            parts = self.module.prior(Pairs.from_members(block.members), block.basal[rows], **noise)
            return self.module.decoder(parts, self.particles.covariates[rows])

    def expression(self, block: Block, rows: slice, generator: Generator | None = None) -> Tensor:
        """Return (expected or sampled) expression on the scale of the effects, shape ``(n_rows, n_labels, n_genes)``."""
        output, likelihood = self.decode(block, rows), self.module.decoder.likelihood
        if self.table is not None:
            return self.table(output.log_softmax(-1), self.particles.library[rows])
        values = likelihood.mean(output, self.size[rows])
        if self.sampled:
            shared = () if block.dispersion is None else (block.dispersion[rows],)
            values = likelihood.sample(values, generator, *shared)
        if self.method == "mean":
            return values
        return torch.log2(1 + COUNTS_PER_CELL * values / values.sum(-1, keepdim=True).clamp_min(1))

    def bias(self, members: Tensor) -> float:
        """Return the largest ``total_count_bias`` of a label, averaged over the particles."""
        n, theta = len(self.size), self.module.decoder.likelihood.theta
        largest, basal = 0.0, self.particles.draw_noise().transpose(0, 1)
        for codes in members.split(max(1, self._n_rows // n)):
            output = self.decode(self._draw(codes, basal), slice(0, n))
            bias = total_count_bias(output.softmax(-1), theta, self.size[:, :, 0])
            largest = max(largest, float(bias.mean(0).max()))
        return largest


def _slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices of an even size, so that no two particles of one noise are parted."""
    size = max(2, size // 2 * 2)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))

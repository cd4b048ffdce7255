"""A training step of CRADLE-VAE on a simulated batch: our module, the plain transcriptions and SCVI.

All sides of CRADLE-VAE get the same weights and the same draws; losses, terms and gradients are compared before anything is
timed: gradients in double precision, since in single precision a pre-activation of 1e-7 may fall on either side of the
LeakyReLU's kink.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from _plain_cradle import Noise, PlainCradle
from scvi.module import VAE

from scvi_cradle import presets
from scvi_cradle.module import CradleVAEModule

TERMS = ("reconstruction", "kl_basal", "kl_treatment", "kl_artifact", "cf")
FAILED_SHARE, DOUBLE_SHARE, CONTROL_SHARE = 0.15, 0.1, 0.05


@dataclass(frozen=True)
class Size:
    """Size of a problem; the widths are the published ones."""

    genes: int = 1_187
    treatments: int = 722
    batch: int = 512
    particles: int = 5
    latent: int = 200
    hidden: int = 400
    counts_per_gene: float = 4.0
    seed: int = 0


BFLOAT16 = "bfloat16"
S = Size()  # 56 % of the counts are not 0
L = Size(genes=19_018, treatments=105, counts_per_gene=0.25)  # 16 %


class Batch:
    """A simulated batch in the forms that the two sides take."""

    def __init__(self, args: Size) -> None:
        rng = np.random.default_rng(args.seed)
        n, t = args.batch, args.treatments
        n_doubles = t // 4
        doubles = np.stack([rng.choice(t, 2, replace=False) for _ in range(n_doubles)])
        singles = np.stack([np.arange(t), np.full(t, -1)], axis=1)
        self.members = np.concatenate([[[-1, -1]], singles, doubles])
        kind = rng.choice(3, n, p=[CONTROL_SHARE, 1 - CONTROL_SHARE - DOUBLE_SHARE, DOUBLE_SHARE])
        label = np.select(
            [kind == 0, kind == 1], [np.zeros(n, int), 1 + rng.integers(0, t, n)], 1 + t + rng.integers(0, n_doubles, n)
        )
        share = rng.dirichlet(np.full(args.genes, 0.5))
        library = rng.lognormal(math.log(args.counts_per_gene * args.genes), 0.4, (n, 1))
        x = rng.poisson(rng.gamma(1.0, share * library))
        failed = rng.random(n) < FAILED_SHARE
        self.reference_labels = np.flatnonzero(rng.random(len(self.members)) < 0.95)
        self.profiles = rng.poisson(share * library.mean() * 0.4, (len(self.reference_labels), args.genes)).astype(
            np.float32
        )
        self.moments = np.log1p(x).mean(0), np.maximum(np.log1p(x).std(0), 0.1)
        self.n_obs = rng.integers(100, 400, t).astype(np.float32)
        self.n_failed = float(self.n_obs.sum() * FAILED_SHARE)
        row = np.full(len(self.members), -1)
        row[self.reference_labels] = np.arange(len(self.reference_labels))
        dosage = np.zeros((n, t), dtype=np.float32)
        for i, members in enumerate(self.members[label]):
            dosage[i, members[members >= 0]] = 1
        self.ours = {
            "X": torch.as_tensor(x, dtype=torch.float32),
            "perturbation": torch.as_tensor(label)[:, None],
            "artifact": torch.as_tensor(failed, dtype=torch.float32)[:, None],
            "batch": torch.zeros(n, 1),
        }
        reference = np.where(row[label][:, None] >= 0, self.profiles[row[label]], 0)
        self.plain = {
            "x": self.ours["X"],
            "dosage": torch.as_tensor(dosage),
            "artifact": self.ours["artifact"],
            "reference": torch.as_tensor(reference),
            "has_reference": torch.as_tensor(row[label] >= 0),
        }
        self.treatments = np.flatnonzero((dosage != 0).any(0))


def make_ours(args: Size, batch: Batch) -> CradleVAEModule:
    settings = dict(presets.PAPER) | {"n_latent": args.latent, "n_hidden": args.hidden, "n_particles": args.particles}
    settings |= {"embedding_n_hidden": args.hidden, "kl": "analytic", "mask_init_logit": 0.0}
    prior = settings.pop("mask_prior_prob")
    del settings["mask_init_logits"], settings["output_bias"]
    module = CradleVAEModule(
        args.genes,
        args.treatments,
        n_levels=(1,),
        n_continuous=0,
        mask_prior_logit=math.log(prior / (1 - prior)),
        **settings,
    )
    with torch.no_grad():
        module.effects.mask.logits.normal_(0, 1)
        module.artifact.posterior.loc.normal_(0, 1)
        module.decoder.likelihood.log_theta.normal_(0, 1)
        module.input_mean.copy_(torch.as_tensor(batch.moments[0]))
        module.input_std.copy_(torch.as_tensor(batch.moments[1]))
        module.n_obs_per_treatment.copy_(torch.as_tensor(batch.n_obs))
        module.n_failed.fill_(batch.n_failed)
    module.set_labels(batch.members)
    module.references.set(batch.reference_labels, batch.profiles, ())
    return module


def parameter_map(ours: CradleVAEModule) -> dict[str, list[torch.Tensor]]:
    """Parameters of the plain side, each as the columns of ours that make it."""
    embedding, encoder, decoder = ours.effects.embedding, ours.encoder, ours.decoder
    layers = {f"embedding.layers.{i + 1}": layer for i, layer in enumerate(embedding.hidden.layers)}
    layers |= {
        "embedding.head": embedding.head.linear,
        "encoder.head": encoder.head.linear,
        "decoder.head": decoder.output,
    }
    layers["decoder.layers.1"] = decoder.hidden.layers[0]
    found = {f"{k}.weight": [v.weight] for k, v in layers.items()} | {f"{k}.bias": [v.bias] for k, v in layers.items()}
    return found | {
        "mask_logits": [ours.effects.mask.logits],
        "u_mean": [ours.artifact.posterior.loc],
        "u_log_std": [ours.artifact.posterior.log_scale],
        "log_theta": [decoder.likelihood.log_theta],
        "embedding.layers.0.weight": [embedding.mask_layer.weight, embedding.treatment.T],
        "embedding.layers.0.bias": [embedding.mask_layer.bias],
        "encoder.layers.0.weight": [encoder.first.weights[k] for k in ("x", "perturbation", "artifact")],
        "encoder.layers.0.bias": [encoder.first.bias],
        "decoder.layers.0.weight": [decoder.first.weights[k] for k in ("basal", "perturbation", "artifact")],
        "decoder.layers.0.bias": [decoder.first.bias],
    }


def make_plain(args: Size, batch: Batch, ours: CradleVAEModule, *, as_published: bool) -> PlainCradle:
    plain = PlainCradle(
        args.genes,
        args.treatments,
        args.latent,
        args.hidden,
        args.particles,
        prior_logit=ours.effects.mask.prior_logit,
        cf_weight=ours.cf_weight,
        as_published=as_published,
    )
    source = parameter_map(ours)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(torch.cat(source[name], dim=-1))
        plain.mean.copy_(ours.input_mean)
        plain.std.copy_(ours.input_std)
        plain.n_obs.copy_(ours.n_obs_per_treatment)
        plain.n_failed.copy_(ours.n_failed)
    return plain


def make_noise(args: Size, generator: torch.Generator | None = None) -> Noise:
    shape = (args.particles, args.treatments, args.latent)
    draw = {"generator": generator}
    return Noise(
        torch.rand(shape, **draw).clamp(1e-6, 1 - 1e-6),
        torch.randn(shape, **draw),
        torch.randn(args.particles, 1, args.latent, **draw),
        torch.randn(args.particles, args.batch, args.latent, **draw),
    )


def step_ours(module: CradleVAEModule, batch: Batch) -> dict[str, torch.Tensor]:
    outputs = module.inference(**module._get_inference_input(batch.ours))
    decoded = module.generative(**module._get_generative_input(batch.ours, outputs))
    output = module.loss(batch.ours, outputs, decoded)
    output.loss.backward()
    eligible = ((batch.plain["artifact"][:, 0] == 0) & batch.plain["has_reference"]).sum()
    n = len(batch.ours["X"])
    return {
        "loss": output.loss.detach(),
        "reconstruction": output.reconstruction_loss_sum / n,
        "kl_basal": output.kl_local_sum / n,
        "kl_treatment": output.extra_metrics["kl_treatment"],
        "kl_artifact": output.extra_metrics["kl_artifact"],
        "cf": output.extra_metrics["cf_kl"] * eligible / n,
    }


def step_plain(plain: PlainCradle, batch: Batch, noise: Noise) -> dict[str, torch.Tensor]:
    terms = plain.loss(**batch.plain, noise=noise)
    terms["loss"].backward()
    return {k: v.detach() for k, v in terms.items()}


def compare(ours: CradleVAEModule, plain: PlainCradle, batch: Batch, noise: Noise) -> tuple[float, float]:
    """Return the largest relative differences of losses and terms, and of gradients (norms, by parameter)."""
    ours.zero_grad()
    plain.zero_grad()
    rows = torch.as_tensor(batch.treatments)
    normals = [noise.embedding[:, rows], noise.artifact, noise.basal]
    with (
        mock.patch.object(torch, "rand", return_value=noise.mask[:, rows]),
        mock.patch.object(torch, "randn", side_effect=normals),
    ):
        a = step_ours(ours, batch)
    b = step_plain(plain, batch, noise)
    loss_error = max(abs(float(a[k] - b[k])) / max(abs(float(b[k])), 1e-6) for k in ("loss", *TERMS))
    source, slope_error = parameter_map(ours), 0.0
    grads = {id(p): p.grad for p in ours.parameters()}
    for name, parameter in plain.named_parameters():
        parts = [_gradient(part, grads) for part in source[name]]
        error = (torch.cat(parts, dim=-1) - parameter.grad).norm() / parameter.grad.norm()
        slope_error = max(slope_error, float(error))
    return loss_error, slope_error


def _gradient(part: torch.Tensor, grads: dict[int, torch.Tensor]) -> torch.Tensor:
    return grads[id(part)] if id(part) in grads else grads[id(part._base)].T


def check(ours: CradleVAEModule, plain: PlainCradle, batch: Batch, noise: Noise) -> dict[str, tuple[float, float]]:
    """Return :func:`compare` in both precisions; raise above 1e-5 (losses) or, in double precision, 1e-4 (gradients)."""
    errors = {"single": compare(ours, plain, batch, noise)}
    torch.set_default_dtype(torch.float64)
    for data in (batch.ours, batch.plain):
        data |= {k: v.double() for k, v in data.items() if v.is_floating_point()}
    wide = copy.deepcopy(ours).double(), copy.deepcopy(plain).double()
    wide[0].references.double()
    errors["double"] = compare(*wide, batch, Noise(*(v.double() for v in noise)))
    torch.set_default_dtype(torch.float32)
    for data in (batch.ours, batch.plain):
        data |= {k: v.float() for k, v in data.items() if v.is_floating_point()}
    if max(errors["single"][0], errors["double"][0]) > 1e-5 or errors["double"][1] > 1e-4:
        msg = f"The two sides do not compute the same objective (losses, gradients: {errors})."
        raise RuntimeError(msg)
    return errors


def gradient_error(module: CradleVAEModule, batch: Batch, setting: str) -> float:
    """Return the largest relative difference (norm, by parameter) that a precision of products makes in the gradients."""
    grads = []
    for precision in ("highest", setting):
        torch.manual_seed(0)
        module.zero_grad()
        with matmul_precision(precision):
            step_ours(module, batch)
        grads.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    return max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in zip(*grads, strict=True))


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """Set the precision of matrix products, and set it back."""
    if setting == BFLOAT16:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_scvi(args: Size) -> VAE:
    """Return the module of SCVI at the same widths."""
    return VAE(args.genes, n_hidden=args.hidden, n_latent=args.latent, n_layers=1, gene_likelihood="nb")


def step_scvi(module: VAE, batch: Batch) -> None:
    n = len(batch.ours["X"])
    tensors = {"X": batch.ours["X"], "batch": torch.zeros(n, 1), "labels": torch.zeros(n, 1)}
    module(tensors)[2].loss.backward()

"""Latent variables and bounds of the likelihood that every model answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scvi_cradle import PerturbedVAE

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
CELLS = np.array([20, 1, 13, 150, 210])


def test_latent_components(case, trained):
    parts = [trained.get_latent_representation(indices=CELLS, component=c) for c in case.components]
    assert all(part.shape == (5, 5) for part in parts)
    np.testing.assert_array_equal(trained.get_latent_representation(indices=CELLS), parts[0])
    full = trained.get_latent_representation(indices=CELLS, component="full")
    np.testing.assert_array_equal(full, np.hstack(parts))
    draws = [trained.get_latent_representation(indices=CELLS, give_mean=False) for _ in range(2)]
    assert (draws[0] != draws[1]).any()
    with pytest.raises(ValueError, match="`component` must be one of"):
        trained.get_latent_representation(component="z")


def test_importance_weighted_bounds(case, trained, with_seed, monkeypatch):
    def bound(seed=0, **kwargs):
        with with_seed(seed):
            return trained.get_iwelbo(indices=cells, **kwargs)

    cells = np.arange(128)
    one = np.mean([bound(seed, n_particles=1) for seed in range(8)], axis=0)
    many = bound(n_particles=40)
    assert many.shape == (128,)
    assert np.isfinite(many).all()
    assert many.mean() > one.mean()
    plain, scored = (bound(n_particles=3, score_global=s) for s in (False, True))
    obs = trained.adata.obs.iloc[cells]
    control = (obs["perturbation"] == "control").to_numpy()
    if case.artifact:
        control = control & ~obs["artifact"].to_numpy()
    globals_ = case.latent_effects and case.settings.get("variant") != "lopez"  # there every cell carries a share
    assert ((plain != scored)[~control].mean() > 0.8) == case.latent_effects
    if globals_:
        np.testing.assert_array_equal(plain[control], scored[control])
    drawn, draw_globals = [], trained.module.draw_globals
    monkeypatch.setattr(
        trained.module, "draw_globals", lambda generator: drawn.append(draw_globals(generator)) or drawn[-1]
    )
    # normal noise comes in blocks of 16 values: 5 latent variables of 16 cells fill them
    np.testing.assert_allclose(bound(n_particles=3, batch_size=64), bound(n_particles=3, batch_size=16), rtol=1e-5)
    assert len(drawn) == 6  # one draw per particle, whatever the batches


def test_the_elbo_is_minus_reconstruction_error_and_divergences(case, trained, with_seed):
    with with_seed(5):
        elbo = trained.get_elbo(return_mean=False, n_particles=2)
    with with_seed(5):
        error = trained.get_reconstruction_error(return_mean=False, n_particles=2)["reconstruction_loss"]
    module, divergence = trained.module, []
    with with_seed(5), torch.inference_mode():
        for tensors, outputs in trained._batches_with_outputs(None, None, None, n_samples=2):
            latent, inputs = outputs["latent"], module._get_inference_input(tensors)
            prior = Normal(torch.as_tensor(latent.prior_mean) + torch.zeros_like(latent.z_basal), 1.0)
            local = kl_divergence(latent.q_basal, prior).sum(-1)
            if case.model is PerturbedVAE:
                noise = Normal(torch.zeros_like(latent.noise), latent.mechanism.variance.sqrt())
                local = local + kl_divergence(latent.q_noise, noise).sum(-1)
            shares = module.global_shares(latent, outputs["pairs"], inputs)
            divergence.append((local + shares).mean(0).numpy())
    np.testing.assert_allclose(elbo, -(error + np.concatenate(divergence)), rtol=1e-5)
    assert trained.get_elbo() == pytest.approx(elbo.mean(), rel=0.05)
    cells = {"indices": CELLS, "return_mean": False}
    assert trained.get_elbo(**cells).shape == (5,)

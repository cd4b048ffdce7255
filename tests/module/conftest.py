"""Recorded noise and networks in numpy, for modules that are compared with their equations cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats


@pytest.fixture
def tape(monkeypatch):
    """Values that torch draws (uniform, normal, gamma), in order; everything in double precision."""
    values, generator = [], torch.Generator().manual_seed(11)

    def recorder(draw, **settings):
        def wrapped(*arguments, **_):
            values.append(draw(*arguments, generator=generator, **settings))
            return values[-1]

        return wrapped

    for name in ("randn", "rand"):
        monkeypatch.setattr(torch, name, recorder(getattr(torch, name), dtype=torch.float64))
    monkeypatch.setattr(torch, "_standard_gamma", recorder(torch._standard_gamma))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield values
    torch.set_default_dtype(default)


class Networks:
    """Encoder and decoder of a module for one cell, in numpy, from the arrays ``w`` of its parameters by name."""

    def __init__(self, module):
        self.w = {k: v.detach().numpy().copy() for k, v in module.state_dict().items()}

    @staticmethod
    def leaky(v):
        return np.where(v > 0, v, 0.01 * v)

    @staticmethod
    def kl_normal(m1, s1, m2, s2):
        return np.sum(np.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5)

    def linear(self, name, value):
        return self.w[f"{name}.weight"] @ value + self.w[f"{name}.bias"]

    def perceptron(self, hidden, name):
        """Activation of the first layer and the residual layers after it."""
        hidden, i = self.leaky(hidden), 0
        while f"{name}.hidden.layers.{i}.weight" in self.w:
            hidden = hidden + self.leaky(self.linear(f"{name}.hidden.layers.{i}", hidden))
            i += 1
        return hidden

    def batch_norm_layers(self, value, name):
        """Layers of scvi-tools in evaluation: linear, batch normalisation by running moments, rectifier."""
        i = 0
        while f"{name}.hidden.fc_layers.Layer {i}.0.weight" in self.w:
            layer = f"{name}.hidden.fc_layers.Layer {i}"
            value = self.linear(f"{layer}.0", value) - self.w[f"{layer}.1.running_mean"]
            value = value / np.sqrt(self.w[f"{layer}.1.running_var"] + 1e-3)
            value = np.maximum(value * self.w[f"{layer}.1.weight"] + self.w[f"{layer}.1.bias"], 0)
            i += 1
        return value

    def head(self, hidden, name):
        """Mean and standard deviation of a Gaussian."""
        mean, log_variance = np.split(self.linear(f"{name}.head.linear", hidden), 2)
        return mean, np.sqrt(np.exp(log_variance) + 1e-4)

    def first(self, name, inputs):
        """First layer on the concatenation of named inputs."""
        weight = np.concatenate([self.w[f"{name}.first.weights.{k}"] for k in inputs], axis=1)
        return weight @ np.concatenate(list(inputs.values())) + self.w[f"{name}.first.bias"]

    def encode(self, x, inputs=None, *, log=True):
        """``q(z | x, inputs)``."""
        x = ((np.log(1 + x) if log else x) - self.w["input_mean"]) / self.w["input_std"]
        if "encoder.first.bias" not in self.w:
            return self.head(self.batch_norm_layers(x, "encoder"), "encoder")
        return self.head(self.perceptron(self.first("encoder", {"x": x} | (inputs or {})), "encoder"), "encoder")

    def decode(self, parts, covariates, *, combine="concat", effect_path="decoder"):
        """Output of the decoder for latent parts by name."""
        if "decoder.first.bias" not in self.w:
            hidden = self.batch_norm_layers(np.concatenate([*parts.values(), covariates]), "decoder")
            return self.linear("decoder.output", hidden)
        inputs = {k: v for k, v in parts.items() if k != "perturbation" or effect_path != "linear"}
        inputs = inputs if combine == "concat" else {"latent": sum(inputs.values())}
        hidden = self.perceptron(self.first("decoder", inputs | {"covariates": covariates}), "decoder")
        if effect_path != "decoder":
            hidden = np.concatenate([hidden, parts["perturbation"]])
        return self.linear("decoder.output", hidden)

    def log_likelihood(self, x, output, likelihood):
        """``log p(x | output)`` of a cell."""
        if likelihood == "gaussian":
            return stats.norm.logpdf(x, output, np.exp(self.w["decoder.likelihood.log_std"]) + 1e-3).sum()
        mu = max(x.sum(), 1) * (np.exp(output) / np.exp(output).sum() + 1e-8)
        if likelihood == "poisson":
            return stats.poisson.logpmf(x, mu).sum()
        theta = np.exp(self.w["decoder.likelihood.log_theta"])
        return stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum()


@pytest.fixture(scope="session")
def networks():
    """Networks in numpy: a class to be called with a module."""
    return Networks

"""Parts of which the modules are made."""

from scvi_cradle.module.base._decoder import NegativeBinomialDecoder
from scvi_cradle.module.base._effects import (
    ArtifactLatent,
    EffectDraw,
    Pairs,
    SparseEffects,
    normal_like,
    straight_through_bernoulli,
)
from scvi_cradle.module.base._elbo import bernoulli_kl_logits, gaussian_kl, importance_weighted_bound
from scvi_cradle.module.base._expectation import LogNormalizedExpectation
from scvi_cradle.module.base._likelihood import (
    count_terms,
    fused_log_prob,
    library_size,
    negative_binomial_log_prob,
    softmax_rates,
)
from scvi_cradle.module.base._networks import BasalEncoder, GaussianHead, ResidualLayers, SplitLinear
from scvi_cradle.module.base._references import References

__all__ = [
    "ArtifactLatent",
    "BasalEncoder",
    "EffectDraw",
    "GaussianHead",
    "LogNormalizedExpectation",
    "NegativeBinomialDecoder",
    "Pairs",
    "References",
    "ResidualLayers",
    "SparseEffects",
    "SplitLinear",
    "bernoulli_kl_logits",
    "count_terms",
    "fused_log_prob",
    "gaussian_kl",
    "importance_weighted_bound",
    "library_size",
    "negative_binomial_log_prob",
    "normal_like",
    "softmax_rates",
    "straight_through_bernoulli",
]

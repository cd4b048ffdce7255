"""Parts of which the modules are made."""

from scvi_cradle.module.base._artifact import ArtifactLatent
from scvi_cradle.module.base._batch_norm import BatchNormDecoder, BatchNormEncoder
from scvi_cradle.module.base._decoder import Decoder, OutputHead
from scvi_cradle.module.base._effects import EffectDraw, EffectNoise, Pairs, TreatmentEffects
from scvi_cradle.module.base._elbo import (
    bernoulli_kl_logits,
    beta_kl,
    beta_log_prob,
    gaussian_kl,
    importance_weighted_bound,
    normal_log_prob,
    summed_gaussian_kl,
)
from scvi_cradle.module.base._embeddings import AmortizedEmbedding, FreeGaussian, PointEmbedding, normal_like
from scvi_cradle.module.base._expectation import LogNormalizedExpectation, total_count_bias
from scvi_cradle.module.base._fast_linear import FastLinear
from scvi_cradle.module.base._likelihood import (
    RATE_FLOOR,
    fused_log_prob,
    library_size,
    negative_binomial_log_prob,
    softmax_rates,
)
from scvi_cradle.module.base._masks import BernoulliMask, BetaBernoulliMask, straight_through_bernoulli
from scvi_cradle.module.base._mmd import multiscale_mmd
from scvi_cradle.module.base._module import LatentDraw, PerturbationModule, posterior_of_cells, sample_normal
from scvi_cradle.module.base._networks import BasalEncoder, GaussianHead, ResidualLayers, SplitLinear
from scvi_cradle.module.base._nnnu import ClassifierBank, hidden_part, nnnu_risk
from scvi_cradle.module.base._observation import (
    GaussianLikelihood,
    MeanSquaredError,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
)
from scvi_cradle.module.base._perceptron import PerceptronDecoder, perceptron
from scvi_cradle.module.base._quantile_decoder import HurdleQuantiles, QuantileHurdleDecoder, start_output
from scvi_cradle.module.base._quantiles import (
    Monotone,
    crossing_penalty,
    increments_of,
    interpolate_quantiles,
    inverse_softplus,
    monotone_quantiles,
    pinball,
    quantile_mean,
    quantile_median,
)
from scvi_cradle.module.base._references import References
from scvi_cradle.module.base._scm import (
    CausalDraw,
    LatentCausalModel,
    Mechanism,
    noise_kl,
    solve_columns,
    solve_in_order,
)

__all__ = [
    "RATE_FLOOR",
    "AmortizedEmbedding",
    "ArtifactLatent",
    "BasalEncoder",
    "BatchNormDecoder",
    "BatchNormEncoder",
    "BernoulliMask",
    "BetaBernoulliMask",
    "ClassifierBank",
    "CausalDraw",
    "Decoder",
    "EffectDraw",
    "EffectNoise",
    "FastLinear",
    "FreeGaussian",
    "GaussianHead",
    "GaussianLikelihood",
    "HurdleQuantiles",
    "LatentCausalModel",
    "LatentDraw",
    "LogNormalizedExpectation",
    "MeanSquaredError",
    "Mechanism",
    "Monotone",
    "NegativeBinomialLikelihood",
    "OutputHead",
    "Pairs",
    "PerceptronDecoder",
    "PerturbationModule",
    "PointEmbedding",
    "PoissonLikelihood",
    "QuantileHurdleDecoder",
    "References",
    "ResidualLayers",
    "SplitLinear",
    "TreatmentEffects",
    "bernoulli_kl_logits",
    "beta_kl",
    "beta_log_prob",
    "crossing_penalty",
    "fused_log_prob",
    "gaussian_kl",
    "hidden_part",
    "importance_weighted_bound",
    "increments_of",
    "interpolate_quantiles",
    "inverse_softplus",
    "library_size",
    "monotone_quantiles",
    "multiscale_mmd",
    "negative_binomial_log_prob",
    "nnnu_risk",
    "noise_kl",
    "normal_like",
    "normal_log_prob",
    "perceptron",
    "pinball",
    "posterior_of_cells",
    "quantile_mean",
    "quantile_median",
    "sample_normal",
    "softmax_rates",
    "solve_columns",
    "solve_in_order",
    "start_output",
    "straight_through_bernoulli",
    "summed_gaussian_kl",
    "total_count_bias",
]

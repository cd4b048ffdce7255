"""Parts of which the modules are made."""

from scvi_cradle.module.base._artifact import ArtifactLatent
from scvi_cradle.module.base._batch_norm import BatchNormDecoder, BatchNormEncoder
from scvi_cradle.module.base._decoder import Decoder, OutputHead
from scvi_cradle.module.base._effects import EffectDraw, Pairs, TreatmentEffects
from scvi_cradle.module.base._elbo import (
    bernoulli_kl_logits,
    beta_kl,
    beta_log_prob,
    gaussian_kl,
    importance_weighted_bound,
    normal_log_prob,
)
from scvi_cradle.module.base._embeddings import AmortizedEmbedding, FreeGaussian, PointEmbedding, normal_like
from scvi_cradle.module.base._expectation import LogNormalizedExpectation
from scvi_cradle.module.base._likelihood import (
    count_terms,
    fused_log_prob,
    library_size,
    negative_binomial_log_prob,
    softmax_rates,
)
from scvi_cradle.module.base._masks import BernoulliMask, BetaBernoulliMask, straight_through_bernoulli
from scvi_cradle.module.base._mmd import multiscale_mmd
from scvi_cradle.module.base._module import LatentDraw, PerturbationModule, posterior_of_cells, sample_normal
from scvi_cradle.module.base._networks import BasalEncoder, GaussianHead, ResidualLayers, SplitLinear
from scvi_cradle.module.base._observation import (
    GaussianLikelihood,
    MeanSquaredError,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
)
from scvi_cradle.module.base._perceptron import PerceptronDecoder, perceptron
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
    "AmortizedEmbedding",
    "ArtifactLatent",
    "BasalEncoder",
    "BatchNormDecoder",
    "BatchNormEncoder",
    "BernoulliMask",
    "BetaBernoulliMask",
    "CausalDraw",
    "Decoder",
    "EffectDraw",
    "FreeGaussian",
    "GaussianHead",
    "GaussianLikelihood",
    "LatentCausalModel",
    "LatentDraw",
    "LogNormalizedExpectation",
    "MeanSquaredError",
    "Mechanism",
    "NegativeBinomialLikelihood",
    "OutputHead",
    "Pairs",
    "PerceptronDecoder",
    "PerturbationModule",
    "PointEmbedding",
    "PoissonLikelihood",
    "References",
    "ResidualLayers",
    "SplitLinear",
    "TreatmentEffects",
    "bernoulli_kl_logits",
    "beta_kl",
    "beta_log_prob",
    "count_terms",
    "fused_log_prob",
    "gaussian_kl",
    "importance_weighted_bound",
    "library_size",
    "multiscale_mmd",
    "negative_binomial_log_prob",
    "noise_kl",
    "normal_like",
    "normal_log_prob",
    "perceptron",
    "posterior_of_cells",
    "sample_normal",
    "softmax_rates",
    "solve_columns",
    "solve_in_order",
    "straight_through_bernoulli",
]

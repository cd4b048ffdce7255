"""SAMS-VAE."""

from __future__ import annotations

from typing import Any, Literal

from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS

from scvi_cradle import presets
from scvi_cradle.data import holds_counts
from scvi_cradle.model._effects import EffectsMixin
from scvi_cradle.model._setup import SetupMixin, check_likelihood
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.module import SAMSVAEModule

MODEL_ONLY = ("mask_prior_prob", "mask_init_logits", "output_bias", "encode_combinations")


class SAMSVAE(SetupMixin, TrainingMixin, EffectsMixin):
    """SAMS-VAE: sparse additive mechanism shifts of treatments (Bereket and Karaletsos 2023).

    A cell's state is its basal state plus the sum of its treatments' effects, each a sparse mask times an embedding.
    Arguments that are not given take the value of the preset; the value in brackets is that of the recommended settings.

    Parameters
    ----------
    adata
        AnnData (or MuData) registered with :meth:`setup_anndata` (:meth:`setup_mudata`).
    registry
        Registry to build the model from without data.
    preset
        ``"recommended"`` (default): what was measured to work; ``"paper"``: the published settings for the Replogle
        screen (150,000 steps of 512 cells unless ``train`` is told otherwise).
    n_latent
        Width of each latent part [the square root of treatments times genes, at least 50 and at most 800].
    n_hidden, n_layers_encoder, n_layers_decoder
        Networks [128, 1, 1].
    mask_prior
        ``"bernoulli"`` (recommended), or ``"beta_bernoulli"``: every entry has a probability of its own with a Beta prior.
    mask_prior_prob, mask_prior_logit
        Prior probability of a mask entry being one [0.01], or its log-odds, which may be as low as -1,000
        (``"bernoulli"``). The paper's rule for equal sparsity at any number of cells is the log-odds of
        ``10 ** (-9 / 50 * n)`` for ``n`` cells per treatment.
    mask_beta
        ``(a, b)`` of the Beta prior [(1, 2)].
    mask_prob_posterior
        Posterior of these probabilities: a ``"point"`` (recommended) or a ``"beta"`` distribution.
    mask_init_logits, gs_temperature
        Start of the mask posterior and temperature of its relaxed draws [0, 1].
    prior_weight_per_cell
        Weight of ``log p(m)`` per cell in addition to ``1 / n_t`` (``"bernoulli"``) [0].
    embedding_prior_scale
        Prior standard deviation of treatment embeddings [1].
    posterior
        Variational family. ``"correlated_basal"`` (recommended): the encoder of the basal state sees the effects, and
        each embedding has a Gaussian of its own; ``"correlated_embedding"``: the posterior of an embedding is a network
        of its mask; ``"correlated"``: both; ``"mean_field"``: neither.
    embedding_n_layers, embedding_n_hidden
        Network of ``q(e | m)`` for the ``embedding`` posteriors [4, 400].
    embedding_init_scale
        Start of the standard deviation of ``q(e)`` otherwise [0.1].
    likelihood
        ``"nb"`` (recommended) or ``"poisson"`` for counts; ``"gaussian"`` for other values.
    combine
        ``"concat"`` (recommended) or ``"sum"`` of basal state and effects in the decoder.
    effect_path
        How effects reach the output: by a ``"linear"`` map, so that they add up on the log scale (recommended), through
        the hidden layers of the ``"decoder"`` (published), or ``"both"``.
    draws, n_particles
        One draw of masks and embeddings per ``"cell"`` (recommended) or per ``"batch"``, and the particles [1].
    kl
        ``"analytic"`` (recommended) or ``"sampled"`` divergences.
    encode_combinations
        ``"additive"`` (recommended): a combination has the effects of its treatments; ``"unique"``: it is a treatment of
        its own, and unseen combinations cannot be asked for.
    output_bias
        Start the output bias at the ``"data"``'s log mean gene shares (recommended) or at ``"random"``.

    Raises
    ------
    ValueError
        For an argument that cannot be, and for counts' likelihoods on data that are not counts.

    Examples
    --------
    >>> adata = cradle.datasets.simulate_perturbseq()
    >>> cradle.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation")
    >>> model = cradle.SAMSVAE(adata)
    >>> model.train(split_key="split")
    >>> effects = model.get_perturbation_effects()
    >>> cradle.pl.mask(effects)
    """

    _module_cls = SAMSVAEModule
    _count_only = False

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        preset: Literal["recommended", "paper"] | None = None,
        n_latent: int | None = None,
        n_hidden: int | None = None,
        n_layers_encoder: int | None = None,
        n_layers_decoder: int | None = None,
        mask_prior: str | None = None,
        mask_prior_prob: float | None = None,
        mask_prior_logit: float | None = None,
        mask_beta: tuple[float, float] | None = None,
        mask_prob_posterior: str | None = None,
        mask_init_logits: float | None = None,
        gs_temperature: float | None = None,
        prior_weight_per_cell: float | None = None,
        embedding_prior_scale: float | None = None,
        posterior: str | None = None,
        embedding_n_layers: int | None = None,
        embedding_n_hidden: int | None = None,
        embedding_init_scale: float | None = None,
        likelihood: str | None = None,
        combine: str | None = None,
        effect_path: str | None = None,
        draws: str | None = None,
        n_particles: int | None = None,
        kl: str | None = None,
        encode_combinations: str | None = None,
        output_bias: str | None = None,
    ) -> None:
        given = dict(locals())
        self._architecture, self._training_settings = presets.resolve("SAMSVAE", preset, given)
        presets.check(self._architecture, mask_prior_logit)
        presets.check_mask_prior(self._architecture["mask_prior"], given)
        super().__init__(adata, registry)
        check_likelihood(self._architecture["likelihood"], holds_counts(self._state(REGISTRY_KEYS.X_KEY)))
        self._build_module(
            mask_prior_logit=presets.prior_logit(self._architecture, mask_prior_logit),
            mask_init_logit=self._architecture["mask_init_logits"],
            **{k: v for k, v in self._architecture.items() if k not in MODEL_ONLY},
        )
        self.init_params_ = self._get_init_params(locals())

    def reset_masks(self) -> None:
        """Put the posterior of the masks back to its start (``mask_init_logits``) and keep everything else.

        Masks that close before the networks have learnt what a dimension means hardly reopen: the gradient of a closed
        entry vanishes. Training in rounds from fresh masks recovered more of the masks of the simulation in appendix A.5
        of the paper than one training of the same length.

        Examples
        --------
        >>> model.train(split_key="split", lr=1e-2)  # the same split in every round
        >>> for _ in range(3):
        ...     model.reset_masks()
        ...     model.train(split_key="split", lr=1e-2)
        """
        self.module.effects.mask.reset()

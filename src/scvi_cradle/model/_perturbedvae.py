"""PerturbedVAE."""

from __future__ import annotations

from typing import Any, Literal

from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS

from scvi_cradle import presets
from scvi_cradle._perturbedvae_settings import check_output, check_warmup, split_latent
from scvi_cradle._validation import check_one_of
from scvi_cradle.data import TrainingStatistics, check_pairing, holds_counts
from scvi_cradle.model._causal import CausalMixin
from scvi_cradle.model._effects import EffectsMixin
from scvi_cradle.model._setup import SetupMixin, check_likelihood
from scvi_cradle.module import PerturbedVAEModule

TRAINING = ("n_epochs_kl_warmup", "n_epochs_align_warmup")
MODEL_ONLY = ("control_cells", "control_pairing", "control_partner_key", "sample_latents", "output_bias", *TRAINING)
KL_WEIGHTS = ("kl_weight_responsive", "kl_weight_invariant")
COLLAPSE_NATS = 0.1
MIN_VARIANCE_RATIO, MIN_VARIANCE_RATIO_BESIDE_NOISE = 0.1, 0.02  # of expected to real values
BOUND_FACTOR = 4.0
ALIGNMENT_WEIGHT = {"l2": 0.05, "mmd": 10.0, "none": 0.0}


class PerturbedVAE(SetupMixin, CausalMixin, EffectsMixin):
    r"""PerturbedVAE: invariant latent variables, and responsive ones in a causal model (arXiv 2605.19343).

    Invariant variables :math:`z_\iota` carry the background of a cell; responsive ones :math:`z_\nu` depend on each other
    in the order of an acyclic graph, on :math:`z_\iota`, and on the treatments, which change every mechanism. Cells can be
    aligned with control partners in :math:`z_\iota`. Trained on controls and single perturbations, the model predicts
    combinations from control cells.

    Arguments that are not given take the value of the preset; the value in brackets is that of the recommended settings.
    The paper's text leaves many of them open: ``docs/user_guide/perturbedvae`` says which are inferred.

    Parameters
    ----------
    adata
        AnnData (or MuData) registered with :meth:`setup_anndata` (:meth:`setup_mudata`): log-normalised values (as from
        :func:`scanpy.pp.log1p`), or counts for ``likelihood="nb"``.
    registry
        Registry to build the model from without data.
    preset
        ``"recommended"`` (default): what was measured to work; ``"paper"``: the published settings.
    n_latent
        Total number of latent variables, of which 19 % are responsive (the paper's 20 of 105); instead of the next two.
    n_latent_responsive, n_latent_invariant
        Numbers of responsive and of invariant variables [20, 85].
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder [256, 2].
    mechanism
        ``"mlp"`` (recommended): mechanisms are networks of the treatments; ``"linear"``: those of a combination are sums
        of those of its treatments.
    noise_scale
        Variances of the responsive variables' noise: ``"learned"`` (recommended) for every perturbation, or ``"fixed"``.
    lambda_bound
        None (recommended), or ``"tanh"``: weights of the graph stay within (-1, 1).
    noise_encoder
        Posterior of the responsive variables' noise, from the encoder's output and the treatments: ``"mlp"``
        (recommended), with one hidden layer of ``n_hidden``, or ``"linear"``, without.
    likelihood
        ``"mse"`` (recommended): mean squared error over genes; ``"gaussian"``: a likelihood with a variance per gene;
        ``"nb"``: for counts.
    output_activation
        Of the decoder, for ``"mse"`` and ``"gaussian"``: ``"identity"`` (recommended), ``"softplus"`` (expected values
        are positive: for data that are not centred) or ``"leaky_relu"`` (of slope 0.2).
    output_variance
        For ``likelihood="gaussian"``: ``"learned"`` (recommended) for every gene, or a number, the variance of all.
    alignment
        ``"l2"``: squared distance of the posterior means of :math:`z_\iota` of a cell and of its control
        partner; ``"mmd"``: discrepancy between cells and predictions from their partners, in batches of one
        perturbation, in place of their reconstruction; ``"none"``. Recommended: ``"none"``, as the invariant variables
        collapse when they are aligned with random partners, but ``"l2"`` where a ``control_pairing`` or an
        ``alignment_weight`` is given.
    alignment_weight
        Weight of that term. Default 0.05 (``"mmd"``: 10) beside a mean squared error; for the other likelihoods, which
        add up over genes, it is multiplied by half the number of genes.
    align_stop_grad
        ``"control"``: the partner's mean is not moved by the alignment. None (recommended): both are.
    kl_weight_responsive, kl_weight_invariant
        Weights of the divergences, summed over latent variables. Recommended beside a mean squared error (published:
        1e-2): 8 times the mean variance of genes over their number, four times the weight that makes it a Gaussian
        bound; 1 for the other likelihoods. The smaller they are, the more of the variation between cells is kept.
    n_epochs_kl_warmup, n_epochs_align_warmup
        ``(start, end)`` of linear warm-ups in epochs. Default: from 10 % (alignment: 5 %) to 50 % of the run, which is
        (10, 50) and (5, 50) of 100 epochs.
    control_cells
        ``"included"`` (recommended): control cells are cells of the training like others; ``"partners"``: they are
        partners of others alone, for ``alignment="l2"`` and ``"mmd"``. Beside ``"l2"`` the mechanisms without a treatment
        are then not trained, so that generated controls, and effects as differences from them, extrapolate.
    control_pairing
        Partners of cells: ``"random"``: a training control drawn anew in every epoch; ``"fixed"``: drawn
        once; ``"within:<column of obs>"``: drawn anew among controls of the same batch, cell type, ...; ``"shared"``:
        named in ``control_partner_key``.
    control_partner_key
        Column of ``obs`` with the name of every cell's partner, for ``control_pairing="shared"``.
    sample_latents
        Draw latent variables in generation [True], or take their means.

    Raises
    ------
    ValueError
        For an argument that cannot be, and for ``likelihood="nb"`` on data that are not counts.

    Examples
    --------
    >>> adata = cradle.datasets.simulate_perturbseq()
    >>> sc.pp.normalize_total(adata, target_sum=1e4)
    >>> sc.pp.log1p(adata)
    >>> cradle.PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation")
    >>> model = cradle.PerturbedVAE(adata)
    >>> model.train(split_key="split")
    >>> cells = model.get_generated_expression("G01+G02")
    >>> cradle.pl.causal_graph(model.get_causal_graph())
    """

    _module_cls = PerturbedVAEModule
    _count_only = False

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        preset: Literal["recommended", "paper"] | None = None,
        n_latent: int | None = None,
        n_latent_responsive: int | None = None,
        n_latent_invariant: int | None = None,
        n_hidden: int | None = None,
        n_layers: int | None = None,
        mechanism: str | None = None,
        noise_scale: str | None = None,
        lambda_bound: str | None = None,
        noise_encoder: str | None = None,
        likelihood: str | None = None,
        output_activation: str | None = None,
        output_variance: str | float | None = None,
        alignment: str | None = None,
        alignment_weight: float | None = None,
        align_stop_grad: str | None = None,
        kl_weight_responsive: float | None = None,
        kl_weight_invariant: float | None = None,
        n_epochs_kl_warmup: tuple[float, float] | None = None,
        n_epochs_align_warmup: tuple[float, float] | None = None,
        control_cells: str | None = None,
        control_pairing: str | None = None,
        control_partner_key: str | None = None,
        sample_latents: bool | None = None,
    ) -> None:
        given = dict(locals())
        architecture, training = presets.resolve("PerturbedVAE", preset, given)
        architecture |= split_latent(n_latent, n_latent_responsive, n_latent_invariant, architecture)
        presets.check(architecture, likelihood=("mse", "gaussian", "nb"))
        check_output(*(architecture[k] for k in ("likelihood", "output_activation", "output_variance")))
        for name in TRAINING:
            check_warmup(name, architecture[name])
        check_one_of("sample_latents", architecture["sample_latents"], (True, False))
        check_pairing(architecture["control_pairing"], control_partner_key)
        architecture |= {"control_partner_key": control_partner_key, "output_bias": "data"}
        self._architecture = architecture
        self._training_settings = training | {name: architecture[name] for name in TRAINING}
        super().__init__(adata, registry)
        check_likelihood(architecture["likelihood"], holds_counts(self._state(REGISTRY_KEYS.X_KEY)))
        self._resolve_weights(given)
        settings = {k: v for k, v in self._architecture.items() if k not in MODEL_ONLY}
        self._build_module(**(settings | {k: 1.0 for k in KL_WEIGHTS if settings[k] is None}))
        self.init_params_ = self._get_init_params(locals())

    def _resolve_weights(self, given: dict[str, Any]) -> None:
        """Set what was not given to what suits the likelihood and the partners."""
        settings, sums = self._architecture, self._architecture["likelihood"] != "mse"
        idle = [name for name in ("alignment_weight", "control_pairing") if given[name] not in (None, 0.0, "random")]
        if settings["alignment"] == "none" and idle:
            msg = (
                f"`{idle[0]}` has no meaning with alignment='none'; received {given[idle[0]]!r}: leave one of them out."
            )
            raise ValueError(msg)
        if settings["alignment"] is None:
            asked = settings["control_pairing"] != "random" or settings["alignment_weight"] is not None
            settings["alignment"] = "l2" if asked else "none"
        if settings["control_cells"] == "partners" and settings["alignment"] == "none":
            msg = "`control_cells='partners'` needs an alignment, without which no control cell would be seen in training; received alignment='none': give alignment='l2' or 'mmd', or leave `control_cells` out."
            raise ValueError(msg)
        if settings["alignment_weight"] is None:
            scale = len(self._genes) / 2 if sums and settings["alignment"] == "l2" else 1.0
            settings["alignment_weight"] = ALIGNMENT_WEIGHT[settings["alignment"]] * scale
        for name in KL_WEIGHTS:
            if given[name] is None and sums:
                settings[name] = 1.0

    def _set_statistics(self, statistics: TrainingStatistics, n_train: int) -> None:
        """Take weights of divergences that are left open from the data: four times those of a Gaussian bound."""
        super()._set_statistics(statistics, n_train)
        if not self.is_trained_:
            weight = BOUND_FACTOR * 2.0 * float(statistics.input_variance.mean()) / len(self._genes)
            for i, name in enumerate(KL_WEIGHTS):
                if self._architecture[name] is None:
                    self.module.kl_weights[i] = weight

    def _diagnostic_warnings(self, diagnostics: dict[str, float]) -> list[str]:
        """Return one sentence per sign of a collapse."""
        messages = []
        value = diagnostics["kl_invariant"]
        if value < COLLAPSE_NATS:
            aligned = " or `alignment_weight`" if self.module.alignment == "l2" else ""
            messages.append(
                f"The invariant variables are unused: KL {value:.3g} nats, below {COLLAPSE_NATS}; lower "
                f"`kl_weight_invariant`{aligned}, train longer, or take fewer responsive than invariant variables."
            )
        ratio = diagnostics.get("expected_variance_ratio")
        least = MIN_VARIANCE_RATIO if self._architecture["likelihood"] == "mse" else MIN_VARIANCE_RATIO_BESIDE_NOISE
        if ratio is not None and ratio < least:
            messages.append(
                f"Generated cells of one label are close to one mean: {ratio:.2g} of the real variance between cells, "
                f"below {least}; lower `kl_weight_invariant` and `kl_weight_responsive` (to a tenth, say), or train longer."
            )
        return messages

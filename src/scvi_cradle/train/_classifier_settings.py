"""Settings of the classifiers."""

from __future__ import annotations

from dataclasses import dataclass

from scvi_cradle._validation import check_one_of, check_positive, check_probability
from scvi_cradle.module.base._nnnu import CORRECTIONS, Correction


@dataclass(frozen=True)
class ClassifierSettings:
    """How classifiers are fitted; published are ``lr=1e-4`` and ``patience=None``.

    Parameters
    ----------
    n_hidden, dropout
        Width of the hidden layer; probability to leave out a hidden unit (rounded to 1/256).
    lr, weight_decay
        Of AdamW (decoupled decay).
    max_steps
        Full-batch steps per prevalence, rounded up to a multiple of ``check_every``.
    check_every
        Steps between two looks at the validation cells.
    patience
        Steps in which the validation risk has not fallen by .001 after which a head stops; ``None``: never. The
        weights with the smallest validation risk are restored in any case.
    prevalence_start, prevalence_step, prevalence_min
        The assumed share of positives falls from ``prevalence_start`` in steps until the controls score low enough.
    control_target
        Largest mean probability of the validation controls.
    n_folds
        Folds of the out-of-fold scores.
    correction
        ``"clamp"`` or ``"ascent"``, see :func:`~scvi_cradle.module.base.nnnu_risk`.
    max_negative
        Most controls that a head trains on, and most that it is validated on, drawn at random; ``None``: all.

    Notes
    -----
    In 50 dimensions a few hundred cells are learned by heart within some hundred steps of ``lr=1e-3``: looking often
    finds the best weights, and waiting long for better ones does not pay. On 12 mixtures in 3 simulated data sets (200
    or 800 labelled cells, 30 or 70 % of them moved by .5 to 1.5 standard deviations in 5 of 50 dimensions, 2,000
    controls) the mean AUROC of moved cells out of fold was .787 with the defaults, .768 with ``check_every=100,
    patience=500`` in 2.7 times the time, .783 with ``patience=500`` and .789 with ``lr=3e-4, check_every=50,
    patience=600`` in twice the time; the true direction has .912 (``python benchmarks/classifier_study.py quality``).
    The prevalence found is a screening device, not an estimate: it ended at .15 to .25 where 30 % had moved.
    """

    n_hidden: int = 16
    dropout: float = 0.5
    lr: float = 1e-3
    weight_decay: float = 5e-4
    max_steps: int = 7_000
    check_every: int = 20
    patience: int | None = 200
    prevalence_start: float = 0.9
    prevalence_step: float = 0.05
    prevalence_min: float = 0.05
    control_target: float = 0.15
    n_folds: int = 4
    correction: Correction = "clamp"
    max_negative: int | None = 2_000

    def __post_init__(self) -> None:
        for name in ("n_hidden", "max_steps", "check_every"):
            check_positive(name, getattr(self, name), integer=True)
        for name in ("patience", "max_negative"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name), integer=True)
        check_positive("lr", self.lr)
        check_positive("weight_decay", self.weight_decay, allow_zero=True)
        for name in ("prevalence_start", "prevalence_step", "prevalence_min", "control_target"):
            check_probability(name, getattr(self, name))
        check_one_of("correction", self.correction, CORRECTIONS)
        if not 0 <= self.dropout < 1:
            msg = f"`dropout` must lie in [0, 1); received {self.dropout!r}."
            raise ValueError(msg)
        if self.prevalence_min > self.prevalence_start:
            msg = (
                "`prevalence_min` must not exceed `prevalence_start`; "
                f"received {self.prevalence_min!r} and {self.prevalence_start!r}."
            )
            raise ValueError(msg)
        if not isinstance(self.n_folds, int) or self.n_folds < 2:
            msg = f"`n_folds` must be an integer of 2 or more; received {self.n_folds!r}."
            raise ValueError(msg)

    def prevalence(self, level: int) -> float:
        """Return the assumed share of positives at a level, 0 being the first."""
        return round(self.prevalence_start - level * self.prevalence_step, 12)

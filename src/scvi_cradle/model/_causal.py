"""What PerturbedVAE has learnt: its graph, its programs, and what its blocks know of the perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from scvi_cradle import metrics
from scvi_cradle._constants import CONTROL_UNS_KEY
from scvi_cradle._validation import check_positive
from scvi_cradle.model._base import check_indices
from scvi_cradle.model._control_pairs import ControlPairsMixin
from scvi_cradle.model._draws import as_module_input, covariate_tensors
from scvi_cradle.module.base import Mechanism, solve_columns, solve_in_order

MAX_CELLS = 2_000
MIN_PROBED = 5
N_COMPONENTS = 50


class CausalMixin(ControlPairsMixin):
    """Queries of the causal model."""

    @torch.inference_mode()
    def get_causal_graph(self, threshold: float = 0.25, *, replicates: Sequence[Any] = ()) -> nx.DiGraph:
        r"""Return the graph of the responsive latent variables ("programs").

        An edge :math:`j \to i` is drawn where the mean of :math:`|\Lambda_{\nu\nu}(u)_{ij}|` over the perturbations seen
        in training exceeds the threshold. The graph has no cycles by construction: the order of programs is that of the
        triangular matrix. Scales of latent variables are not identified, and neither are absolute weights: read strong
        edges, and those that replicates share.

        Parameters
        ----------
        threshold
            Least mean absolute weight of an edge.
        replicates
            Further models of the same data (other seeds, other random splits): edges get ``stability``, see
            :meth:`get_edge_stability`.

        Returns
        -------
        Graph with the nodes ``"program_01"``, ``"program_02"``, ... in causal order. Node attribute ``treatments``: names
        (joined by ``", "``) of treatments with training cells of their own whose largest shared effect is that program. Edge attributes
        ``weight`` (mean over perturbations), ``strength`` (mean of absolute weights) and ``stability``.

        Raises
        ------
        ValueError
            If ``threshold`` is negative, or if a replicate cannot be compared.
        """
        check_positive("threshold", threshold, allow_zero=True)
        weight, strength = self._mean_weights()
        names = self._program_names()
        graph = nx.DiGraph(threshold=float(threshold))
        members: dict[str, list[str]] = {name: [] for name in names}
        for treatment, program in self._main_programs().items():
            members[program].append(treatment)
        for name in names:
            graph.add_node(name, treatments=", ".join(members[name]))
        for target, source in zip(*np.nonzero(strength > threshold), strict=True):
            graph.add_edge(
                names[source],
                names[target],
                weight=float(weight[target, source]),
                strength=float(strength[target, source]),
            )
        if replicates:
            stability = self.get_edge_stability(replicates, threshold=threshold)
            for row in stability.itertuples():
                graph.edges[row.source, row.target]["stability"] = float(row.stability)
        return graph

    @torch.inference_mode()
    def get_edge_stability(self, replicates: Sequence[Any], *, threshold: float = 0.25, seed: int = 0) -> pd.DataFrame:
        """Compare the edges of the graph with those of replicates, e.g. of other seeds or of bootstraps of the cells.

        Programs of a replicate are matched one to one with those of this model by the absolute correlation of their
        posterior means in the same cells (at most 2,000 of the data of this model).

        Parameters
        ----------
        replicates
            Trained models of the same genes and treatments.
        threshold
            Least mean absolute weight of an edge, in all models.
        seed
            Seed of the choice of cells.

        Returns
        -------
        DataFrame with a row per edge of this model: ``source``, ``target``, ``weight``, ``strength``, ``stability`` (share
        of replicates with the edge between the matched programs in the same direction) and ``stability_undirected`` (in
        either direction); strongest first. ``attrs["program_correlation"]``: mean correlation of the matched programs over
        replicates. Where it is low, programs differ and edges cannot be compared. ``attrs["density"]``: share of the
        pairs of programs with an edge in a replicate, what ``stability_undirected`` would be by chance (and half of it
        ``stability``).

        Raises
        ------
        ValueError
            If there is no replicate, or if one has other genes, other treatments or another number of programs.
        TypeError
            If a model is given in place of a list of them.
        """
        check_positive("threshold", threshold, allow_zero=True)
        if isinstance(replicates, CausalMixin):
            msg = f"`replicates` must be a list of trained models; received one {type(replicates).__name__}: put it in brackets."
            raise TypeError(msg)
        if not replicates:
            msg = "`replicates` must hold at least one trained model; received none: train models with other seeds."
            raise ValueError(msg)
        weight, strength = self._mean_weights()
        cells = np.arange(self._validate_anndata(None).n_obs)
        cells = np.sort(np.random.default_rng(seed).permutation(cells)[:MAX_CELLS])
        own = self.get_latent_representation(indices=cells, component="responsive")
        directed, undirected, correlations = [], [], []
        for other in replicates:
            if not isinstance(other, type(self)) or other._identity != self._identity:
                msg = f"Replicates must be models with the same genes and treatments and as many programs; received a {type(other).__name__} with others: build them with the same arguments."
                raise ValueError(msg)
            theirs = other.get_latent_representation(self.adata, cells, component="responsive")
            with np.errstate(divide="ignore", invalid="ignore"):  # a program may be constant
                size = np.abs(np.nan_to_num(np.corrcoef(own.T, theirs.T)[: own.shape[1], own.shape[1] :]))
            match = linear_sum_assignment(size, maximize=True)[1]
            correlations.append(size[np.arange(len(match)), match])
            edges = other._mean_weights()[1][np.ix_(match, match)] > threshold
            directed.append(edges)
            undirected.append(edges | edges.T)
        names = self._program_names()
        target, source = np.nonzero(strength > threshold)
        table = pd.DataFrame(
            {
                "source": [names[i] for i in source],
                "target": [names[i] for i in target],
                "weight": weight[target, source],
                "strength": strength[target, source],
                "stability": np.mean(directed, axis=0)[target, source],
                "stability_undirected": np.mean(undirected, axis=0)[target, source],
            }
        ).sort_values("strength", ascending=False, ignore_index=True)
        n_pairs = max(len(names) * (len(names) - 1) / 2, 1)
        table.attrs["density"] = float(np.mean([edges.sum() for edges in directed]) / n_pairs)
        table.attrs["program_correlation"] = dict(
            zip(names, np.mean(correlations, axis=0).astype(float).tolist(), strict=True)
        )
        return table

    @torch.inference_mode()
    def get_latent_programs(self, perturbations: str | Sequence[str] | None = None) -> AnnData:
        r"""Return how perturbations move the responsive latent variables ("programs"), and what programs do to genes.

        The expected response :math:`E[z_\nu \mid z_\iota, u] = A^{-1} \mu + A^{-1} \Lambda_{\nu\iota} z_\iota`, with
        :math:`A = I - \Lambda_{\nu\nu}(u)`, is a shared effect, the same for all cells, and a modulation by the cell's
        context; here both are differences from those of the control.

        Parameters
        ----------
        perturbations
            Labels, also unseen combinations. Default: all labels seen in training but the control, sorted.

        Returns
        -------
        AnnData of shape ``(n_perturbations, n_responsive)``: X the shared effect
        :math:`A(u)^{-1}\mu(u) - A(0)^{-1}\mu(0)`; ``layers["context_mean"]``, ``layers["context_std"]``: mean and standard
        deviation of the difference of modulations over the training controls (at most 2,000); ``layers["noise_std"]``:
        standard deviation of the response given the context; ``obs["program"]``: the program with the largest shared
        effect; ``obs["shared_fraction"]``: the shared part of the mean squared response, 1 where the context does not
        matter (or nothing responds). ``varm["genes"]`` (programs x genes, a DataFrame): change of the output (log2 of a gene's share for counts,
        else its value) when the program moves, from the mean control cell, by one standard deviation of its shared effects
        over the perturbations and of its noise.
        """
        control = self._rule.control_name
        labels = [x for x in self._requested_labels(perturbations) if perturbations is not None or x != control]
        rows = self._pool_sample()
        states = torch.as_tensor(self._library_pool["state_mean"][rows], device=self.module.device)
        mechanism = self._mechanism([control, *labels])
        shared = solve_in_order(mechanism.weights, mechanism.mean)  # (n + 1, d)
        context = mechanism.reduced_context()  # (n + 1, d, n_invariant)
        change, moved = shared[1:] - shared[0], context[1:] - context[0]
        centred = states - states.mean(0)
        covariance = centred.T @ centred / len(states)
        context_mean = moved @ states.mean(0)
        context_variance = torch.einsum("tij,jk,tik->ti", moved, covariance, moved).clamp_min(0.0)
        inverse = solve_columns(mechanism.weights, torch.eye(self.module.n_responsive, device=states.device))
        noise = (inverse.square() @ mechanism.variance[..., None])[..., 0].sqrt()
        shared_square = change.square().sum(-1)
        square = shared_square + (context_mean.square() + context_variance).sum(-1)
        names = self._program_names()
        effects = change.cpu().numpy()
        obs = pd.DataFrame(
            {
                "program": pd.Categorical.from_codes(np.abs(effects).argmax(1), names),
                "shared_fraction": torch.where(square > 0, shared_square / square, 1.0).cpu().numpy(),
            },
            index=pd.Index(labels, dtype=str),
        )
        result = AnnData(effects, obs=obs, var=pd.DataFrame(index=names), uns={CONTROL_UNS_KEY: control})
        result.layers["context_mean"] = context_mean.cpu().numpy()
        result.layers["context_std"] = context_variance.sqrt().cpu().numpy()
        result.layers["noise_std"] = noise[1:].cpu().numpy()
        step = (shared.var(0, unbiased=False) + noise.square().mean(0)).sqrt()
        start = shared[0] + context[0] @ states.mean(0)
        result.varm["genes"] = self._gene_loadings(states.mean(0), start, step, rows)
        return result

    def _pool_sample(self) -> np.ndarray:
        """Return rows of the pool, at most 2,000, that stand for the training controls."""
        weight = self._library_pool["weight"]
        if len(weight) <= MAX_CELLS:
            return np.arange(len(weight))
        return np.sort(np.random.default_rng(0).choice(len(weight), MAX_CELLS, replace=False, p=weight / weight.sum()))

    def _gene_loadings(self, state: Tensor, start: Tensor, step: Tensor, rows: np.ndarray) -> pd.DataFrame:
        """Return the change of the output along every program, programs x genes, at the mean of the covariates."""
        d, module = len(step), self.module
        steps = torch.cat([start[None], start + step.diag()])
        parts = {"invariant": state.expand(1, d + 1, -1), "responsive": steps[None]}
        tensors = as_module_input(covariate_tensors(self._library_pool, rows), module.device)
        module.eval()
        output = module.decoder(parts, module.covariates(tensors).mean(0).expand(d + 1, -1))[0]
        if module.decoder.likelihood.counts:
            output = torch.log_softmax(output, dim=-1) / np.log(2)
        else:
            output = module.decoder.likelihood.mean(output)
        return pd.DataFrame((output[1:] - output[0]).cpu().numpy(), index=self._program_names(), columns=self._genes)

    def get_perturbation_leakage(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None, *, seed: int = 0
    ) -> pd.DataFrame:
        """Test whether perturbation labels can be read off the latent blocks by a linear classifier.

        If the invariant block is what it should be, its accuracy is that of chance. The posterior of the responsive block
        is given the label, so that its accuracy says nothing about held-out labels; it stands beside for comparison.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's held-out cells, if there are two labels with 5 cells among them, else all.
        seed
            Seed of the classifier's own split of these cells (80 % and 20 %, stratified).

        Returns
        -------
        DataFrame indexed by ``"invariant"``, ``"responsive (given the label)"``, ``"hidden"`` (the output of the encoder)
        and ``"expression"`` (50 principal components, or as many as the cells allow), with the columns of
        :func:`scvi_cradle.metrics.linear_probe`.

        Raises
        ------
        ValueError
            If there are not two labels with at least 5 cells.
        """
        self._trained_counts()
        data = self._validate_anndata(adata)
        positions = self._probed_cells() if adata is None and indices is None else check_indices(indices, data)
        positions = np.unique(positions)  # no cell on both sides
        labels = np.asarray(self._observed_labels(data, positions)).astype(str)
        found = pd.Series(labels).value_counts()
        frequent = sorted(found.index[found >= MIN_PROBED])
        if len(frequent) < 2:
            msg = f"A classifier of perturbations needs two labels with at least {MIN_PROBED} cells; received {len(frequent)}: pass more cells."
            raise ValueError(msg)
        kept = np.isin(labels, frequent)
        positions, labels = positions[kept], labels[kept]
        manager = self.get_anndata_manager(data, required=True)
        values = {
            "invariant": self.get_latent_representation(data, positions, component="invariant"),
            "responsive (given the label)": self.get_latent_representation(data, positions, component="responsive"),
            "hidden": self.get_latent_representation(data, positions, component="hidden"),
            "expression": self._comparable(manager.get_from_registry("X")[positions]).toarray(),
        }
        n_components = min(N_COMPONENTS, len(positions) // 2, len(self._genes))
        rows = {
            name: metrics.linear_probe(
                matrix, labels, n_components=n_components if name == "expression" else None, seed=seed
            )
            for name, matrix in values.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _probed_cells(self) -> np.ndarray:
        if self._has_training_data():
            for held_out in (self.test_indices_, self.validation_indices_):
                if held_out is not None and len(held_out):
                    counts = pd.Series(self._observed_labels(self.adata, np.asarray(held_out))).value_counts()
                    if (counts >= MIN_PROBED).sum() >= 2:
                        return np.sort(np.asarray(held_out))
        return np.arange(self.adata.n_obs)

    # ---- the causal model -------------------------------------------------------------------------------------------

    @property
    def _identity(self) -> tuple[list[str], tuple[str, ...], int]:
        """What replicates have in common."""
        return self._genes, self._table.treatments, self.module.n_responsive

    def _program_names(self) -> list[str]:
        n = self.module.n_responsive
        return [f"program_{i + 1:0{max(2, len(str(n)))}d}" for i in range(n)]

    def _main_programs(self) -> dict[str, str]:
        """Return the program with the largest shared effect of every treatment with training cells of its own."""
        counts, names = self._trained_counts(), self._program_names()
        alone = [t for t in self._table.treatments if counts.get(t)]
        mechanism = self._mechanism([self._rule.control_name, *alone])
        shared = solve_in_order(mechanism.weights, mechanism.mean)
        largest = (shared[1:] - shared[0]).abs().argmax(1).tolist()
        return {treatment: names[i] for treatment, i in zip(alone, largest, strict=True)}

    def _mechanism(self, labels: Sequence[str]) -> Mechanism:
        """Return the mechanisms of canonical labels."""
        self.module.eval()
        return self.module.causal(self._pairs_of(list(labels)).dosage(self.module.n_treatments))

    def _mean_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and mean absolute weight of every edge over the perturbations seen in training."""
        labels = [x for x in self._requested_labels(None) if x != self._rule.control_name]
        weights = self._mechanism(labels).weights
        return weights.mean(0).cpu().numpy(), weights.abs().mean(0).cpu().numpy()

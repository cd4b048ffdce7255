"""The many small classifiers of the perturbation probability: how fast and how good.

python benchmarks/classifier_study.py speed      # time per step, of a whole fit, and against a loop over categories
python benchmarks/classifier_study.py quality    # AUROC of moved cells out of fold, under several settings

One thread; process time, which neighbours on the machine lengthen less than wall time. Seeds 0 (speed), 0-2 (quality).
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from scvi_cradle.module.base import nnnu_risk
from scvi_cradle.train import ClassifierSettings, fit_classifiers
from scvi_cradle.train._classifier_heads import Head, _Block, _Dropout, blocks

N_CONTROLS, N_DIMENSIONS = 2_000, 50
SETTINGS = {
    "default": {},
    "patience 500, looks every 100": {"check_every": 100, "patience": 500},
    "patience 500, looks every 20": {"patience": 500},
    "lr 3e-4, patience 600": {"lr": 3e-4, "check_every": 50, "patience": 600},
    "published": {"lr": 1e-4, "check_every": 100, "patience": None},
}


def screen(categories: list[tuple[int, float, float]], rng: np.random.Generator) -> tuple:
    """Latents of controls and of categories (cells, share moved, shift of 5 dimensions), and which cells moved."""
    parts, unlabeled, moved, start = [rng.normal(size=(N_CONTROLS, N_DIMENSIONS))], [], [], N_CONTROLS
    for size, share, shift in categories:
        y, x = rng.random(size) < share, rng.normal(size=(size, N_DIMENSIONS))
        x[y, :5] += shift
        parts.append(x)
        unlabeled.append(np.arange(start, start + size))
        moved.append(y)
        start += size
    z = np.concatenate(parts).astype(np.float32)
    return z, unlabeled, [np.arange(N_CONTROLS)] * len(categories), rng.random(len(z)) < 0.8, moved


def speed() -> None:
    """25 categories of 100 to 1,500 cells, 6 separable and 19 inert."""
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.linspace(100, 1_500, 25).astype(int))
    z, unlabeled, negative, is_train, _ = screen([(n, 1.0, 3.0 * (k < 6)) for k, n in enumerate(sizes)], rng)
    start = time.process_time()
    fit = fit_classifiers(z, unlabeled, negative, is_train)
    print(f"whole fit: {time.process_time() - start:.1f} s; prevalence {fit.prevalence}; steps {fit.steps}")
    pairs = [(u[is_train[u]], v[is_train[v]]) for u, v in zip(unlabeled, negative, strict=True)]
    heads = [Head(u, v, u[:9], v[:9], k, 0.5) for k, (u, v) in enumerate(pairs)]
    dropout, in_bank = _Dropout(0.5, 16, 0), 0.0
    for members in blocks([h.n_rows for h in heads]):
        block = _Block(z, [heads[i] for i in members], ClassifierSettings())
        in_bank += seconds(lambda step, block=block: block.step(dropout, step))
    alone = 0.0
    for u, v in pairs:
        network = nn.Sequential(nn.Linear(N_DIMENSIONS, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=5e-4)
        x_u, x_v = torch.from_numpy(z[u]), torch.from_numpy(z[v])

        def step(_: int, network=network, optimiser=optimiser, x_u=x_u, x_v=x_v) -> None:
            optimiser.zero_grad()
            nnnu_risk(network(x_u).T, network(x_v).T, 0.5).sum().backward()
            optimiser.step()

        alone += seconds(step)
    print(f"one step of 25 categories: {in_bank * 1e3:.1f} ms in blocks, {alone * 1e3:.1f} ms in a loop")


def seconds(step, n: int = 200) -> float:
    """Mean process time of a step."""
    for i in range(10):
        step(i)
    start = time.process_time()
    for i in range(n):
        step(i)
    return (time.process_time() - start) / n


def quality() -> None:
    """12 mixtures, three data sets."""
    categories = [(n, share, shift) for n in (200, 800) for share in (0.3, 0.7) for shift in (0.5, 1.0, 1.5)]
    for name, settings in SETTINGS.items():
        scores, spent = [], 0.0
        for seed in range(3):
            z, unlabeled, negative, is_train, moved = screen(categories, np.random.default_rng(seed))
            start = time.process_time()
            fit = fit_classifiers(z, unlabeled, negative, is_train, ClassifierSettings(**settings), seed=seed)
            spent += time.process_time() - start
            best = [z[u][:, :5].sum(1) for u in unlabeled]
            found = zip(moved, fit.unlabeled_logits, best, fit.prevalence, strict=True)
            scores.append([[roc_auc_score(y, g), roc_auc_score(y, b), p] for y, g, b, p in found])
        mean = np.mean(scores, axis=0)
        print(
            f"{name}: AUROC {mean[:, 0].mean():.3f} (of the true direction {mean[:, 1].mean():.3f}), {spent / 3:.0f} s"
        )
        for category, row in zip(categories, mean, strict=True):
            print(f"  {category}: AUROC {row[0]:.3f} ({row[1]:.3f}), prevalence {row[2]:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"speed": speed, "quality": quality}[sys.argv[1]]()

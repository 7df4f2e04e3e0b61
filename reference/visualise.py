"""Pictures: loss curves, and the activation weights over one user's behaviours (paper fig. 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data import ClickData, Samples, gather_batch
from .files import replacing

if TYPE_CHECKING:
    from .models import DIN
    from .options import Options
    from .training_loop import RunResult

# Okabe-Ito: told apart with any colour vision; one colour per model, fused dashed over unfused.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GRID = "#222222", "#DDDDDD"


def make_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK})
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", **options)


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)


def _smooth(values: np.ndarray, width: int, of: Callable[..., Any] = np.mean) -> tuple[np.ndarray, np.ndarray]:
    """The middle step of each block of ``width`` consecutive steps, and the blocks' means (or another ``of``)."""
    width = max(1, min(width, len(values)))
    blocks = len(values) // width
    return (np.arange(blocks) + 0.5) * width, of(values[: blocks * width].reshape(blocks, width), axis=1)


def loss_curves(results: list[RunResult], path: Path, title: str = "") -> None:
    """Training loss over steps and GAUC over epochs; with fused runs also their distance from the unfused ones."""
    models = list(dict.fromkeys(r.model_name for r in results))
    colour = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(models)}
    unfused = {r.model_name: r for r in results if r.variant == "unfused"}
    pairs = [(r, unfused[r.model_name]) for r in results if r.variant == "fused" and r.model_name in unfused]
    figure, axes = make_figure(5.0 * (3 if pairs else 2), 4.2, 3 if pairs else 2)
    for result in results:
        fused = result.variant == "fused" and result.model_name in unfused
        style = {
            "color": colour[result.model_name],
            "lw": 2.2 if not fused else 1.6,
            "ls": (0, (2, 2)) if fused else "-",
        }
        if fused:
            style["color"] = INK
        steps, means = _smooth(np.asarray(result.losses), max(1, len(result.losses) // 60))
        axes[0].plot(steps, means, label=f"{result.model_name}, {result.variant}", **style)
        gauc = [epoch["gauc"] for epoch in result.epochs]
        axes[1].plot(
            np.arange(1, len(gauc) + 1), gauc, marker="o", ms=5, label=f"{result.model_name}, {result.variant}", **style
        )
    axes[0].set(xlabel="training step", ylabel="negative log-likelihood", title="Training loss")
    axes[1].set(xlabel="epoch", ylabel="GAUC", title="GAUC on held-out users")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)
    if pairs:
        for twin, plain in pairs:
            a, b = np.asarray(twin.losses), np.asarray(plain.losses)
            gap = np.abs(a - b) / np.maximum(np.abs(b), 1e-12)
            steps, worst = _smooth(gap, max(1, len(gap) // 60), np.max)
            axes[2].plot(steps, np.maximum(worst, 1e-9), lw=2.0, color=colour[twin.model_name], label=twin.model_name)
        axes[2].axhline(1e-4, color=INK, ls="--", lw=1.2)
        axes[2].text(0.99, 1.15e-4, "limit 1e-4", ha="right", va="bottom", transform=axes[2].get_yaxis_transform())
        axes[2].set(
            yscale="log", xlabel="training step", ylabel="relative difference", title="Fused against unfused loss"
        )
        axes[2].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.85))
        axes[2].set_ylim(5e-10, max(5e-4, axes[2].get_ylim()[1]))
    for axis in axes:
        axis.grid(color=GRID, lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def pick_user(data: ClickData, behaviours: int) -> Samples | None:
    """The samples of a test user with a full window of behaviours and many categories among the candidates."""
    lengths = data.test.history_lengths()
    best, best_kinds = None, 0
    for user in np.unique(data.test.user[lengths >= min(behaviours, int(lengths.max(initial=0)))])[:400]:
        own = np.flatnonzero(data.test.user == user)
        kinds = len(np.unique(data.item_category[data.test.item[own]]))
        if kinds > best_kinds:
            best, best_kinds = own, kinds
    return None if best is None else data.test.take(best)


def activation_weights(
    model: Any, data: ClickData, path: Path, options: Options, behaviours: int = 18, candidates: int = 8
) -> None:
    """Heat map: one row per candidate, one column per behaviour of one test user, colour = activation weight.

    All candidates meet the same behaviours (the user's most recent ones at the last impression), so that rows differ
    by the candidate alone. Rows are sorted by the predicted probability.
    """
    own = pick_user(data, behaviours)
    if own is None or not len(own):
        return
    last = int(np.argmax(own.stop))
    stop = int(own.stop[last])
    start = max(int(own.start[last]), stop - behaviours)
    unseen = np.setdiff1d(own.item, data.log_item[start:stop])  # a behaviour met again as candidate says little
    shown = _spread_over_categories(data, unseen if len(unseen) else own.item, candidates)
    if len(shown) < candidates:  # next-item tasks test one item a user: fill up with popular ones
        shown = np.concatenate([shown, _popular(data, data.log_item[start:stop], shown, candidates - len(shown))])
    samples = Samples(
        np.full(len(shown), own.user[last]),
        shown,
        np.zeros(len(shown), dtype=np.float32),
        np.full(len(shown), start),
        np.full(len(shown), stop),
    )
    batch = gather_batch(data, samples).to(torch.device(options.device))
    weights, probability = _weights(model, batch, len(shown))
    order = np.argsort(-probability)
    _draw_weights(data, path, shown[order], data.log_item[start:stop], weights[order], probability[order])


@torch.no_grad()
def _weights(model: DIN, batch: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    training = model.training
    model.eval()
    weights = model.activation_weights(batch).float().cpu().numpy().reshape(rows, -1)
    probability = torch.sigmoid(model(batch).float()).cpu().numpy()
    model.train(training)
    return weights, probability


def _spread_over_categories(data: ClickData, items: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` distinct items, taking one of each category in turn."""
    items = np.unique(items)
    category = data.item_category[items]
    turn = np.zeros(len(items), dtype=int)
    for kind in np.unique(category):
        members = np.flatnonzero(category == kind)
        turn[members] = np.arange(len(members))
    return items[np.lexsort((category, turn))][:count]


def _popular(data: ClickData, history: np.ndarray, without: np.ndarray, count: int) -> np.ndarray:
    """The most frequent items of as many categories, half of them met in ``history`` (the latest first), half not."""
    seen = np.bincount(data.train.item, minlength=data.num_items)
    seen[history] = seen[without] = seen[0] = 0
    by_category = np.bincount(data.item_category, weights=seen, minlength=data.num_categories)
    related = list(dict.fromkeys(data.item_category[history[::-1]].tolist()))
    others = [kind for kind in np.argsort(-by_category).tolist() if kind not in related]
    kinds = [*related[: count - count // 2], *others][:count]
    best = [int(np.argmax(np.where(data.item_category == kind, seen, -1))) for kind in kinds]
    return np.array([item for item in best if seen[item] > 0], dtype=without.dtype)


def _name(data: ClickData, item: int, width: int) -> str:
    name = data.item_names[item] if data.item_names else f"item {item}"
    name = name if len(name) <= width else name[: width - 1].rstrip() + "…"
    if data.category_names is None:
        return f"{name} [{data.item_category[item]}]"
    return f"{name} [{data.category_names[data.item_category[item]][:14]}]"


def _draw_weights(
    data: ClickData, path: Path, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, probability: np.ndarray
) -> None:
    centre, label = 0.0, "weight"
    if np.allclose(weights.sum(1), 1.0, atol=1e-3) and not (weights < 0).any():
        # Softmax: what matters is by how much a weight differs from 1/n, which indifferent attention gives to all.
        weights, centre, label = weights * len(columns), 1.0, f"weight relative to uniform (1/{len(columns)})"
    signed = bool((weights < centre).any())
    limit = float(np.abs(weights - centre).max()) or 1.0
    figure, axis = make_figure(4.5 + 0.48 * len(columns), 3.2 + 0.42 * len(rows))
    from matplotlib.colors import TwoSlopeNorm

    # White is indifference: weight 0, or the uniform share. Relative weights cannot fall below 0, so the scale does not.
    low = 0.0 if centre else -limit
    norm = TwoSlopeNorm(vcenter=centre, vmin=low, vmax=centre + limit) if signed else None
    image = axis.imshow(weights, cmap="RdBu_r" if signed else "Reds", norm=norm, aspect="auto")
    if not signed:
        image.set_clim(0.0, limit)
    axis.set_xticks(
        range(len(columns)), [_name(data, int(i), 24) for i in columns], rotation=50, ha="right", fontsize=8
    )
    axis.set_yticks(
        range(len(rows)),
        [f"{_name(data, int(i), 28)}  p={p:.2f}" for i, p in zip(rows, probability, strict=True)],
        fontsize=9,
    )
    axis.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axis.grid(which="minor", color="white", lw=1.5)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel("behaviours, oldest to newest")
    axis.set_ylabel("candidates, by predicted probability")
    axis.set_title(f"Activation weights of one user's behaviours, {data.name}")
    figure.colorbar(image, ax=axis, label=label, shrink=0.85, pad=0.01)
    save_figure(figure, path)

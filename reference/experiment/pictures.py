"""The paper's pictures from trained models: learning curves (fig. 4, 5), control functions (fig. 3), activation weights
(fig. 7) and a map of the item embeddings (fig. 8)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import load_weights
from ..data import ClickData, Samples, gather_batch
from ..models import DIN, build, schema_of
from ..options import Options
from ..training_loop import predict
from ..units import Dice
from ..visualise import COLOURS, GRID, INK, activation_weights, make_figure, pick_user, save_figure
from .laboratory import Laboratory
from .report import Measured

MARKERS = "osD^vPX<>"


def learning_curves(value: dict[str, Any], path: Path) -> None:
    """Training loss over the run and test GAUC after each epoch: mean over seeds, band from the least to the largest."""
    figure, axes = make_figure(13.0, 4.6, 2)
    frame = _frame([float(np.mean(row["gauc"])) for row in value["rows"]])
    for place, row in enumerate(value["rows"]):
        style = {"color": COLOURS[place % len(COLOURS)], "ls": "-" if place < len(COLOURS) else "--", "lw": 1.8}
        gauc = np.array([run for run in row["gauc_by_epoch"] if run])
        if not gauc.size:
            continue
        loss = np.mean([run for run in row["training_loss"] if run], axis=0)
        epochs = np.arange(1, gauc.shape[1] + 1)
        axes[0].plot((np.arange(len(loss)) + 0.5) * len(epochs) / len(loss), loss, label=row["label"], **style)
        mean = float(np.mean(row["gauc"]))
        label = f"{row['label']}: {mean:.3f}, below the frame" if frame and mean < frame[0] else row["label"]
        axes[1].plot(epochs, gauc.mean(0), marker=MARKERS[place % len(MARKERS)], ms=5, label=label, **style)
        axes[1].fill_between(epochs, gauc.min(0), gauc.max(0), color=style["color"], alpha=0.1, lw=0)
    axes[0].set(xlabel="epoch", ylabel="negative log-likelihood", title="Training loss")
    axes[1].set(xlabel="epoch", ylabel="GAUC", title="Test GAUC after each epoch, mean and range over seeds")
    if frame:
        axes[1].set_ylim(*frame)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in axes:
        axis.grid(color=GRID, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(value["data"].split(":")[0])
    save_figure(figure, path)


def _frame(means: list[float]) -> tuple[float, float] | None:
    """Limits of the GAUC axis where one model lies far below all others: without it these can be told apart."""
    lowest, *others = sorted(means)
    if len(others) < 3:
        return None
    width = others[-1] - others[0]
    return (others[0] - width, others[-1] + 0.5 * width) if others[0] - lowest > 2 * width else None


def of_din(laboratory: Laboratory, measured: Measured, options: Options, out: Path, prefix: str) -> None:
    """The pictures of one trained DIN: that of the first seed, after the epoch that was chosen."""
    data = laboratory.parts["test"]
    chosen = replace(measured.choice.options, seed=options.seed)
    weights = laboratory.paths(measured.row.model, chosen, "test", measured.choice.epoch)[2]
    if not weights.is_file():  # that run diverged: its row says so
        return
    model = build(measured.row.model, schema_of(data), chosen.model_config())
    load_weights(weights, model)
    assert isinstance(model, DIN)
    model.to(torch.device(chosen.device)).eval()
    activation_weights(model, data, out / f"{prefix}-weights.png", chosen)
    embedding_map(model, data, out / f"{prefix}-embeddings.png", chosen)
    control_functions(model, data, out / f"{prefix}-control.png", chosen)


def embedding_map(
    model: DIN, data: ClickData, path: Path, options: Options, categories: int = 9, per_category: int = 100
) -> None:
    """t-SNE of item embeddings, coloured by category and by one user's predicted click probability (fig. 8).

    The most frequent items of the most frequent categories, each as the unit meets it: [item ; category].
    """
    from sklearn.manifold import TSNE

    seen = np.bincount(data.train.item, minlength=data.num_items) + np.bincount(data.log_item, minlength=data.num_items)
    by_category = np.bincount(data.item_category, weights=seen, minlength=data.num_categories)
    by_category[0] = 0
    shown = np.argsort(-by_category)[: min(categories, int((by_category > 0).sum()))]
    parts = []
    for kind in shown:
        members = np.flatnonzero((data.item_category == kind) & (seen > 0))
        parts.append(members[np.argsort(-seen[members], kind="stable")[:per_category]])
    items = np.concatenate(parts)
    own = pick_user(data, 20)
    if len(items) < 10 or own is None:
        return
    last = int(np.argmax(own.stop))
    candidates = Samples(
        np.full(len(items), own.user[last]),
        items,
        np.zeros(len(items), dtype=np.float32),
        np.full(len(items), own.start[last]),
        np.full(len(items), own.stop[last]),
    )
    probability = 1.0 / (1.0 + np.exp(-predict(model, data, candidates, options).astype(np.float64)))
    device = model.items.item.weight.device
    with torch.no_grad():
        ids = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (items, data.item_category[items]))
        table = model.items(*ids).float().cpu().numpy()
    place = TSNE(init="pca", perplexity=min(30, (len(items) - 1) // 3), random_state=0).fit_transform(table)

    figure, axes = make_figure(14.0, 5.8, 2)
    history = np.unique(data.item_category[data.log_item[own.start[last] : own.stop[last]]])
    at = 0
    for number, (kind, members) in enumerate(zip(shown, parts, strict=True)):
        own_points = place[at : at + len(members)]
        at += len(members)
        name = data.category_names[kind] if data.category_names else f"category {kind}"
        axes[0].scatter(
            *own_points.T,
            s=16,
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            alpha=0.8,
            lw=0,
            label=name + (" (in the user's history)" if kind in history else ""),
        )
    axes[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5)
    axes[0].set_title("by category")
    drawn = axes[1].scatter(*place.T, s=16, c=probability, cmap="viridis", lw=0)
    figure.colorbar(drawn, ax=axes[1], label="predicted click probability")
    axes[1].set_title("by what DIN predicts for one user")
    for axis in axes:
        axis.set_xticks([]), axis.set_yticks([])
    figure.suptitle(f"t-SNE of item embeddings, {data.name}")
    save_figure(figure, path)


@torch.no_grad()
def control_functions(
    model: DIN, data: ClickData, path: Path, options: Options, channels: int = 3, samples: int = 4096
) -> None:
    """What decides between the two slopes of Dice and of PReLU, over the real inputs of the first MLP layer (fig. 3).

    Both are y = p(s)·s + (1 − p(s))·α·s. PReLU's p steps at 0 wherever the inputs lie; Dice's is a sigmoid centred on
    their mean, as wide as they are. For a model trained with another activation Dice's curve is the one it would have.
    """
    inputs: list[torch.Tensor] = []
    hook = model.mlp.linears[0].register_forward_hook(lambda module, given, result: inputs.append(result.float().cpu()))
    try:
        model(gather_batch(data, data.test.take(slice(0, samples))).to(torch.device(options.device)))
    finally:
        hook.remove()
    s = inputs[0].numpy()
    activation = model.mlp.activations[0]
    if isinstance(activation, Dice):
        mean, var = (x.float().cpu().numpy() for x in (activation.running_mean, activation.running_var))
    else:
        mean, var = s.mean(0), s.var(0)
    # The channels whose inputs lie farthest below 0, nearest to 0 and farthest above, in units of their own width.
    order = np.argsort(mean / np.sqrt(var + 1e-8))
    picked = order[(np.linspace(0.02, 0.98, channels) * (len(order) - 1)).astype(int)]
    figure, axes = make_figure(4.4 * channels, 3.8, channels)
    for axis, channel in zip(np.atleast_1d(axes), picked, strict=True):
        low, high = np.quantile(s[:, channel], [0.001, 0.999])
        low, high = min(low, -0.1 * (high - low)), max(high, 0.1 * (high - low))  # 0 stays in view
        grid = np.linspace(low, high, 400)
        density, edges = np.histogram(s[:, channel], bins=60, range=(low, high))
        axis.fill_between(edges[:-1], density / density.max(), step="post", color=GRID, label="inputs of the layer")
        axis.plot(grid, grid > 0, color=COLOURS[1], lw=2, label="PReLU")
        dice = 1.0 / (1.0 + np.exp(-(grid - mean[channel]) / np.sqrt(var[channel] + 1e-8)))
        axis.plot(grid, dice, color=COLOURS[0], lw=2, label="Dice")
        axis.set(xlabel="s", ylabel="p(s)", title=f"channel {channel}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.axvline(0, color=INK, lw=0.6, ls=":")
    np.atleast_1d(axes)[0].legend(frameon=False, loc="upper left")
    figure.suptitle(f"Control functions on the inputs of the first MLP layer, {data.name}")
    save_figure(figure, path)

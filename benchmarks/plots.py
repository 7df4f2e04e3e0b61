"""Pictures of the results: times against the fused version, growth with one size at a time, distance from the floors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .record import read
from .report import Race, fused_of, races, rivals

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and nothing in the file depends on the day or the process: a redrawn picture is the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "din_kernels", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    _pyplot().close(figure)
    # Matplotlib ends lines with spaces, which tools that look after text files dislike.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _label(race: Race) -> str:
    fused = fused_of(race)
    return f"{fused.suite.replace('_', ' ')} {fused.workload} {fused.measure}" + (
        "" if fused.dtype == "float32" else f" {fused.dtype}"
    )


def speedups(found: list[Race], path: Path) -> Path:
    """One row of points for each race: every other contestant's time as a multiple of the fused one, quartiles as lines."""
    pyplot = _pyplot()
    names = list(dict.fromkeys(r.contestant for race in found for r in rivals(race)))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.3 * len(found)))
    for place, race in enumerate(found):
        for r in rivals(race):
            assert r.times_fused is not None
            ratio, index = r.times_fused, names.index(r.contestant)
            axes.errorbar(
                ratio.median, place, xerr=[[ratio.median - ratio.low], [ratio.high - ratio.median]], fmt="osD^v<>"[index // 8],
                color=_COLOURS[index % len(_COLOURS)], markersize=4, elinewidth=1, label=r.contestant,
            )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.set_yticks(range(len(found)), [_label(race) for race in found])
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of the fused version's (left of 1: faster than it)")
    axes.grid(axis="x", alpha=0.3, which="both")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _save(figure, path)


def growth(found: list[Race], path: Path) -> Path:
    """Time against batch (N), longest list (L), embedding width (D) and first hidden layer (H), each varied alone."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 4, figsize=(11, 3), sharey=True)
    sizes = {
        "N": ("batch", "batch"), "L": ("longest", "longest list"), "D": ("dim", "embedding width"),
        "H": ("hidden", "first hidden layer"),
    }  # fmt: skip
    for axes, (letter, (key, title)) in zip(panels, sizes.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for race in found:
            fused = fused_of(race)
            if fused.workload.partition("=")[0] in (letter, "base"):
                value = int(str(fused.details[key]).partition("-")[0])
                for r in race:
                    if r.time is not None:
                        lines.setdefault(r.contestant, []).append((value, r.time.median * 1e3))
        for index, (name, points) in enumerate(lines.items()):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, marker="o", markersize=3, color=_COLOURS[index % len(_COLOURS)], label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel(title)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("ms, forward + backward")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _save(figure, path)


def floors(found: list[Race], path: Path) -> Path:
    """For each race the share of the fused time that each limit alone would take; a bar that reaches 100 % binds."""
    pyplot = _pyplot()
    limits = ("bytes", "arithmetic", "special", "issue")
    height = 0.8 / len(limits)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.4 * len(found)))
    for index, limit in enumerate(limits):
        places, shares = [], []
        for place, race in enumerate(found):
            fused = fused_of(race)
            if fused.floor and limit in fused.floor and fused.time:
                places.append(place + (index - 1.5) * height)
                shares.append(100 * fused.floor[limit] / fused.time.median)
        if shares:
            axes.barh(places, shares, height, color=_COLOURS[index], label=limit)
    axes.set_yticks(range(len(found)), [_label(race) for race in found])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the fused version's time that each limit of this machine would take by itself")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _save(figure, path)


def draw(results: Path) -> list[Path]:
    """Write the pictures of every result file that exists."""
    made = []
    for kind in ("cpu", "gpu"):
        if not (results / f"{kind}.json").exists():
            continue
        _, records = read(results / f"{kind}.json")
        suites = ("local_activation", "scoring", "training_step", "dice", "sparse_update")
        found = [race for suite in suites for race in races(records, suite)]
        swept = races(records, "sweep")
        with_floor = [race for race in found if fused_of(race).floor]
        if found:
            made.append(speedups(found, results / f"{kind}-speedup.svg"))
        if with_floor:
            made.append(floors(with_floor, results / f"{kind}-floors.svg"))
        if swept:
            made.append(growth(swept, results / f"{kind}-growth.svg"))
    return made

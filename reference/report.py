"""The table at the end of a run, and ``metrics.json``."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from .data import ClickData
from .files import write_json
from .metrics import Scores, rela_impr
from .options import Options
from .training_loop import RunResult

# Range of DIN's test GAUC over seeds 1-4 with the demo's settings (0.7185 to 0.7197; BaseModel 0.7187 to 0.7195).
SEED_RANGE = 0.0012


def loss_difference(one: list[float], other: list[float]) -> float:
    """Largest relative difference of two loss curves, step by step: max |a − b| / |b|."""
    if len(one) != len(other):
        raise ValueError(f"the loss curves have {len(one)} and {len(other)} steps: the runs cannot be compared")
    return max((abs(a - b) / max(abs(b), 1e-12) for a, b in zip(one, other, strict=True)), default=0.0)


def base_of(results: list[RunResult]) -> RunResult | None:
    """The BaseModel that RelaImpr is measured against: the better of sum and mean pooling, unfused if trained.

    The better one, because pooling is a choice the BaseModel has too: against the weaker one DIN would look too good.
    """
    candidates = [r for r in results if r.model_name in ("base", "base-mean")]
    unfused = [r for r in candidates if r.variant == "unfused"]
    return max(unfused or candidates, key=lambda r: r.scores.gauc, default=None)


def base_gauc(results: list[RunResult]) -> float | None:
    base = base_of(results)
    return None if base is None else base.scores.gauc


def fused_differences(results: list[RunResult]) -> dict[str, float]:
    """Model name -> largest relative difference between its fused and its unfused loss curve."""
    unfused = {r.model_name: r for r in results if r.variant == "unfused"}
    return {
        r.model_name: loss_difference(r.losses, unfused[r.model_name].losses)
        for r in results
        if r.variant == "fused" and r.model_name in unfused
    }


def summary(
    data: ClickData, options: Options, results: list[RunResult], baselines: dict[str, Scores]
) -> dict[str, Any]:
    base = base_gauc(results)
    device = torch.device(options.device)
    return {
        "options": options.as_dict(),
        "data": data.describe(),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": options.threads or torch.get_num_threads(),
        },
        "baselines": {name: scores.as_dict() for name, scores in baselines.items()},
        "results": {
            result.label: {
                "model": result.model_name,
                "variant": result.variant,
                "parameters": result.parameters,
                **result.scores.as_dict(),
                "rela_impr": None if base is None else rela_impr(result.scores.gauc, base),
                "seconds_per_step": result.step_seconds,
                "peak_bytes": result.peak_bytes,
                "epochs": result.epochs,
                "losses": result.losses,
            }
            for result in results
        },
        "largest_relative_loss_difference": fused_differences(results),
    }


def table(results: list[RunResult], baselines: dict[str, Scores]) -> str:
    from tabulate import tabulate

    base = base_gauc(results)
    differences = fused_differences(results)
    rows: list[list[str]] = []
    for result in results:
        gap = differences.get(result.model_name) if result.variant == "fused" else None
        rows.append(
            [
                f"{result.model_name} ({result.variant})",
                *_score_cells(result.scores, base),
                f"{1e3 * result.step_seconds:.1f} ms",
                f"{result.peak_bytes / 2**20:.0f} MiB",
                "" if gap is None else f"{gap:.1e}",
            ]
        )
    for name, scores in baselines.items():
        rows.append([name, *_score_cells(scores, base), "", "", ""])
    headers = ["model", "GAUC", "AUC", "logloss", "RelaImpr", "per step", "peak memory", "loss gap"]
    return tabulate(rows, headers, disable_numparse=True, stralign="right", colalign=("left",))


def _score_cells(scores: Scores, base: float | None) -> list[str]:
    impr = "" if base is None else f"{100 * rela_impr(scores.gauc, base):+.2f} %"
    return [f"{scores.gauc:.4f}", f"{scores.auc:.4f}", f"{scores.logloss:.4f}", impr]


def notes(results: list[RunResult], baselines: dict[str, Scores], part: str) -> list[str]:
    """What the table does not say by itself, the unpleasant included."""
    lines = []
    some = results[0].scores
    lines.append(
        f"GAUC over {some.users} {part} users; {some.users_left_out} with one class only left out (no AUC is defined)."
    )
    base = base_of(results)
    if base is not None:
        lines.append(f"RelaImpr is measured over {base.model_name} ({base.variant}).")
    for name, gap in fused_differences(results).items():
        verdict = "within" if gap <= 1e-4 else "ABOVE"
        lines.append(f"{name}: fused and unfused loss curves differ by at most {gap:.1e} relative ({verdict} 1e-4).")
    for result in results:
        if result.model_name != "din":
            continue
        rivals = {k: v.gauc for k, v in baselines.items()}
        if base is not None:
            rivals[base.model_name] = base.scores.gauc
        lost = [f"{name} ({gauc:.4f})" for name, gauc in rivals.items() if result.scores.gauc <= gauc]
        lead = result.scores.gauc - (result.scores.gauc if base is None else base.scores.gauc)
        if base is not None and abs(lead) <= SEED_RANGE:
            lines.append(
                f"din ({result.variant}) and {base.model_name} tie: their GAUC differ by {lead:+.4f}, and seeds alone "
                f"move it by {SEED_RANGE} (range over four seeds of the demo)."
            )
        if lost:
            lines.append(f"din ({result.variant}) does NOT beat {', '.join(lost)} with GAUC {result.scores.gauc:.4f}.")
    return lines


def write(path: Path, value: dict[str, Any]) -> None:
    write_json(path, value)

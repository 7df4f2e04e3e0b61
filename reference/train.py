"""Train the reference models, unfused and fused side by side: ``python -m reference.train``, ``make demo``."""

from __future__ import annotations

import sys
import warnings

import torch

from . import report, visualise
from .baselines import BASELINES
from .checkpoint import save_weights
from .data import ClickData, DataError, load
from .models import build, build_twin, schema_of
from .options import Options, output_folder, parse
from .training_loop import RunResult, reproducible, train

# Chosen on held-out train users (as reference.search does), never on the test users. The recipe is the paper's (SGD, lr
# falling to a tenth) at a larger batch, with the public code's softmax and clipping. Sums over histories of very
# different length, which SGD takes badly, do worse here for BaseModel and DIN alike.
DEMO = Options(
    models=("base-mean", "din"),
    variants=("unfused", "fused"),
    softmax=True,
    init_std=0.02,
    optimizer="sgd",
    lr=2.0,
    clip_norm=5.0,
    batch_size=64,
    epochs=2,
    threads=1,  # steps are small: threads gain little, and one gives the same numbers on any number of cores
    out="runs/demo",
)


def planned_runs(options: Options, demo: bool) -> list[tuple[str, str]]:
    """(model, variant) in the order they run. The demo trains BaseModel unfused only: nothing in it is worth fusing."""
    runs = [(model, variant) for model in options.models for variant in options.variants]
    if demo:
        runs = [(m, v) for m, v in runs if v == "unfused" or m == "din"]
    return runs


def run(options: Options, data: ClickData | None = None, *, demo: bool = False, quiet: bool = False) -> list[RunResult]:
    """Everything the command does, outputs included; returns the results in order."""
    if data is None:
        data = load(
            options.data,
            options.data_dir,
            max_history=options.max_history,
            history=options.history,
            split_seed=options.split_seed,
        )
    if options.validation:
        data = data.validation_split(options.validation, options.split_seed)
    out = output_folder(options)
    if not quiet:
        print(data.describe(), file=sys.stderr)
    results = []
    with reproducible(options):
        for name, variant in planned_runs(options, demo):
            torch.manual_seed(options.seed)
            start = build(name, schema_of(data), options.model_config())
            model = (
                start
                if variant == "unfused"
                else build_twin(name, schema_of(data), options.model_config(), start, fused=True)
            )
            path = out / "checkpoints" / f"{name}-{variant}.pt"
            result = train(model, data, options, model_name=name, variant=variant, checkpoint_path=path, quiet=quiet)
            save_weights(out / f"{name}-{variant}.safetensors", model)
            results.append(result)
    baselines = {name: baseline(data) for name, baseline in BASELINES.items()}
    report.write(out / "metrics.json", report.summary(data, options, results, baselines))
    visualise.loss_curves(results, out / "loss_curves.png", title=data.name)
    attentive = [r for r in results if r.model_name == "din"]
    if attentive:
        visualise.activation_weights(attentive[0].model, data, out / "activation_weights.png", options)
    if not quiet:
        print()
        print(report.table(results, baselines))
        for line in report.notes(results, baselines, "validation" if options.validation else "test"):
            print(line)
        print(
            f"Written to {out}/: metrics.json, loss_curves.png, weights and checkpoints"
            + (", activation_weights.png" if attentive else "")
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given, DEMO)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    try:
        run(options, demo="--demo" in given)
    except (DataError, ValueError, NotImplementedError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

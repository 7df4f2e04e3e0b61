"""Training and loading, measured side by side: ``python -m reference.throughput``.

For each model: the time of a training step with unfused and with fused modules, and the time the loader takes to make
the batch of such a step. Fused and unfused steps alternate on the same batches, so whatever else the machine does hits
both alike; figures are medians. Loading holds training back when its share of the step exceeds what can run beside it:
on a GPU the CPU gathers the next batch while the device computes, so a share below 100 % costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from .data import Batch, ClickData, DataError, load, train_batches
from .files import write_json
from .models import build, build_twin, schema_of
from .options import Options, check, from_arguments, output_folder, parse_with_preset, parser
from .training_loop import autocast, make_optimizer


class Stepper:
    """One model and its optimizer; ``seconds(batch)`` is the time of a whole training step, to its end on the device."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.device = torch.device(options.device)
        self.model, self.options = model.to(self.device).train(), options
        self.optimizer = make_optimizer(options, model)
        self.forward = torch.compile(model, dynamic=True) if options.compile else model

    def seconds(self, batch: Batch) -> float:
        self._wait()
        began = time.perf_counter()
        with autocast(self.options, self.device):
            logits = self.forward(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.label)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(data: ClickData, options: Options, steps: int, warm_up: int = 5) -> list[dict[str, Any]]:
    """One row a model: median seconds of a fused and an unfused step, of loading a batch, and of moving it."""
    device = torch.device(options.device)
    rows = []
    for name in options.models:
        torch.manual_seed(options.seed)
        unfused = build(name, schema_of(data), options.model_config())
        fused = build_twin(name, schema_of(data), options.model_config(), unfused, fused=True)
        steppers = {"unfused": Stepper(unfused, options), "fused": Stepper(fused, options)}
        times: dict[str, list[float]] = {"unfused": [], "fused": [], "load": []}
        behaviours = samples = 0
        stream = train_batches(data, options.batch_size, options.seed, 0)
        next(stream)  # the epoch's permutation
        for step in range(warm_up + steps):
            began = time.perf_counter()
            batch = next(stream, None)
            if batch is None:
                break
            loaded = time.perf_counter() - began
            batch = batch.to(device)
            taken = {variant: stepper.seconds(batch) for variant, stepper in steppers.items()}
            if step >= warm_up:
                times["load"].append(loaded)
                for variant, value in taken.items():
                    times[variant].append(value)
                behaviours, samples = behaviours + batch.history_item.numel(), samples + len(batch)
        if not times["load"]:
            raise ValueError(f"{data.name}: an epoch has fewer than {warm_up + 2} batches: lower --batch-size")
        medians = {key: statistics.median(values) for key, values in times.items()}
        rows.append({"model": name, "steps": len(times["load"]), "mean_history": behaviours / samples, **medians})
    return rows


def table(rows: list[dict[str, Any]], batch_size: int) -> str:
    from tabulate import tabulate

    cells = [
        [
            row["model"],
            f"{1e3 * row['unfused']:.2f} ms",
            f"{1e3 * row['fused']:.2f} ms",
            f"{row['unfused'] / row['fused']:.2f}",
            f"{batch_size / row['fused']:,.0f}",
            f"{1e3 * row['load']:.2f} ms",
            f"{100 * row['load'] / min(row['fused'], row['unfused']):.0f} %",
        ]
        for row in rows
    ]
    headers = [
        "model",
        "unfused step",
        "fused step",
        "unfused / fused",
        "samples/s fused",
        "loading",
        "of the faster step",
    ]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    p.prog, p.description = "python -m reference.throughput", (__doc__ or "").split("\n")[0]
    p.set_defaults(out="runs/throughput", models=("base", "din"), batch_size=1024)
    p.add_argument("--steps", type=int, default=50)
    for action in p._actions:
        if action.dest in ("demo", "epochs", "variants", "resume", "until_epoch", "validation"):  # no part in this
            action.help = argparse.SUPPRESS
    given = parse_with_preset(p, sys.argv[1:] if arguments is None else arguments)
    given.pop("demo")
    steps = given.pop("steps")
    options = from_arguments(given)
    threads = torch.get_num_threads()
    try:
        check(options)
        data = load(
            options.data,
            options.data_dir,
            max_history=options.max_history,
            history=options.history,
            split_seed=options.split_seed,
        )
        if options.threads:
            torch.set_num_threads(options.threads)
        rows = measure(data, options, steps)
    except (DataError, ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    write_json(
        output_folder(options) / "throughput.json",
        {"data": data.describe(), "options": options.as_dict(), "rows": rows},
    )
    print(data.describe())
    print(table(rows, options.batch_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())

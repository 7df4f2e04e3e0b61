"""Runs that are kept: each is one training, stored as one JSON file when it ends; whoever asks again gets the file."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoint import save_weights
from ..data import ClickData
from ..files import write_json
from ..models import build, build_twin, schema_of
from ..options import Options, check
from ..training_loop import train
from .tables import Row

Record = dict[str, Any]
Probe = Callable[[nn.Module, ClickData], dict[str, float]]
_LOSS_POINTS = 60  # a loss curve is kept as this many means


@dataclass(frozen=True)
class Choice:
    """What a row chose on the validation part: options, epoch to stop after, and the whole list it chose from."""

    options: Options
    setting: dict[str, Any]
    epoch: int
    tried: list[dict[str, Any]]


class Laboratory:
    """Trains and remembers. ``part`` is "validation" (cut from the train part, to choose on) or "test".

    A run's file carries in its name a digest of everything its numbers depend on: options, model, variant, the data's
    description. Another option, another file.
    """

    def __init__(
        self, data: ClickData, options: Options, out: Path, *, probe: Probe | None = None, quiet: bool
    ) -> None:
        self.parts = {"test": data, "validation": data.held_out(options.validation or 0.2, options.split_seed)}
        self.variant, self.out, self.probe, self.quiet = options.variants[0], out, probe, quiet

    def paths(self, model: str, options: Options, part: str, epoch: int) -> tuple[dict[str, Any], Path, Path]:
        """The run's key, its file, and where its weights after ``epoch`` lie if they were asked for."""
        key = {
            "part": part,
            "data": self.parts[part].describe(),
            "model": model,
            "variant": self.variant,
            "options": options.what_training_depends_on(),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{model}-{part}-{digest}"
        return key, self.out / "runs" / f"{name}.json", self.out / "weights" / f"{name}-{epoch}.safetensors"

    def run(self, model: str, options: Options, part: str, *, keep_epoch: int = 0) -> Record:
        """The record of one training, from its file if there is one; ``keep_epoch``: keep the weights of that epoch."""
        key, path, weights = self.paths(model, options, part, keep_epoch)
        if options.resume and path.is_file() and (not keep_epoch or weights.is_file()):
            return json.loads(path.read_text())
        check(options)
        data = self.parts[part]
        torch.manual_seed(options.seed)
        network = build(model, schema_of(data), options.model_config())
        if self.variant == "fused":
            network = build_twin(model, schema_of(data), options.model_config(), network, fused=True)
        probed: list[dict[str, float]] = []

        def after_epoch(epoch: int, trained: nn.Module) -> None:
            if self.probe is not None:
                probed.append(self.probe(trained, data))
            if epoch == keep_epoch:
                save_weights(weights, trained)

        record: Record = {"key": key}
        try:
            result = train(
                network,
                data,
                options,
                model_name=model,
                variant=self.variant,
                quiet=self.quiet,
                after_epoch=after_epoch,
            )
        except FloatingPointError as error:
            record["diverged"] = str(error)
        else:
            losses = np.array_split(np.asarray(result.losses), min(_LOSS_POINTS, len(result.losses)))
            more = probed or [{} for _ in result.epochs]
            record |= {
                "parameters": result.parameters,
                "epochs": [{**scores, **extra} for scores, extra in zip(result.epochs, more, strict=True)],
                "loss": [float(block.mean()) for block in losses],
                "seconds_per_step": result.step_seconds,
                "peak_bytes": result.peak_bytes,
            }
        write_json(path, record)
        return record

    def choose(
        self, row: Row, start: Options, grid: dict[str, list[Any]], seeds: list[int], done: Callable[[], None]
    ) -> Choice:
        """The setting and the epoch with the best mean GAUC on the validation part; the test part is not looked at."""
        tried: list[dict[str, Any]] = []
        best: tuple[float, dict[str, Any], int] | None = None
        for values in itertools.product(*grid.values()):
            setting = dict(zip(grid, values, strict=True))
            gauc = []
            for seed in seeds:
                options = dataclasses.replace(start, **row.fixed, **setting, seed=seed)
                record = self.run(row.model, options, "validation")
                gauc.append([epoch["gauc"] for epoch in record.get("epochs", [])])
                done()
            tried.append({"setting": setting, "gauc": gauc})
            if not all(gauc):
                continue  # diverged with one seed: not a setting to choose
            means = np.mean(gauc, axis=0)
            epoch = int(np.argmax(means))
            if best is None or means[epoch] > best[0]:
                best = float(means[epoch]), setting, epoch + 1
        if best is None:
            raise FloatingPointError(f"{row.label}: training diverged with every setting of {grid}: lower --lr")
        return Choice(dataclasses.replace(start, **row.fixed, **best[1]), best[1], best[2], tried)

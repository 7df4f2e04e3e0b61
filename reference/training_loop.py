"""Training one model: steps, schedule, evaluation, checkpoints, timing and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import checkpoint, fused_tables, regularizers
from .checkpoint import Progress
from .data import ClickData, Samples, eval_batches, prefetched, train_batches
from .data.batches import batch_bounds
from .metrics import Scores, evaluate_scores
from .models import DIN
from .options import Options


@dataclass
class RunResult:
    """One model trained: ``losses`` per step, ``epochs`` scores after each epoch, the last ones also in ``scores``."""

    model_name: str
    variant: str
    model: nn.Module
    parameters: int
    losses: list[float]
    epochs: list[dict[str, float]]
    scores: Scores
    step_seconds: float
    peak_bytes: int

    @property
    def label(self) -> str:
        return f"{self.model_name}-{self.variant}"


class PeakMemory:
    """Peak memory of a block above what was in use when it began: CUDA's allocator, or the process' resident set.

    On Linux the kernel's high-water mark of this process is reset first: no run hides behind an earlier one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError, AttributeError):
                # Memory the allocator keeps from an earlier run would be reused unseen: give it back first (glibc).
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.before = self._resident("VmRSS:")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.bytes = max(0, self._resident("VmHWM:") - self.before)

    @staticmethod
    def _resident(field: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
        except (OSError, StopIteration):
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def reproducible(options: Options) -> Iterator[None]:
    """Within the block: ``options.threads``, and deterministic algorithms where torch has them."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if options.threads:
        torch.set_num_threads(options.threads)
    # index_add and embedding backward use float atomics on a GPU unless told otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def autocast(options: Options, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if options.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def predict(
    model: nn.Module,
    data: ClickData,
    samples: Samples,
    options: Options,
    regularizer: regularizers.Regularizer | None = None,
) -> np.ndarray:
    """Logits of ``samples`` [S] float32, in evaluation mode; the model's mode is restored."""
    device = torch.device(options.device)
    training = model.training
    model.eval()
    parts = []
    for batch in eval_batches(data, samples, options.eval_batch_size):
        batch = batch.to(device)
        if regularizer is not None:
            batch = regularizer.batch(batch, training=False)
        with autocast(options, device):
            parts.append(model(batch).float().cpu())
    model.train(training)
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


@torch.no_grad()
def behaviour_weights(model: DIN, data: ClickData, samples: Samples, options: Options) -> np.ndarray:
    """The weight DIN gives each behaviour of ``samples``, back to back [N] float32, in evaluation mode."""
    training = model.training
    model.eval()
    parts = [
        model.activation_weights(batch.to(torch.device(options.device))).float().cpu()
        for batch in eval_batches(data, samples, options.eval_batch_size)
    ]
    model.train(training)
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


def evaluate(
    model: nn.Module, data: ClickData, options: Options, regularizer: regularizers.Regularizer | None = None
) -> Scores:
    """Scores on ``data.test``."""
    logits = predict(model, data, data.test, options, regularizer)
    return evaluate_scores(data.test.label, logits, data.test.user)


def make_optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=options.lr)
    return torch.optim.Adam(model.parameters(), lr=options.lr, eps=options.adam_eps)


def learning_rate(options: Options, step: int, total: int) -> float:
    """Exponential decay from ``lr`` to ``lr · lr_decay`` over ``total`` steps."""
    return options.lr * options.lr_decay ** (step / max(1, total))


def train(
    model: nn.Module,
    data: ClickData,
    options: Options,
    *,
    model_name: str = "model",
    variant: str = "unfused",
    checkpoint_path: Path | None = None,
    quiet: bool = False,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
) -> RunResult:
    """Train ``model`` in place on ``data.train`` and score it on ``data.test`` after every epoch.

    ``after_epoch(epoch, model)`` is called then, with epochs counted from 1; it must leave the model as it is.

    The order of samples depends on (seed, epoch) alone, so fused and unfused runs see the same batches and a resumed
    run goes on exactly where it stopped.
    """
    if len(data.train) < 2:
        raise ValueError(f"{data.name}: the train part has {len(data.train)} sample(s), at least 2 are needed")
    from tqdm import tqdm

    device = torch.device(options.device)
    torch.manual_seed(options.seed)  # dropout draws the same whichever models ran before
    model.to(device).train()
    regularizer = regularizers.make(options, data)
    with contextlib.ExitStack() as stack:
        optimizer: torch.optim.Optimizer | fused_tables.Optimizers = make_optimizer(options, model)
        if variant == "fused" and isinstance(regularizer, regularizers.RowPenalty):
            obstacle = fused_tables.obstacle(options)
            if obstacle is None:
                tables = stack.enter_context(fused_tables.FusedTables(model, regularizer))
                optimizer = fused_tables.optimizers(model, tables, options)
            elif not quiet:
                tqdm.write(
                    f"{model_name} {variant}: penalty by autograd, not in the update: {obstacle}", file=sys.stderr
                )
        return _train(
            model, data, options, regularizer, optimizer, model_name=model_name, variant=variant,
            checkpoint_path=checkpoint_path, quiet=quiet, after_epoch=after_epoch,
        )  # fmt: skip


def _train(
    model: nn.Module,
    data: ClickData,
    options: Options,
    regularizer: regularizers.Regularizer,
    optimizer: torch.optim.Optimizer | fused_tables.Optimizers,
    *,
    model_name: str,
    variant: str,
    checkpoint_path: Path | None,
    quiet: bool,
    after_epoch: Callable[[int, nn.Module], None] | None,
) -> RunResult:
    """The epochs of ``train``."""
    from tqdm import tqdm

    device = torch.device(options.device)
    depends_on = {**options.what_training_depends_on(), "model": model_name, "variant": variant}
    progress = Progress()
    if options.resume and checkpoint_path is not None and checkpoint_path.is_file():
        progress = checkpoint.load(checkpoint_path, model, optimizer, depends_on, device)
    forward = torch.compile(model, dynamic=True) if options.compile else model
    steps_per_epoch = len(batch_bounds(len(data.train), options.batch_size))
    total = options.epochs * steps_per_epoch
    last_epoch = options.epochs if options.until_epoch is None else min(options.until_epoch, options.epochs)
    times: list[float] = []

    with (
        PeakMemory(device) as memory,
        tqdm(
            total=last_epoch * steps_per_epoch,
            initial=progress.epoch * steps_per_epoch,
            desc=f"{model_name} {variant}",
            unit="step",
            disable=True if quiet else None,
            leave=False,
        ) as bar,
    ):
        for epoch in range(progress.epoch, last_epoch):
            pending: list[torch.Tensor] = []
            began = time.perf_counter()
            batches = train_batches(data, options.batch_size, options.seed, epoch)
            for index, batch in enumerate(prefetched(batches) if device.type == "cuda" else batches):
                step_began = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(options, epoch * steps_per_epoch + index, total)
                batch = regularizer.batch(batch.to(device), training=True)
                with autocast(options, device):
                    logits = forward(batch)
                loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.label)
                penalty = regularizer.penalty(model, batch)
                optimizer.zero_grad(set_to_none=True)
                (loss if penalty is None else loss + penalty).backward()
                if options.clip_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
                optimizer.step()
                pending.append(loss.detach())
                times.append(time.perf_counter() - step_began)
                bar.update()
                if device.type == "cpu":
                    bar.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)
            losses = torch.stack(pending).cpu()  # the one synchronisation of an epoch on a GPU
            if device.type == "cuda":
                times[-steps_per_epoch:] = [(time.perf_counter() - began) / steps_per_epoch] * steps_per_epoch
            if not bool(torch.isfinite(losses).all()):
                at = epoch * steps_per_epoch + int((~torch.isfinite(losses)).nonzero()[0, 0])
                raise FloatingPointError(f"{model_name} {variant}: the loss is not finite at step {at}: lower --lr")
            progress.losses += losses.tolist()
            scores = evaluate(model, data, options, regularizer)
            progress.epochs.append(scores.as_dict())
            progress.epoch = epoch + 1
            if after_epoch is not None:
                after_epoch(epoch + 1, model)
            progress.step_seconds = statistics.median(times)
            if checkpoint_path is not None:
                checkpoint.save(checkpoint_path, model, optimizer, progress, depends_on)
            if not quiet:
                tqdm.write(
                    f"{model_name:>9} {variant:<8} epoch {epoch + 1}/{options.epochs}  "
                    f"loss {float(losses.mean()):.5f}  "
                    f"GAUC {scores.gauc:.4f}  AUC {scores.auc:.4f}  logloss {scores.logloss:.4f}",
                    file=sys.stderr,
                )
    progress.peak_bytes = max(progress.peak_bytes, memory.bytes)
    final = progress.epochs[-1] if progress.epochs else evaluate(model, data, options, regularizer).as_dict()
    return RunResult(
        model_name=model_name,
        variant=variant,
        model=model,
        parameters=sum(p.numel() for p in model.parameters()),
        losses=progress.losses,
        epochs=progress.epochs,
        scores=Scores(**final),  # type: ignore[arg-type]
        step_seconds=progress.step_seconds,
        peak_bytes=progress.peak_bytes,
    )

"""Checkpoints (read back with ``weights_only=True``: no code is ever unpickled) and final weights as safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .files import replacing

FORMAT = 1


@dataclass
class Progress:
    """What a run has done so far: enough, with the options, to go on as if it had never stopped."""

    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    step_seconds: float = float("nan")
    peak_bytes: int = 0


class Stateful(Protocol):
    """An optimizer, or several as one."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def save(path: Path, model: nn.Module, optimizer: Stateful, progress: Progress, depends_on: dict[str, Any]) -> None:
    state = {
        "format": FORMAT,
        "options": json.dumps(depends_on, sort_keys=True),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(
    path: Path, model: nn.Module, optimizer: Stateful, depends_on: dict[str, Any], device: torch.device
) -> Progress:
    """Restore model, optimizer and random state in place; returns the progress. Raises ``ValueError`` on a mismatch."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this program ({type(error).__name__}): delete it") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version: delete it and train again")
    saved = json.loads(state["options"])
    differ = [key for key in depends_on if saved.get(key) != json.loads(json.dumps(depends_on[key]))]
    if differ:
        changes = ", ".join(f"{key}: {saved.get(key)!r} then, {depends_on[key]!r} now" for key in differ)
        raise ValueError(f"{path} was made with other options ({changes}): use the same ones, or another --out")
    model.load_state_dict(state["model"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    if state["rng_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["rng_cuda"]])
    return Progress(**state["progress"])


def save_weights(path: Path, model: nn.Module) -> None:
    """The state dict alone, as safetensors."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}, temporary)


def load_weights(path: Path, model: nn.Module) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path), strict=True)

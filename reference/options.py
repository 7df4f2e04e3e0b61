"""The trainer's options, their defaults, and the checks that name the option and the fix."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .data import DATASETS
from .models import MODELS, ModelConfig
from .models.common import POOLINGS
from .presets import PRESETS
from .units import ACTIVATIONS, INTERACTIONS

REGULARIZERS = ("none", "l2", "mba", "dropout", "filter", "difacto")
OPTIMIZERS = ("sgd", "adam")
AMP = ("none", "bf16")


@dataclass(frozen=True)
class Options:
    """One run. ``lr`` falls exponentially to ``lr · lr_decay`` over the run (paper: 1.0 with 0.1 for SGD)."""

    data: str = "ml-100k"
    data_dir: str | None = None
    max_history: int = 50
    history: str = "rated"
    models: tuple[str, ...] = ("base", "din")
    variants: tuple[str, ...] = ("unfused",)
    activation: str = "dice"
    interaction: str = "outer"
    softmax: bool = False
    cross: bool = False
    pooling: str = "sum"
    profile: bool = True
    field_dim: int = 8
    unit_hidden: tuple[int, ...] = (36,)
    mlp_hidden: tuple[int, ...] = (200, 80)
    init_std: float = 0.1
    regularizer: str = "none"
    reg_lambda: float = 0.01
    dropout: float = 0.5
    min_count: int = 5
    optimizer: str = "adam"
    lr: float = 0.001
    lr_decay: float = 0.1
    adam_eps: float = 1e-8
    clip_norm: float = 0.0
    batch_size: int = 256
    epochs: int = 3
    seed: int = 1
    split_seed: int = 0
    validation: float = 0.0
    device: str = "cpu"
    threads: int = 0
    compile: bool = False
    amp: str = "none"
    eval_batch_size: int = 1024
    until_epoch: int | None = None
    resume: bool = False
    out: str = "runs/train"

    def model_config(self) -> ModelConfig:
        return ModelConfig(
            field_dim=self.field_dim,
            unit_hidden=self.unit_hidden,
            mlp_hidden=self.mlp_hidden,
            activation=self.activation,
            interaction=self.interaction,
            softmax=self.softmax,
            cross=self.cross,
            pooling=self.pooling,
            use_profile=self.profile,
            init_std=self.init_std,
        )

    def as_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def what_training_depends_on(self) -> dict[str, Any]:
        """The options that change the numbers: a checkpoint may be resumed only under the same ones."""
        free = {"data_dir", "models", "variants", "until_epoch", "resume", "out", "eval_batch_size", "compile"}
        return {key: value for key, value in self.as_dict().items() if key not in free}


def check(options: Options) -> None:
    """Raise ``ValueError`` naming the option that cannot be used, and what to use instead."""

    def require(good: bool, option: str, expected: str) -> None:
        if not good:
            value = getattr(options, option)
            raise ValueError(f"--{option.replace('_', '-')} must be {expected}, got {value!r}")

    for model in options.models:
        require(model in MODELS, "models", f"among {', '.join(MODELS)}")
    require(bool(options.models), "models", "at least one model")
    require(options.activation in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}")
    require(options.interaction in INTERACTIONS, "interaction", f"one of {', '.join(INTERACTIONS)}")
    require(options.pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}")
    require(options.regularizer in REGULARIZERS, "regularizer", f"one of {', '.join(REGULARIZERS)}")
    require(options.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}")
    require(options.amp in AMP, "amp", f"one of {', '.join(AMP)}")
    for name in ("epochs", "field_dim", "eval_batch_size"):
        require(getattr(options, name) >= 1, name, "at least 1")
    require(options.batch_size >= 2, "batch_size", "at least 2 (batch statistics)")
    require(options.threads >= 0, "threads", "at least 0 (0: torch's own choice)")
    require(options.max_history >= 0, "max_history", "at least 0")
    require(options.lr > 0, "lr", "positive")
    require(0 < options.lr_decay <= 1, "lr_decay", "in (0, 1]")
    require(options.clip_norm >= 0, "clip_norm", "at least 0 (0: no clipping)")
    require(options.reg_lambda >= 0, "reg_lambda", "at least 0")
    require(0 <= options.dropout < 1, "dropout", "in [0, 1)")
    require(0 <= options.validation < 1, "validation", "in [0, 1)")
    require(all(w >= 1 for w in options.unit_hidden), "unit_hidden", "positive widths")
    require(all(w >= 1 for w in options.mlp_hidden), "mlp_hidden", "positive widths")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for but torch sees no CUDA device: use --device cpu")


def parser() -> argparse.ArgumentParser:
    default = Options()
    p = argparse.ArgumentParser(
        prog="python -m reference.train",
        description="Train the reference DIN and its baselines, unfused and fused, and compare them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--demo", action="store_true", help="the settings of `make demo` (other options still apply)")
    p.add_argument(
        "--preset", choices=PRESETS, help="a training recipe (other options still apply): " + ", ".join(PRESETS)
    )
    data = p.add_argument_group("data")
    data.add_argument("--data", metavar="NAME", help="; ".join(f"{k}: {v}" for k, v in DATASETS.items()))
    data.add_argument("--data-dir", metavar="FOLDER", help="where the files lie; default: cache, then download")
    data.add_argument("--max-history", type=int, metavar="T", help="keep the T most recent behaviours")
    data.add_argument("--history", choices=("rated", "liked"), help="MovieLens: which earlier movies are behaviours")
    data.add_argument(
        "--validation",
        type=float,
        metavar="SHARE",
        help="score on this share of the train users instead of the test users",
    )
    data.add_argument("--split-seed", type=int, help="seed of the split by user and of sampled negatives")
    model = p.add_argument_group("model")
    model.add_argument("--models", nargs="+", metavar="MODEL", help="; ".join(f"{k}: {v}" for k, v in MODELS.items()))
    which = model.add_mutually_exclusive_group()
    which.add_argument(
        "--unfused", dest="variants", action="store_const", const=("unfused",), help="plain PyTorch (default)"
    )
    which.add_argument("--fused", dest="variants", action="store_const", const=("fused",), help="din_kernels modules")
    which.add_argument(
        "--both", dest="variants", action="store_const", const=("unfused", "fused"), help="both, and compare"
    )
    model.add_argument("--activation", choices=ACTIVATIONS)
    model.add_argument("--interaction", choices=INTERACTIONS)
    model.add_argument("--softmax", action=argparse.BooleanOptionalAction, help="normalise the weights over a history")
    model.add_argument("--cross", action=argparse.BooleanOptionalAction, help="feed candidate ∘ pooled to the MLP too")
    model.add_argument("--pooling", choices=POOLINGS, help="of the behaviours, in models without attention")
    model.add_argument("--profile", action=argparse.BooleanOptionalAction, help="feed gender, age group, occupation")
    model.add_argument("--field-dim", type=int, metavar="D", help="embedding width of item and of category")
    model.add_argument("--unit-hidden", type=int, nargs="+", metavar="H", help="hidden layers of the activation unit")
    model.add_argument("--mlp-hidden", type=int, nargs="+", metavar="H", help="hidden layers of the MLP on top")
    model.add_argument("--init-std", type=float, help="standard deviation of the embeddings at the start")
    reg = p.add_argument_group("regularization of the embeddings")
    reg.add_argument("--regularizer", choices=REGULARIZERS)
    reg.add_argument("--reg-lambda", type=float, metavar="λ")
    reg.add_argument("--dropout", type=float, help="share of behaviour ids dropped (regularizer dropout)")
    reg.add_argument("--min-count", type=int, help="ids seen less often are dropped (regularizer filter)")
    train = p.add_argument_group("training")
    train.add_argument("--optimizer", choices=OPTIMIZERS)
    train.add_argument("--lr", type=float)
    train.add_argument("--lr-decay", type=float, help="lr falls exponentially to lr·this over the run")
    train.add_argument("--adam-eps", type=float)
    train.add_argument("--clip-norm", type=float, help="limit of the gradient norm over all parameters; 0: none")
    train.add_argument("--batch-size", type=int)
    train.add_argument("--epochs", type=int)
    train.add_argument("--seed", type=int)
    train.add_argument("--device")
    train.add_argument("--threads", type=int, help="CPU threads; 0: torch's own choice")
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the models")
    train.add_argument("--amp", choices=AMP, help="automatic mixed precision")
    train.add_argument("--eval-batch-size", type=int)
    train.add_argument("--out", metavar="FOLDER", help="metrics.json, pictures, weights, checkpoints")
    train.add_argument("--resume", action=argparse.BooleanOptionalAction, help="go on from the checkpoints in --out")
    train.add_argument("--until-epoch", type=int, metavar="E", help="stop after E epochs; --resume goes on later")
    for action in p._actions:
        if action.dest not in ("help", "demo", "preset"):
            action.default = getattr(default, action.dest)
    return p


def parse(arguments: list[str] | None, demo: Options) -> Options:
    """Options from the command line; with ``--demo`` the defaults are those of ``demo``."""
    p = parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--demo" in arguments:
        p.set_defaults(**{f.name: getattr(demo, f.name) for f in fields(Options)})
    given = parse_with_preset(p, arguments)
    given.pop("demo")
    options = from_arguments(given)
    try:
        check(options)
    except ValueError as error:
        p.error(str(error))
    return options


def parse_with_preset(p: argparse.ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """What ``p`` reads, with the defaults of ``--preset`` where one is named."""
    preset = vars(p.parse_args(arguments)).get("preset")
    if preset is not None:
        p.set_defaults(**PRESETS[preset])
    given = vars(p.parse_args(arguments))
    given.pop("preset")
    return given


def from_arguments(given: dict[str, Any]) -> Options:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return Options(**values)


def output_folder(options: Options) -> Path:
    return Path(options.out).expanduser()

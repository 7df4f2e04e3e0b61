"""Each library's own attention unit against itself converted, on the CPU or the GPU at hand.

``python -m benchmarks.converted_peers [--batch 512 --length 100 --dim 64 --rounds 20]`` prints a table for the pages
"Switching from …": forward + backward in training mode. The two take turns on the same inputs, so each ratio compares calls
that follow one another; the figure is the median ratio, with its quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import din_kernels

Case = tuple[str, nn.Module, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]]


def cases(dim: int, length: int, device: torch.device) -> Iterator[Case]:
    """(what, the library's module, how it is called on query [B, D], keys [B, T, D], lengths [B])."""
    with contextlib.suppress(ImportError):
        from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer

        def deepctr(module: nn.Module, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
            return module(query.unsqueeze(1), keys, lengths.unsqueeze(1))

        yield (
            "DeepCTR-Torch (80, 40) sigmoid",
            AttentionSequencePoolingLayer((80, 40), "sigmoid", embedding_dim=dim),
            deepctr,
        )
        yield (
            "DeepCTR-Torch (80, 40) sigmoid, softmax",
            AttentionSequencePoolingLayer((80, 40), "sigmoid", True, embedding_dim=dim),
            deepctr,
        )
        yield (
            "DeepCTR-Torch (64, 16) Dice, its DIN's default",
            AttentionSequencePoolingLayer((64, 16), "Dice", embedding_dim=dim),
            deepctr,
        )
    with contextlib.suppress(ImportError):
        from fuxictr.pytorch.layers.attentions.target_attention import DIN_Attention

        def fuxictr(module: nn.Module, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
            return module(query, keys, torch.arange(keys.shape[1], device=keys.device) < lengths.unsqueeze(1))

        yield "FuxiCTR [64] Dice, its DIN's default", DIN_Attention(dim, [64], "Dice"), fuxictr
        yield "FuxiCTR [64] ReLU", DIN_Attention(dim, [64], "ReLU"), fuxictr
        yield "FuxiCTR [64] ReLU, batch_norm", DIN_Attention(dim, [64], "ReLU", batch_norm=True), fuxictr
    with contextlib.suppress(ImportError):
        from recbole.model.layers import SequenceAttLayer

        def recbole(module: nn.Module, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
            return module(query, keys, lengths)

        for widths, note in (((80, 40), "sigmoid"), ((256, 256, 256), "sigmoid, its DIN's default")):
            positions = torch.arange(length, device=device)  # not a buffer: it does not move with the module
            layer = SequenceAttLayer(positions, (4 * dim, *widths), "sigmoid", False, False)
            yield f"RecBole {widths} {note}", layer, recbole
    with contextlib.suppress(ImportError):
        from torch_rechub.models.ranking.din import ActivationUnit

        def rechub(module: nn.Module, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
            return module(keys, query)

        yield "torch-rechub [36] dice, its default", ActivationUnit(dim, [36]), rechub
        yield "torch-rechub [36] prelu", ActivationUnit(dim, [36], "prelu"), rechub


def seconds(call: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("batch", 512), ("length", 100), ("dim", 64), ("rounds", 20), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    query = torch.randn(args.batch, args.dim, device=device, requires_grad=True)
    keys = torch.randn(args.batch, args.length, args.dim, device=device, requires_grad=True)
    lengths = torch.randint(1, args.length + 1, (args.batch,), device=device)
    print(f"B={args.batch}, lengths 1..{args.length}, D={args.dim}, fp32, {device}, {args.threads} thread(s), "
          f"torch {torch.__version__}, {args.rounds} rounds\n")  # fmt: skip
    print("| unit | converted: times as fast (quartiles) |\n|---|---|")
    with contextlib.redirect_stdout(io.StringIO()):
        found = list(cases(args.dim, args.length, device))  # a library may print while it is imported
    for what, original, run in found:
        original = original.to(device)
        converted, report = din_kernels.convert(copy.deepcopy(original))
        assert report.swapped, what

        def step(module: nn.Module, run: Callable[..., Tensor] = run) -> None:
            run(module, query, keys, lengths).square().sum().backward()

        ratios = []
        for round_ in range(args.rounds + 2):
            before = seconds(lambda module=original: step(module), device)  # type: ignore[misc]
            after = seconds(lambda module=converted: step(module), device)  # type: ignore[misc]
            if round_ >= 2:
                ratios.append(before / after)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {what} | {middle:.1f} ({low:.1f} – {high:.1f}) |", flush=True)


if __name__ == "__main__":
    main()

"""The scorer against the unfused model, call by call and through the HTTP service under load.

``python -m benchmarks.load_test`` races calls: one visitor with 100 behaviours and 300 candidates, contestants taking turns.
``--http`` also starts both services and lets ``wrk`` (https://github.com/wg/wrk, in most distributions) load them in turns.

Three contestants score the same request. ``unfused``: the reference DIN, every candidate a sample with its own copy of the
behaviours, as the model is trained. ``unfused, shared``: the reference unit given all candidates of the visitor at once,
which copies no ids but still materialises every pair. ``scorer``: ``din_kernels.serving.Scorer``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from din_kernels.serving import Candidates, Request, Scorer, Visitor
from reference.data.batches import Batch
from reference.models import DIN, ModelConfig, Schema, build
from reference.models.common import join

SCHEMA = Schema(num_items=63_001, num_categories=801)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A network, and the request it is asked."""

    name: str
    field_dim: int
    hidden: tuple[int, ...]
    interaction: str
    behaviours: int = 100
    candidates: int = 300

    def model(self) -> DIN:
        """Statistics and slopes as after training, not those of the start."""
        torch.manual_seed(0)
        config = ModelConfig(field_dim=self.field_dim, unit_hidden=self.hidden, interaction=self.interaction)
        model = cast(DIN, build("din", SCHEMA, config))
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "running_mean"):
                    cast(Tensor, module.running_mean).normal_(std=0.3)
                    cast(Tensor, module.running_var).uniform_(0.1, 1.5)
                    cast(Tensor, module.alpha).normal_(std=0.3)
        return model.eval()

    def request(self, seed: int = 0) -> Request:
        draw = torch.Generator().manual_seed(seed)

        def ids(size: int, count: int) -> Tensor:
            return torch.randint(size, (count,), generator=draw)

        t, c = self.behaviours, self.candidates
        return Request(
            ids(SCHEMA.num_items, t), ids(SCHEMA.num_categories, t), torch.zeros(0, dtype=torch.int64),
            ids(SCHEMA.num_items, c), ids(SCHEMA.num_categories, c),
        )  # fmt: skip


SHAPES = (
    Shape("outer, 36, D = 16", 8, (36,), "outer"),
    Shape("product, 36, D = 16", 8, (36,), "product"),
    Shape("product, 80-40, D = 64", 32, (80, 40), "product"),
)


class Unfused(Scorer):
    """The queue and the service of ``Scorer`` over the reference model, every candidate a sample."""

    def __init__(self, model: DIN, *sizes: int, **options: Any) -> None:
        super().__init__(model, *sizes, **options)
        self.model = model

    def score_requests(self, requests: Sequence[Request]) -> list[Tensor]:
        lengths = [r.history_item.numel() for r in requests for _ in range(r.item.numel())]
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        offsets[1:] = torch.tensor(lengths).cumsum(0)

        def every(name: str) -> Tensor:
            return torch.cat([getattr(r, name) for r in requests])

        def copied(name: str) -> Tensor:
            return torch.cat([getattr(r, name).repeat(r.item.numel()) for r in requests])

        profile = torch.cat([r.profile.expand(r.item.numel(), -1) for r in requests])
        item = every("item")
        batch = Batch(
            torch.zeros_like(item), item, every("category"), profile, torch.zeros(len(item)),
            copied("history_item"), copied("history_category"), offsets,
        )  # fmt: skip
        with torch.inference_mode():
            return list(self.model(batch).split([r.item.numel() for r in requests]))


def shared(model: DIN, request: Request) -> Tensor:
    """The reference model with all candidates of one visitor given to its unit at once."""
    with torch.inference_mode():
        candidate = model.items(request.item, request.category)
        behaviours = model.items(request.history_item, request.history_category)
        offsets = torch.tensor([0, behaviours.shape[0]])
        pooled = model.unit(candidate.unsqueeze(0), behaviours, offsets=offsets).squeeze(0)
        profile = model.profile(request.profile.expand(candidate.shape[0], -1))
        return model.mlp(join(profile, candidate, pooled, model.config.cross))


def percentile(seconds: list[float], share: float) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def race(shape: Shape, seconds: float) -> list[str]:
    """A line for each contestant; ratios of medians over calls that took turns."""
    model = shape.model()
    sizes = (shape.behaviours, shape.candidates)
    scorer, unfused = Scorer(model, *sizes, backend="torch"), Unfused(model, *sizes, backend="torch")
    calls: dict[str, Callable[[Request], Tensor]] = {
        "scorer": lambda request: scorer.score_requests([request])[0],
        "unfused": lambda request: unfused.score_requests([request])[0],
        "unfused, shared": lambda request: shared(model, request),
    }
    requests = [shape.request(seed) for seed in range(16)]
    expected = unfused.score_requests([requests[0]])[0]
    for name, call in calls.items():
        error = float((call(requests[0]) - expected).abs().max() / expected.abs().max())
        if error > 1e-5:
            raise AssertionError(f"{shape.name}: {name} is off by {error:.2g}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times["scorer"]) < 20:
        request = requests[len(times["scorer"]) % len(requests)]
        for name, call in calls.items():
            began = time.perf_counter()
            call(request)
            times[name].append(time.perf_counter() - began)
    lines = []
    for name, found in times.items():
        pairs = sorted(other / own for other, own in zip(found, times["scorer"], strict=True))
        lines.append(
            f"| {shape.name} | {name} | {percentile(found, 0.5) * 1e3:.2f} | {percentile(found, 0.99) * 1e3:.2f} | "
            f"{pairs[len(pairs) // 2]:.1f} |"
        )
    return lines


# ---- through HTTP ------------------------------------------------------------------------------------------------


def serve(shape: Shape, fused: bool, port: int) -> None:
    import uvicorn

    from reference.serve import create_app

    torch.set_num_threads(1)
    make = Scorer if fused else Unfused
    scorer = make(shape.model(), shape.behaviours, shape.candidates, backend="torch")
    uvicorn.run(create_app(scorer), port=port, log_level="warning")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, patience: float = 60.0) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def wrk(port: int, body: Path, connections: int, seconds: int) -> tuple[float, float, float]:
    """(requests per second, p50, p99 in milliseconds); raises if an answer was not 200."""
    command = [
        "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "--latency", "-s", str(body),
        f"http://127.0.0.1:{port}/score",
    ]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(said)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert rate is not None
    quantiles = []
    for share in ("50%", "99%"):
        found = re.search(rf"{share}\s+([\d.]+)(us|ms|s)\b", said)
        assert found is not None
        quantiles.append(float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]])
    return float(rate[1]), quantiles[0], quantiles[1]


def load(shape: Shape, connections: Sequence[int], seconds: int, rounds: int) -> list[str]:
    request = shape.request()
    visitor = Visitor(request.history_item.tolist(), request.history_category.tolist(), [])
    candidates = Candidates(request.item.tolist(), request.category.tolist())
    body = json.dumps({"visitor": visitor._asdict(), "candidates": candidates._asdict()})
    spawn = multiprocessing.get_context("spawn")
    ports = {"scorer": free_port(), "unfused": free_port()}
    services = [spawn.Process(target=serve, args=(shape, name == "scorer", port)) for name, port in ports.items()]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "post.lua")
        script.write_text(
            f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = {json.dumps(body)}\n"
        )
        try:
            for service in services:
                service.start()
            for port in ports.values():
                wait_for(port)
                wrk(port, script, 1, 1)
            for count in connections:
                found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ports}
                for _ in range(rounds):
                    for name, port in ports.items():
                        found[name].append(wrk(port, script, count, seconds))
                middle = {name: [sorted(x)[len(x) // 2] for x in zip(*f, strict=True)] for name, f in found.items()}
                for name, (rate, p50, p99) in middle.items():
                    lines.append(
                        f"| {shape.name} | {count} | {name} | {rate:.0f} | {p50:.1f} | {p99:.1f} | "
                        f"{middle['scorer'][0] / rate:.1f} |"
                    )
        finally:
            for service in services:
                if service.is_alive():
                    service.terminate()
                    service.join()
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5, help="of a race, and of each turn of wrk")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each service")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--http", action="store_true")
    options = parser.parse_args()
    if options.http and shutil.which("wrk") is None:
        print("error: --http needs wrk: install it from your distribution", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    print("| network | contestant | p50, ms | p99, ms | times the scorer's |\n|---|---|---|---|---|")
    for shape in SHAPES:
        print("\n".join(race(shape, options.seconds)), flush=True)
    if options.http:
        print("\n| network | connections | service | requests/s | p50, ms | p99, ms | scorer's rate over this |")
        print("|---|---|---|---|---|---|---|")
        for shape in SHAPES:
            print("\n".join(load(shape, options.connections, options.seconds, options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""An HTTP service that ranks candidates with a trained DIN: ``python -m reference.serve runs/demo/checkpoints/din-unfused.pt``.

POST /score    one visitor and their candidates -> a logit and a probability for each candidate, in their order
GET  /health   what is being served
GET  /metrics  for Prometheus

FastAPI checks the request's form and ``din_kernels.serving`` its ids (422); a full queue answers 503 with ``Retry-After``, a
request that waited too long 504.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from torch import nn

from din_kernels.serving import Candidates, Closed, DeadlineExceeded, Overloaded, Scorer, Visitor

from .checkpoint import FORMAT
from .models import Schema, build
from .options import Options

Id = StrictInt


class VisitorBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    history_item: list[Id] = Field(description="items of the visitor's behaviours, oldest first; may be empty")
    history_category: list[Id] = Field(description="their categories")
    profile: list[Id] = Field(default=[], description="ids of the visitor's fixed features, one a field")


class CandidatesBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    item: list[Id]
    category: list[Id]


class ScoreBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    visitor: VisitorBody
    candidates: CandidatesBody


class ScoreAnswer(BaseModel):
    logits: list[float]
    probabilities: list[float]


def load_model(path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The DIN in a checkpoint of ``reference.train``, in evaluation. No code in the file is run (``weights_only``).

    The sizes of the id spaces are those of the tables; the shape of the network comes from the options saved beside them.
    Raises ``ValueError`` for a file that is none, or holds another model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of reference.train ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of reference.train")
    saved = json.loads(state["options"])
    if saved.get("model") != "din":
        raise ValueError(f"{path} holds the model {saved.get('model')!r}: only 'din' weighs behaviours by candidate")
    known = {field.name for field in fields(Options)}
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
    options = Options(**given)
    tables = state["model"]
    profile = sorted(
        (int(key.split(".")[2]), value.shape[0]) for key, value in tables.items() if key.startswith("profile.tables.")
    )
    schema = Schema(
        tables["items.item.weight"].shape[0],
        tables["items.category.weight"].shape[0],
        tuple(size for _, size in profile),
    )
    model = build("din", schema, options.model_config())
    model.load_state_dict(tables, strict=True)
    return model.to(device).eval()


class QueueMetrics:
    """The scorer's own counters, read when Prometheus asks."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def collect(self) -> Iterator[Any]:
        yield GaugeMetricFamily("din_queue_requests", "Requests that wait to be scored", value=self.scorer.waiting())
        batches = CounterMetricFamily(
            "din_batches", "Batches scored; done requests over batches is how many were merged"
        )
        batches.add_metric([], self.scorer.counters.batches)
        yield batches
        outcomes = CounterMetricFamily("din_queue_outcomes", "Requests by what became of them", labels=["outcome"])
        for name in ("done", "failed", "expired", "cancelled", "overloaded"):
            outcomes.add_metric([name], getattr(self.scorer.counters, name))
        yield outcomes


def create_app(scorer: Scorer) -> FastAPI:
    """The service over ``scorer``, which is shut down with it."""
    registry = CollectorRegistry()
    answers = Counter("din_answers", "Answers of /score by status", ["status"], registry=registry)
    latency = Histogram(
        "din_score_seconds", "From a parsed request to its scores", registry=registry,
        buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024),
    )  # fmt: skip
    candidates_scored = Counter("din_candidates", "Candidates scored", registry=registry)
    registry.register(QueueMetrics(scorer))  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        scorer.close()

    app = FastAPI(title="din_kernels scoring", lifespan=lifespan)

    def refused(status: int, error: Exception, headers: dict[str, str] | None = None) -> HTTPException:
        answers.labels(str(status)).inc()
        return HTTPException(status, str(error), headers)

    @app.post("/score")
    async def score(body: ScoreBody) -> ScoreAnswer:
        began = time.perf_counter()
        visitor = Visitor(body.visitor.history_item, body.visitor.history_category, body.visitor.profile)
        try:
            future = scorer.submit(visitor, Candidates(body.candidates.item, body.candidates.category))
            logits = await asyncio.wrap_future(future)
        except (ValueError, IndexError, TypeError) as error:
            raise refused(422, error) from error
        except Overloaded as error:
            raise refused(503, error, {"Retry-After": "1"}) from error
        except Closed as error:
            raise refused(503, error) from error
        except DeadlineExceeded as error:
            raise refused(504, error) from error
        latency.observe(time.perf_counter() - began)
        candidates_scored.inc(logits.numel())
        answers.labels("200").inc()
        return ScoreAnswer(logits=logits.tolist(), probabilities=torch.sigmoid(logits).tolist())

    @app.get("/health")
    async def health() -> dict[str, Any]:
        limits = scorer.limits
        return {
            "status": "ok",
            "backend": scorer.backend,
            "device": str(scorer.device),
            "items": limits.items,
            "categories": limits.categories,
            "profile": list(limits.profile),
            "max_behaviours": limits.max_behaviours,
            "max_candidates": limits.max_candidates,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m reference.serve", description=__doc__.split("\n\n")[0])
    made.add_argument("checkpoint", type=Path, help="a checkpoint that reference.train wrote for the model 'din'")
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--max-behaviours", type=int, default=200)
    made.add_argument("--max-candidates", type=int, default=1000)
    made.add_argument("--window-ms", type=float, default=0.5, help="how long a request may wait for company")
    made.add_argument("--timeout-ms", type=float, default=100.0, help="a request that waited longer is dropped (504)")
    made.add_argument("--capacity", type=int, default=1024, help="requests that may wait; more are refused (503)")
    made.add_argument("--threads", type=int, default=1, help="torch threads of one request")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        model = load_model(options.checkpoint, options.device)
        scorer = Scorer(
            model, options.max_behaviours, options.max_candidates, window=options.window_ms / 1e3,
            timeout=options.timeout_ms / 1e3, capacity=options.capacity,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    scorer.warm_up()
    import uvicorn

    uvicorn.run(create_app(scorer), host=options.host, port=options.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())

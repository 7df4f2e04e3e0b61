"""The HTTP service: answers, refusals, health and metrics, and checkpoints as ``reference.train`` writes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the service needs the extra 'serve'")
pytest.importorskip("httpx", reason="the test client needs httpx")
pytest.importorskip("prometheus_client", reason="the service needs the extra 'serve'")

from fastapi.testclient import TestClient

from din_kernels.serving import Scorer
from reference import checkpoint, serve
from reference.options import Options

from ._models import expected_scores, make_model, make_request


def as_json(behaviours: int, candidates: int, seed: int = 0) -> dict[str, Any]:
    visitor, ads = make_request(behaviours, candidates, seed=seed)
    return {"visitor": visitor._asdict(), "candidates": ads._asdict()}


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(make_model(), 32, 16, backend="torch", window=0.0)


@pytest.fixture
def client(scorer: Scorer) -> Iterator[TestClient]:
    with TestClient(serve.create_app(scorer)) as made:
        yield made


def test_scores(client: TestClient) -> None:
    answer = client.post("/score", json=as_json(5, 4))
    assert answer.status_code == 200
    (expected,) = expected_scores(make_model(), [make_request(5, 4)])
    found = answer.json()
    torch.testing.assert_close(torch.tensor(found["logits"]).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(found["probabilities"]).double(), torch.sigmoid(expected), rtol=1e-5, atol=1e-6
    )


def changed(**changes: Any) -> dict[str, Any]:
    body = as_json(2, 2)
    for path, value in changes.items():
        part, name = path.split("__")
        body[part][name] = value
    return body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "visitor"),
        ({"visitor": as_json(2, 2)["visitor"]}, "candidates"),
        (changed(visitor__history_item=["a", 1]), "valid integer"),
        (changed(visitor__history_item=[1.5, 1]), "valid integer"),
        (changed(candidates__item=[True, 1]), "valid integer"),
        (changed(visitor__age=3), "Extra inputs"),
        (changed(visitor__history_item=[1, 97]), "history_item ids must lie in [0, 97)"),
        (changed(visitor__history_item=[1]), "as long as history_item"),
        (changed(visitor__profile=[]), "profile must hold 2 ids"),
        (changed(candidates__item=[], candidates__category=[]), "between 1 and max_candidates"),
        (changed(candidates__item=[2**70, 1]), "no id"),
    ],
)
def test_requests_at_fault_get_422(client: TestClient, body: dict[str, Any], message: str) -> None:
    answer = client.post("/score", json=body)
    assert answer.status_code == 422
    assert message in answer.text
    assert client.post("/score", json=as_json(2, 2)).status_code == 200


def test_other_faults_of_a_request(client: TestClient) -> None:
    assert client.post("/score", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    assert client.get("/score").status_code == 405
    assert client.get("/nowhere").status_code == 404


def test_health(client: TestClient) -> None:
    found = client.get("/health").json()
    assert found["status"] == "ok"
    assert (found["items"], found["categories"], found["profile"]) == (97, 11, [3, 5])


def test_metrics(client: TestClient) -> None:
    for _ in range(3):
        client.post("/score", json=as_json(5, 4))
    client.post("/score", json=changed(visitor__profile=[9, 9]))
    text = client.get("/metrics").text
    for line in (
        'din_answers_total{status="200"} 3.0',
        'din_answers_total{status="422"} 1.0',
        "din_score_seconds_count 3.0",
        "din_candidates_total 12.0",
        "din_batches_total 3.0",
        'din_queue_outcomes_total{outcome="done"} 3.0',
        "din_queue_requests 0.0",
    ):
        assert line in text


def test_overload_and_deadline_and_shutdown() -> None:
    scorer = Scorer(make_model(), 32, 16, backend="torch", window=0.0, capacity=1, timeout=0.05)
    gate, entered = threading.Event(), threading.Event()
    score = scorer.score_requests

    def held(requests: Any) -> Any:
        entered.set()
        assert gate.wait(20)
        return score(requests)

    scorer.score_requests = held  # type: ignore[method-assign]
    with TestClient(serve.create_app(scorer)) as client:
        running = scorer.submit(*make_request(2, 2), timeout=60)
        assert entered.wait(20)
        answers: list[int] = []
        waits = threading.Thread(target=lambda: answers.append(client.post("/score", json=as_json(2, 2)).status_code))
        waits.start()
        while scorer.waiting() == 0:
            pass
        refused = client.post("/score", json=as_json(2, 2))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "waiting" in refused.json()["detail"]
        threading.Event().wait(0.1)  # past the deadline of the one in the queue
        gate.set()
        waits.join(20)
        assert answers == [504]
        running.result(20)
        scorer.close()
        assert client.post("/score", json=as_json(2, 2)).status_code == 503


def save(path: Path, *, name: str = "din", **config: Any) -> torch.nn.Module:
    options = Options(field_dim=6, unit_hidden=(12,), mlp_hidden=(20, 10), **config)
    model = make_model(**config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    depends_on = {**options.what_training_depends_on(), "model": name, "variant": "unfused"}
    checkpoint.save(path, model, optimizer, checkpoint.Progress(), depends_on)
    return model


@pytest.mark.parametrize("config", [{}, {"softmax": True, "interaction": "product", "activation": "prelu"}])
def test_checkpoints_of_the_trainer(tmp_path: Path, config: dict[str, Any]) -> None:
    model = save(tmp_path / "din.pt", **config)
    loaded = serve.load_model(tmp_path / "din.pt")
    assert not loaded.training
    pair = make_request(6, 5)
    actual = Scorer(loaded, 32, 16, backend="torch").score(*pair)
    torch.testing.assert_close(actual.double(), expected_scores(model, [pair])[0], rtol=1e-5, atol=1e-6)


def test_files_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a checkpoint"):
        serve.load_model(tmp_path / "junk.pt")
    save(tmp_path / "base.pt", name="base")
    with pytest.raises(ValueError, match="holds the model 'base'"):
        serve.load_model(tmp_path / "base.pt")
    assert serve.main([str(tmp_path / "missing.pt")]) == 1
    assert "missing.pt" in capsys.readouterr().err


class Touch:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    torch.save({"format": 1, "model": Touch(tmp_path / "touched")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        serve.load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()

"""Shape buckets and their static buffers; on a CPU the function is called where a GPU would replay its graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from din_kernels.serving import Bucket, Scorer
from din_kernels.serving.buckets import Graphs, Inputs, Ladder
from din_kernels.serving.requests import Limits, Request

from ._models import expected_scores, make_model, make_request

LADDER = Ladder(max_visitors=6, max_behaviours=100, max_candidates=300)
LIMITS = Limits(97, 11, (3, 5), 100, 300)


def request(behaviours: int, candidates: int, seed: int = 0) -> Request:
    return LIMITS.check(*make_request(behaviours, candidates, seed=seed))


@pytest.mark.parametrize(
    ("shapes", "bucket"),
    [
        ([(0, 1)], (1, 16, 16)),
        ([(16, 16)], (1, 16, 16)),
        ([(17, 33)], (1, 32, 64)),
        ([(100, 300)], (1, 100, 300)),  # the largest request is a bucket, though no power of two
        ([(65, 257)] * 3, (4, 100, 300)),
        ([(1, 1)] * 6, (6, 16, 16)),
        ([(1, 40), (40, 1)], (2, 64, 64)),
    ],
)
def test_smallest_bucket_that_holds_the_requests(shapes: list[tuple[int, int]], bucket: tuple[int, int, int]) -> None:
    assert LADDER.bucket_of([request(*shape) for shape in shapes]) == Bucket(*bucket)


def test_every_request_has_a_bucket_and_there_are_few() -> None:
    found = {LADDER.bucket(1, t, c) for t in range(101) for c in range(1, 301)}
    assert all(b.behaviours <= 100 and b.candidates <= 300 for b in found)
    assert len(found) == 4 * 6
    for t in range(101):
        assert t <= LADDER.bucket(1, t, 1).behaviours
    for c in range(1, 301):
        assert c <= LADDER.bucket(1, 1, c).candidates


def test_too_large_for_any_bucket() -> None:
    with pytest.raises(ValueError, match="no bucket"):
        Ladder(1, 8, 8).bucket_of([request(9, 1)])
    with pytest.raises(ValueError, match="between 1 and 6 requests"):
        LADDER.bucket_of([request(1, 1)] * 7)


def test_buffers_stay_where_they_are_and_buckets_are_made_once() -> None:
    seen: list[Inputs] = []

    def run(inputs: Inputs) -> Tensor:
        seen.append(inputs)
        count = inputs.candidates.shape[2]
        # Something each input takes part in: sums over real behaviours only, as the kernels read them.
        real = torch.arange(inputs.history.shape[2]) < inputs.lengths.unsqueeze(1)
        total = (inputs.history.sum(0) * real).sum(1) + inputs.profile.sum(1)
        return (inputs.candidates.sum(0) * 1000 + total.unsqueeze(1)).view(-1, count)

    graphs = Graphs(LADDER, LIMITS, torch.device("cpu"), run)
    # A short request after a long one in the same buffers: what the long one left must not show.
    requests = [request(15, 16, 1), request(2, 3, 2), request(0, 1, 3)]
    for each in requests:
        (scores,) = graphs([each])
        total = int(each.history_item.sum() + each.history_category.sum() + each.profile.sum())
        assert torch.equal(scores, (each.item + each.category) * 1000 + total)
    assert len(graphs) == 1
    assert len({inputs.history.data_ptr() for inputs in seen}) == 1
    assert len(graphs([request(1, 1, seed) for seed in range(8)])) == 8  # 6, and then 2
    assert len(graphs) == 3


def test_warm_up_makes_every_bucket_of_one_visitor() -> None:
    model = make_model()
    scorer = Scorer(model, 20, 20, backend="triton")
    assert scorer.graphs is not None
    scorer.graphs._run = lambda inputs: inputs.candidates[0]  # the buckets matter here, not the scores
    scorer.warm_up()
    assert set(scorer.graphs._captured) == {Bucket(1, t, c) for t in (16, 20) for c in (16, 20)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
def test_replayed_graphs_give_the_models_scores() -> None:
    model = make_model(field_dim=16, unit_hidden=(36,)).cuda()
    pairs = [make_request(t, c, seed=i) for i, (t, c) in enumerate([(5, 3), (90, 200), (0, 2), (33, 1)])]
    expected = expected_scores(copy.deepcopy(model).cpu(), pairs)
    scorer = Scorer(model, 100, 300)
    scorer.warm_up()
    for _ in range(3):
        for actual, wanted in zip(scorer.score_many(pairs), expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4)

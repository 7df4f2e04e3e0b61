"""The scorer gives the model's scores, and ranks as the model does."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from din_kernels.serving import Candidates, DinParts, Scorer, Visitor, network
from din_kernels.testing import compare, tolerance

from ._models import SCHEMA, Expected, expect, expected_scores, make_model, make_request

SHAPES = [(7, 5), (3, 17), (0, 4), (1, 1), (40, 2)]


def check(actual: Tensor, expected: Expected, bound: float = 1e-6) -> None:
    """Within ``bound`` of the size of what the scores are sums of (some 16 roundings of float32), and in the same order
    wherever the scores tell candidates apart."""
    scores, size = expected
    assert actual.shape == scores.shape
    assert float((actual.double() - scores).abs().max()) <= bound * size
    apart = scores.unsqueeze(0) - scores.unsqueeze(1)
    got = actual.double().unsqueeze(0) - actual.double().unsqueeze(1)
    decided = apart.abs() > 2 * bound * size
    assert torch.equal(got.sign()[decided], apart.sign()[decided])


@pytest.mark.parametrize("activation", ["dice", "prelu", "sigmoid", "relu"])
@pytest.mark.parametrize("interaction", ["outer", "product"])
def test_scores_are_the_models(activation: str, interaction: str) -> None:
    for softmax, cross, hidden in itertools.product((False, True), (False, True), ((12,), (9, 6))):
        model = make_model(
            activation=activation, interaction=interaction, softmax=softmax, cross=cross, unit_hidden=hidden
        )
        pairs = [make_request(t, c, seed=i) for i, (t, c) in enumerate(SHAPES)]
        scorer = Scorer(model, 64, 32, backend="torch")
        for actual, pair in zip(scorer.score_many(pairs), pairs, strict=True):
            check(actual, expect(model, pair))


def test_fused_model_is_scored_as_its_unfused_twin() -> None:
    pairs = [make_request(9, 6)]
    check(Scorer(make_model(fused=True), 64, 32, backend="torch").score(*pairs[0]), expect(make_model(), pairs[0]))


@pytest.mark.parametrize("softmax", [False, True])
def test_triton_backend_in_padded_buckets(softmax: bool, device: torch.device) -> None:
    model = make_model(softmax=softmax)
    pairs = [make_request(t, c, seed=i) for i, (t, c) in enumerate([(5, 3), (0, 2), (18, 7)])]
    scorer = Scorer(copy.deepcopy(model).to(device), 20, 10, backend="triton", max_visitors=2)
    for actual, pair in zip(scorer.score_many(pairs), pairs, strict=True):
        check(actual, expect(model, pair))


def test_unit_in_bfloat16_on_the_triton_backend(device: torch.device) -> None:
    """Rows, weights and pooled behaviours rounded to bfloat16: three roundings between tables and logits."""
    model = make_model(activation="sigmoid")
    pairs = [make_request(12, 9)]
    scorer = Scorer(copy.deepcopy(model).to(device), 20, 10, backend="triton", dtype=torch.bfloat16)
    actual = scorer.score(*pairs[0])
    found = compare(actual, expected_scores(model, pairs)[0], tolerance(torch.bfloat16, length=12, stages=3))
    assert found.ok, str(found)
    assert found.rms_ratio > 1e-5  # or it was not bfloat16 at all


def test_padded_network_with_prelu_and_cross(device: torch.device) -> None:
    model = make_model(activation="prelu", cross=True, interaction="product")
    pairs = [make_request(5, 3)]
    scorer = Scorer(copy.deepcopy(model).to(device), 8, 4, backend="triton")
    check(scorer.score(*pairs[0]), expect(model, pairs[0]))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    pairs = [make_request(9, 23), make_request(23, 9)]
    monkeypatch.setattr(network, "CHUNK_PAIRS", 20)
    scorer = Scorer(model, 64, 32, backend="torch")
    for actual, pair in zip(scorer.score_many(pairs), pairs, strict=True):
        check(actual, expect(model, pair))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_slopes_at_their_ends(alpha: float) -> None:
    """α = 0 (as at the start of training) drops a term, α = 1 makes Dice linear."""
    model = make_model()
    for module in model.modules():
        if hasattr(module, "alpha"):
            nn.init.constant_(module.alpha, alpha)
    pairs = [make_request(6, 5)]
    check(Scorer(model, 64, 32, backend="torch").score(*pairs[0]), expect(model, pairs[0]))


def test_channels_that_hardly_vary() -> None:
    """Running variances far below and far above what the folded scales like."""
    model = make_model()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_var[0] = 0.0
            module.running_var[1] = 1e6
    pairs = [make_request(6, 9)]
    check(Scorer(model, 64, 32, backend="torch").score(*pairs[0]), expect(model, pairs[0]), bound=1e-5)


def test_bfloat16_tables() -> None:
    """Tables in bfloat16 are read as they are: the scores are those of a model with rounded tables."""
    model = make_model()
    half = copy.deepcopy(model)
    for table in (half.items.item, half.items.category, *half.profile.tables):
        table.weight.data = table.weight.data.bfloat16()
    rounded = copy.deepcopy(half).float()
    pairs = [make_request(20, 15)]
    actual = Scorer(half, 64, 32, backend="torch").score(*pairs[0])
    check(actual, expect(rounded, pairs[0]))
    # Against the model that was trained: what rounding two factors of every product costs (stages: tables, unit, MLP).
    found = compare(actual, expected_scores(model, pairs)[0], tolerance(torch.bfloat16, length=20, stages=3))
    assert found.ok, str(found)


def test_training_on_does_not_reach_the_scorer() -> None:
    model = make_model()
    pair = make_request(6, 5)
    scorer = Scorer(model, 64, 32, backend="torch")
    before = scorer.score(*pair).clone()
    with torch.no_grad():
        for part in (model.unit, model.mlp):
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(1.0)
    assert torch.equal(scorer.score(*pair), before)


def test_tables_are_not_copied() -> None:
    model = make_model()
    scorer = Scorer(model, 64, 32, backend="torch")
    assert scorer.network is not None
    assert scorer.network.item_table.data_ptr() == model.items.item.weight.data_ptr()


def test_many_threads_get_what_one_gets() -> None:
    model = make_model()
    pairs = [make_request(3 + i % 9, 1 + i % 13, seed=i) for i in range(40)]
    scorer = Scorer(model, 64, 32, backend="torch")
    alone = [scorer.score(*pair) for pair in pairs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda pair: scorer.score(*pair), pairs * 3))
    for i, scores in enumerate(together):
        assert torch.equal(scores, alone[i % len(pairs)])


def test_no_gradient_is_recorded_whatever_the_caller_has_on() -> None:
    with torch.enable_grad():
        scores = Scorer(make_model(), 8, 8, backend="torch").score(*make_request(3, 2))
    assert not scores.requires_grad
    assert scores.is_inference()


def test_nothing_to_score() -> None:
    assert Scorer(make_model(), 8, 8, backend="torch").score_many([]) == []


class Other(nn.Module):
    pass


def test_models_of_other_shapes() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="DinParts"):
        Scorer(Other(), 8, 8)
    parts = DinParts.of(model)
    pair = make_request(3, 2)
    assert torch.equal(
        Scorer(parts, 8, 8, backend="torch").score(*pair), Scorer(model, 8, 8, backend="torch").score(*pair)
    )
    with pytest.raises(ValueError, match="the MLP takes"):
        DinParts(parts.item, parts.category, (), parts.unit, parts.linears, parts.activations)
    with pytest.raises(ValueError, match="the unit takes"):
        DinParts(parts.item[:, :3], parts.category, parts.profile, parts.unit, parts.linears, parts.activations)


@pytest.mark.parametrize(
    ("visitor", "candidates", "error", "message"),
    [
        (
            Visitor([SCHEMA.num_items], [0], [0, 0]),
            Candidates([1], [1]),
            IndexError,
            r"history_item ids must lie in \[0, 97\)",
        ),
        (Visitor([1], [-1], [0, 0]), Candidates([1], [1]), IndexError, "history_category"),
        (Visitor([1], [1, 2], [0, 0]), Candidates([1], [1]), ValueError, "as long as history_item"),
        (Visitor([1], [1], [0, 0]), Candidates([1], [11]), IndexError, "category ids"),
        (Visitor([1], [1], [0, 0]), Candidates([], []), ValueError, "between 1 and max_candidates = 8"),
        (Visitor([1], [1], [0, 0]), Candidates([1] * 9, [1] * 9), ValueError, "max_candidates = 8"),
        (Visitor([1] * 9, [1] * 9, [0, 0]), Candidates([1], [1]), ValueError, "send the latest"),
        (Visitor([1], [1], [0]), Candidates([1], [1]), ValueError, "profile must hold 2 ids"),
        (Visitor([1], [1], [0, 5]), Candidates([1], [1]), IndexError, r"profile\[1\]"),
        (Visitor([1.5], [1], [0, 0]), Candidates([1], [1]), TypeError, "history_item must hold integers, got float64"),
        (Visitor([True], [1], [0, 0]), Candidates([1], [1]), TypeError, "history_item"),
        (Visitor([1], [1], [0, 0]), Candidates([2**70], [1]), IndexError, "item holds something that is no id"),
        (Visitor(torch.ones(1), [1], [0, 0]), Candidates([1], [1]), TypeError, "float32"),
        (Visitor(torch.ones(1, 1).long(), [1], [0, 0]), Candidates([1], [1]), ValueError, "flat list"),
    ],
)
def test_requests_that_cannot_be_scored(
    visitor: Visitor, candidates: Candidates, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Scorer(make_model(), 8, 8, backend="torch").score(visitor, candidates)

"""``arkv eval weights`` and ``arkv bench linear --weights``: rows that say what they should."""

from __future__ import annotations

import sys

import pytest
import torch

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.bench import Options, linear_layers
from arkv_fx.evaluation.bench.quantized_layers import nbytes, products, quantized
from arkv_fx.evaluation.weight_error import weight_bytes, weight_error
from arkv_fx.models import random_model

pytest.importorskip("torchao")


def test_fewer_bits_err_more_and_the_model_keeps_its_weights() -> None:
    model = random_model("llama")
    before = [(p, p.clone()) for p in model.parameters()]
    ids = torch.randint(1, 120, (60,), generator=torch.Generator().manual_seed(0))
    own, int8, int4 = weight_error(model, {"text": ids})
    assert (own["weights"], int8["weights"], int4["weights"]) == ("own", "int8", "int4")
    assert own["bytes"] == weight_bytes(model) == sum(p.nbytes for p in model.parameters())
    assert own["kl"] == 0 and 0 < int8["kl"] < int4["kl"] / 20
    assert int8["top1"] >= int4["top1"] and abs(int8["perplexity_ratio"] - 1) < 0.1
    assert own["bytes"] > int8["bytes"] > int4["bytes"]
    for (old, value), now in zip(before, model.parameters(), strict=True):
        assert old is now and torch.equal(now, value)
    with pytest.raises(EvaluationError, match="two tokens"):
        weight_error(model, {"text": ids[:1]})


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 200])
def test_all_ways_compute_the_same(kind: str, rows: int) -> None:
    dtype = torch.bfloat16
    weight = torch.randn(96, 64).to(dtype)
    made = quantized([weight], kind)
    assert nbytes(made) < weight.nbytes * {"int8": 0.6, "int4": 0.4}[kind]
    x = torch.randn(rows, 64).to(dtype)
    ours, theirs, torchs = (call(x, made[0]) for call in products(kind).values())
    first = ours[0] if isinstance(ours, list) else ours
    for other in (theirs, torchs):
        torch.testing.assert_close(first, other, rtol=0.03, atol=0.3)


def test_the_bench_has_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["arkv_fx.evaluation.bench.linear_layers"]  # the package has a function
    monkeypatch.setattr(module, "ROWS", (1,))
    monkeypatch.setattr(module, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(module, "_shapes", lambda model: [torch.Size((32, 64))])
    options = Options(rounds=1, weights=("int8", "int4"), dtype=torch.bfloat16)
    with torch.no_grad():
        found = linear_layers(options, lambda message: None)
    assert [row.method for row in found] == [
        "arkv", "torch", "arkv int8", "torchao int8", "_weight_int8pack_mm",
        "arkv int4", "torchao int4", "_weight_int4pack_mm_for_cpu",
    ]  # fmt: skip
    assert set(found[2].ratio_to) == {"torch@1", "torchao int8@1", "_weight_int8pack_mm@1"}
    assert found[0].bytes == 32 * 64 * 2 and found[2].bytes == 32 * 64 + 32 * 5

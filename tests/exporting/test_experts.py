"""Mixtures of experts leave torch with the tokens that they had there, engines' graphs as well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arkv_fx
from arkv_fx.exporting.experts import RUN, order_by_kind, product_by_expert
from arkv_fx.exporting.programs import make_programs
from arkv_fx.exporting.torch_tensorrt_target import plain
from arkv_fx.models import random_model
from arkv_fx.runtime import OnnxSession


@pytest.mark.slow
def test_exported_experts_say_what_the_plain_model_says(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    ids = torch.randint(1, 120, (1, 30), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[:, 30:].numpy()
    assert len(set(expected[0].tolist())) > 3  # something that a wrong expert would change
    roomy = arkv_fx.ArkvConfig(budget=64, window=8, tiers=("native",))
    folder = arkv_fx.export(model, None, tmp_path / "moe", config=roomy)
    session = OnnxSession(folder, threads=1)
    assert np.array_equal(session.generate(ids.numpy(), 12), expected)


@pytest.mark.parametrize("shared_out", ["evenly", "to the last", "to the first half"])
@pytest.mark.parametrize(
    ("experts", "rows"),
    [(1, 7), (4, 1), (4, 4), (4, 5), (3, RUN), (3, RUN + 1), (8, 1000), (128, 8), (128, 700)],
)
def test_rows_by_expert(experts: int, rows: int, shared_out: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, experts, (rows,), generator=generator)
    if shared_out == "to the last":
        ids = torch.full_like(ids, experts - 1)
    elif shared_out == "to the first half":
        ids = ids // 2
    found, order = order_by_kind(ids, experts)
    expected = torch.sort(ids, stable=True)
    assert torch.equal(found, expected.values) and torch.equal(order, expected.indices)
    ends = torch.bincount(ids, minlength=experts).cumsum(0).int()
    x = torch.randn(rows, 6, generator=generator)
    weights = torch.randn(experts, 6, 5, generator=generator)
    product = torch.ops.arkv.grouped_mm(x, weights, ends)
    torch.testing.assert_close(product_by_expert(x, weights, ends), product)


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral"])
def test_graphs_of_engines(arch: str) -> None:
    """They sort nothing but what their number fixes, and say what the plain model says."""
    model = random_model(arch, num_hidden_layers=1)  # type: ignore[arg-type]
    config = arkv_fx.ArkvConfig(budget=400, window=8, tiers=("native",))
    made = make_programs(model, config, None, 1)
    prompt, token = (plain(made.engine(name).program) for name in ("prefill", "decode"))
    for program in prompt, token:
        called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert not [name for name in called if "arkv" in name or "sort" in name or "histc" in name]
    ids = torch.randint(1, 120, (1, 300), generator=torch.Generator().manual_seed(0))
    places = torch.arange(300)[None]
    with torch.no_grad():
        expected = model(ids).logits
        for size in 9, 70, 299:  # in one run, in two and in several
            mask = torch.ones_like(ids[:, :size])
            first, *state = prompt.module()(ids[:, :size], mask, places[:, :size])
            torch.testing.assert_close(first, expected[:, size - 1 : size], rtol=1e-4, atol=1e-4)
        second, *_ = token.module()(ids[:, 299:], places[:, 299:], *state)
    torch.testing.assert_close(second, expected[:, 299:], rtol=1e-4, atol=1e-4)

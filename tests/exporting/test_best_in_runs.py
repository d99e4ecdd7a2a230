"""The best of many, a few at a time: as the whole sort gives them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from arkv_fx.runtime.operators import best, best_in_runs, is_best, leaving_torch, traced_to_leave

RANKS = st.lists(st.sampled_from([float("-inf"), -1e38, -1.0, 0.0, 0.5, 3e38]), min_size=1)


@given(st.data(), RANKS, st.integers(1, 7))
def test_runs_are_the_parts_of_a_whole_sort(
    data: st.DataObject, ranks: list[float], most: int
) -> None:
    """Among many equals, and of ranks of no token more than of others."""
    count = data.draw(st.integers(1, len(ranks)))
    rank = torch.tensor(ranks).expand(2, -1)
    rank = torch.stack([rank[0], rank[1].flip(-1)])
    found = best_in_runs(rank, count, most)
    assert torch.equal(found, rank.argsort(dim=-1, descending=True, stable=True)[:, :count])
    assert torch.equal(found, best(rank, count))


def test_graphs_of_engines_sort_no_more_than_they_can() -> None:
    class Best(torch.nn.Module):
        def forward(self, rank: torch.Tensor) -> torch.Tensor:
            return best(rank, 10)

    rank = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    counts = []
    for most in 0, 4:
        with traced_to_leave(most):
            program = torch.export.export(Best(), (rank,), strict=False)
        nodes = program.graph.find_nodes(op="call_function", target=torch.ops.arkv.best.default)
        counts.append([node.args[1] for node in nodes])
        assert torch.equal(program.module()(rank), best(rank, 10))
    assert counts == [[10], [4, 4, 2]] and not leaving_torch()


def test_what_is_taken_does_not_hang_on_the_order_of_equals() -> None:
    """TensorRT, and torch's topk, may give any of equals in any order."""
    rank, index = torch.tensor([[1.0, 0.0, 1.0, 1.0, 2.0]]), torch.arange(5)
    for taken in [4, 3, 0], [4, 2, 3], [0, 4, 2]:
        winners = torch.tensor([taken])
        with traced_to_leave(3):
            found = is_best(rank, winners, index)
        assert found[0].nonzero().flatten().tolist() == sorted(taken)
    winners = best(rank, 3)
    assert torch.equal(is_best(rank, winners, index)[0].nonzero().flatten(), winners[0].sort()[0])

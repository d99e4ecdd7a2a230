"""Whether a mask is causal is looked at once for all layers of a call, and anew when it changed."""

from __future__ import annotations

import pytest
import torch

from arkv_fx.ops import halves


def test_a_mask_is_looked_at_once_until_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []
    look = halves._only_causal

    def counted(mask: torch.Tensor) -> bool:
        looked.append(look(mask))
        return looked[-1]

    monkeypatch.setattr(halves, "_only_causal", counted)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
    assert [halves._known_causal(mask) for _ in range(3)] == [True] * 3 and looked == [True]
    mask[..., 0] = False
    assert not halves._known_causal(mask) and looked == [True, False]
    assert halves._known_causal(torch.ones_like(mask).tril(2)) and looked == [True, False, True]
    with torch.inference_mode():  # says nothing of what is written to it
        mask = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
        assert halves._known_causal(mask)
        mask[..., 0] = False
        assert not halves._known_causal(mask)

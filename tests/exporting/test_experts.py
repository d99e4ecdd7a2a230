"""A mixture of experts leaves torch with the tokens that it had there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arkv_fx
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

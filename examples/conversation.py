"""Two turns over one ArkvCache: the second continues where the first stopped, in the same bytes."""

import torch

import arkv_fx
from arkv_fx.models import random_model

model = random_model("qwen3")
config = arkv_fx.ArkvConfig(budget=64, window=16)
arkv_fx.transform(model, config, compile="eager")

cache = arkv_fx.ArkvCache(model)
turn = torch.randint(1, 128, (1, 100))
for number in (1, 2):
    turn = model.generate(turn, past_key_values=cache, max_new_tokens=20, do_sample=False)
    print(f"turn {number}: {cache.get_seq_length()} tokens seen, {cache.nbytes()} bytes held")
    turn = torch.cat([turn, torch.randint(1, 128, (1, 30))], dim=1)

"""An unmodified model under torch.compile: its DynamicCache holds no memory, the state is ours."""

import torch
from transformers import DynamicCache

import arkv_fx  # noqa: F401  (registers the backend when the package is not installed)
from arkv_fx.compile.backend import arkv_backend
from arkv_fx.models import random_model
from arkv_fx.state.anchors import absorbed_nbytes

model = random_model("llama")
options = {"budget": 64, "compile": "eager"}
compiled = torch.compile(model, backend=arkv_backend, options=options)  # or backend="arkv"

cache = DynamicCache(config=model.config)
token = torch.randint(1, 128, (1, 100))
with torch.no_grad():
    for _ in range(10):
        logits = compiled(input_ids=token, past_key_values=cache).logits
        token = logits[:, -1:].argmax(-1)
keys = cache.layers[0].keys
print(
    f"the model's cache claims {tuple(keys.shape)} and stores {keys.untyped_storage().nbytes()} B"
)
print(f"the compressed states take {absorbed_nbytes()} bytes")

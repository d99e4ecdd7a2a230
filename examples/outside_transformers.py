"""A GPT that knows no cache gets one, and answers a token at a time what it answered at once."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import arkv_fx


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Learned positions, the full forward for every token."""

    def __init__(self, vocabulary: int = 128, width: int = 64, longest: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.blocks(x))


torch.manual_seed(0)
model = GPT().eval()
text = torch.randint(0, 128, (1, 600))
with torch.no_grad():
    full = model(text)

config = arkv_fx.ArkvConfig(compression=4.0, context=600, window=16)
arkv_fx.transform(model, config, insert_cache=True, compile="eager")
cache = arkv_fx.ArkvCache(model)
out = [model(text[:, :500], cache=cache)]
for i in range(500, 600):
    out.append(model(text[:, i : i + 1], cache=cache))
print(model.arkv.report())
same = (torch.cat(out, 1).argmax(-1) == full.argmax(-1))[:, 500:].float().mean()
print(f"{cache.nbytes()} bytes held; {same:.0%} of the decoded tokens are the full forward's")

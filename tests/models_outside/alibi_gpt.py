"""A GPT with ALiBi (linear biases by distance) and a softmax written out; no cache."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def get_slopes(n):
    start = 2 ** (-(2 ** -(math.log2(n) - 3)))
    return [start * start**i for i in range(n)]


class AlibiAttention(nn.Module):
    def __init__(self, dim, heads, max_len, flash=False):
        super().__init__()
        self.heads, self.flash = heads, flash
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        slopes = torch.tensor(get_slopes(heads)).view(1, heads, 1, 1)
        position = torch.arange(max_len)
        distance = (position[None, :] - position[:, None]).view(1, 1, max_len, max_len)
        self.register_buffer("alibi", slopes * distance)
        self.register_buffer("causal", torch.tril(torch.ones(1, 1, max_len, max_len)).bool())

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        alibi = self.alibi[:, :, :T, :T]
        hidden = ~self.causal[:, :, :T, :T]
        if self.flash:
            mask = alibi.masked_fill(hidden, float("-inf"))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            att = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(C // self.heads)
            att = att + alibi
            att = att.masked_fill(hidden, float("-inf"))
            att = torch.softmax(att, dim=-1)
            y = torch.matmul(att, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class AlibiGPT(nn.Module):
    def __init__(self, vocab=97, dim=32, heads=4, layers=2, max_len=64, flash=False):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.attns = nn.ModuleList(
            AlibiAttention(dim, heads, max_len, flash) for _ in range(layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers + 1))
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        for i, (attn, mlp) in enumerate(zip(self.attns, self.mlps, strict=True)):
            x = x + attn(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))

"""A translator as in "Attention Is All You Need": causal decoder, cross-attention, sinusoids."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def sinusoids(length, dim):
    pe = torch.zeros(length, dim)
    position = torch.arange(length).unsqueeze(1)
    div = torch.exp(torch.arange(0, dim, 2) * -(math.log(10000.0) / dim))
    pe[:, 0::2] = torch.sin(position * div)
    pe[:, 1::2] = torch.cos(position * div)
    return pe.unsqueeze(0)


class MultiHeadAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x):
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def forward(self, query, key, value, mask=None):
        q, k, v = (
            self.split(self.w_q(query)),
            self.split(self.w_k(key)),
            self.split(self.w_v(value)),
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x.transpose(1, 2).contiguous().view(query.size(0), query.size(1), -1)
        return self.w_o(x)


class Layer(nn.Module):
    def __init__(self, dim, heads, cross):
        super().__init__()
        self.self_attn = MultiHeadAttention(dim, heads)
        self.cross_attn = MultiHeadAttention(dim, heads) if cross else None
        self.feed_forward = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, memory=None, mask=None):
        x = self.norms[0](x + self.self_attn(x, x, x, mask))
        if self.cross_attn is not None:
            x = self.norms[1](x + self.cross_attn(x, memory, memory))
        return self.norms[2](x + self.feed_forward(x))


class Transformer(nn.Module):
    def __init__(self, vocab=97, dim=32, heads=4, layers=2, max_len=64):
        super().__init__()
        self.scale = math.sqrt(dim)
        self.src_embed, self.tgt_embed = nn.Embedding(vocab, dim), nn.Embedding(vocab, dim)
        self.register_buffer("pe", sinusoids(max_len, dim))
        self.encoder = nn.ModuleList(Layer(dim, heads, cross=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(dim, heads, cross=True) for _ in range(layers))
        self.generator = nn.Linear(dim, vocab)

    def encode(self, src):
        x = self.src_embed(src) * self.scale + self.pe[:, : src.size(1)]
        for layer in self.encoder:
            x = layer(x)
        return x

    def forward(self, src, tgt):
        memory = self.encode(src)
        size = tgt.size(1)
        mask = torch.triu(torch.ones(1, size, size, device=tgt.device), diagonal=1) == 0
        x = self.tgt_embed(tgt) * self.scale + self.pe[:, :size].requires_grad_(False)
        for layer in self.decoder:
            x = layer(x, memory, mask.unsqueeze(1))
        return F.log_softmax(self.generator(x), dim=-1)

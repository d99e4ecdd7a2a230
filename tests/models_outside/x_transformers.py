"""A decoder in the style of x-transformers: pre-norm, rotary, past tensors in and out by cat."""

import torch
import torch.nn.functional as F
from torch import cat, einsum, nn


def exists(val):
    return val is not None


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return cat((-x2, x1), dim=-1)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, base=10000):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim)))

    def forward(self, t):
        freqs = einsum("i , j -> i j", t.type_as(self.inv_freq), self.inv_freq)
        return cat((freqs, freqs), dim=-1)


class RelativePositionBias(nn.Module):
    """T5's: learned, by distance."""

    def __init__(self, heads, buckets=16, max_distance=32):
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.relative_attention_bias = nn.Embedding(buckets, heads)

    def forward(self, i, j, device):
        q_pos = torch.arange(j - i, j, dtype=torch.long, device=device)
        k_pos = torch.arange(j, dtype=torch.long, device=device)
        n = torch.max(q_pos[:, None] - k_pos[None, :], torch.zeros((), dtype=torch.long))
        exact = self.buckets // 2
        large = exact + (
            torch.log(n.clamp(min=1).float() / exact)
            / torch.log(torch.tensor(self.max_distance / exact))
            * (self.buckets - exact)
        ).long().clamp(max=self.buckets - exact - 1)
        values = self.relative_attention_bias(torch.where(n < exact, n, large))
        return values.permute(2, 0, 1)[None]


class Attention(nn.Module):
    def __init__(self, dim, heads, dim_head, flash=True):
        super().__init__()
        self.heads, self.scale, self.flash = heads, dim_head**-0.5, flash
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, rotary=None, rel_pos=None, cache=None):
        b, n, _ = x.shape
        q, k, v = (
            t.reshape(b, n, self.heads, -1).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(x), self.to_v(x))
        )
        if exists(rotary):
            q, k = (t * rotary.cos() + rotate_half(t) * rotary.sin() for t in (q, k))
        if exists(cache):
            ck, cv = cache
            k = cat((ck, k), dim=-2)
            v = cat((cv, v), dim=-2)
        i, j = q.shape[-2], k.shape[-2]
        causal_mask = torch.ones((i, j), dtype=torch.bool, device=x.device).triu(j - i + 1)
        bias = rel_pos(i, j, x.device) if exists(rel_pos) else None
        if self.flash:
            mask = ~causal_mask
            if exists(bias):
                mask = bias.masked_fill(causal_mask, -torch.finfo(q.dtype).max // 2)
            else:
                mask = mask[None, None].expand(b, 1, i, j)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            sim = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
            if exists(bias):
                sim = sim + bias
            sim = sim.masked_fill(causal_mask, -torch.finfo(sim.dtype).max)
            attn = sim.softmax(dim=-1, dtype=torch.float32).type_as(sim)
            out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1)), (k, v)


class Decoder(nn.Module):
    def __init__(self, vocab=97, dim=32, depth=2, heads=4, dim_head=8, t5_bias=False, flash=True):
        super().__init__()
        self.token_emb = nn.Embedding(vocab, dim)
        self.rotary = None if t5_bias else RotaryEmbedding(dim_head)
        self.rel_pos = RelativePositionBias(heads) if t5_bias else None
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(dim),
                    Attention(dim, heads, dim_head, flash),
                    nn.LayerNorm(dim),
                    nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
                ]
            )
            for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocab, bias=False)

    def forward(self, x, intermediates=None):
        past = intermediates[0][0].shape[-2] if exists(intermediates) else 0
        x = self.token_emb(x)
        n = x.shape[1]
        rotary = None
        if exists(self.rotary):
            rotary = self.rotary(torch.arange(past, past + n, device=x.device))
        new = []
        for index, (norm1, attn, norm2, ff) in enumerate(self.layers):
            cache = intermediates[index] if exists(intermediates) else None
            out, cached = attn(norm1(x), rotary, self.rel_pos, cache)
            x = x + out
            x = x + ff(norm2(x))
            new.append(cached)
        return self.to_logits(self.final_norm(x)), new

"""One cached attention: attend to what is held and to the new tokens, then update the state.

These are the reference semantics, in plain torch, without a branch on tensor values; the kinds
of call differ only in how many tokens come (one: ``decode``; many: ``prefill`` or a chunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arkv_fx.kernels import Encoder, get_kernel, get_step
from arkv_fx.kernels.softmax import Knobs, allowed, group
from arkv_fx.ops.arrivals import Arrivals
from arkv_fx.ops.balance import SCALE, balance
from arkv_fx.ops.blocks import attend_in_blocks, fits
from arkv_fx.ops.exchange import exchange_one
from arkv_fx.ops.halves import attend_in_halves, comes_in_halves
from arkv_fx.ops.merge import merge_many
from arkv_fx.ops.recorded import attend_recorded
from arkv_fx.ops.uncompressed import attend_computed, attend_prompt
from arkv_fx.plan import LayerPlan
from arkv_fx.scores import Observation, Stats
from arkv_fx.state.journal import current
from arkv_fx.state.view import View, view


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: Sequence[Tensor],
    plan: LayerPlan,
    knobs: Knobs,
    fresh: bool,
    kernel: str = "reference",
    computed: Sequence[Tensor] | None = None,
) -> Tensor:
    """Attention of T new tokens over the cache and themselves; updates ``state`` in place.

    Args:
        q: [B, Hq, T, Dk]; k: [B, Hkv, T, Dk]; v: [B, Hkv, T, Dv], positions already encoded.
        mask: None, or [B or 1, Hq or 1, T, S] bool or additive whose last column is the newest
            token. A token whose own column is hidden from its own row is padding: never stored.
        state: the tensors of ``plan.specs()``, each with a leading batch dimension.
        fresh: the state is known to be empty, so this is a whole prefill.
        kernel: name in ``arkv_fx.kernels.KERNELS``: what attends for a single new token, and makes
            the codes of many.
        computed: keys [B, Hx, N, Dx] and values [B, Hx, N, Dvx] that the model computes from what
            is cached (multi-head latent attention), for every column that ``columns`` gives and in
            its order; then q is [B, Hq, T, Dx].

    Returns:
        [B, Hq, T, Dv] in q's dtype.
    """
    if (journal := current()) is not None and type(q) is Tensor:  # numbers, and no tracing
        return attend_recorded(
            journal, attend, q, k, v, mask, state, plan, knobs, fresh, kernel, computed
        )
    if not computed and k.shape[2] == 1 and (step := get_step(kernel, plan)) is not None:
        return step(q, k, v, mask, state, knobs)
    held = view(plan, state)
    out, seen = look(q, k, v, mask, held, knobs, fresh, kernel, computed)
    settle(held, seen, fresh, kernel)
    return out


@dataclass
class Seen:
    """What one attention leaves to be done: its update of the state, for a batch of any size.

    ``new`` are the new tokens, ``updated`` the statistics of all columns and ``layer`` the score's
    sums after the step; ``finite`` [B] bool says whether keys and values are numbers, ``padded``
    whether there was a mask.
    """

    new: Arrivals
    updated: Stats
    layer: Stats
    finite: Tensor
    padded: bool


def look(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: View, knobs: Knobs, fresh: bool,
    kernel: str = "reference", computed: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Seen]:  # fmt: skip
    """The first half of ``attend``: its result, and the update that ``settle`` makes."""
    # The cache is not differentiated: a graph through it would keep every step alive.
    q, k, v = q.detach(), k.detach(), v.detach()
    plan = held.plan
    new, query_pos = _arrivals(k, v, mask, held)
    layer = dict(held.layer)
    if plan.balanced:
        q, k, layer[SCALE] = balance(q, k, new.valid, held)
        new.k = k
    extremes = [f((1, 2, 3)) for x in (k, v) for f in (x.amax, x.amin)]  # NaN passes through both
    finite = torch.isfinite(torch.stack(extremes)).all(0)
    new.stats = plan.policy().arrive(k, v, new.valid, layer)
    alone = fresh and k.shape[2] != 1
    out, seen = _run(q, new, mask, held, knobs, query_pos, alone, kernel, computed)
    columns = _gather_stats(held, new, alone)
    updated = plan.policy().observe(columns, seen)
    return out.flatten(1, 2).to(q.dtype), Seen(new, updated, layer, finite, mask is not None)


def settle(
    held: View, seen: Seen, fresh: bool, kernel: str = "reference", encoder: Encoder | None = None
) -> None:
    """The second half of ``attend``: the update of the state, in place.

    ``encoder`` makes the codes of many tokens instead of the kernel's.
    """
    new, length = seen.new, seen.new.k.shape[2]
    if held.centre is not None:
        _centre(held, held.centre, new, seen.padded)
    if length == 1:
        exchange_one(held, new, seen.updated, kernel)
    else:
        merge_many(held, new, seen.updated, fresh, kernel, encoder)
    for name, total in seen.layer.items():
        held.layer[name].copy_(total)
    held.count.add_(new.valid.sum(-1, dtype=torch.int32))
    held.seen.add_(length)
    held.bad.copy_(torch.maximum(held.bad, (~seen.finite).to(torch.int32)))


def peek(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor],
    plan: LayerPlan, knobs: Knobs, fresh: bool, kernel: str = "reference",
    computed: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """What ``attend`` would answer, with the state left as it is; same arguments and result.

    Only the last new tokens may ask: then q is [B, Hq, Q, Dk] and the mask [B or 1, Hq or 1, Q, S].
    Without a mask a single one sees all others, and more than one must be all.
    """
    held, asking = view(plan, state), q.shape[2]
    new, query_pos = _arrivals(k, v, mask if asking == k.shape[2] else None, held)
    if plan.balanced:
        q, new.k, _ = balance(q, k, new.valid, held)
    query_pos = query_pos[:, query_pos.shape[1] - asking :]
    alone = fresh and k.shape[2] != 1
    out, _ = _run(q, new, mask, held, knobs, query_pos, alone, kernel, computed)
    return out.flatten(1, 2).to(q.dtype)


def columns(
    k: Tensor, v: Tensor, state: Sequence[Tensor], plan: LayerPlan, fresh: bool
) -> tuple[Tensor, Tensor]:
    """Every column's key and value [B, Hkv, N, D], in k's dtype: slots, then the new tokens.

    The new tokens alone where they are a whole prompt. A slot's position is not its place.
    """
    if fresh and k.shape[2] != 1:
        return k, v
    return _columns(k, v, view(plan, state))


def _columns(k: Tensor, v: Tensor, held: View) -> tuple[Tensor, Tensor]:
    """Slots, then the new tokens."""
    plan = held.plan
    found = [s.keys_and_values(..., (plan.k_dim, plan.v_dim)) for s in held.segments if s.slots]
    keys, values = (
        torch.cat([*(x.to(new.dtype) for x in side), new], 2)
        for side, new in zip(zip(*found, strict=True), (k, v), strict=True)
    )
    return keys, values


def _arrivals(k: Tensor, v: Tensor, mask: Tensor | None, held: View) -> tuple[Arrivals, Tensor]:
    """The new tokens, without statistics yet, and the positions [B, T] of their queries."""
    batch, _, length, _ = k.shape
    steps = torch.arange(length, device=k.device, dtype=torch.int32)
    query_pos = held.seen[:, None] + steps
    valid = _valid(mask, batch, length, k.device)
    pos = torch.where(valid, query_pos, -1)[:, None].expand(-1, held.plan.heads, -1)
    return Arrivals(k, v, pos, valid, {}), query_pos


def _centre(held: View, centre: Tensor, new: Arrivals, padded: bool) -> None:
    """Until a token leaves the ring, the centre is the mean key of all tokens so far."""
    weight, k = new.valid[:, None, :, None], new.k.float()
    came = (torch.where(weight, k, 0.0) if padded else k).sum(2)
    before = held.count[:, None, None].float()
    total = before + weight.float().sum(2)
    mean = (centre * before + came) / total.clamp(min=1.0)
    centre.copy_(torch.where(before <= held.plan.ring, mean, centre))


def _valid(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """[B, T] bool: a real token attends to itself, whatever the mask's form."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    # A restride makes Inductor write the mask out before its diagonal is read: inlined, the lookups
    # of transformers' padding masks do not compile there (index checks before their index).
    if not torch.compiler.is_exporting():
        mask = mask.as_strided(mask.size(), mask.stride(), mask.storage_offset())
    own = allowed(mask[..., -length:]).diagonal(dim1=-2, dim2=-1).any(1)
    return own.expand(batch, length)


def _gather_stats(held: View, new: Arrivals, alone: bool) -> Stats:
    """Statistics of all columns [B, Hkv, N]: ring, tiers, new tokens (or new tokens alone)."""
    if alone:
        return new.stats
    return {name: torch.cat([held.stats[name], new.stats[name]], -1) for name in new.stats}


def _run(
    q: Tensor, new: Arrivals, mask: Tensor | None, held: View, knobs: Knobs, query_pos: Tensor,
    alone: bool, kernel: str, computed: Sequence[Tensor] | None,
) -> tuple[Tensor, Observation]:  # fmt: skip
    """Output [B, Hkv, G, T, Dv] and what was observed; ``alone``: there is nothing held."""
    length, padded = new.k.shape[2], mask is not None
    if alone:
        prompt = computed or (new.k, new.v)
        out, probs = attend_prompt(q, prompt, mask, held.plan, knobs, query_pos)
        return out, _observation(probs, new.valid, query_pos, new.pos, held.plan, length, padded)
    asked, watched, rows, heard = q, mask, query_pos, None
    if not fits(q.shape[2], held.plan.slots + length, q.shape[0], q.shape[1]):
        pair = computed or _columns(new.k, new.v, held)
        whole = q.shape[2] == length
        if whole and comes_in_halves(q, pair, mask, held.plan, knobs):
            heard = attend_in_halves(q, pair, held.positions, held.plan, knobs)
        else:
            offset = held.seen + length - (mask.shape[-1] if mask is not None else 0)
            heard = attend_in_blocks(
                q, pair, held.positions, mask, offset, query_pos, held.plan, knobs
            )
        # The score only looks at what the last queries saw.
        last = slice(-held.plan.window, None)
        asked, rows = q[:, :, last], query_pos[:, last]
        watched = mask[..., last, :] if mask is not None else None
    if computed:
        out, probs = attend_computed(asked, computed, watched, held, knobs, rows)
    else:
        run = get_kernel(kernel if length == 1 else "reference")
        grouped = group(asked, held.plan.heads)
        out, probs = run(grouped, new.k, new.v, watched, held, knobs, rows)
    out = out if heard is None else heard
    pos = torch.cat([held.positions, new.pos], -1)
    return out, _observation(probs, new.valid, query_pos, pos, held.plan, length, padded)


def _observation(
    probs: Tensor,
    real: Tensor,
    query_pos: Tensor,
    pos: Tensor,
    plan: LayerPlan,
    length: int,
    padded: bool,
) -> Observation:
    """What the last W of these queries saw, in a call of ``length`` new tokens."""
    newest = query_pos[:, -1, None, None]
    # An old slot was last observed `length` queries ago; a new one has only lived its age + 1.
    steps = torch.ones_like(pos)
    if length != 1:
        steps = (newest - pos + 1).clamp(min=1, max=length)
    watched = slice(-plan.window, None)
    return Observation(
        probs=probs[..., watched, :],
        real=real[:, watched],
        query_pos=query_pos[:, watched],
        pos=pos,
        steps=steps.float(),
        window=plan.window,
        padded=padded,
    )

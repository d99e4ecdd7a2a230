"""Play cases and compare. ``python tests/fuzz/fuzz_run.py SEED...`` plays these again."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from fuzz_cases import SCRIPTS, Case, case, draw_group
from fuzz_models import build
from fuzz_play import Call, Play, held, read
from torch import Tensor
from transformers import PreTrainedModel

from arkv_fx import transform
from arkv_fx.huggingface.model_caches import new_cache

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}
NOISE, TRIES = 3e-6, 8  # of embeddings, as a share of each; at least half of what a dtype can tell


class Mismatch(AssertionError):
    """Two that should have answered alike did not: the case, and the command that plays it."""


class Subject:
    """The models of a group: as it was, transformed, and lowered by Inductor where that is asked.

    ``unstable`` are seeds whose answers hang on rounding: among several equal tokens one is kept.
    """

    def __init__(self, number: int) -> None:
        group = self.group = draw_group(number)
        self.unstable: list[int] = []
        torch._dynamo.reset()
        self.plain = build(group.architecture, group.settings, group.dtype, group.attention)
        self.model = transform(copy.deepcopy(self.plain), group.config, compile="reference")
        if group.kind == "lowered":
            self.lowered = transform(copy.deepcopy(self.plain), group.config, compile="inductor")

    def check(self, case: Case) -> None:
        """Play one case and compare.

        Raises:
            Mismatch: if answers differ, or anything else goes wrong.
        """
        try:
            play = Play(self.model, case).run()
            assert play.calls[-1].held, "no layer was fused: nothing was tested"
            {"identity": self._as_plain, "alone": self._as_alone, "lowered": self._as_lowered}[
                self.group.kind
            ](play)
        except Exception as error:
            raise Mismatch(f"{type(error).__name__}: {error}\n{case}") from error

    def _as_plain(self, play: Play) -> None:
        """Every call answered what a forward of the plain model over the whole text does."""

        def whole() -> list[Call]:
            return [
                replace(call, logits=read(self.plain, call.text, call.size, None, self.group))
                for call in calls
            ]

        calls = play.calls + play.asides
        self._alike(play, calls, whole, self.plain)

    def _as_alone(self, play: Play) -> None:
        """Every row of the batch is answered as it is alone, and keeps the same tokens."""
        for row in range(self.group.batch):
            calls = list(_history(play.calls, row))
            self._alike(play, calls, lambda calls=calls: self._alone(calls), self.model)

    def _as_lowered(self, play: Play) -> None:
        """Inductor's graphs answer what eager ones do, and keep the same tokens."""
        lowered = Play(self.lowered, play.case).run()
        again: Callable[[], list[Call]] = lambda: Play(self.model, play.case).run().calls  # noqa: E731
        self._alike(play, lowered.calls, again, self.model)

    def _alike(
        self, play: Play, found: list[Call], again: Callable[[], list[Call]], model: PreTrainedModel
    ) -> None:
        """``found`` is what ``again`` gives by ``model``, unless that itself hangs on rounding."""
        expected, limit = again(), TOLERANCE[self.group.dtype]
        try:
            _same(found, expected, limit)
        except AssertionError:
            for seed in range(TRIES):
                with _noisy(model, seed):
                    other = again()
                try:
                    _same(other, expected, limit)
                except AssertionError:
                    self.unstable.append(play.case.seed)
                    return
            raise

    def _alone(self, calls: list[Call]) -> list[Call]:
        """The same calls of one row without others."""
        out: list[Call] = []
        for call in calls:
            if call.rows is None:
                cache = new_cache(self.model)
            logits = read(self.model, call.text, call.size, cache, self.group)
            out.append(replace(call, logits=logits, held=held(cache)))
        return out


def _history(calls: list[Call], row: int) -> Iterator[Call]:
    """What became the last row ``row``, without its padding, which is to the left."""
    rows: list[int] = []
    for call in reversed(calls):
        rows.append(row)
        row = row if call.rows is None else call.rows[row]
    for call, row in zip(calls, reversed(rows), strict=True):
        text = call.text.rows([row])
        pad = int((text.mask == 0).sum())
        size = min(call.size, text.mask.shape[1] - pad)
        text = replace(text, ids=text.ids[:, pad:], mask=text.mask[:, pad:])
        own = [[torch.where(p < 0, p, p - pad)[[row]] for p in layer] for layer in call.held]
        yield Call(text, size, call.logits[[row], -size:], own, call.rows)


def _same(found: list[Call], expected: list[Call], limit: float) -> None:
    """Same logits of real tokens, same tokens held."""
    for one, other in zip(found, expected, strict=True):
        where = f"after {one.text.ids.shape[1]} tokens, {one.size} of them at once"
        real = one.text.mask[:, -one.size :].bool()
        error = _difference(one.logits[real], other.logits[real])
        assert error <= limit, f"logits differ by {error:.1e} {where}"
        for layer, pair in enumerate(zip(one.held, other.held, strict=True)):
            for segment, (a, b) in enumerate(zip(*pair, strict=True)):
                assert torch.equal(a, b), f"layer {layer}, segment {segment} differs {where}"


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest number; infinite where either is not finite."""
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def _noisy(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """The model with embeddings that differ as little as rounding makes them differ."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    before = weight.detach().clone()
    noise = max(NOISE, torch.finfo(weight.dtype).eps / 2)
    weight.data += (noise * before * torch.randn(before.shape, generator=generator)).to(
        before.dtype
    )
    try:
        yield
    finally:
        weight.data.copy_(before)


def run(seeds: list[int], progress: Callable[[str], None] = lambda _: None) -> list[int]:
    """Play cases in turn; the seeds of those that hang on rounding.

    Raises:
        Mismatch: for the first that fails.
    """
    unstable: list[int] = []
    subject: Subject | None = None
    for seed in sorted(seeds):
        if subject is None or subject.group.number != seed // SCRIPTS:
            unstable += subject.unstable if subject else []
            subject = Subject(seed // SCRIPTS)
            progress(f"{subject.group}")
        subject.check(case(seed))
    return unstable + (subject.unstable if subject else [])


if __name__ == "__main__":
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = run([int(seed) for seed in sys.argv[1:]], print)
    print(f"{len(sys.argv) - 1} cases, {time.perf_counter() - began:.0f} s, unstable: {found}")

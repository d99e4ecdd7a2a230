"""The form for Inductor: equal to the reference, and what is generated from it."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from kernel_cases import Case, arguments, cases, compare
from torch._inductor.utils import run_and_get_code

from arkv_fx.compile import pieces
from arkv_fx.kernels import inductor
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.state.session import LayerState

PLAN = LayerPlan(
    2, 64, 64, torch.float32, 4, 1, 0, (Tier("k8v4", 72), Tier("k4v3", 136)), "combined"
)


# A sum that reads codes: accumulator, load of bytes or of four at a time, addition, with no other
# accumulator between.
FUSED = re.compile(
    r"acc0_vec = at::vec::Vectorized<float>\(0\);(?:(?!acc0_vec =)[\s\S])*?"
    r"Vectorized<(?:u?int8|int32)_t>::loadu(?:(?!acc0_vec =)[\s\S])*?acc0_vec = tmp_acc0_vec \+"
)


@settings(max_examples=60)
@given(case=cases())
@example(Case(k_dim=64, v_dim=128, pad=(0, 61), mask="lowest"))  # a row that sees nothing
def test_it_equals_the_reference(case: Case) -> None:
    compare("inductor", arguments(case)[1], case.dtype)


@pytest.mark.parametrize("name", ["centre_logits", "stored_query", "lowest"])
def test_a_broken_form_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(sliding=30) if name == "lowest" else Case()
    _, args = arguments(case)
    compare("inductor", args, case.dtype)
    right = getattr(inductor, name)
    wrong = (lambda *a: right(*a) + 5) if name == "lowest" else (lambda *a: right(*a) * 1.01)
    monkeypatch.setattr(inductor, name, lambda *a: wrong(*a) if right(*a) is not None else None)
    with pytest.raises(AssertionError, match=r"output|probabilities"):
        compare("inductor", args, case.dtype)


def generated(kernel: str, plan: LayerPlan = PLAN, **settings: bool) -> str:
    """Inductor's code of one decode step."""
    tensors = LayerState(plan, 1, torch.device("cpu")).tensors
    q, k, v = (torch.randn(1, heads, 1, PLAN.k_dim) for heads in (4, 2, 2))
    text = plan.to_json()

    def step(*args: torch.Tensor) -> torch.Tensor:
        q, k, v, *state = args
        return torch.ops.arkv.attend(
            q, k, v, None, state, text, 0.2, 0.0, None, False, kernel=kernel
        )

    fresh = {"fx_graph_cache": False, **pieces.SETTINGS, **settings}
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        torch._inductor.config.patch(fresh),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        _, codes = run_and_get_code(torch.compile(step), q, k, v, *tensors)
    return str(codes[0])


def large_buffers(code: str) -> list[str]:
    """What the code allocates of the size of a tier's codes or more; logits are smaller."""
    made = re.findall(r"empty_strided_cpu\(\((.*?)\), .*?, (torch\.\w+)\)", code)
    assert made, "the form of the generated code is another than this test knows"
    smallest = PLAN.heads * PLAN.tiers[0].slots * PLAN.v_dim // 2  # bytes of its values
    return [
        f"{shape} {dtype}"
        for shape, dtype in made
        if math.prod(int(n) for n in shape.split(",") if n.strip()) >= smallest
    ]


def test_codes_become_numbers_inside_the_reductions() -> None:
    """No keys or values are written out, none are multiplied by a library, no codes are copied."""
    code = generated("inductor")
    assert large_buffers(code) == []
    assert set(re.findall(r"extern_kernels\.(\w+)", code)) <= {"mm"}  # the rotation of one vector
    assert len(FUSED.findall(code)) >= 4  # keys and values of both tiers


def test_the_reference_would_write_them_out() -> None:
    code = generated("reference", replace(PLAN, score="mass", tiers=(Tier("int8", 72),)))
    assert large_buffers(code) and "extern_kernels.bmm" in code
    assert not FUSED.search(code)


def test_without_our_settings_codes_would_be_copied() -> None:
    assert large_buffers(generated("inductor", reorder_for_locality=True))

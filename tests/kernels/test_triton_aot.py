"""What the compiler makes of the kernels, for GPUs that need not be there.

The operator is really called, and its launches are compiled instead of run: registers, spills,
shared memory and the width of the loads are facts of the machine code.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arkv_fx.formats import FORMATS
from arkv_fx.kernels.gpu import attend_triton, launch
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.state.session import LayerState

triton = pytest.importorskip("triton", reason="Triton is not installed")

ARCHITECTURES = (80, 90, 120)
DEFAULT = ("k8v4", "k4v3")
WIDE_LOAD = r"(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128"


@dataclass(frozen=True)
class Layer:
    """One layer of a model, as large as it is there."""

    heads: int
    groups: int
    dim: int
    tiers: tuple[tuple[str, int], ...]
    dtype: torch.dtype = torch.bfloat16

    def plan(self) -> LayerPlan:
        tiers = tuple(Tier(*tier) for tier in self.tiers)
        return LayerPlan(
            self.heads, self.dim, self.dim, self.dtype, 32, 4, 0, tiers, "combined",
            short_positions=True,
        )  # fmt: skip


def llama(*formats: str, slots: int = 1024) -> Layer:
    return Layer(8, 4, 128, tuple((name, slots) for name in formats))


def smollm(*formats: str, slots: int = 1024) -> Layer:
    return Layer(3, 3, 64, tuple((name, slots) for name in formats))


@dataclass
class Binary:
    """What the disassembler says of one kernel."""

    registers: int
    stack: int
    shared: int
    sass: str
    layouts: str
    """The compiler's form in which every tensor says which thread holds what."""

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


Build = Callable[..., dict[str, Binary]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Build]:
    """Compiles both kernels of one decode step, without reading an earlier compilation."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    binaries: dict[str, Binary] = {}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def disassemble(kernel: Any, name: str) -> Binary:
        file = tmp_path / f"{name}.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [tools / "cuobjdump", flag, file], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        registers, stack = int(found[1]), int(found[2])
        return Binary(registers, stack, kernel.metadata.shared, sass, kernel.asm["ttgir"])

    def compile_launch(
        self: Any, *args: Any, architecture: int, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        """`JITFunction.run` up to the point where a GPU is needed."""
        target = GPUTarget("cuda", architecture, 32)
        backend = make_backend(target)
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        source = ASTSource(self, signature, constants, attributes)
        kernel = compile(source, target=target, options=options.__dict__)
        binaries[self.__name__] = disassemble(kernel, self.__name__)

    def build(layer: Layer, architecture: int, **given: Any) -> dict[str, Binary]:
        monkeypatch.setattr(
            JITFunction,
            "run",
            lambda self, *args, **kwargs: compile_launch(
                self, *args, architecture=architecture, **kwargs
            ),
        )
        call(layer, **given)
        return binaries

    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    monkeypatch.setattr("arkv_fx.kernels.gpu._check", lambda q: None)
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        yield build


def call(layer: Layer, softcap: float = 0.0, sinks: bool = False, masked: bool = False) -> None:
    plan = layer.plan()
    held = LayerState(plan, 1, torch.device("cpu")).view()
    k = torch.zeros(1, plan.heads, 1, plan.k_dim, dtype=plan.dtype)
    q = k[:, :, None].expand(-1, -1, layer.groups, -1, -1)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool) if masked else None
    logits = torch.zeros(layer.heads * layer.groups) if sinks else None
    attend_triton(q, k, k, mask, held, Knobs(0.1, softcap, logits), held.seen[:, None])


def wide_loads(layer: Layer) -> int:
    """16-byte loads that a thread needs for one block of every segment's codes.

    int3 is left out: a plane of a block is less than 16 bytes for every thread.
    """
    plan = layer.plan()
    total = 0
    for fmt, _ in plan.segments():
        for codec, dim in ((fmt.key, plan.k_dim), (fmt.value, plan.v_dim)):
            if codec.name != "int3":
                total += launch.block_slots(plan) * codec.fields(dim, plan.dtype)[0].nbytes
    return total // (16 * 128)


def check_factors(decode: Binary) -> None:
    """The four threads that share a row of a product's factor hold numbers of their own.

    Triton sums the copies that they hold of a shorter row. Its interpreter does not show that.
    """
    rows = re.findall(
        r"tensor<\d+x(\d+)x\w+, #ttg\.dot_op<{opIdx = 0, .*?kWidth = (\d+)}>> \*", decode.layouts
    )
    assert len(rows) >= decode.layouts.count("tt.dot ") > 0
    for inner, neighbours in rows:
        assert int(inner) >= 4 * int(neighbours), f"{inner} numbers, {neighbours} to each thread"


def check(layer: Layer, binaries: dict[str, Binary], most_registers: int = 128) -> None:
    decode = binaries["decode"]
    check_factors(decode)
    assert decode.registers <= most_registers
    for name, binary in binaries.items():
        assert binary.stack == 0 and not binary.count(r"\b(?:LDL|STL)\b"), f"{name} spills"
        assert binary.shared <= 80 * 1024
    assert decode.count(WIDE_LOAD) >= wide_loads(layer)
    names = {c.name for f, _ in layer.plan().segments() for c in (f.key, f.value)}
    if not names & {"int4", "int3"}:  # their zero points are single bytes
        assert not decode.count(r"LDG\.E\.(?:\w+\.)*[US]8\b")
    assert decode.count(r"\bHMMA\b")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_formats(build: Build, architecture: int) -> None:
    """Llama-3-8B's layers."""
    check(llama(*DEFAULT), build(llama(*DEFAULT), architecture))


def test_default_formats_of_a_small_model(build: Build) -> None:
    check(smollm(*DEFAULT), build(smollm(*DEFAULT), 80))


def test_all_that_an_attention_may_have(build: Build) -> None:
    layer = llama("int8", "int4")
    check(layer, build(layer, 80, softcap=50.0, sinks=True, masked=True))


def test_tiers_of_no_slot_and_of_one(build: Build) -> None:
    """Triton makes a constant of an argument that is 1."""
    layer = Layer(8, 4, 128, (("int8", 1), ("fp8", 0)))
    check(layer, build(layer, 80))


def test_float32_runs_fewer_programs_but_does_not_spill(build: Build) -> None:
    """Only the ring's two products are of float32; those with codes are sums of three."""
    layer = replace(llama(*DEFAULT, slots=64), dtype=torch.float32)
    binaries = build(layer, 90)
    check(layer, binaries, most_registers=255)
    factors = re.findall(r"tt\.dot .* : tensor<\d+x\d+x(\w+),", binaries["decode"].layouts)
    assert factors == 2 * 3 * ["f32"] + len(DEFAULT) * 2 * 3 * ["bf16"]


@pytest.mark.parametrize(
    "layer",
    [
        Layer(4, 2, 256, (("k8v4", 64),)),  # few slots at once: short rows of the values' product
        Layer(4, 2, 16, (("int4", 64),)),  # short rows of the keys' product
    ],
)
def test_factors_of_packed_codes(build: Build, layer: Layer) -> None:
    check_factors(build(layer, 90)["decode"])


def test_copies_among_the_factors_are_noticed(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As was wrong on an H100: 16 slots at once, of which each thread took eight."""
    monkeypatch.setattr(launch, "block_slots", lambda plan: 16)
    layer = replace(llama("k8v4", slots=64), dtype=torch.float32)
    with pytest.raises(AssertionError, match="16 numbers, 8 to each thread"):
        check_factors(build(layer, 90)["decode"])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("make", [llama, smollm])
def test_every_format(build: Build, make: Callable[..., Layer], architecture: int) -> None:
    for layer in [make(name) for name in FORMATS] + [make(*DEFAULT)]:
        check(layer, build(layer, architecture))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        Layer(1, 32, 128, (("k8v4", 64),)),  # more query heads than a tile of 16 rows
        Layer(8, 4, 128, (("k8v4", 64), ("k4v3", 64)), torch.float32),
        Layer(4, 2, 256, (("k8v4", 64), ("k4v3", 64))),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_does_not_fit_128_registers_does_not_spill(
    build: Build, layer: Layer, architecture: int
) -> None:
    check(layer, build(layer, architecture), most_registers=255)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        Layer(8, 4, 128, (("k8v4", 64), ("k4v3", 64)), torch.float16),
        Layer(32, 1, 96, (("k8v4", 64), ("k4v3", 64))),
        Layer(8, 16, 128, (("k8v4", 64), ("k4v3", 64))),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_heads(build: Build, layer: Layer, architecture: int) -> None:
    check(layer, build(layer, architecture))


def test_a_kernel_of_too_few_registers_is_noticed(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = llama("native")
    monkeypatch.setattr(launch, "options", lambda settings: {"num_stages": 1, "maxnreg": 64})
    with pytest.raises(AssertionError, match="spills"):
        check(layer, build(layer, 80))

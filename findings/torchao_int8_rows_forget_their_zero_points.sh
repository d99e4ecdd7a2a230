#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0: Int8Tensor with one scale a row and asymmetric codes.
#
# Guess: linear(x, q) is x @ q.dequantize().T but for rounding, whatever the granularity and the mapping.
# Behaviour: with a scale a row the product leaves the zero points out; with groups shorter than a row it
# takes them off. Symmetric codes, which Int8WeightOnlyConfig makes by default, have none and are right.
#
# Seen (weights 8 x 64 of rand(), largest difference of the product from that of dequantized weights, over
# its largest number):
#   a scale a row, asymmetric: 0.85
#   a scale a row, symmetric: 0.00
#   groups of 32, asymmetric: 0.00
# It fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy 2>/dev/null
cat >"$work/look.py" <<'PY'
import torch
from torchao.quantization import Int8Tensor, PerGroup, PerRow
from torchao.quantization.quant_primitives import MappingType

torch.manual_seed(0)
weight, x = torch.rand(8, 64), torch.rand(4, 64)


def off(granularity, mapping):
    q = Int8Tensor.from_hp(weight, granularity, mapping_type=mapping)
    right = x @ q.dequantize().T
    return float((torch.nn.functional.linear(x, q) - right).abs().max() / right.abs().max())


found = [
    off(PerRow(), MappingType.ASYMMETRIC),
    off(PerRow(), MappingType.SYMMETRIC),
    off(PerGroup(32), MappingType.ASYMMETRIC),
]
print(f"a scale a row, asymmetric: {found[0]:.2f}")
print(f"a scale a row, symmetric: {found[1]:.2f}")
print(f"groups of 32, asymmetric: {found[2]:.2f}")
assert found[0] > 0.2 and max(found[1:]) < 0.01
PY
"$work/venv/bin/python" "$work/look.py" 2>/dev/null

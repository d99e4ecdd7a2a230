#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0: int4 weights for CPUs (PrototypeInt4WeightOnlyConfig), saved and loaded.
#
# Guess: a state_dict that was saved on one machine and loads on another multiplies there as it did, or is
# refused.
# Behaviour: codes are packed for the instructions of the machine that quantizes, and nothing that is saved
# says for which; a machine with others reads them in another order and gives other numbers, with no warning.
# ATEN_CPU_CAPABILITY stands for the other machine here. Quantize where the model runs.
#
# Seen (a linear layer of 64 x 128, relative difference of the outputs):
#   saved by avx2, loaded by avx2: 0.00
#   saved by avx2, loaded by default: 1.43
#   saved by default, loaded by avx2: 1.43
#   saved by default, loaded by default: 0.00
# It fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy 2>/dev/null
cat >"$work/look.py" <<'PY'
import sys

import torch
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_

what, file = sys.argv[1:]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16))
x = torch.randn(4, 128, dtype=torch.bfloat16)
with torch.no_grad():
    if what == "save":
        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
        torch.save({"weights": model.state_dict(), "out": model(x)}, file)
    else:
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["weights"], assign=True)
        out, was = model(x).float(), saved["out"].float()
        print(f"{float((out - was).norm() / was.norm()):.2f}")
PY
failed=0
for saved in avx2 default; do
  ATEN_CPU_CAPABILITY=$saved "$work/venv/bin/python" "$work/look.py" save "$work/weights.pt" 2>/dev/null
  for loaded in avx2 default; do
    off=$(ATEN_CPU_CAPABILITY=$loaded "$work/venv/bin/python" "$work/look.py" load "$work/weights.pt" 2>/dev/null)
    echo "saved by $saved, loaded by $loaded: $off"
    if [ "$saved" = "$loaded" ]; then
      [ "$off" = 0.00 ] || failed=1
    else
      python3 -c "import sys; sys.exit(not float(sys.argv[1]) > 0.5)" "$off" || failed=1
    fi
  done
done
exit $failed

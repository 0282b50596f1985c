#!/usr/bin/env bash
# Models spread over the devices of a machine with GPUs (device_map="auto"), beside the same search on the processor: benchmarks/scale_gpu.sh
# With two GPUs or more, sums over layers cross devices. Models are written to benchmarks/cache/scale/ first: 0.2, 2 and 13 GB.
# Damage differs from the processor's by the rounding of bfloat16 kernels; the plan should not.
set -euo pipefail
cd "$(dirname "$0")/.."
python - <<'PYTHON'
import torch
assert torch.cuda.is_available(), "no GPU that torch can use"
print(*(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())), sep="\n")
PYTHON
python benchmarks/scale.py --rows "0.1B resident" "0.1B spread" "1B spread" "7B spread" \
    --timeout 240 --out benchmarks/results/scale_gpu.csv "$@"

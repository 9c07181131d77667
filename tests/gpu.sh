#!/usr/bin/env bash
# The whole GPU tier, on a machine that may have no network: build for this GPU, run every test there is, measure a
# few layers. Under six minutes on an H100 with 16 cores.
#   tests/gpu.sh [folder for logs and records]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-$(mktemp -d)}
mkdir -p "$out"

# SPARSERT_SITE: a folder with the package already built, instead of building it
site=${SPARSERT_SITE:-}
if [ -z "$site" ]; then
  site=$(mktemp -d)
  architecture=$(python3 -c 'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + ("a" if major == 9 else ""))')
  python3 -m pip install -q --no-build-isolation --no-deps --target "$site" \
    -C cmake.define.SPARSERT_CUDA_ARCHS="$architecture" . 2>&1 | tee "$out/build.log"
fi
export OMP_NUM_THREADS=2  # tiny models on many threads spend their time waiting for each other
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

python3 -P -m sparsert env | tee "$out/env.txt"
# -p no:cacheprovider: nothing is written into the tree; -P: the installed package is tested, not the tree.
# Most tests wait for something other than the GPU, so parts run beside each other.
parts=(
  "bench tests/bench"
  "kernels tests/formats tests/kernels tests/nn tests/ops"
  "engine tests/engine tests/evaluate tests/models"
  "integrations tests/integrations"
  "making tests/compress tests/examples tests/jobs"
)
rest=(tests)
for part in "${parts[@]}"; do
  for folder in ${part#* }; do rest+=("--ignore=$folder"); done
done
parts+=("rest ${rest[*]}")
run_part() {  # name, then arguments for pytest
  local log="$out/pytest_$1.log"
  shift
  python3 -P -m pytest -q -p no:cacheprovider --durations=8 "$@" > "$log" 2>&1
}
jobs=()
for part in "${parts[@]}"; do
  # shellcheck disable=SC2086 # words of a part are arguments
  run_part $part &
  jobs+=($!)
done
trap 'kill "${jobs[@]}" 2> /dev/null || true' EXIT
failed=0
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
cat "$out"/pytest_*.log
# alone on the GPU, as its numbers have to be
python3 -P -m sparsert bench kernels --shapes llama-3.1-8b,smollm2-135m --layers fused --batch 1,16,64 --peers none \
  --output "$out/kernels.json" | tee "$out/kernels.txt"
exit "$failed"

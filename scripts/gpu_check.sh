#!/usr/bin/env bash
# Builds, tests, sanitizes, times and profiles pyeff on the GPU of this machine: see --help, and docs/gpu.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if ! command -v "$python" >/dev/null; then
  echo "gpu_check: no $python here; name the interpreter that has torch by PYTHON=" >&2
  exit 2
fi
# Where NVIDIA's toolkit lies when nobody has put it on the path.
for folder in "${CUDA_HOME:-/usr/local/cuda}/bin" /opt/nvidia/nsight-compute/*/; do
  [ -d "$folder" ] && PATH="$PATH:${folder%/}"
done
export PATH
exec "$python" scripts/gpu_check.py "$@"

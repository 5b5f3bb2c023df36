#!/usr/bin/env bash
# The mission's own line on a CUDA card, `vllm serve DIR --quantization qplug-awq`: small models in
# several formats, greedy tokens beside those of their dense twins, which kernels ran.
#
#     integration/vllm/gpu_smoke.sh [--out RESULT.json] [--eager]
#
# It needs, and says in one line what is missing:
#   - a CUDA device that torch sees, and a C compiler for Triton's launchers;
#   - PYTHON (python3 unless set) with torch, Triton, Transformers, NumPy, einops and safetensors;
#   - a CUDA build of vLLM for that Python: installed (`pip install vllm`), or carried to a machine
#     without a network in build/gpu-vllm/site (integration/vllm/bring_vllm.py).
# qplug itself need not be installed: this checkout is used.
# Exit codes: 0 all tokens agree; 1 they do not, or a server failed; 2 something is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

missing() {
    echo "gpu_smoke: $1" >&2
    exit 2
}

export PYTHONSAFEPATH=1 PYTHONPATH="$PWD:$PWD/converters:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
if [ -f build/gpu-vllm/vllm.tar.xz ] && [ ! -d build/gpu-vllm/site ]; then
    tar -xf build/gpu-vllm/vllm.tar.xz -C build/gpu-vllm
fi
if [ -d build/gpu-vllm/site ]; then
    PYTHONPATH="$PYTHONPATH:$PWD/build/gpu-vllm/site"
fi
has() { "$python" -c "$1" >/dev/null 2>&1; }

command -v "$python" >/dev/null || missing "no $python: set PYTHON"
has "import torch" || missing "no torch in $python"
if [ "${QPLUG_SMOKE_CPU:-}" != 1 ]; then # 1: a rehearsal with vLLM's CPU build
    has "import torch; assert torch.cuda.is_available()" || missing "torch sees no CUDA device"
fi
command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
    missing "no C compiler: Triton builds its launchers with one"
for module in triton transformers numpy einops safetensors; do
    has "import $module" || missing "no $module in $python"
done
has "import importlib.util as u; assert u.find_spec('vllm').origin" ||
    missing "no vLLM in $python: pip install vllm, or carry one (integration/vllm/bring_vllm.py)"
exec "$python" -m integration.vllm.gpu_smoke "$@"

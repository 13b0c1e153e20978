#!/bin/sh
# Installs this project and a folder of wheels on a machine without a network, beside the python3
# (with torch for CUDA) that is there already:
#
#     . scripts/gpu_setup.sh WHEELS SITE      # run from the repository; sets PYTHONPATH
#
# WHEELS: transformers, pydantic and what else that python3 lacks, and mamba_ssm's, built anywhere by
#
#     MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip wheel --no-build-isolation --no-deps mamba_ssm
#
# Mamba-2's kernels are Triton and compile when first used; mamba_ssm only imports with a module
# selective_scan_cuda on the path (Mamba-1's kernels, which nothing here calls): an empty one.

wheels=$1 site=$2
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$wheels"/*.whl || echo "gpu_setup: the wheels were not installed" >&2
: > "$site/selective_scan_cuda.py"
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"

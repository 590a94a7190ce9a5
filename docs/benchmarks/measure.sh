#!/usr/bin/env bash
# Measure whole frames on this machine's GPU, then compare their tensors and boxes with those of PyTorch in fp32, which needs
# onnx and onnxscript: docs/benchmarks/measure.sh FOLDER, from the root of the repository.
# Each file is in FOLDER as soon as it is measured, the most important ones first; all together take about nine minutes.
# PYTHON names the Python that has PyTorch and the package (python3 by default).
set -euo pipefail
out=$(realpath -m "${1:?usage: docs/benchmarks/measure.sh FOLDER}")
python=${PYTHON:-python3}
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/test${PYTHONPATH:+:$PYTHONPATH}
status=0
"$python" test/recipe_files.py "$files"

measure() {
    local name=$1
    shift
    "$python" -m dsvt_ros.tools.cli benchmark --device cuda --output "$out/$name.json" "$@"
}

unscaled="--set preprocess.scale_features=false"

# Options for a model with the weights of the recipe.
given() {
    echo "--model $1 --weights $files/$1.safetensors $unscaled"
}

# And for a cloud of it in several orders.
clouds() {
    printf -- '--cloud %s ' "$files/$1"_*.npy
}

export_weights() {
    "$python" -m dsvt_ros.tools.cli export --model "$1" --weights "$files/$1.safetensors" --output "$files/$1"
}

verify() {
    local name=$1 model=$2
    shift 2
    "$python" -m dsvt_ros.tools.cli verify "$files/$model" --device cuda --backends reference-fp16,torch,triton \
        --output "$out/${name}_verify.json" "$@" || status=$?
}

everything=reference,reference-fp16,torch,triton,auto
# shellcheck disable=SC2046,SC2086
{
    measure waymo_pillar $(given waymo_pillar) $(clouds waymo) --runs 100 --backends $everything \
        --picture "$out/waymo_pillar.png"
    measure waymo_pillar_simulated --model waymo_pillar --weights "$files/waymo_pillar.safetensors" --cloud simulated \
        --runs 100 --backends $everything --picture "$out/waymo_pillar_simulated.png"
    measure waymo_pillar_scaling $(given waymo_pillar) $(clouds waymo) --runs 50 \
        --backends torch,triton --points 20000,60000,180000,360000
    measure waymo_voxel $(given waymo_voxel) $(clouds waymo) --runs 50 --backends $everything
    measure nuscenes_pillar $(given nuscenes_pillar) $(clouds nuscenes) --runs 50 --backends $everything
    measure demo --cloud simulated:55000 --runs 100 --backends $everything
    for model in waymo_pillar waymo_voxel nuscenes_pillar; do
        export_weights $model
        verify $model $model $unscaled --cloud "$files/${model%%_*}_0.npy"
    done
    verify waymo_pillar_simulated waymo_pillar --cloud simulated --max-frames 2
}
exit $status  # 1 where a backend is further from fp32 than it may be

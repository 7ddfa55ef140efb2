#!/usr/bin/env bash
# timm's own train.py with grafts on the model that it builds, then a file of weights that needs no fxgraft.
#
#   bash examples/timm_train.sh TIMM DATA [further options of train.py]
#
# TIMM is a checkout of timm's repository in the version that is installed; its package does not hold the scripts.
set -euo pipefail
timm=$1 data=$2
shift 2
python -m fxgraft.timm "$timm/train.py" --data-dir "$data" --model resnet50 --graft rsc \
  --output output --experiment grafted "$@"
fxgraft merge output/grafted --graft rsc --out output/model.safetensors

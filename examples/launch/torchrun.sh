#!/usr/bin/env bash
# One worker for each GPU of this machine. Stopped or killed, the same command goes on, on any number of GPUs.
#
# accelerate starts workers as well:
#   accelerate launch --multi_gpu --num_processes 8 --no_python pnlac-fast cache --model "$MODEL" --tuned "$TUNED" --data "$DATA" --out "$OUT" --worker auto
set -euo pipefail
: "${MODEL:?a hub id or directory}" "${TUNED:?an adapter or checkpoint}" "${DATA:?questions}" "${OUT:=run.zarr}"

torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --no-python \
    pnlac-fast cache --model "$MODEL" --tuned "$TUNED" --data "$DATA" --out "$OUT" --worker auto
pnlac-fast merge "$OUT"

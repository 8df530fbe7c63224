#!/usr/bin/env bash
# A model too large for one GPU: each GPU of this machine has a slice of every layer, and writes its neurons of all units.
set -euo pipefail
: "${MODEL:?a hub id or directory}" "${TUNED:?an adapter or checkpoint}" "${DATA:?questions}" "${OUT:=run.zarr}"

torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --no-python \
    pnlac-fast cache --model "$MODEL" --tuned "$TUNED" --data "$DATA" --out "$OUT" --tp
pnlac-fast merge "$OUT"

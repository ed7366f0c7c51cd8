#!/usr/bin/env bash
# Run the quickstart: real data, shards, a training run with two processes, export, decoding. `make quickstart` runs it.
# Flags are passed to tools/pretrain.py (CI trains for fewer steps: --train-iters 150).
set -euo pipefail
cd "$(dirname "$0")/../.."
export CUDA_VISIBLE_DEVICES= # a demonstration for CPUs; the model is far too small for a GPU
DATA=data/quickstart RUN=runs/quickstart
rm -rf "$DATA" "$RUN"

# GeoNames cities as JSON lines (CC BY 4.0), 64 rows per document; 5% of the documents are held out
python examples/quickstart/cities.py $DATA/cities.jsonl
python tools/prepare_data.py --input $DATA/cities.jsonl --tokenizer byte \
  --output $DATA/train --held-out-fraction 0.05 --held-out-output $DATA/valid

# plain AR first, then the joint objective; two data-parallel processes
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tools/pretrain.py --config examples/quickstart/config.yaml \
  --train-data $DATA/train --valid-data $DATA/valid --save $RUN "$@"

# export a standard Hugging Face folder
python tools/convert_checkpoint.py export --checkpoint $RUN --hf $RUN/hf

# compare draft-and-verify decoding with AR and prompt lookup in the same engine, on held-out prompts
python examples/quickstart/measure.py --run $RUN --valid-data $DATA/valid

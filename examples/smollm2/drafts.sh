#!/usr/bin/env bash
# Teach SmolLM2-135M to draft without changing it: prompts, the model's own text, draft weights on the frozen model, an
# adapter. `make smollm2-drafts` runs this script, and one that was stopped goes on. Flags are passed to
# tools/pretrain.py; DRAFTS_RUN and DRAFTS_DATA set other folders. measure_drafts.py measures the adapter.
set -euo pipefail
cd "$(dirname "$0")/../.."
export CUDA_VISIBLE_DEVICES=
HF=runs/smollm2/hf RUN=${DRAFTS_RUN:-runs/smollm2/drafts} DATA=${DRAFTS_DATA:-data/drafts} HELD_OUT=96

# What was made once stays, for the last prompts are held out. Four of nine prompts are beginnings that the model draws.
COUNT=${PROMPTS:-4704}
if [ ! -f $DATA/prompts.jsonl ]; then
  mkdir -p $DATA
  printf '"\\n\\n"\n%.0s' $(seq $((COUNT * 51 / 100 + 8))) > $DATA/nothing.jsonl
  python tools/generate_data.py --model $HF --prompts $DATA/nothing.jsonl --overwrite --output $DATA/beginnings \
    --batch-size 240 --max-new-tokens 20 --temperature 1 --top-p 0.9 --seed 1
  python examples/smollm2/own_prompts.py $DATA/prompts.jsonl $COUNT $HF $DATA/beginnings.jsonl
fi
[ -f $DATA/valid/manifest.json ] ||
  python tools/generate_data.py --model $HF --prompts $DATA/prompts.jsonl --overwrite \
    --output $DATA/train --held-out $HELD_OUT --held-out-output $DATA/valid \
    --batch-size 128 --max-new-tokens 96 --min-distinct 0.7
tail -n $HELD_OUT $DATA/prompts.jsonl > $DATA/held_out.jsonl

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tools/pretrain.py --config examples/smollm2/drafts.yaml \
  --init-from $HF --train-data $DATA/train --valid-data $DATA/valid --save $RUN --load $RUN "$@"

rm -rf $RUN/adapter
python tools/convert_checkpoint.py export --checkpoint $RUN --hf $RUN/adapter

#!/usr/bin/env bash
# Teach SmolLM2-135M to draft: continue it with the joint objective on Python's standard library. It takes hours on two
# CPU cores. `make study-smollm2` runs this script, and a run that was stopped resumes. Flags are passed to
# tools/pretrain.py, and those in MEASURE_ARGS to measure.py. SMOLLM2_RUN sets another folder for the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
export CUDA_VISIBLE_DEVICES=
DATA=data/study/smollm2 HF=runs/smollm2/hf RUN=${SMOLLM2_RUN:-runs/smollm2/tidar}

# one document per source file, in the model's own tokens; 5% of the documents are held out
python examples/study/corpora.py data/study smollm2

python tools/pretrain.py --config examples/smollm2/config.yaml --init-from $HF \
  --train-data $DATA/train --valid-data $DATA/valid --save $RUN --load $RUN "$@"

rm -rf $RUN/hf
python tools/convert_checkpoint.py export --checkpoint $RUN --hf $RUN/hf
python examples/smollm2/measure.py --before $HF --after $RUN --valid-data $DATA/valid --output benchmarks/smollm2.json \
  ${MEASURE_ARGS:-}

#!/usr/bin/env bash
# Run tools/pretrain.py on one or more nodes: one torchrun agent per node, one rank per GPU. Flags are passed to it.
#
#   examples/launch.sh --config FILE.yaml --save runs/x --load runs/x                               # one node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/launch.sh --config FILE.yaml --save ...         # on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 examples/launch.sh --config FILE.yaml --save ...         # on the other
#
# MASTER_ADDR     a name or address of the node of rank 0 that all nodes can reach
# MASTER_PORT     a free port on that node [29500]
# GPUS_PER_NODE   processes per node [all GPUs]; set a number on machines without GPUs
# LOG_DIR         folder for one log per rank, in a sub-folder per node, in addition to the console
# CUDA_DEVICE_MAX_CONNECTIONS   [1: megatron-core needs it to overlap communication in tensor and context parallelism]
# PYTORCH_CUDA_ALLOC_CONF       [expandable_segments:True: the GPU's memory fragments less]
# If gloo or NCCL choose the wrong network interface, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the right one.
#
# On SIGUSR1 or SIGTERM to this script, the ranks save and exit. On SIGINT (Ctrl-C) they exit at once.
set -euo pipefail
# torchrun inherits that these are ignored, and so does each rank until it sets its own handlers (training/signals.py)
trap '' USR1 TERM
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT # for torchrun versions that read it
NNODES=${NNODES:-1}
if [[ $NNODES == 1 ]]; then
  NODE_RANK=0 where=(--standalone) # takes any free port
else
  : "${MASTER_ADDR:?"error: set MASTER_ADDR to the address of the node whose NODE_RANK is 0"}"
  : "${NODE_RANK:?"error: set NODE_RANK to the number of this node, 0 to $((NNODES - 1))"}"
  where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
logs=()
[[ -z ${LOG_DIR:-} ]] || logs=(--log-dir "$LOG_DIR/node$NODE_RANK" --tee 3)

export PYTHONUNBUFFERED=1
if ! command -v torchrun >/dev/null; then
  echo "error: torchrun is not found; activate the environment (. .venv/bin/activate)" >&2
  exit 2
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS-1}
# torch reads PYTORCH_ALLOC_CONF too, the newer name
[[ -v PYTORCH_ALLOC_CONF ]] || export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
set -m # job control: without it, a process started with & ignores SIGINT
torchrun "${where[@]}" --nproc-per-node "${GPUS_PER_NODE:-gpu}" ${logs[@]+"${logs[@]}"} \
  "$(dirname "$0")/../tools/pretrain.py" "$@" &
agent=$!

# torchrun would forward SIGTERM and kill the ranks 30 seconds later, during a save, so only the ranks are signalled
ask_ranks() { # fails while there are no ranks
  local ranks
  ranks=$(cat "/proc/$agent/task/"*/children 2>/dev/null) && [[ -n $ranks ]] && kill -USR1 $ranks
}
trap 'ask_ranks || true' USR1
trap 'ask_ranks || kill -INT "$agent"' TERM
trap 'kill -INT "$agent"' INT
while kill -0 "$agent" 2>/dev/null; do # a signal interrupts the wait but not the agent
  wait "$agent" && status=0 || status=$?
done
exit "$status"

# shellcheck shell=bash disable=SC2034
# Qwen3-32B: two nodes train, two serve.
TRAINER_NODES=2 SERVER_NODES=2
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=4 SERVER_TP=2 ROLLOUT_LAG=1
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(  # of pretrain_rasft.py
    --objective rasft --bf16 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4
    --sequence-parallel --recompute-granularity selective --recompute-modules mlp --seq-length 8192
    --micro-batch-size 1 --global-batch-size 256 --data-epochs 1 --rasft-refresh-interval 32
    --rollout-num-samples 4 --rollout-max-new-tokens 4096 --sync-bucket-mib 512 --save-interval 100
)

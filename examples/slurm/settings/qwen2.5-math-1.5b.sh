# shellcheck shell=bash disable=SC2034
# Qwen2.5-Math-1.5B on one node, which also samples.
TRAINER_NODES=1 SERVER_NODES=0
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=0 SERVER_TP=1 ROLLOUT_LAG=0
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(  # of pretrain_rasft.py
    --objective rasft --bf16 --overlap-grad-reduce --overlap-param-gather --seq-length 4096
    --micro-batch-size 1 --global-batch-size 256 --data-epochs 1 --rasft-refresh-interval 32
    --rollout-num-samples 4 --rollout-max-new-tokens 3072 --rollout-batch-size 64 --save-interval 100
)

# shellcheck shell=bash disable=SC2034
# Llama-3.2-3B on one node, which also samples.
TRAINER_NODES=1 SERVER_NODES=0
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=0 SERVER_TP=1 ROLLOUT_LAG=0
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(  # of pretrain_rasft.py
    --objective rasft --bf16 --tensor-model-parallel-size 2 --sequence-parallel --overlap-grad-reduce
    --overlap-param-gather --seq-length 8192 --micro-batch-size 1 --global-batch-size 256 --data-epochs 1
    --rasft-refresh-interval 32 --rollout-num-samples 4 --rollout-max-new-tokens 4096 --rollout-batch-size 64
    --save-interval 100
)

# shellcheck shell=bash disable=SC2034
# Qwen2.5-Math-7B: one node trains, one serves. SERVER_NODES=0: one node does both.
TRAINER_NODES=1 SERVER_NODES=${SERVER_NODES:-1}
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=8 SERVER_TP=1 ROLLOUT_LAG=1
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(  # of pretrain_rasft.py
    --objective rasft --bf16 --tensor-model-parallel-size 2 --sequence-parallel --overlap-grad-reduce
    --overlap-param-gather --seq-length 4096 --micro-batch-size 1 --global-batch-size 256 --data-epochs 1
    --rasft-refresh-interval 32 --rollout-num-samples 4 --rollout-max-new-tokens 3072 --sync-bucket-mib 512
    --save-interval 100
)

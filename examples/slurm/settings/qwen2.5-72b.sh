# shellcheck shell=bash disable=SC2034
# Qwen2.5-72B: eight nodes train in FP8, four serve.
TRAINER_NODES=8 SERVER_NODES=4
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=2 SERVER_TP=4 ROLLOUT_LAG=1
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(  # of pretrain_rasft.py
    --objective rasft --bf16 --fp8-format hybrid --fp8-recipe tensorwise --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 4 --sequence-parallel --num-layers-per-virtual-pipeline-stage 5
    --overlap-grad-reduce --overlap-param-gather --seq-length 8192 --micro-batch-size 1
    --global-batch-size 256 --data-epochs 1 --rasft-refresh-interval 32 --rollout-num-samples 4
    --rollout-max-new-tokens 4096 --sync-bucket-mib 512 --save-interval 100
)

# shellcheck shell=bash disable=SC2034
# Qwen3-30B-A3B, a mixture of 128 experts over 8 GPUs: two nodes train, two serve.
TRAINER_NODES=2 SERVER_NODES=2
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=8 SERVER_TP=1 ROLLOUT_LAG=1
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(  # of pretrain_rasft.py
    --objective rasft --bf16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    --context-parallel-size 2 --expert-model-parallel-size 8 --sequence-parallel --moe-grouped-gemm
    --expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall --overlap-grad-reduce
    --overlap-param-gather --seq-length 8192 --micro-batch-size 1 --global-batch-size 256 --data-epochs 1
    --rasft-refresh-interval 32 --rollout-num-samples 4 --rollout-max-new-tokens 4096 --sync-bucket-mib 512
    --save-interval 100
)

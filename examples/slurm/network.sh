# shellcheck shell=bash
# NCCL and network settings of the cluster, read by rasft.sbatch on its first node and passed to every process.
# Ask your administrators for the names of interfaces; `ip -brief address` and `ibv_devices` list them.

# The interface for rendezvous and gloo: it must have an address that all nodes reach. Unset: NCCL and gloo choose one.
# export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0

# The InfiniBand or RoCE cards. Unset: NCCL uses all of them.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7

# The address of the first trainer node, if other nodes do not reach it by its host name.
# HEAD_ADDRESS=10.0.0.1

# Rollout servers need the same value (docs/servers.md). 1 keeps NVLS.
export NCCL_CUMEM_ENABLE=${NCCL_CUMEM_ENABLE:-0}

# Warnings name the failing card or node. A failed collective ends its process after the time-out instead of waiting.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

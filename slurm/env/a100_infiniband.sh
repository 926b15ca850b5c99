# shellcheck shell=bash disable=SC2034,SC2054,SC2154
# Nodes of 8 A100 with InfiniBand, one adapter for each pair or single GPU, such as DGX A100.

# Adapters that carry the ranks' traffic; `ibdev2netdev` lists them. Names that begin with mlx5 hold for Mellanox's.
export NCCL_IB_HCA=mlx5
export NCCL_IB_TIMEOUT=22
export NCCL_IB_RETRY_CNT=10
export NCCL_DEBUG=WARN
# What a rank was doing is written when a collective does not end in time.
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
# Work starts in the order in which it was given: tensor-parallel communication overlaps with matrix products.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=8

# none: the environment of this checkout. pyxis: image as for srun --container-image. apptainer: a file.
container=none
image=
mounts=$checkout

# Each rank on the cores and the memory beside its GPU: the NUMA domains of GPUs 0 to 7 of a DGX A100, as
# `nvidia-smi topo -m` shows them. All GPUs of a node stay visible to its ranks, who pick theirs by local rank.
srun_options=(--cpu-bind=map_ldom:3,3,1,1,7,7,5,5 --mem-bind=local)

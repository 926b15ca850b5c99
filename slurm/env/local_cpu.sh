# shellcheck shell=bash disable=SC2034,SC2054,SC2154
# Nodes that are namespaces of one machine (tools/slurm_cluster.sh): ranks on CPUs, over the loopback interface.
export OMP_NUM_THREADS=1
export GLOO_SOCKET_IFNAME=lo

srun_options=(--cpu-bind=none)

#!/usr/bin/env bash
# SLURM from Debian's packages, for tools/slurm_cluster.sh. Its services stay off; nothing is done where it is there.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client munge)

if [ "$(id -u)" != 0 ]; then
    echo "error: the tests on SLURM need root: they start nodes with host names of their own" >&2
    exit 1
fi
missing=no
for program in slurmctld slurmd sbatch munged; do command -v "$program" > /dev/null || missing=yes; done
[ "$missing" = yes ] || exit 0
if ! command -v apt-get > /dev/null; then
    echo "error: without apt-get, install SLURM (slurmctld, slurmd, sbatch) and munge by hand, and try again" >&2
    exit 1
fi
# Debian's way to keep a package from starting its services
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
fi
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${PACKAGES[@]}"

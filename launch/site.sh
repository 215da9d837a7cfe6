# shellcheck shell=bash disable=SC2034
# What this cluster needs before it can train. launch/slurm.sbatch sources it on a job's first node, in the project's folder;
# DISTRIB_SITE=FILE in the environment names another one.

# Modules, and what has to be set for NCCL's network:
# module load cuda/13.0
# export NCCL_SOCKET_IFNAME=ib0

# The environment that `make train` or pip has made:
if [[ -d .venv ]]; then PATH=$PWD/.venv/bin:$PATH; fi

# The Python that trains, and the options of srun that come with it.
python=(python)
srun_options=()

# In a container of Apptainer:
# python=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" image.sif python)

# In a container of Pyxis:
# srun_options=(--container-image=image.sqsh --container-mounts="$PWD:$PWD,$PWD/.slurm" --container-workdir="$PWD")

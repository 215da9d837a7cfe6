# shellcheck shell=bash disable=SC2034
# Settings of this cluster. launch/slurm.sbatch sources this file on the first node of a job, in the project's folder;
# DISTRIB_SITE=FILE in the environment names another file.

# Modules, and the network interface that all nodes share, if the run does not find it: of NCCL (GPUs) and of gloo (CPUs).
# module load cuda/13.0
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# The environment that `make train` created:
if [[ -d .venv ]]; then PATH=$PWD/.venv/bin:$PATH; fi

# The command that runs train.py, and options of srun.
python=(python)
srun_options=()

# In a container of Apptainer:
# python=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" image.sif python)

# In a container of Pyxis:
# srun_options=(--container-image=image.sqsh --container-mounts="$PWD:$PWD,$PWD/.slurm" --container-workdir="$PWD")

# shellcheck shell=bash disable=SC2034
# The site file of the tests: their own Python, and steps that take PACE seconds longer.
PATH=$PYTHON_OF_TESTS:$PATH
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=(python tests/paced.py)
srun_options=()

"""python -m distrib and accelerate launch -m distrib: the same as the command `distrib`."""

from distrib.cli import run

if __name__ == "__main__":
    run()

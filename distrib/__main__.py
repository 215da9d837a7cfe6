"""python -m distrib, and accelerate launch -m distrib: what the command `distrib` is."""

from distrib.cli import run

if __name__ == "__main__":
    run()

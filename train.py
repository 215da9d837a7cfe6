"""Train an image classifier:  accelerate launch train.py [CONFIG.yaml] [key=value ...]"""

from distrib import cli

if __name__ == "__main__":
    cli.run("train")

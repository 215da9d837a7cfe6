"""What a run stands on: ranks, signals, the run folder, checkpoints. Nothing here knows what is learned."""

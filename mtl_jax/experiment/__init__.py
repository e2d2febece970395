"""Every side effect: config, building, the loop, checkpoints, logs."""

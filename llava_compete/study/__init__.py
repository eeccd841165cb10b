"""Studies of the paper's two claims on sample efficiency: the theory's setting, and a learning curve on images."""

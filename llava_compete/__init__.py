"""llava_compete: visual instruction tuning with competition-routed sparse mixtures of experts."""

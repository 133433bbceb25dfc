"""Interface to DeepSpeed: its configuration, its engine, and the partitions of weights and optimizer states of a rank."""

"""Interface to DeepSpeed: its configuration, its engine, and the partitions of weights and states per rank."""

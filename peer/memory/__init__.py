"""The memory engine: training state in tiers, moved by a schedule that is known in advance."""

"""The NVMe tier: one crash-safe file of units, its wear, and the drive it is on."""

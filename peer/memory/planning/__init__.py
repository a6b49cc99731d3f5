"""What lives where and how large a wave is: budgets, profiles, the simulator and the plan. No torch."""

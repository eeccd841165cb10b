"""Studies of routing: do routers differ, error against samples, and the rates that the theory speaks of."""

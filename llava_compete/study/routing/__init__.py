"""Do routers differ? Small tasks on which they can, and a program that trains many runs of a rule at once."""

"""How implementations from outside are found, run in a process of their own and observed."""

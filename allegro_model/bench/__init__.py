"""How fast this machine is: measured, and what follows from it for a run that has not begun."""

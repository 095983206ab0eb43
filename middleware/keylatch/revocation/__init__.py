"""How a process knows that what it remembers still holds, and how a revoke waits until all do."""

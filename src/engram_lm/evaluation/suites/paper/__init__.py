"""The benchmarks of the Engram paper: a group with its numbers of examples, and the tasks that the harness lacks."""

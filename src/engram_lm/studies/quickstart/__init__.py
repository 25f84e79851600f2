"""Does memory help on this text? A small model with memory against its twin without, on one machine, in minutes."""

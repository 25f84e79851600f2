"""What does memory hold that attention does not? Facts recalled against facts read, with memory on and suppressed."""

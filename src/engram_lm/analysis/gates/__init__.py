"""When the memory fires: gates token by token, averaged over a text, and laid behind it as colors."""

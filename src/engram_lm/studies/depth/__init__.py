"""Where does memory belong, and how much depth does it stand for? One module at every depth, compared with none."""

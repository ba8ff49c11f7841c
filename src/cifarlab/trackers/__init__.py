"""Where rows go besides the run folder: the terminal, and Weights & Biases on request."""

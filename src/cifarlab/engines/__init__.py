"""Where a list of trainings runs: this machine's processes, or a Ray cluster."""

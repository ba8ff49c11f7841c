"""Where rows go: the run folder and the terminal; and, on request, W&B and TensorBoard, which mirror the folder."""

"""What a model has learned, measured on data that no stage trains on."""

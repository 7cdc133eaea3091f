"""What a scheduler runs, one file a pipeline."""

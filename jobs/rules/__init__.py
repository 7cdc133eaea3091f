"""What has to be true of rules before they are put in force: they are tried on history, and judged."""

"""What a person or a scheduler starts: the `finpro` command, one `spark-submit` entry per job, the embedded platform."""

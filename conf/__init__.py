"""Every setting and nothing else: typed settings, rule thresholds, Spark and logging properties, migrations."""

"""Every setting and nothing else: typed settings, fraud rules, Spark and logging properties, migrations."""

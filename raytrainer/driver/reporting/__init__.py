"""What becomes of reports: all workers' as one, rows for the loggers, results and profiles."""

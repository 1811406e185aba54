"""The MLflow runs of trainings and imports: their metrics, their errors, and the runs that a crash left open."""

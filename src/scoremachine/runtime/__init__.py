"""What everything stands on: validation, whole files, progress, caches."""

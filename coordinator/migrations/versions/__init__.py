"""One file per version; `coordinator.migrations` runs them in order."""

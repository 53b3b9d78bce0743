"""bcSR, the paper's training set: coordinates, measurement, selection, splits and storage."""

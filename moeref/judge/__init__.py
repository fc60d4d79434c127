"""Is it right? Comparison, noise model, vacuity and the verdict."""

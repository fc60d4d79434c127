"""From a mismatch to its cause: error geometry, read-outs, and the catalogue's faults as hypotheses."""

"""For other people's test suites. hypothesis is imported only by the modules of this package."""

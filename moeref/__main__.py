"""`python -m moeref`."""

from moeref.cli import main

main()

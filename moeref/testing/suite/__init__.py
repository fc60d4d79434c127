"""The suite that judges a candidate: pytest --moe-candidate my_kernel.py:run --pyargs moeref.testing.suite."""

"""How fast is it? Latencies beside a verdict, a floor and each other, every timed output looked at."""

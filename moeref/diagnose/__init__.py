"""Why is it wrong? Faults, laws, read-outs and the explanation built on them."""

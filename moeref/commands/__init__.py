"""One file a command; torch is imported only inside them, so that --help answers at once."""

"""Search of tilings and crossovers on the card at hand: never at run time, only where it is asked for."""

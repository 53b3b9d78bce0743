"""How good models are, against each other and the paper: scores, statistics, times, crops."""

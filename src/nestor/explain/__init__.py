"""Tables and forecasts: what a program is, what its updates cost and how much memory they take."""

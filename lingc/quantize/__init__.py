"""Weight storage formats and the recipes that choose among them; needs NumPy alone."""

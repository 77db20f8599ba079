"""A package, so that `tests` is this folder and not one that a dependency installs (latex2sympy2 does)."""

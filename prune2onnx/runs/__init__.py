"""The settings and results of runs as data: recipe, budgets, history, report, Pareto front."""

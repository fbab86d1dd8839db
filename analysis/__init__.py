"""Programs on what a run of either script has left: tables, plots, tests, exports."""

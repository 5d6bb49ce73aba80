"""How good a looped model is: lm-evaluation-harness on our engine, base against looped."""

"""What stands in the way of training here: one module for each kind of question, findings as `Check`s."""

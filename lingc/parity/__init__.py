"""Compare two ways of running one model, token by token, and judge the difference by a budget.

Importing it brings no torch: the eager side and the interpreter are imported when one is opened.
"""

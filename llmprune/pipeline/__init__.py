"""Joins the stages into one call: trace, score, plan, compact, repair, save."""

"""The stage `guidance`: active-mind's Analyzer and Planner, and physavatar's phrases."""

"""Turns scores into verdicts: rules, tiers and near-duplicate clips. Nothing here measures or stores anything."""

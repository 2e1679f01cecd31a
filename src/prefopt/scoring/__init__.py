"""From tokenised groups to completion scores: plan, layouts, attention of packed rows, log-probs."""
